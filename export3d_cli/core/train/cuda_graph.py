"""Forward and backward pass of a training step as one CUDA graph.

A step is about seven thousand small kernels. Launched one by one they leave a fast GPU idle for two thirds of the time;
as a graph they are launched together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from export3d_cli.core.model.warp.rasterizer import RasterWindows
from export3d_cli.core.train.pair_sampler import Batch

EAGER_STEPS = 24  # steps without a graph first: they measure the widths of the rasteriser's windows
WARMUP_RUNS = 3  # runs on the capture stream before the capture


class StepGraph:
    """Runs `compute`, which leaves gradients in the parameters, eagerly for `EAGER_STEPS` steps, then replays it."""

    def __init__(self, compute: Callable[[Batch, Any], tuple[Tensor, ...]], parameters: Sequence[Tensor],
                 buffers: Sequence[Tensor], windows: RasterWindows | None) -> None:  # fmt: skip
        """All shapes must stay fixed; warm-up and capture restore the `buffers`, which `compute` changes."""
        self.compute, self.parameters, self.buffers, self.windows = compute, parameters, buffers, windows
        self.graph_key: Any = None
        self.eager_steps_done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_batch: Batch | None = None
        self.static_result: tuple[Tensor, ...] = ()

    def __call__(self, batch: Batch, graph_key: Any, seed: Callable[[], None]) -> tuple[Tensor, ...]:
        """Run `compute` after `seed`; another `graph_key` records a new graph. The next call overwrites the result."""
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
        for static, new in zip(self.static_batch, batch, strict=True):
            static.copy_(new)
        seed()
        self.graph.replay()
        return self.static_result

    def release(self) -> None:
        """Drop the graph and let the rasteriser's windows grow again."""
        self.graph, self.static_result = None, ()
        if self.windows is not None:
            self.windows.fixed = False

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self, batch: Batch, graph_key: Any) -> None:
        self.static_batch = Batch(*(x.clone() for x in batch))
        if self.windows is not None:
            self.windows.fixed = True
        saved = [buffer.clone() for buffer in self.buffers]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_RUNS):
                    self._clear_gradients()
                    self.compute(self.static_batch, graph_key)
            torch.cuda.current_stream().wait_stream(stream)
            self._clear_gradients()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.static_result = self.compute(self.static_batch, graph_key)
        finally:
            for buffer, value in zip(self.buffers, saved, strict=True):
                buffer.copy_(value)
