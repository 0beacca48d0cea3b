"""Metrics that compare images, landmarks and motions: pure functions of NumPy arrays.

Images are uint8 (H, W, 3) RGB; landmarks are in crop units, (T, 478, 3); distances are in pixels of a 256 px image.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import yaml

from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, BetaStatistics, region_of
from export3d_cli.core.face.landmarks import MEASURE_POINTS, NUM_MESH_VERTICES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import head_pose, rotation_log, yaw_pitch_roll


@dataclass(frozen=True)
class Metric:
    """How a metric is named and printed."""

    better: Literal["higher", "lower", ""]  # "": neither
    unit: str
    digits: int
    description: str


# all columns of the scores, in the order of the tables
_TABLE = yaml.safe_load(Path(__file__).with_name("metrics.yaml").read_text(encoding="utf-8"))
METRICS = {name: Metric(**row) for name, row in _TABLE.items()}
REFERENCE_SIZE_PX = 256  # landmark distances refer to images of this side, whatever the actual size
_SSIM_SIGMA, _SSIM_RADIUS = 1.5, 5  # Gaussian window of side 11
BOOTSTRAP_RESAMPLES = 4000
EYE_DISTANCE_PX = 64  # distance of the eyes in a face of 256 px, for the places of irises
# Blendshapes that stand for action units: those that the tracker reports, without gaze; present from this weight on.
NOT_REPORTED = ("cheekPuff", "cheekSquint", "noseSneer", "tongueOut")
ACTION_UNITS = [
    k for k, name in enumerate(ARKIT_NAMES) if region_of(name) != "gaze" and not name.startswith(NOT_REPORTED)
]
ACTION_UNIT_PRESENT = 0.2
IRIS_RADIUS = 10.5 / 63  # iris to centre of rotation, 10.5 mm, over the inter-ocular distance, 63 mm


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 100 (for equal images)."""
    return min(100.0, cv2.PSNR(a, b))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the structural similarity (Wang et al. 2004), mean over RGB: Gaussian window of side 11, sigma 1.5."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    kernel = np.exp(-0.5 * (np.arange(-_SSIM_RADIUS, _SSIM_RADIUS + 1) / _SSIM_SIGMA) ** 2)
    kernel /= kernel.sum()
    inside = slice(_SSIM_RADIUS, -_SSIM_RADIUS)

    def blur(image: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(image, cv2.CV_64F, kernel, kernel)[inside, inside]

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


def landmark_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return AKD: the mean image-plane distance of landmarks (T, N, 3), in px at 256."""
    return float(np.linalg.norm((a - b)[..., :2], axis=-1).mean() * REFERENCE_SIZE_PX)


def mean_abs_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean absolute difference; for blendshapes (T, 52) this is AED."""
    return float(np.abs(a - b).mean())


def action_unit_consistency(a: np.ndarray, b: np.ndarray) -> float:
    """Return AUCON of expressions (T, 64): the fraction of action units that are present in both or in neither."""
    return float(np.mean((a[:, ACTION_UNITS] > ACTION_UNIT_PRESENT) == (b[:, ACTION_UNITS] > ACTION_UNIT_PRESENT)))


def pose_rmse(a: np.ndarray, b: np.ndarray) -> float:
    """Return PRMSE: the root mean square difference of yaw, pitch and roll, degrees, of cameras (T, 25)."""
    return float(np.sqrt(np.mean((yaw_pitch_roll(a) - yaw_pitch_roll(b)) ** 2)))


def neutral_vertices(motion: Motion) -> np.ndarray:
    """Return the mesh's vertices (T, 468, 3) in inter-ocular distances about their mean, without the expression."""
    statistics, points = BetaStatistics.load(), motion.head_landmarks.astype(np.float64)
    left, right = (points[:, list(corners)].mean(1) for corners in MEASURE_POINTS.eye_corners)
    weights = (motion.beta - statistics.mean) @ statistics.slopes  # (T, K) of the expression's modes
    points = points / np.linalg.norm(left - right, axis=-1)[:, None, None]
    points = (points - np.tensordot(weights, statistics.modes, 1))[:, :NUM_MESH_VERTICES]
    return points - points.mean(1, keepdims=True)


def vertex_distance(a: Motion, b: Motion) -> float:
    """Return AVD: the mean distance of the vertices of two faces without expression, in inter-ocular distances."""
    return float(np.linalg.norm(neutral_vertices(a) - neutral_vertices(b), axis=-1).mean())


def pose_vector(camera: np.ndarray) -> np.ndarray:
    """Return the poses (T, 6) that APD compares: rotation vector in radians, centre in the camera frame."""
    rotation, centre = head_pose(camera)
    return np.concatenate([rotation_log(rotation), centre], axis=-1)


def rotation_angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the angle (T,) in degrees between the head rotations seen by two sequences of cameras (T, 25)."""
    return np.degrees(np.linalg.norm(rotation_log(head_pose(a)[0] @ np.swapaxes(head_pose(b)[0], -1, -2)), axis=-1))


def gaze_direction(iris: np.ndarray) -> np.ndarray:
    """Return gaze directions in the head frame: unit vectors (..., 3), x to the image's right, y down, z backwards.

    `iris` (..., 2) is the offset of an iris from the middle of its eye's corners, in inter-ocular distances.
    """
    xy = np.asarray(iris, dtype=np.float64) / IRIS_RADIUS
    xy = xy / np.maximum(1.0, np.linalg.norm(xy, axis=-1, keepdims=True))  # an eye turns by at most 90 degrees
    z = -np.sqrt(np.maximum(0.0, 1 - (xy**2).sum(-1, keepdims=True)))
    return np.concatenate([xy, z], axis=-1)


def gaze_error(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean angle in degrees between gaze directions (..., 3)."""
    sine, cosine = np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1)
    return float(np.degrees(np.arctan2(sine, cosine)).mean())


