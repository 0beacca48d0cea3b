"""68 landmarks -> head pose and ARKit's coefficients: a bounded, regularised least-squares fit of a linear face.

A face is mean + identity modes + expression directions, (68, 3) in the head frame, seen by the camera of the head crop.
Each step linearises the projection, takes the six numbers of the pose out of the normal equations, and finds the
coefficients in [0, 1] by coordinate descent. The face at rest is one for a whole clip and is found by `fit_neutral`.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export3d_cli.core.face.beta import ARKIT_NAMES
from export3d_cli.core.runtime.camera import FOCAL, RADIUS, rotation_exp
from export3d_cli.core.runtime.errors import WeightsError

GAUSS_NEWTON_STEPS, DESCENT_SWEEPS = 5, 12  # linearisations, and passes of coordinate descent in each
NEUTRAL_FRAMES, NEUTRAL_ROUNDS = 48, 6  # frames that the face at rest is found from, and times both fits take turns
OFF_MODEL_SD = 0.004  # head-frame units by which each point of a person may lie off the identity modes
SPARSITY_WEIGHT = 1.5  # cost of a coefficient of 1, in squared deviations: what is not seen to move stays at rest
COEFFICIENT_SD = 0.7  # expected size of coefficients
# Directions that 68 points hardly show, or show as another's: they stay 0.
UNOBSERVED_PREFIXES = ("cheekPuff", "cheekSquint", "eyeLook", "jawForward", "noseSneer", "tongueOut")
OBSERVABLE = np.array([not name.startswith(UNOBSERVED_PREFIXES) for name in ARKIT_NAMES])
# Expected deviation of each point, in crop units: of jaw sides, chin, brows, nose, eyes and lips.
LANDMARK_SD = np.repeat([0.02, 0.01, 0.02, 0.006, 0.005, 0.003, 0.004], [6, 5, 6, 10, 9, 12, 20])


@dataclass(frozen=True)
class FaceBasis:
    """A linear face of 68 points in the head frame."""

    mean: np.ndarray  # (68, 3)
    identity: np.ndarray  # (K, 68, 3), a standard deviation each
    expression: np.ndarray  # (52, 68, 3), in the order of ARKIT_NAMES

    @classmethod
    def load(cls, path: Path) -> FaceBasis:
        """Read `fan_basis.npz`; raises `WeightsError` for a file that is not one."""
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
                basis = cls(*(data[name].astype(np.float64) for name in ("mean", "identity", "expression")))
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise WeightsError(f"{path} holds no basis of 68 points ({error}): install export3d-cli again") from error
        shapes = basis.mean.shape, basis.identity.shape[1:], basis.expression.shape
        if shapes != ((68, 3), (68, 3), (52, 68, 3)):
            raise WeightsError(f"{path} holds a basis of shapes {shapes}: install export3d-cli again")
        return basis

    def deform(self, neutral: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """The face at rest (68, 3) and coefficients (F, 52) -> points (F, 68, 3)."""
        points: np.ndarray = neutral + np.tensordot(coefficients, self.expression, 1)
        return points


@dataclass(frozen=True)
class FaceFit:
    """What was fitted to F frames."""

    rotation: np.ndarray  # (F, 3, 3), head to camera
    centre: np.ndarray  # (F, 3), the head frame's origin in the camera frame
    coefficients: np.ndarray  # (F, 52) in [0, 1]
    shape: np.ndarray  # (F, 68, 3), head frame

    def project(self) -> np.ndarray:
        """The shape in crop units, (F, 68, 2)."""
        seen = self._camera_points()
        return FOCAL * seen[..., :2] / seen[..., 2:] + 0.5

    def depth(self) -> np.ndarray:
        """The shape's depth in the camera frame, (F, 68)."""
        return self._camera_points()[..., 2]

    def _camera_points(self) -> np.ndarray:
        return np.einsum("fij,fnj->fni", self.rotation, self.shape) + self.centre[:, None]


def fit_frames(points: np.ndarray, basis: FaceBasis, neutral: np.ndarray) -> FaceFit:
    """Pose and coefficients of each frame by itself.

    Args:
        points: (F, 68, 2), crop units.
        basis: how faces move.
        neutral: the face at rest, (68, 3).
    """
    coefficients = np.zeros((len(points), len(ARKIT_NAMES)))
    shape = basis.deform(neutral, coefficients)
    fit = FaceFit(*_initial_pose(points, shape), coefficients, shape)
    for step in range(GAUSS_NEWTON_STEPS):
        left, by_pose, by_point = _linearise(points, fit)
        columns = _mode_jacobian(by_point, basis.expression[OBSERVABLE])
        if step == 0:  # only the pose: what is far off would pass for an expression
            columns *= 0
        was = fit.coefficients[:, OBSERVABLE]
        now = _solve_bounded(*_eliminate_pose(by_pose, columns, left + (columns @ was[..., None])[..., 0]), was)
        left = left - (columns @ (now - was)[..., None])[..., 0]
        move = np.linalg.solve(_transpose(by_pose) @ by_pose, _transpose(by_pose) @ left[..., None])[..., 0]
        coefficients = np.zeros_like(fit.coefficients)
        coefficients[:, OBSERVABLE] = now
        fit = FaceFit(
            rotation_exp(move[:, :3]) @ fit.rotation, fit.centre + move[:, 3:], coefficients,
            basis.deform(neutral, coefficients),
        )  # fmt: skip
    return fit


