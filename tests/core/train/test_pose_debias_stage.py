"""The stage `pose_debias`: its regression, the corrected basis, and exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.config.schema import PoseDebiasConfig, TrainConfig
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.model.checkpoint import load_state, load_weights, save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import rotation_log
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.train import trainer
from export3d_cli.core.train.pose_debias_stage import PoseDebiasStage, fit_rotations
from export3d_cli.core.train.trainer import train
from export3d_cli.core.train.training_data import Batch

FACE = load_canonical_face().points


def rigid_rotation(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) that aligns points (P, 3) with others best (Kabsch)."""
    u, _, vt = np.linalg.svd((after - after.mean(0)).T @ (before - before.mean(0)))
    return u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt


def test_fit_rotations_ignores_outliers_and_shrinks_with_ridge() -> None:
    rng = np.random.default_rng(0)
    lam_deltas = torch.from_numpy(rng.normal(size=(400, 4))).float()
    true = torch.from_numpy(rng.normal(size=(4, 3))).float() / 100
    rotations = lam_deltas @ true + torch.from_numpy(rng.normal(size=(400, 3))).float() / 1000
    rotations[::20] += 1  # lost tracks
    torch.testing.assert_close(fit_rotations(lam_deltas, rotations, 1.0), true, atol=5e-4, rtol=0)
    assert fit_rotations(lam_deltas, rotations, 1e9).abs().max() < 1e-4


@pytest.fixture
def rotating_run(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run of the stage alone, from weights whose basis rotates the face, with an exact tracker."""
    torch.manual_seed(0)
    model, rng = Export3D(tiny.model), np.random.default_rng(1)
    assert model.flow is not None
    centred = FACE - FACE.mean(0)
    fields = [np.cross(w, centred) for w in rng.normal(size=(tiny.model.basis, 3)) / 300]
    model.flow.basis.copy_(torch.from_numpy(np.stack(fields)))
    save_weights(tmp_path / "init.safetensors", model.state_dict(), tiny.model, {})
    render, true_rotations = PoseDebiasStage.render_expressions, []

    def render_and_remember(
        self: PoseDebiasStage, batch: Batch, row: int, beta: Tensor
    ) -> tuple[Tensor, Tensor, list[np.ndarray]]:
        source_lam, lam, frames = render(self, batch, row, beta)
        lam_deltas = torch.cat([source_lam, lam]) - source_lam
        deformed = self.flow.deform_landmarks(torch.from_numpy(FACE).float()[None], lam_deltas)
        true_rotations[:] = [rigid_rotation(FACE, points) for points in deformed.double().numpy()]
        return source_lam, lam, frames

    monkeypatch.setattr(PoseDebiasStage, "render_expressions", render_and_remember)
    monkeypatch.setattr(
        PoseDebiasStage, "track_rotations", lambda self, frames: (np.ones(len(frames), bool), np.stack(true_rotations))
    )
    stage_config = PoseDebiasConfig(steps=4, batch=4, ridge=1e-3)
    return replace(
        tiny,
        stages=("pose_debias",),
        init=str(tmp_path / "init.safetensors"),
        pose_debias=stage_config,
        checkpoint_every=1,
    )


def rotations_of(basis: Tensor) -> np.ndarray:
    """Return the rotation vectors (n, 3) of displacement fields."""
    return np.stack([rotation_log(rigid_rotation(FACE, FACE + field)) for field in basis.double().numpy()])


def test_train_removes_rotation_from_the_basis_only(rotating_run: TrainConfig) -> None:
    before = load_weights(rotating_run.init)[0]
    done = train(rotating_run)
    after, _, record = load_weights(done.weights)
    assert (done.stage, done.step, done.finished, record["pose_debias_steps"]) == ("pose_debias", 4, True, 4)
    old, new = (np.abs(rotations_of(state["flow.basis"])).max() for state in (before, after))
    assert old > 0.002 and new < 0.1 * old
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"flow.basis"}


def test_resume_is_exact(rotating_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(rotating_run)
    broken = replace(rotating_run, run=str(tmp_path / "broken"))
    for _ in range(2):  # stopped in the first round and after it
        with monkeypatch.context() as patch:
            start = load_state(Path(broken.run))
            step = 0 if start is None else int(start[1]["step"])
            patch.setattr(PoseDebiasStage, "measure", stopping_after(PoseDebiasStage.measure, patch))
            stopped = train(broken)
        assert (stopped.finished, stopped.step) == (False, step + 1)
    assert train(broken).finished
    a, b = (load_weights(Path(folder) / "weights.safetensors")[0] for folder in (rotating_run.run, broken.run))
    assert torch.equal(a["flow.basis"], b["flow.basis"])


def stopping_after(measure: object, patch: pytest.MonkeyPatch) -> object:
    """Return `measure` that ends the run's time."""

    def once(self: PoseDebiasStage, *batch: object) -> None:
        measure(self, *batch)  # type: ignore[operator]
        patch.setattr(trainer.TrainingRun, "out_of_time", lambda run: True)

    return once


def test_stage_without_faces_follows_the_other_stages(tiny: TrainConfig) -> None:
    done = train(
        replace(tiny, stages=("reconstruction", "pose_debias"), steps=1, pose_debias=PoseDebiasConfig(steps=2, batch=1))
    )
    assert (done.stage, done.step, done.finished) == ("pose_debias", 2, True)  # grey images: no face is found
    record = load_weights(done.weights)[2]
    assert (record["steps"], record["pose_debias_steps"]) == (1, 2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stages": ["pose_debias"]}, "init"),
        ({"model": {"flow": False}, "stages": ["reconstruction", "pose_debias"]}, r"model\.flow"),
        ({"pose_debias": {"batch": 0}}, r"pose_debias\.batch"),
        ({"pose_debias": {"weight": [1, 2]}, "data": {"path": ["a"]}}, r"pose_debias\.weight"),
    ],
)
def test_invalid_config_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_train_config({"preset": "tiny", **change})
