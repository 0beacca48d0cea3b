"""What TensorBoard is given, with and without it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from export3d_cli.core.config.schema import AdversarialConfig, TrainConfig
from export3d_cli.core.train.tensorboard_logger import TensorBoardLogger
from export3d_cli.core.train.training_run import TrainingRun


def test_nothing_is_written_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    board = TensorBoardLogger(tmp_path / "board", enabled=True)
    board.write("clebs", 1, {"loss": 1.0})
    board.close()
    assert not (tmp_path / "board").exists()


def test_steps_go_on_over_the_stages(tiny: TrainConfig) -> None:
    config = replace(tiny, stages=("clebs", "reconstruction", "adversarial"), adversarial=AdversarialConfig(steps=5))
    run = TrainingRun.open(replace(config, tensorboard=False), None)
    assert [run._global_step(s, 2) for s in config.stages] == [2, 3 + 2, 3 + 4 + 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scalars_can_be_read_back_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, (1, 2, 3)), (3, (3, 4))):  # the second call resumes after step 2
        board = TensorBoardLogger(tmp_path, enabled=True, first_step=first)
        for step in steps:
            board.write("reconstruction", step, {"loss": step + 10.0 * (first > 0), "lr": 0.5})
        board.close()
    assert TensorBoardLogger(tmp_path / "unwanted", enabled=False).writer is None
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"reconstruction/loss", "reconstruction/lr"}
    losses = [(e.step, e.value) for e in found.Scalars("reconstruction/loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]
