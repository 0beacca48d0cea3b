"""The loop of all stages, on a stage that only counts: skipped steps, log, checkpoints, resume, time limit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export3d_cli.core.config.schema import TrainConfig
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.train.stage import MAX_SKIPPED_GRADIENTS, Stage, TrainingRun, update_ema

NAN = float("nan")


class CountingStage(Stage):
    """Logs the step as the loss; `bad` replaces values of steps."""

    images_per_step = 2

    def __init__(self, run: TrainingRun, bad: dict[int, dict[str, float]]) -> None:
        super().__init__(run, "reconstruction")
        self.bad, self.taken, self.counter = bad, list[int](), {"counter": torch.zeros(1)}
        self.saved_parts = {"mine.": self.counter}

    def draw(self, step: int) -> int:
        return step

    def take_step(self, batch: int) -> dict[str, float]:
        assert batch == self.step
        self.taken.append(batch)
        self.counter["counter"] += torch.rand(1)  # seeded by the step
        return {"loss": float(batch), "grad": 1.0} | self.bad.get(batch, {})


def make_stage(config: TrainConfig, bad: dict[int, dict[str, float]] | None = None) -> CountingStage:
    return CountingStage(TrainingRun(config), bad or {})


@pytest.fixture
def config(tiny: TrainConfig) -> TrainConfig:
    return replace(tiny, stages=("reconstruction",), steps=40, log_every=4, checkpoint_every=10)


def test_loop_logs_means_and_resumes_after_the_checkpoint(config: TrainConfig) -> None:
    whole = make_stage(replace(config, run=config.run + "-whole"))
    assert whole.train()
    stopped = make_stage(config, {33: {"loss": NAN}})
    with pytest.raises(
        TrainingError, match=r"loss of stage reconstruction is nan at step 33 .*\(stage reconstruction, st"
    ):
        stopped.train()
    resumed = make_stage(config)
    assert resumed.train()
    assert resumed.taken == list(range(30, 40))
    assert torch.equal(resumed.counter["counter"], whole.counter["counter"])
    lines = [json.loads(s) for s in (Path(config.run) / "stats.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [*range(4, 41, 4)]  # 32 is repeated
    assert [x["loss"] for x in lines[:2]] == [1.5, 5.5]
    assert lines[0]["images_a_second"] == pytest.approx(2 / lines[0]["seconds_a_step"], rel=1e-3)


def test_non_finite_steps_are_skipped_up_to_a_limit(config: TrainConfig) -> None:
    bad = {step: {"loss": NAN} for step in (4, 5)}
    assert make_stage(replace(config, skip_nonfinite=2), bad).train()
    with pytest.raises(TrainingError, match=r"nan at step 5 .*there is no checkpoint yet"):
        make_stage(replace(config, run=config.run + "1", skip_nonfinite=1), bad).train()
    gradients = {step: {"grad": NAN} for step in range(MAX_SKIPPED_GRADIENTS)}
    assert make_stage(replace(config, run=config.run + "2"), gradients).train()
    with pytest.raises(TrainingError, match="grad of stage"):
        make_stage(replace(config, run=config.run + "3"), gradients | {MAX_SKIPPED_GRADIENTS: {"grad": NAN}}).train()


def test_loop_stops_when_the_time_is_over(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage(replace(config, max_minutes=1.0))
    monkeypatch.setattr(TrainingRun, "elapsed_minutes", lambda run: 0.3 * len(stage.taken))
    assert not stage.train()
    assert stage.taken == [0, 1, 2, 3]
    assert stage.run.last_saved == ("reconstruction", 4)


def test_state_that_does_not_fit_is_refused(config: TrainConfig) -> None:
    make_stage(config).train()
    stage = make_stage(config)
    stage.saved_parts = {"mine.": {"other": torch.zeros(1)}}
    with pytest.raises(TrainingError, match="does not fit its configuration"):
        stage.train()


def test_update_ema_starts_fast_and_copies_integers() -> None:
    average = {"x": torch.zeros(2), "n": torch.tensor(1)}
    update_ema(average, {"x": torch.ones(2), "n": torch.tensor(7)}, 0.9, 1)
    assert average["x"].tolist() == pytest.approx([1 - 2 / 11] * 2)
    update_ema(average, {"x": torch.zeros(2), "n": torch.tensor(8)}, 0.9, 1000)
    assert average["x"].tolist() == pytest.approx([0.9 * (1 - 2 / 11)] * 2)
    assert average["n"] == 8
