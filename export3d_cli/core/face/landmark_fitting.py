"""Head pose and ARKit coefficients from 68 landmarks: a bounded, regularised least-squares fit of a linear face model.

A face is mean + identity modes + expression directions, (68, 3) in the head frame, projected by the crop's camera.
Each step linearises the projection, eliminates the six pose parameters from the normal equations, and solves for the
coefficients in [0, 1] by coordinate descent. `fit_neutral` fits one neutral face to a whole clip.
"""

from dataclasses import dataclass

import numpy as np

from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.runtime.camera import FOCAL, RADIUS, rotation_exp

GAUSS_NEWTON_STEPS, DESCENT_SWEEPS = 5, 12  # linearisations; passes of coordinate descent in each
NEUTRAL_FRAMES, NEUTRAL_ROUNDS = 48, 6  # frames used for the neutral face; alternations of both fits
OFF_MODEL_SD = 0.004  # standard deviation of a person's points from the identity modes, head-frame units
SPARSITY_WEIGHT = 1.5  # L1 weight: cost of a coefficient of 1 in squared deviations
COEFFICIENT_SD = 0.7  # standard deviation of the prior of coefficients
# Coefficients that 68 points hardly show, or confuse with others: they stay 0.
UNOBSERVED_PREFIXES = ("cheekPuff", "cheekSquint", "eyeLook", "jawForward", "noseSneer", "tongueOut")
OBSERVABLE = np.array([not name.startswith(UNOBSERVED_PREFIXES) for name in ARKIT_NAMES])
# Standard deviation of each point, crop units: sides of the jaw, chin, brows, nose, eyes and lips.
LANDMARK_SD = np.repeat([0.02, 0.01, 0.02, 0.006, 0.005, 0.003, 0.004], [6, 5, 6, 10, 9, 12, 20])