def fit_neutral(points: np.ndarray, basis: FaceBasis) -> np.ndarray:
    """The face at rest (68, 3) that, expression and pose apart, explains the frames (F, 68, 2) of a clip best."""
    points = points[np.unique(np.linspace(0, len(points) - 1, NEUTRAL_FRAMES).round().astype(int))]
    modes = np.concatenate([basis.identity, OFF_MODEL_SD * np.eye(204).reshape(204, 68, 3)])
    identity = np.zeros(len(modes))
    neutral = basis.mean
    for _ in range(NEUTRAL_ROUNDS):
        left, by_pose, by_point = _linearise(points, fit_frames(points, basis, neutral))
        columns = _mode_jacobian(by_point, modes)
        normal, pull = _eliminate_pose(by_pose, columns, left + columns @ identity)
        # the mean, not the sum: frames of one clip err alike, so that many of them must not outvote the prior
        identity = np.linalg.solve(normal.mean(0) + np.eye(len(modes)), pull.mean(0))
        neutral = basis.mean + np.tensordot(identity, modes, 1)
    return neutral


def _initial_pose(points: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A first guess: turned in the image only, as far away as the face's size tells."""
    a, b = shape[..., :2] - shape[..., :2].mean(1, keepdims=True), points - points.mean(1, keepdims=True)
    along = np.einsum("fni,fni->f", a, b)
    across = np.einsum("fn,fn->f", a[..., 0], b[..., 1]) - np.einsum("fn,fn->f", a[..., 1], b[..., 0])
    o = np.zeros_like(along)
    rotation = rotation_exp(np.stack([o, o, np.arctan2(across, along)], axis=1))
    scale = np.hypot(along, across) / (a**2).sum((1, 2))  # crop units a head-frame unit
    depth = FOCAL / np.maximum(scale, 0.1 * FOCAL / RADIUS)
    xy = (points.mean(1) - 0.5) / FOCAL * depth[:, None]
    return rotation, np.column_stack([xy, depth]) - np.einsum("fij,fj->fi", rotation, shape.mean(1))


def _linearise(points: np.ndarray, fit: FaceFit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The projection around a fit, each row divided by its expected deviation.

    Returns:
        what is left to explain (F, 136), derivatives by the pose (F, 136, 6), by each point of the head (F, 68, 2, 3).
    """
    turned = np.einsum("fij,fnj->fni", fit.rotation, fit.shape)
    x, y, z = np.moveaxis(turned + fit.centre[:, None], -1, 0)
    o = np.zeros_like(x)
    by_place = np.stack([FOCAL / z, o, -FOCAL * x / z**2, o, FOCAL / z, -FOCAL * y / z**2], axis=-1)
    by_place = by_place.reshape(*x.shape, 2, 3) / LANDMARK_SD[:, None, None]
    a, b, c = np.moveaxis(turned, -1, 0)  # a small turn w moves a point by w x point
    by_turn = by_place @ np.stack([o, c, -b, -c, o, a, b, -a, o], axis=-1).reshape(*x.shape, 3, 3)
    left = (points - fit.project()) / LANDMARK_SD[:, None]
    by_pose = np.concatenate([by_turn, by_place], axis=-1).reshape(len(x), 136, 6)
    return left.reshape(len(x), 136), by_pose, by_place @ fit.rotation[:, None]


def _mode_jacobian(by_point: np.ndarray, modes: np.ndarray) -> np.ndarray:
    """Derivatives by points (F, 68, 2, 3) and modes (K, 68, 3) -> derivatives by modes, (F, 136, K)."""
    return (by_point @ modes.transpose(1, 2, 0)).reshape(len(by_point), 136, len(modes))


def _eliminate_pose(by_pose: np.ndarray, columns: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normal equations (F, K, K), (F, K) of the columns, less what a change of pose would explain as well."""
    shared = _transpose(by_pose) @ columns  # (F, 6, K)
    taken = np.linalg.solve(_transpose(by_pose) @ by_pose, shared)
    pull = _transpose(columns) @ target[..., None] - _transpose(taken) @ (_transpose(by_pose) @ target[..., None])
    return _transpose(columns) @ columns - _transpose(taken) @ shared, pull[..., 0]


def _solve_bounded(normal: np.ndarray, pull: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Coefficients (F, K) in [0, 1] with the least squared error, size and sum, by coordinate descent."""
    K = normal.shape[-1]
    normal = normal + np.eye(K) / COEFFICIENT_SD**2
    now = start.copy()
    for _ in range(DESCENT_SWEEPS):
        for k in range(K):
            downhill = pull[:, k] - SPARSITY_WEIGHT - (normal[:, k] * now).sum(-1)
            now[:, k] = (now[:, k] + downhill / normal[:, k, k]).clip(0, 1)
    return now


def _transpose(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2)
