"""Forward and backward of a training step as one CUDA graph.

A step is some seven thousand small operations; launched one by one they keep a fast GPU waiting for two thirds of the
time. Recorded once, they are launched together, and a small batch is trained on as fast as the GPU computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from export3d_cli.core.model.warp.rasterizer import RasterWindows
from export3d_cli.core.train.pair_sampler import Batch

EAGER_STEPS = 24  # steps taken one by one before: they tell how wide the windows of the rasteriser must be
WARMUP_RUNS = 3  # times a step is rehearsed on the stream that records it


class StepGraph:
    """Calls `compute`, which leaves gradients in the parameters, and after `FIRST` times replays it."""

    def __init__(
        self, compute: Callable[[Batch, Any], tuple[Tensor, ...]], parameters: Sequence[Tensor],
        buffers: Sequence[Tensor], windows: RasterWindows | None,
    ) -> None:  # fmt: skip
        """Everything has fixed shapes and stays on one CUDA device.

        Args:
            compute: a batch and what else the step depends on -> tensors.
            buffers: what `compute` changes; a rehearsal leaves no trace there.
        """
        self.compute, self.parameters, self.buffers, self.windows = compute, parameters, buffers, windows
        self.graph_key: Any = None
        self.eager_steps_done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_batch: Batch | None = None
        self.static_result: tuple[Tensor, ...] = ()

    def __call__(self, batch: Batch, graph_key: Any, seed: Callable[[], None]) -> tuple[Tensor, ...]:
        """What `compute` makes of the batch; with another `kind` (hashable) than before it is recorded anew.

        `seed` sets the random numbers of the step. Results are overwritten by the next call.
        """
        if graph_key != self.graph_key:
            self.release()
            self.graph_key, self.eager_steps_done = graph_key, 0
        if self.eager_steps_done < EAGER_STEPS:
            self.eager_steps_done += 1
            seed()
            self._clear_gradients()
            return self.compute(batch, graph_key)
        if self.graph is None:
            self._record(batch, graph_key)
        assert self.static_batch is not None and self.graph is not None
        for field in fields(Batch):
            getattr(self.static_batch, field.name).copy_(getattr(batch, field.name))
        seed()
        self.graph.replay()
        return self.static_result

    def release(self) -> None:
        """Leave everything as it is without a graph."""
        self.graph, self.static_result = None, ()
        if self.windows is not None:
            self.windows.fixed = False

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self, batch: Batch, graph_key: Any) -> None:
        self.static_batch = Batch(**{f.name: getattr(batch, f.name).clone() for f in fields(Batch)})
        if self.windows is not None:
            self.windows.fixed = True
        kept = [buffer.clone() for buffer in self.buffers]
        try:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARMUP_RUNS):
                    self._clear_gradients()
                    self.compute(self.static_batch, graph_key)
            torch.cuda.current_stream().wait_stream(beside)
            self._clear_gradients()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.static_result = self.compute(self.static_batch, graph_key)
        finally:
            for buffer, before in zip(self.buffers, kept, strict=True):
                buffer.copy_(before)