@dataclass(frozen=True)
class FaceBasis:
    """A linear face model of 68 points in the head frame; `fan_basis.npz` holds it."""

    mean: np.ndarray  # (68, 3)
    identity: np.ndarray  # (K, 68, 3), one standard deviation each
    expression: np.ndarray  # (52, 68, 3), in the order of ARKIT_NAMES

    def deform(self, neutral: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """Return the points (F, 68, 3) of a neutral face (68, 3) with coefficients (F, 52)."""
        return neutral + np.tensordot(coefficients, self.expression, 1)


@dataclass(frozen=True)
class FaceFit:
    """A fit to F frames."""

    rotation: np.ndarray  # (F, 3, 3), head to camera
    centre: np.ndarray  # (F, 3), the head frame's origin in the camera frame
    coefficients: np.ndarray  # (F, 52) in [0, 1]
    shape: np.ndarray  # (F, 68, 3), head frame

    def project(self) -> np.ndarray:
        """Return the shape in crop units, (F, 68, 2)."""
        points = self._camera_points()
        return FOCAL * points[..., :2] / points[..., 2:] + 0.5

    def depth(self) -> np.ndarray:
        """Return the shape's depth in the camera frame, (F, 68)."""
        return self._camera_points()[..., 2]

    def _camera_points(self) -> np.ndarray:
        return np.einsum("fij,fnj->fni", self.rotation, self.shape) + self.centre[:, None]


def fit_frames(points: np.ndarray, basis: FaceBasis, neutral: np.ndarray) -> FaceFit:
    """Fit pose and coefficients of each frame (F, 68, 2), crop units, on its own to a person's neutral face (68, 3)."""
    coefficients = np.zeros((len(points), len(ARKIT_NAMES)))
    shape = basis.deform(neutral, coefficients)
    fit = FaceFit(*_initial_pose(points, shape), coefficients, shape)
    for step in range(GAUSS_NEWTON_STEPS):
        residual, by_pose, by_point = _linearise(points, fit)
        jacobian = _mode_jacobian(by_point, basis.expression[OBSERVABLE])
        if step == 0:  # pose only: a large pose error would be fitted as an expression
            jacobian *= 0
        previous = fit.coefficients[:, OBSERVABLE]
        target = residual + (jacobian @ previous[..., None])[..., 0]
        current = _solve_bounded(*_eliminate_pose(by_pose, jacobian, target), previous)
        residual = residual - (jacobian @ (current - previous)[..., None])[..., 0]
        pose_step = np.linalg.solve(by_pose.mT @ by_pose, by_pose.mT @ residual[..., None])[..., 0]
        coefficients = np.zeros_like(fit.coefficients)
        coefficients[:, OBSERVABLE] = current
        fit = FaceFit(rotation_exp(pose_step[:, :3]) @ fit.rotation, fit.centre + pose_step[:, 3:], coefficients,
                      basis.deform(neutral, coefficients))  # fmt: skip
    return fit


def fit_neutral(points: np.ndarray, basis: FaceBasis) -> np.ndarray:
    """Fit the neutral face (68, 3) of a clip to its frames (F, 68, 2), whatever their expressions and poses."""
    points = points[np.unique(np.linspace(0, len(points) - 1, NEUTRAL_FRAMES).round().astype(int))]
    modes = np.concatenate([basis.identity, OFF_MODEL_SD * np.eye(204).reshape(204, 68, 3)])
    identity = np.zeros(len(modes))
    neutral = basis.mean
    for _ in range(NEUTRAL_ROUNDS):
        residual, by_pose, by_point = _linearise(points, fit_frames(points, basis, neutral))
        jacobian = _mode_jacobian(by_point, modes)
        normal, rhs = _eliminate_pose(by_pose, jacobian, residual + jacobian @ identity)
        # the mean, not the sum: errors of one clip's frames are correlated and must not outweigh the prior
        identity = np.linalg.solve(normal.mean(0) + np.eye(len(modes)), rhs.mean(0))
        neutral = basis.mean + np.tensordot(identity, modes, 1)
    return neutral


def _initial_pose(points: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a first guess of rotation and centre: in-plane rotation only, distance from the size of the face."""
    a, b = shape[..., :2] - shape[..., :2].mean(1, keepdims=True), points - points.mean(1, keepdims=True)
    along = np.einsum("fni,fni->f", a, b)
    across = np.einsum("fn,fn->f", a[..., 0], b[..., 1]) - np.einsum("fn,fn->f", a[..., 1], b[..., 0])
    zero = np.zeros_like(along)
    rotation = rotation_exp(np.stack([zero, zero, np.arctan2(across, along)], axis=1))
    scale = np.hypot(along, across) / (a**2).sum((1, 2))  # crop units per head-frame unit
    depth = FOCAL / np.maximum(scale, 0.1 * FOCAL / RADIUS)
    xy = (points.mean(1) - 0.5) / FOCAL * depth[:, None]
    return rotation, np.column_stack([xy, depth]) - np.einsum("fij,fj->fi", rotation, shape.mean(1))


def _linearise(points: np.ndarray, fit: FaceFit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return residuals (F, 136), derivatives by pose (F, 136, 6) and points (F, 68, 2, 3), in standard deviations."""
    rotated = np.einsum("fij,fnj->fni", fit.rotation, fit.shape)
    x, y, z = np.moveaxis(rotated + fit.centre[:, None], -1, 0)
    zero = np.zeros_like(x)
    by_translation = np.stack([FOCAL / z, zero, -FOCAL * x / z**2, zero, FOCAL / z, -FOCAL * y / z**2], axis=-1)
    by_translation = by_translation.reshape(*x.shape, 2, 3) / LANDMARK_SD[:, None, None]
    a, b, c = np.moveaxis(rotated, -1, 0)  # a small rotation w moves a point by w x point
    by_rotation = by_translation @ np.stack([zero, c, -b, -c, zero, a, b, -a, zero], axis=-1).reshape(*x.shape, 3, 3)
    residual = (points - fit.project()) / LANDMARK_SD[:, None]
    by_pose = np.concatenate([by_rotation, by_translation], axis=-1).reshape(len(x), 136, 6)
    return residual.reshape(len(x), 136), by_pose, by_translation @ fit.rotation[:, None]


def _mode_jacobian(by_point: np.ndarray, modes: np.ndarray) -> np.ndarray:
    """Return derivatives by modes (K, 68, 3) from those by points (F, 68, 2, 3), (F, 136, K)."""
    return (by_point @ modes.transpose(1, 2, 0)).reshape(len(by_point), 136, len(modes))


def _eliminate_pose(by_pose: np.ndarray, jacobian: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the normal equations (F, K, K), (F, K) of the modes with the pose eliminated (Schur complement)."""
    coupling = by_pose.mT @ jacobian  # (F, 6, K)
    solved = np.linalg.solve(by_pose.mT @ by_pose, coupling)
    rhs = jacobian.mT @ target[..., None] - solved.mT @ (by_pose.mT @ target[..., None])
    return jacobian.mT @ jacobian - solved.mT @ coupling, rhs[..., 0]


def _solve_bounded(normal: np.ndarray, rhs: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Minimise squared error plus L2 and L1 penalty over coefficients (F, K) in [0, 1], by coordinate descent."""
    K = normal.shape[-1]
    normal = normal + np.eye(K) / COEFFICIENT_SD**2
    current = start.copy()
    for _ in range(DESCENT_SWEEPS):
        for k in range(K):
            descent = rhs[:, k] - SPARSITY_WEIGHT - (normal[:, k] * current).sum(-1)
            current[:, k] = (current[:, k] + descent / normal[:, k, k]).clip(0, 1)
    return current
