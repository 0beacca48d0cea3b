"""The run folder: states that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export3d_cli.core.config.schema import TrainConfig
from export3d_cli.core.model.checkpoint import save_state
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.train.stage import TrainingRun


def test_state_of_another_stage_is_refused(tiny: TrainConfig) -> None:
    Path(tiny.run).mkdir()
    save_state(Path(tiny.run), {"x": torch.zeros(1)}, {"stage": "lids", "step": 2, "seed": 0})
    with pytest.raises(TrainingError, match="stopped in the stage lids, which is not one of this run's"):
        TrainingRun(tiny)
