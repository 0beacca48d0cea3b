"""The stages `mouth`, `eyes` and `lids`: their batches, exact resume, and that they learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.config.schema import EyesConfig, InpaintConfig, LidsConfig, MouthConfig, TrainConfig
from export3d_cli.core.model.checkpoint import load_state, load_weights
from export3d_cli.core.model.inpaint.eyes import eye_opening
from export3d_cli.core.model.inpaint.inpainter import CONDITION_CHANNELS, INPAINT_SIZE_PX
from export3d_cli.core.model.inpaint.mouth import mouth_opening
from export3d_cli.core.runtime.errors import ConfigError, TrainingError
from export3d_cli.core.train import trainer
from export3d_cli.core.train.inpaint_stage import INPAINT_SAMPLERS
from export3d_cli.core.train.trainer import train
from export3d_cli.core.train.training_data import PairSampler, load_datasets

from .conftest import SIZE

SHORT = {"steps": 3, "batch": 2, "adversarial_start": 1, "discriminator_width": 2}
# the canonical lips almost touch; the clips move all lips alike and shut no eyes
CONFIGS: dict[str, InpaintConfig] = {
    "mouth": MouthConfig(min_opening=0.0, **SHORT),
    "eyes": EyesConfig(min_opening=0.0, **SHORT),
    "lids": LidsConfig(max_opening=1.0, **SHORT),
}
each_stage = pytest.mark.parametrize("name", CONFIGS)


def stage_run(config: TrainConfig, name: str) -> TrainConfig:
    """Return the config of a run of the stage `name` alone."""
    return replace(
        config, stages=(name,), checkpoint_every=1, model=replace(config.model, **{name: 4}), **{name: CONFIGS[name]}
    )


@pytest.fixture
def sampler(tiny: TrainConfig) -> PairSampler:
    return PairSampler(load_datasets(tiny.data, SIZE), tiny.data)


@each_stage
def test_batches_repeat_and_no_matching_frame_is_an_error(sampler: PairSampler, name: str) -> None:
    def opening(points: torch.Tensor) -> torch.Tensor:
        return mouth_opening(points) if name == "mouth" else eye_opening(points, 0)

    openings = torch.cat([opening(torch.from_numpy(data.landmarks)) for data in sampler.datasets])
    key, value = ("max_opening", openings.min() - 0.01) if name == "lids" else ("min_opening", openings.max() + 0.01)
    with pytest.raises(TrainingError, match=rf"{name}\.{key}"):
        INPAINT_SAMPLERS[name](sampler, replace(CONFIGS[name], **{key: float(value)}))
    inpaint_sampler = INPAINT_SAMPLERS[name](sampler, CONFIGS[name])
    drawn = (inpaint_sampler.draw_batch(0, 5, rank, 3) for rank in (0, 0, 1))
    (crops, hole), (same, same_hole), (other, _) = drawn
    size = (INPAINT_SIZE_PX, INPAINT_SIZE_PX)
    assert crops.shape == (3, 3, *size) and hole.condition.shape == (3, CONDITION_CHANNELS, *size)
    assert torch.equal(crops, same) and torch.equal(hole.mask, same_hole.mask)
    assert not torch.equal(crops, other)


@each_stage
def test_resume_is_exact(tiny: TrainConfig, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stage_run(tiny, name)
    whole = train(run)
    assert (whole.finished, whole.stage, whole.step) == (True, name, 3)
    broken = replace(run, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainingRun, "out_of_time", lambda self: (self.folder / "state.json").exists())
        stopped = train(broken)
    assert (stopped.finished, stopped.stage, stopped.step) == (False, name, 1)
    assert train(broken).finished
    a, b = (load_state(Path(folder)) for folder in (run.run, broken.run))
    assert a is not None and b is not None
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    lines = [json.loads(s) for s in (Path(broken.run) / "stats.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3]
    assert ["g_adv" in x for x in lines] == [False, True, True]
    assert load_weights(whole.weights)[2][f"{name}_steps"] == 3


def test_later_stages_do_not_change_the_inpainters(tiny: TrainConfig) -> None:
    config = replace(tiny, steps=1)
    for name in CONFIGS:
        config = stage_run(config, name)
    before = load_weights(train(replace(config, stages=tuple(CONFIGS))).weights)[0]
    whole = train(replace(config, stages=(*CONFIGS, "reconstruction")))  # a stage is added to the finished run
    assert (whole.finished, whole.stage) == (True, "reconstruction")
    state = load_weights(whole.weights)[0]
    changed = {k.split(".")[0] for k in state if not torch.equal(state[k], before[k])}
    assert "inpainters" not in changed and "superres" in changed


def test_weights_without_an_inpainter_get_one(tiny: TrainConfig, tmp_path: Path) -> None:
    run = stage_run(tiny, "eyes")
    first = train(replace(tiny, stages=("reconstruction",), steps=1))
    second = train(replace(run, run=str(tmp_path / "second"), init=str(first.weights)))
    before, after = load_weights(first.weights), load_weights(second.weights)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert (before[1].eyes, after[1].eyes) == (0, 4)
    with pytest.raises(ConfigError, match=r"holds another model: set model.eyes="):
        train(replace(run, run=str(tmp_path / "third"), init=str(first.weights), stages=("reconstruction",)))


def test_training_reduces_l1(tiny: TrainConfig) -> None:
    long = replace(CONFIGS["mouth"], steps=24, lr=0.02, adversarial=0.0)
    summary = train(replace(stage_run(tiny, "mouth"), mouth=long, checkpoint_every=100))
    losses = [json.loads(s)["l1"] for s in Path(summary.run / "stats.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert (summary.run / "samples").is_dir()


@each_stage
def test_invalid_config_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{name}"):
        make_train_config({"preset": "tiny", "stages": [name]})
    with pytest.raises(ConfigError, match=rf"{name}\.batch"):
        make_train_config({"preset": "compact", "stages": [name], name: {"batch": 0}})
    with pytest.raises(ConfigError, match=rf"{name}\.weight"):
        make_train_config({"preset": "compact", "data": {"path": ["a", "b"]}, name: {"weight": [1.0]}})


@each_stage
def test_untrained_inpainter_is_left_out(name: str) -> None:
    """It would output noise."""
    assert getattr(make_train_config({"preset": "compact"}).model, name) == 0
    for kept in ({"stages": [name]}, {"init": "export3d-compact"}):
        assert getattr(make_train_config({"preset": "compact", **kept}).model, name) > 0
    with pytest.raises(ConfigError, match=rf"model\.{name}.*stage {name}"):
        make_train_config({"preset": "compact", "model": {name: 8}})
