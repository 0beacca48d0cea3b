"""The fit to 68 points, on exact projections of a known face."""

from __future__ import annotations

import numpy as np
import pytest

from export3d_cli.core.face import fan_tracker as fitting
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.fan_tracker import OBSERVABLE, FaceBasis, FaceFit, fit_frames, fit_neutral
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.landmarks import IBUG68
from export3d_cli.core.runtime.camera import rotation_from_angles
from export3d_cli.core.runtime.weights import load_arrays, resolve_weights

MIRROR = [IBUG68.index(load_canonical_face().mirror[i]) for i in IBUG68]
POSES = [(0, 0, 0), (30, 0, 0), (-40, 10, 5), (10, -20, -15), (0, 15, 80)]  # yaw, pitch, roll in degrees


@pytest.fixture(scope="module")
def basis() -> FaceBasis:
    arrays = load_arrays(resolve_weights("fan_basis"))
    return FaceBasis(*(arrays[name].astype(np.float64) for name in ("mean", "identity", "expression")))


@pytest.fixture(scope="module")
def person(basis: FaceBasis) -> np.ndarray:
    """Return the neutral face of a person, (68, 3)."""
    size = np.random.default_rng(3).normal(size=len(basis.identity))
    return basis.mean + np.tensordot(0.8 * size, basis.identity, 1)


def project_face(basis: FaceBasis, neutral: np.ndarray, poses: list[tuple[float, ...]], **expression: float) -> FaceFit:
    """Return the face in each pose, with the given coefficients."""
    coefficients = np.zeros((len(poses), len(ARKIT_NAMES)))
    for name, value in expression.items():
        coefficients[:, [i for i, arkit_name in enumerate(ARKIT_NAMES) if arkit_name.startswith(name)]] = value
    rotation = np.stack([rotation_from_angles(*pose) for pose in poses])
    centre = np.array([0.02, -0.03, 2.6]) + 0.01 * np.arange(len(poses))[:, None]
    return FaceFit(rotation, centre, coefficients, basis.deform(neutral, coefficients))


def rotation_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the angles between rotations in degrees."""
    return np.degrees(np.arccos(((np.trace(np.swapaxes(a, 1, 2) @ b, axis1=1, axis2=2) - 1) / 2).clip(-1, 1)))


@pytest.mark.parametrize(
    "expression",
    [{}, {"jawOpen": 0.6}, {"eyeBlink": 0.9}, {"mouthSmile": 0.8, "browOuterUp": 0.8}, {"mouthPucker": 0.8}],
)
def test_fit_frames_recovers_pose_and_coefficients(
    basis: FaceBasis, person: np.ndarray, expression: dict[str, float]
) -> None:
    truth = project_face(basis, person, POSES, **expression)
    fitted = fit_frames(truth.project(), basis, person)
    assert rotation_distance(truth.rotation, fitted.rotation).max() < 1.5
    np.testing.assert_allclose(fitted.centre, truth.centre, atol=0.03)
    assert np.abs(fitted.coefficients - truth.coefficients).max() < 0.3
    assert np.abs(fitted.coefficients - truth.coefficients).mean() < 0.02
    assert np.linalg.norm(fitted.project() - truth.project(), axis=-1).mean() < 0.5 / 256


def test_fit_frames_without_priors_is_exact(
    basis: FaceBasis, person: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SPARSITY_WEIGHT": 0,
        "COEFFICIENT_SD": 1e4,
        "GAUSS_NEWTON_STEPS": 12,
        "DESCENT_SWEEPS": 150,
    }.items():
        monkeypatch.setattr(fitting, name, value)
    truth = project_face(basis, person, POSES[:4], jawOpen=0.5, eyeBlink=0.6, mouthSmile=0.4)
    fitted = fit_frames(truth.project(), basis, person)
    np.testing.assert_allclose(fitted.project(), truth.project(), atol=1e-4)
    assert rotation_distance(truth.rotation, fitted.rotation).max() < 0.1
    assert np.abs(fitted.coefficients - truth.coefficients).max() < 0.05


def test_fit_neutral_recovers_the_person_from_a_moving_face(basis: FaceBasis, person: np.ndarray) -> None:
    poses = [(yaw, 5.0 * np.sin(yaw), 0.0) for yaw in range(-30, 31, 5)]
    parts = [project_face(basis, person, poses[i::3], jawOpen=0.3 * i, eyeBlink=0.5 * (2 - i)) for i in range(3)]
    fitted = fit_neutral(np.concatenate([part.project() for part in parts]), basis)
    before = np.linalg.norm(basis.mean - person, axis=1).mean()
    assert np.linalg.norm(fitted - person, axis=1).mean() < 0.5 * before


def test_fit_frames_keeps_coefficients_in_bounds_with_noise(basis: FaceBasis) -> None:
    rng = np.random.default_rng(0)
    points = project_face(basis, basis.mean, POSES).project() + rng.normal(0, 0.03, (len(POSES), 68, 2))
    fitted = fit_frames(points, basis, basis.mean)
    assert fitted.coefficients.min() >= 0
    assert fitted.coefficients.max() <= 1
    assert (fitted.coefficients[:, ~OBSERVABLE] == 0).all()
    assert np.isfinite(fitted.centre).all()


def test_fit_frames_of_a_mirrored_face_mirrors_coefficients(basis: FaceBasis) -> None:
    truth = project_face(basis, basis.mean, [(20, 5, 3)], mouthSmileLeft=0.8, eyeBlinkRight=0.7)
    points = truth.project()
    mirrored = points[:, MIRROR] * [-1, 1] + [1, 0]
    one, two = (fit_frames(p, basis, basis.mean).coefficients[0] for p in (points, mirrored))
    swap = {"Left": "Right", "Right": "Left"}
    for i, name in enumerate(ARKIT_NAMES):
        side = next((side for side in swap if name.endswith(side)), None)
        j = i if side is None else ARKIT_NAMES.index(name.removesuffix(side) + swap[side])
        assert two[j] == pytest.approx(one[i], abs=0.05), name


def test_shipped_basis_matches_the_canonical_face_and_is_symmetric(basis: FaceBasis) -> None:
    canonical = load_canonical_face().points[list(IBUG68)]
    assert np.linalg.norm(basis.mean - canonical, axis=1).mean() < 0.02  # 1 cm
    np.testing.assert_allclose(basis.mean[MIRROR], basis.mean * [-1, 1, 1], atol=2e-3)
    jaw = basis.expression[ARKIT_NAMES.index("jawOpen")]
    assert jaw[8, 1] > 0.03  # the chin goes down
    assert np.abs(jaw[36:48]).max() < 1e-3  # the eyes stay
