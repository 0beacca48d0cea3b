"""A small network on LiteRT."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from export3d_cli.core.runtime.errors import WeightsError


class LiteRTNetwork:
    """A tflite network with a single float32 input; `origin` is its file, for errors. Threads may share one."""

    def __init__(self, content: bytes, origin: Path, threads: int) -> None:
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise WeightsError(
                f"{origin} holds a network that does not load ({error}): fetch the file again"
            ) from error
        self._lock = threading.Lock()  # an interpreter serves one thread at a time
        self._input = self._interpreter.get_input_details()[0]
        self._outputs = [detail["index"] for detail in self._interpreter.get_output_details()]

    def __call__(self, array: np.ndarray) -> list[np.ndarray]:
        """Run the network on one input without batch axis; returns all outputs with their batch axis."""
        with self._lock:
            self._interpreter.set_tensor(self._input["index"], array[None])
            self._interpreter.invoke()
            return [self._interpreter.get_tensor(index) for index in self._outputs]  # copies
