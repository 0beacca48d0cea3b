"""How alike two pictures, two faces or two motions are: pure functions over NumPy arrays.

Images are uint8 (H, W, 3) RGB; landmarks are in crop units, (T, 478, 3); distances are told in pixels of a 256 image.
"""

from __future__ import annotations

import cv2
import numpy as np

PIXELS = 256  # image side in which landmark distances are told, whatever the images' own
# The 68 points of iBUG (jaw, brows, nose, eyes, outer and inner lips) among MediaPipe's 478, as commonly chosen.
IBUG68 = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389, 71, 63, 105, 66, 107, 336, 296,
    334, 293, 301, 168, 197, 5, 4, 75, 97, 2, 326, 305, 33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380, 61,
    39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,
)  # fmt: skip
# ArcFace's template at 112 pixels, in the image's order: left eye, right eye, nose, left and right mouth corner.
ARCFACE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
ARCFACE_SIDE = 112
_SIGMA, _RADIUS = 1.5, 5  # SSIM's Gaussian window of side 11


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, at most 100 (of equal images)."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return min(100.0, 10 * float(np.log10(255**2 / error))) if error else 100.0


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), mean over RGB: Gaussian window of side 11, sigma 1.5."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    kernel = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    kernel /= kernel.sum()

    def blur(image: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(image, cv2.CV_64F, kernel, kernel)[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


def landmark_distance(a: np.ndarray, b: np.ndarray, points: tuple[int, ...] | None = None) -> float:
    """AKD: mean distance of (T, 478, 3) landmarks in the image plane, or of some of the points, in pixels at 256."""
    chosen = slice(None) if points is None else list(points)
    return float(np.linalg.norm((a[:, chosen] - b[:, chosen])[..., :2], axis=-1).mean() * PIXELS)


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference; of blendshapes (T, 52) this is AED, of angles in degrees the pose error."""
    return float(np.abs(a - b).mean())


def correlation(truth: np.ndarray, result: np.ndarray, least: float) -> float:
    """Pearson's correlation of two series (T,); NaN where the truth's deviation stays below `least`.

    A result that hardly moves (a tenth of `least`) follows nothing: 0, not the correlation of its noise.
    """
    if len(truth) < 3 or truth.std() < least:
        return float("nan")
    if result.std() < least / 10:
        return 0.0
    return float(np.corrcoef(truth, result)[0, 1])


def similarity(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift that lay points (N, 2) on `target` (N, 2) in least squares -> (2, 3)."""
    x, y = points[:, 0], points[:, 1]
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate([np.stack([x, -y, one, zero], axis=1), np.stack([y, x, zero, one], axis=1)])
    a, b, tx, ty = np.linalg.lstsq(rows, np.concatenate([target[:, 0], target[:, 1]]), rcond=None)[0]
    return np.array([[a, -b, tx], [b, a, ty]])


def arcface_crop(image: np.ndarray, five: np.ndarray) -> np.ndarray:
    """The face whose five points (5, 2) lie at pixels of `image`, laid on ArcFace's template: uint8 (112, 112, 3)."""
    return cv2.warpAffine(image, similarity(five, ARCFACE), (ARCFACE_SIDE, ARCFACE_SIDE), flags=cv2.INTER_LINEAR)


def mean_of(values: list[float]) -> float:
    """Mean of what is a number; NaN of nothing."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
