"""The stage that fills mouths: what it draws, exact resume, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.checkpoint import licence_of, load_state, load_weights, save_weights
from export3d_cli.core.config import MouthConfig, TrainConfig, train_config
from export3d_cli.core.errors import ConfigError, TrainingError
from export3d_cli.core.face.mesh import canonical_face
from export3d_cli.core.model.painter import SIDE, opening
from export3d_cli.core.train import trainer
from export3d_cli.core.train.cache import load_sets
from export3d_cli.core.train.data import Sampler
from export3d_cli.core.train.mouth import Mouths
from export3d_cli.core.train.trainer import train

from .conftest import BUNDLE, SIZE

# the canonical lips touch but for a slit; the clips move all lips alike
SMALL = MouthConfig(steps=3, batch=2, open=0.0, after=1, critic_width=2)


@pytest.fixture
def run(tiny: TrainConfig) -> TrainConfig:
    return replace(tiny, stages=("mouth",), mouth=SMALL, model=replace(tiny.model, mouth=4), checkpoint_every=1)


@pytest.fixture
def sampler(tiny: TrainConfig) -> Sampler:
    return Sampler(load_sets(tiny.data, SIZE), tiny.data, canonical_face(BUNDLE).mirror)


def test_draws_are_repeatable_and_of_open_mouths(sampler: Sampler) -> None:
    widest = [float(opening(torch.from_numpy(data.landmarks)).max()) for data in sampler.sets]
    with pytest.raises(TrainingError, match=r"mouth\.open"):
        Mouths(sampler, replace(SMALL, open=max(widest) + 0.01))
    mouths = Mouths(sampler, SMALL)
    a, b, other = (mouths.batch(0, 5, rank, 3) for rank in (0, 0, 1))
    assert a.picture.shape == (3, 3, SIDE, SIDE) and a.hole.facts.shape == (3, 7, SIDE, SIDE)
    assert torch.equal(a.picture, b.picture) and torch.equal(a.hole.hidden, b.hole.hidden)
    assert not torch.equal(a.picture, other.picture)


def test_resume_is_exact(run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(run)
    assert (whole.finished, whole.stage, whole.step) == (True, "mouth", 3)
    broken = replace(run, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "out_of_time", lambda self: (self.folder / "state.json").exists())
        stopped = train(broken)
    assert (stopped.finished, stopped.stage, stopped.step) == (False, "mouth", 1)
    assert train(broken).finished
    a, b = (load_state(Path(folder)) for folder in (run.run, broken.run))
    assert a is not None and b is not None
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    lines = [json.loads(s) for s in (Path(broken.run) / "stats.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3]
    assert ["g_adv" in x for x in lines] == [False, True, True]
    assert load_weights(whole.weights)[2]["mouth_steps"] == 3


def test_the_stages_after_it_leave_the_painter_alone(run: TrainConfig) -> None:
    config = replace(run, stages=("clebs", "mouth", "reconstruction"), steps=1)
    whole = train(config)
    assert (whole.finished, whole.stage) == (True, "reconstruction")
    state = load_weights(whole.weights)[0]
    mouth = load_weights(train(replace(config, stages=("clebs", "mouth"), run=config.run + "2")).weights)[0]
    names = [k for k in state if k.startswith("painter.")]
    assert names and all(torch.equal(state[k], mouth[k]) for k in names)


def test_weights_without_a_painter_get_one(run: TrainConfig, tiny: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(tiny, stages=("reconstruction",), steps=1))
    save_weights(first.weights, *load_weights(first.weights), licence="only for this test")
    second = train(replace(run, run=str(tmp_path / "second"), init=str(first.weights)))
    before, after = load_weights(first.weights), load_weights(second.weights)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert (before[1].mouth, after[1].mouth) == (0, 4)
    assert licence_of(second.weights) == "only for this test"  # what is made of them is theirs
    with pytest.raises(ConfigError, match="another size"):
        train(replace(run, run=str(tmp_path / "third"), init=str(first.weights), stages=("reconstruction",)))


def test_it_learns_to_fill(run: TrainConfig) -> None:
    summary = train(replace(run, mouth=replace(SMALL, steps=40, lr=0.01, adversarial=0.0), run=run.run + "-long"))
    lines = [json.loads(s) for s in Path(summary.run / "stats.jsonl").read_text().splitlines()]
    losses = [x["l1"] for x in lines]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert (summary.run / "samples").is_dir()


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.mouth"):
        train_config({"preset": "tiny", "stages": ["mouth"]})
    with pytest.raises(ConfigError, match=r"mouth\.batch"):
        train_config({"preset": "compact", "stages": ["mouth"], "mouth": {"batch": 0}})
    with pytest.raises(ConfigError, match=r"mouth\.weight"):
        train_config({"preset": "compact", "data": {"path": ["a", "b"]}, "mouth": {"weight": [1.0]}})
