"""The run folder: log, TensorBoard's scalars, the global step, and states that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export3d_cli.core.config.schema import AdversarialConfig, TrainConfig
from export3d_cli.core.model.checkpoint import save_state
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.train.training_run import TrainingRun


def test_global_step_counts_over_all_stages(tiny: TrainConfig) -> None:
    config = replace(tiny, stages=("clebs", "reconstruction", "adversarial"), adversarial=AdversarialConfig(steps=5))
    run = TrainingRun.open(config, None)
    assert [run._global_step(s, 2) for s in config.stages] == [2, 3 + 2, 3 + 4 + 2]


def test_state_of_another_stage_is_refused(tiny: TrainConfig) -> None:
    Path(tiny.run).mkdir()
    save_state(Path(tiny.run), {"x": torch.zeros(1)}, {"stage": "lids", "step": 2, "seed": 0})
    with pytest.raises(TrainingError, match="stopped in the stage lids, which is not one of this run's"):
        TrainingRun.open(tiny, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_of_a_resumed_run_replaces_repeated_steps(tiny: TrainConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(tiny, stages=("reconstruction",), tensorboard=True)
    for resumed, steps in ((False, (1, 2, 3)), (True, (3, 4))):  # the second call resumes after step 2
        if resumed:
            save_state(Path(tiny.run), {}, {"stage": "reconstruction", "step": 2, "seed": 0})
        run = TrainingRun.open(config, None)
        for step in steps:
            run.log("reconstruction", step, 4, {"loss": step + 10.0 * resumed, "lr": 0.5})
        run.close()
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"reconstruction/loss", "reconstruction/lr"}
    losses = [(e.step, e.value) for e in events.Scalars("reconstruction/loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]
    lines = [json.loads(s)["loss"] for s in (run.folder / "stats.jsonl").read_text().splitlines()]
    assert lines == [1.0, 2.0, 13.0, 14.0]
