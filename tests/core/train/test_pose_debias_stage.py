"""The stage that keeps expressions from being read as turns: its regression, that it turns back, and exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from export3d_cli.core.config.schema import PoseDebiasConfig, TrainConfig, make_train_config
from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.model.checkpoint import load_state, load_weights, save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import rotation_log
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.train import trainer
from export3d_cli.core.train.pair_sampler import Batch
from export3d_cli.core.train.pose_debias_stage import PoseDebiasStage, fit_rotations
from export3d_cli.core.train.trainer import train

from .conftest import BUNDLE

FACE = load_canonical_face(BUNDLE).points


def rigid_turn(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) that brings points (P, 3) nearest to others, by Kabsch."""
    u, _, vt = np.linalg.svd((after - after.mean(0)).T @ (before - before.mean(0)))
    return u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt


def test_turns_are_found_among_lost_tracks() -> None:
    rng = np.random.default_rng(0)
    asked = torch.from_numpy(rng.normal(size=(400, 4))).float()
    true = torch.from_numpy(rng.normal(size=(4, 3))).float() / 100
    turned = asked @ true + torch.from_numpy(rng.normal(size=(400, 3))).float() / 1000
    turned[::20] += 1  # another face, or none
    torch.testing.assert_close(fit_rotations(asked, turned, 1.0), true, atol=5e-4, rtol=0)
    assert fit_rotations(asked, turned, 1e9).abs().max() < 1e-4


@pytest.fixture
def turning(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run of the stage alone, of weights whose expressions turn the face and are read as they are moved."""
    torch.manual_seed(0)
    model, rng = Export3D(tiny.model), np.random.default_rng(1)
    assert model.flow is not None
    about = FACE - FACE.mean(0)
    turns = [np.cross(w, about) for w in rng.normal(size=(tiny.model.basis, 3)) / 300]
    model.flow.basis.copy_(torch.from_numpy(np.stack(turns)))
    save_weights(tmp_path / "init.safetensors", model.state_dict(), tiny.model, {})
    results, seen = PoseDebiasStage.render_expressions, []

    def remember(
        self: PoseDebiasStage, batch: Batch, row: int, beta: Tensor
    ) -> tuple[Tensor, Tensor, list[np.ndarray]]:
        own, asked, frames = results(self, batch, row, beta)
        moved = self.flow.deform_landmarks(torch.from_numpy(FACE).float()[None], torch.cat([own, asked]) - own)
        seen[:] = [rigid_turn(FACE, points) for points in moved.double().numpy()]
        return own, asked, frames

    monkeypatch.setattr(PoseDebiasStage, "render_expressions", remember)
    monkeypatch.setattr(
        PoseDebiasStage, "track_rotations", lambda self, frames: (np.ones(len(frames), bool), np.stack(seen))
    )
    few = PoseDebiasConfig(steps=4, batch=8, ridge=1e-3)
    return replace(
        tiny, stages=("pose_debias",), init=str(tmp_path / "init.safetensors"), pose_debias=few, checkpoint_every=1
    )


def turns_of(basis: Tensor) -> np.ndarray:
    return np.stack([rotation_log(rigid_turn(FACE, FACE + field)) for field in basis.double().numpy()])


def test_expressions_no_longer_turn_the_face(turning: TrainConfig) -> None:
    before = load_weights(turning.init)[0]
    done = train(turning)
    after, _, record = load_weights(done.weights)
    assert (done.stage, done.step, done.finished, record["steady_steps"]) == ("pose_debias", 4, True, 4)
    old, new = (np.abs(turns_of(state["flow.basis"])).max() for state in (before, after))
    assert old > 0.002 and new < 0.05 * old
    own = {k for k in before if not torch.equal(before[k], after[k])}
    assert own == {"flow.basis"}


def test_resume_is_exact(turning: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(turning)
    broken = replace(turning, run=str(tmp_path / "broken"))
    for _ in range(3):  # stopped in the first round, and after it
        with monkeypatch.context() as patch:
            start = load_state(Path(broken.run))
            step = 0 if start is None else int(start[1]["step"])
            patch.setattr(PoseDebiasStage, "measure", counted(PoseDebiasStage.measure, patch))
            stopped = train(broken)
        assert (stopped.finished, stopped.step) == (False, step + 1)
    assert train(broken).finished
    a, b = (load_weights(Path(folder) / "weights.safetensors")[0] for folder in (turning.run, broken.run))
    assert torch.equal(a["flow.basis"], b["flow.basis"])


def counted(look: object, patch: pytest.MonkeyPatch) -> object:
    """`look`, after which time is over."""

    def once(self: PoseDebiasStage) -> None:
        look(self)  # type: ignore[operator]
        patch.setattr(trainer.TrainingRun, "out_of_time", lambda run: True)

    return once


def test_it_follows_the_other_stages(tiny: TrainConfig) -> None:
    done = train(
        replace(tiny, stages=("clebs", "reconstruction", "pose_debias"), pose_debias=PoseDebiasConfig(steps=2, batch=1))
    )
    assert (done.stage, done.step, done.finished) == ("pose_debias", 2, True)  # grey pictures: no face is found
    record = load_weights(done.weights)[2]
    assert (record["steps"], record["steady_steps"]) == (4, 2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"stages": ["pose_debias"]}, "init"),
        ({"model": {"flow": False}, "stages": ["reconstruction", "pose_debias"]}, r"model\.flow"),
        ({"pose_debias": {"batch": 0}}, r"pose_debias\.batch"),
        ({"pose_debias": {"weight": [1, 2]}, "data": {"path": ["a"]}}, r"pose_debias\.weight"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        make_train_config({"preset": "tiny", **change})
