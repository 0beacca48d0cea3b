"""The stages that fill mouths and eyes: what they draw, exact resume, and that they learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.config.schema import (
    EyesConfig,
    InpaintConfig,
    LidsConfig,
    MouthConfig,
    TrainConfig,
    make_train_config,
)
from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.model.checkpoint import load_state, load_weights, read_licence, save_weights
from export3d_cli.core.model.inpaint import eyes as eye_painter
from export3d_cli.core.model.inpaint import mouth as mouth_painter
from export3d_cli.core.model.inpaint.inpainter import CONDITION_CHANNELS, CROP_SIZE_PX
from export3d_cli.core.runtime.errors import ConfigError, TrainingError
from export3d_cli.core.train import trainer
from export3d_cli.core.train.frame_cache import load_datasets
from export3d_cli.core.train.inpaint_data import INPAINT_SAMPLERS
from export3d_cli.core.train.pair_sampler import PairSampler
from export3d_cli.core.train.trainer import train

from .conftest import BUNDLE, SIZE

FEW = {"steps": 3, "batch": 2, "after": 1, "critic_width": 2}
# the canonical lips touch but for a slit; the clips move all lips alike, and shut no eyes
SMALL: dict[str, InpaintConfig] = {
    "mouth": MouthConfig(min_opening=0.0, **FEW), "eyes": EyesConfig(min_opening=0.0, **FEW), "lids": LidsConfig(max_opening=1.0, **FEW)
}  # fmt: skip
each = pytest.mark.parametrize("name", SMALL)


def of_stage(config: TrainConfig, name: str) -> TrainConfig:
    """A run of the stage `name` alone."""
    return replace(
        config, stages=(name,), checkpoint_every=1, model=replace(config.model, **{name: 4}), **{name: SMALL[name]}
    )


@pytest.fixture
def sampler(tiny: TrainConfig) -> PairSampler:
    return PairSampler(load_datasets(tiny.data, SIZE), tiny.data, load_canonical_face(BUNDLE).mirror)


@each
def test_draws_are_repeatable_and_of_what_is_asked_for(sampler: PairSampler, name: str) -> None:
    def opening(points: torch.Tensor) -> torch.Tensor:
        return mouth_painter.mouth_opening(points) if name == "mouth" else eye_painter.eye_opening(points, 0)

    found = torch.cat([opening(torch.from_numpy(data.landmarks)) for data in sampler.datasets])
    none = {"shut": float(found.min()) - 0.01} if name == "lids" else {"open": float(found.max()) + 0.01}
    with pytest.raises(TrainingError, match=rf"{name}\.{next(iter(none))}"):
        INPAINT_SAMPLERS[name](sampler, replace(SMALL[name], **none))
    drawer = INPAINT_SAMPLERS[name](sampler, SMALL[name])
    a, b, other = (drawer.draw_batch(0, 5, rank, 3) for rank in (0, 0, 1))
    assert a.crops.shape == (3, 3, CROP_SIZE_PX, CROP_SIZE_PX) and a.hole.condition.shape == (
        3,
        CONDITION_CHANNELS,
        CROP_SIZE_PX,
        CROP_SIZE_PX,
    )
    assert torch.equal(a.crops, b.crops) and torch.equal(a.hole.mask, b.hole.mask)
    assert not torch.equal(a.crops, other.crops)


@each
def test_resume_is_exact(tiny: TrainConfig, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = of_stage(tiny, name)
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


def test_the_stages_after_them_leave_the_painters_alone(tiny: TrainConfig) -> None:
    stages, config = ("clebs", *SMALL), tiny
    for name in SMALL:
        config = of_stage(config, name)
    whole = train(replace(config, stages=(*stages, "reconstruction"), steps=1))
    assert (whole.finished, whole.stage) == (True, "reconstruction")
    state = load_weights(whole.weights)[0]
    before = load_weights(train(replace(config, stages=stages, run=config.run + "2")).weights)[0]
    for name in SMALL:
        names = [k for k in state if k.startswith(f"painters.{name}.")]
        assert names and all(torch.equal(state[k], before[k]) for k in names)


@each
def test_weights_without_a_painter_get_one(tiny: TrainConfig, name: str, tmp_path: Path) -> None:
    run = of_stage(tiny, name)
    first = train(replace(tiny, stages=("reconstruction",), steps=1))
    save_weights(first.weights, *load_weights(first.weights), licence="only for this test")
    second = train(replace(run, run=str(tmp_path / "second"), init=str(first.weights)))
    before, after = load_weights(first.weights), load_weights(second.weights)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert (getattr(before[1], name), getattr(after[1], name)) == (0, 4)
    assert read_licence(second.weights) == "only for this test"  # what is made of them is theirs
    with pytest.raises(ConfigError, match="another size"):
        train(replace(run, run=str(tmp_path / "third"), init=str(first.weights), stages=("reconstruction",)))


@each
def test_it_learns_to_fill(tiny: TrainConfig, name: str) -> None:
    long = replace(SMALL[name], steps=40, lr=0.01, adversarial=0.0)
    summary = train(replace(of_stage(tiny, name), **{name: long}))
    lines = [json.loads(s) for s in Path(summary.run / "stats.jsonl").read_text().splitlines()]
    losses = [x["l1"] for x in lines]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert (summary.run / "samples").is_dir()


@each
def test_what_cannot_be_trained_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{name}"):
        make_train_config({"preset": "tiny", "stages": [name]})
    with pytest.raises(ConfigError, match=rf"{name}\.batch"):
        make_train_config({"preset": "compact", "stages": [name], name: {"batch": 0}})
    with pytest.raises(ConfigError, match=rf"{name}\.weight"):
        make_train_config({"preset": "compact", "data": {"path": ["a", "b"]}, name: {"weight": [1.0]}})


@each
def test_a_painter_that_nothing_trains_is_left_out(name: str) -> None:
    """It would paint noise."""
    assert getattr(make_train_config({"preset": "compact"}).model, name) == 0
    for kept in ({"stages": [name]}, {"init": "export3d-compact"}):
        assert getattr(make_train_config({"preset": "compact", **kept}).model, name) > 0
    with pytest.raises(ConfigError, match=rf"model\.{name}.*stage {name}"):
        make_train_config({"preset": "compact", "model": {name: 8}})
