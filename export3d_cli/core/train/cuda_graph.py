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

from export3d_cli.core.model.warp.rasterizer import Windows
from export3d_cli.core.train.pair_sampler import Batch

FIRST = 24  # steps taken one by one before: they tell how wide the windows of the rasteriser must be
WARM = 3  # times a step is rehearsed on the stream that records it


class StepGraph:
    """Calls `compute`, which leaves gradients in the parameters, and after `FIRST` times replays it."""

    def __init__(
        self, compute: Callable[[Batch, Any], tuple[Tensor, ...]], parameters: Sequence[Tensor],
        buffers: Sequence[Tensor], windows: Windows | None,
    ) -> None:  # fmt: skip
        """Everything has fixed shapes and stays on one CUDA device.

        Args:
            compute: a batch and what else the step depends on -> tensors.
            buffers: what `compute` changes; a rehearsal leaves no trace there.
        """
        self.compute, self.parameters, self.buffers, self.windows = compute, parameters, buffers, windows
        self.kind: Any = None
        self.taken = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Batch | None = None
        self.result: tuple[Tensor, ...] = ()

    def __call__(self, batch: Batch, kind: Any, seed: Callable[[], None]) -> tuple[Tensor, ...]:
        """What `compute` makes of the batch; with another `kind` (hashable) than before it is recorded anew.

        `seed` sets the random numbers of the step. Results are overwritten by the next call.
        """
        if kind != self.kind:
            self.end()
            self.kind, self.taken = kind, 0
        if self.taken < FIRST:
            self.taken += 1
            seed()
            self._clear()
            return self.compute(batch, kind)
        if self.graph is None:
            self._record(batch, kind)
        assert self.batch is not None and self.graph is not None
        for field in fields(Batch):
            getattr(self.batch, field.name).copy_(getattr(batch, field.name))
        seed()
        self.graph.replay()
        return self.result

    def end(self) -> None:
        """Leave everything as it is without a graph."""
        self.graph, self.result = None, ()
        if self.windows is not None:
            self.windows.fixed = False

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self, batch: Batch, kind: Any) -> None:
        self.batch = Batch(**{f.name: getattr(batch, f.name).clone() for f in fields(Batch)})
        if self.windows is not None:
            self.windows.fixed = True
        kept = [buffer.clone() for buffer in self.buffers]
        try:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM):
                    self._clear()
                    self.compute(self.batch, kind)
            torch.cuda.current_stream().wait_stream(beside)
            self._clear()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.compute(self.batch, kind)
        finally:
            for buffer, before in zip(self.buffers, kept, strict=True):
                buffer.copy_(before)
