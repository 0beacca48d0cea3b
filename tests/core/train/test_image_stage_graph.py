"""A training step as one CUDA graph, with a stand-in for the graph: the tests need no GPU."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export3d_cli.core.config.schema import AdversarialConfig, TrainConfig
from export3d_cli.core.model.warp.rasterizer import RasterWindows
from export3d_cli.core.train import image_stage as stage
from export3d_cli.core.train.image_stage import StepGraph
from export3d_cli.core.train.trainer import train
from export3d_cli.core.train.training_data import Batch

SYNC_OPS = ("_local_scalar_dense", "lift_fresh", "nonzero", "unique", "masked_select")
DECOMPOSITIONS = ("linalg_inv", "linalg_solve", "linalg_qr")
TERMS = dict.fromkeys(
    ("l1", "mask", "crop_perceptual", "residual_flow", "landmarks", "flow", "density_tv", "silhouette"), 1.0
)


class Recorder:
    """A stand-in for `torch.cuda.CUDAGraph`: replay computes the step again, into the same tensors."""

    recorded = 0
    step: StepGraph

    def replay(self) -> None:
        step = self.step
        assert step.static_batch is not None
        for parameter in step.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()  # a graph overwrites gradients, it does not accumulate
        for old, new in zip(step.static_result, step.compute(step.static_batch, step.graph_key), strict=True):
            old.copy_(new)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    class CountingRecorder(Recorder):
        pass

    @contextlib.contextmanager
    def recording(graph: Any) -> Iterator[None]:
        CountingRecorder.recorded += 1
        yield

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    original = StepGraph._record

    def record(self: StepGraph, *args: Any) -> None:
        original(self, *args)
        assert isinstance(self.graph, Recorder)
        self.graph.step = self

    monkeypatch.setattr(StepGraph, "_record", record)
    for name, value in (
        ("CUDAGraph", CountingRecorder), ("graph", recording), ("Stream", Stream), ("current_stream", Stream),
        ("stream", lambda _: contextlib.nullcontext()),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(stage, "EAGER_STEPS", 2)
    return CountingRecorder


def use_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reconstruction stage use a graph on any device."""

    def make_graph(self: stage.ImageStages) -> StepGraph:
        assert self.model.flow is not None
        return StepGraph(
            self.accumulate_gradients, self.parameters, [self.model.generator.plane_ema], self.model.flow.windows
        )

    monkeypatch.setattr(stage.ImageStages, "_make_cuda_graph", make_graph)


def losses(config: TrainConfig) -> list[dict[str, float]]:
    """Train and return the logged values without timings."""
    logged: list[dict[str, float]] = []
    train(config, progress=lambda event: logged.append(event.values) if event.values else None)
    return [{k: v for k, v in values.items() if "second" not in k} for values in logged]


def test_replayed_steps_equal_eager_steps(
    tiny: TrainConfig, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loss = replace(tiny.loss, **TERMS)
    config = replace(
        tiny, stages=("reconstruction", "adversarial"), steps=7, loss=loss, raw_size_start=8, raw_size_grow_step=4,
        adversarial=AdversarialConfig(steps=1, channel_max=8, channel_base=256, mapping_layers=1),
    )  # fmt: skip
    fixed: list[bool] = []
    take_step = stage.ImageStages.take_step

    def look(self: stage.ImageStages, batch: list[Batch]) -> dict[str, float]:
        values = take_step(self, batch)
        assert self.model.flow is not None
        fixed.append(self.model.flow.windows.fixed)
        return values

    monkeypatch.setattr(stage.ImageStages, "take_step", look)
    plain = losses(replace(config, run=str(tmp_path / "plain")))
    use_graph(monkeypatch)
    replayed = losses(replace(config, run=str(tmp_path / "replayed")))
    assert recorder.recorded == 2  # again after the raw render has grown
    assert len(plain) == len(replayed) == 8
    assert fixed[8:] == [False, False, True, True, False, False, True, False]  # released by the stage adversarial
    for one, other in zip(plain, replayed, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5)  # wider windows round differently


def test_failed_capture_falls_back_to_eager_steps(
    tiny: TrainConfig, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(tiny, stages=("reconstruction",), steps=3)
    plain = losses(replace(config, run=str(tmp_path / "plain")))

    @contextlib.contextmanager
    def refused(graph: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    use_graph(monkeypatch)
    messages: list[str] = []
    values: list[dict[str, float]] = []
    summary = train(
        replace(config, run=str(tmp_path / "refused")),
        progress=lambda event: messages.append(event.message) if event.message else values.append(event.values),
    )
    assert summary.finished
    assert any("cannot be one CUDA graph (operation not permitted when stream is capturing)" in t for t in messages)
    assert [v["loss"] for v in values] == [v["loss"] for v in plain]


def test_step_never_synchronises_with_the_device(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that copy a number from or to the device cannot be captured, and stall a GPU."""
    asked: Counter[str] = Counter()

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(name in str(func) for name in SYNC_OPS + DECOMPOSITIONS):
                asked[str(func)] += 1
            return func(*args, **(kwargs or {}))

    plain = stage.ImageStages.accumulate_gradients
    taken: list[bool] = []

    def listening(self: stage.ImageStages, batch: Batch, raw: int, *args: Any) -> tuple[Tensor, Tensor]:
        self.model.expression.requires_grad_(False)  # as after the stage clebs
        plain(self, batch, raw, *args)  # measures the windows, caches the constants
        assert self.model.flow is not None
        self.model.flow.windows.fixed = True
        with Listener():
            taken.append(True)
            return plain(self, batch, raw, *args)

    monkeypatch.setattr(stage.ImageStages, "accumulate_gradients", listening)
    train(replace(tiny, stages=("reconstruction",), steps=1, loss=replace(tiny.loss, **TERMS)))
    assert taken == [True]
    assert not asked


def test_fixed_windows_keep_a_quarter_in_reserve() -> None:
    windows = RasterWindows()
    assert windows(torch.tensor([3.4, 10.0]), 32) == [4, 11]
    assert windows(torch.tensor([7.9, 2.0]), 32) == [8, 3]
    windows.fixed = True
    assert windows(torch.tensor([30.0, 30.0]), 32) == [12, 16]
    assert windows(torch.tensor([30.0, 30.0]), 8) == [2, 2]  # not measured at this size
