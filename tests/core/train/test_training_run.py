"""The run folder: TensorBoard's scalars, the global step, and the log of a resumed run."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export3d_cli.core.config.schema import AdversarialConfig, TrainConfig
from export3d_cli.core.model.checkpoint import save_state
from export3d_cli.core.train.training_run import TensorBoardLogger, TrainingRun


def test_tensorboard_logger_without_tensorboard_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    logger = TensorBoardLogger(tmp_path / "events", enabled=True)
    logger.write("clebs", 1, {"loss": 1.0})
    logger.close()
    assert not (tmp_path / "events").exists()


def test_global_step_counts_over_all_stages(tiny: TrainConfig) -> None:
    config = replace(tiny, stages=("clebs", "reconstruction", "adversarial"), adversarial=AdversarialConfig(steps=5))
    run = TrainingRun.open(config, None)
    assert [run._global_step(s, 2) for s in config.stages] == [2, 3 + 2, 3 + 4 + 2]


def test_open_drops_the_log_lines_after_the_state(tiny: TrainConfig) -> None:
    folder = Path(tiny.run)
    folder.mkdir()
    save_state(folder, {"x": torch.zeros(1)}, {"stage": "pose_debias", "step": 2, "seed": 0})
    lines = [
        {"stage": "reconstruction", "step": 4},
        {"stage": "pose_debias", "step": 1},
        {"stage": "pose_debias", "step": 3},
    ]
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = TrainingRun.open(tiny, None)
    assert run.last_saved == ("pose_debias", 2)
    assert len((folder / "stats.jsonl").read_text().splitlines()) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_logger_of_a_resumed_run_replaces_repeated_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, steps in ((0, (1, 2, 3)), (3, (3, 4))):  # the second call resumes after step 2
        logger = TensorBoardLogger(tmp_path, enabled=True, first_step=first_step)
        for step in steps:
            logger.write("reconstruction", step, {"loss": step + 10.0 * (first_step > 0), "lr": 0.5})
        logger.close()
    assert TensorBoardLogger(tmp_path / "disabled", enabled=False).writer is None
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"reconstruction/loss", "reconstruction/lr"}
    losses = [(e.step, e.value) for e in events.Scalars("reconstruction/loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]