def eye_tracking_error(a: np.ndarray, b: np.ndarray) -> float:
    """Return ET: the mean distance, px, of irises (..., 2) as in `gaze_direction`, in aligned faces of 256 px."""
    return float(np.linalg.norm(a - b, axis=-1).mean() * EYE_DISTANCE_PX)


def flicker(result: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean |second difference| over time of `result` - `truth`, uint8 (T, H, W, 3), T >= 3, in levels."""
    error = result.astype(np.float32) - truth.astype(np.float32)
    return float(np.abs(np.diff(error, n=2, axis=0)).mean())


def excess_jitter(result: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean second difference of landmarks (T, 478, 3), T >= 3, minus that of the truth, in px at 256."""
    a, b = (np.linalg.norm(np.diff(x[..., :2], n=2, axis=0), axis=-1).mean() for x in (result, truth))
    return float((a - b) * REFERENCE_SIZE_PX)


def correlation_and_slope(truth: np.ndarray, result: np.ndarray, min_std: float) -> tuple[float, float]:
    """Return Pearson's correlation of two series (T,) and the slope of `result` over `truth`.

    Both are NaN if the standard deviation of `truth` is below `min_std`. The correlation is 0 for a result that hardly
    moves (less than a tenth of `min_std`), not that of its noise.
    """
    if len(truth) < 3 or truth.std() < min_std:
        return float("nan"), float("nan")
    covariance = float(np.mean((truth - truth.mean()) * (result - result.mean())))
    moves = result.std() >= min_std / 10
    return covariance / float(truth.std() * result.std()) if moves else 0.0, covariance / float(truth.var())


def finite_mean(values: list[float]) -> float:
    """Return the mean of the finite values; NaN if there is none."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of the finite values; NaN for fewer than two."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if len(finite) < 2:
        return float("nan"), float("nan")
    rows = np.random.default_rng(seed).integers(len(finite), size=(BOOTSTRAP_RESAMPLES, len(finite)))
    low, high = np.quantile(finite[rows].mean(1), [0.025, 0.975])
    return float(low), float(high)
