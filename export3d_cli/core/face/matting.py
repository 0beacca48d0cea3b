"""Person matting: MediaPipe's selfie segmentation on LiteRT, refined."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.face.crop import Square
from export3d_cli.core.face.face_track import Face
from export3d_cli.core.face.tracker import LiteRTNetwork

FacePosition = tuple[float, float, float]  # x, y of a face's centre and its size, in sizes of the picture
_NETWORK_SIDE_PX = 256  # input and output side of the network
_BACKGROUND_CONFIDENCE, _PERSON_CONFIDENCE = 0.1, 0.5  # mapped to alpha 0 and 1: loose hair has low confidence
_MAX_HOLE_AREA = 1000  # holes in the person of fewer network pixels are filled as errors of the network
_EDGE_BLUR_SD = 1.3  # blur of the edge, network pixels
_GUIDED_RADIUS = 4  # window radius of the guided filter, pixels at half size
_GUIDED_EPS = 1e-3  # regulariser of the guided filter: squared colour difference that is ignored
_EDGE_EPS = 3e-4  # as `_GUIDED_EPS`, for the matte's edge
_EDGE_RANGE = (0.08, 0.92)  # filtered values that are background, and the person
_STRAND_RANGE = (0.2, 0.6)  # output of the guided filter mapped to alpha 0 and 1
_OTHER_FACE_DISTANCE = 0.5  # face sizes from which on another detection is another face
_PERSON_BORDER_WIDTH = 0.1  # face sizes over which alpha passes from one person to the next
_COLOUR_WINDOW_PX = 25  # window of the colour estimates, network pixels


class PersonMatting:
    """Computes the alpha of the person in pictures, uint8 (H, W, 3) RGB. Keeps no state: threads may share it."""

    def __init__(self, path: Path) -> None:
        """Load `selfie_segmentation.tflite`; raises `WeightsError` if it does not load."""
        self._network = LiteRTNetwork(path.read_bytes(), path, threads=1)

    def alpha(self, image: np.ndarray, faces: Sequence[FacePosition] = (), *, hair_strands: bool = False) -> np.ndarray:
        """Return the person's alpha of a picture, float32 (H, W) in [0, 1]; pixels of all `faces` but the first get 0.

        `hair_strands` adds loose hair, for a person who moves with the surroundings: elsewhere it would show as a rim.
        """
        height, width = image.shape[:2]
        small = cv2.resize(image, (_NETWORK_SIDE_PX, _NETWORK_SIDE_PX), interpolation=cv2.INTER_AREA)
        network_input = small.astype(np.float32) * (1 / 255)
        mask = self._predict_mask(network_input)
        if hair_strands:
            mask = np.maximum(mask, _find_hair_strands(network_input, mask))
        alpha = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
        return alpha * nearest_face_weight(faces, height, width) if len(faces) > 1 else alpha

    def _predict_mask(self, small: np.ndarray) -> np.ndarray:
        """Return the mask (256, 256) of a picture (256, 256, 3), edges softened inwards to hide background."""
        # loose hair that the network misses is often found in the mirror image
        confidence = np.maximum(self._network(small)[0][0, ..., 0], self._network(small[:, ::-1])[0][0, :, ::-1, 0])
        mask = (confidence - _BACKGROUND_CONFIDENCE) / (_PERSON_CONFIDENCE - _BACKGROUND_CONFIDENCE)
        mask = _fill_holes(np.clip(mask, 0, 1))
        mask = cv2.GaussianBlur(mask, (0, 0), _EDGE_BLUR_SD, borderType=cv2.BORDER_REPLICATE)
        return np.clip((mask - 0.35) / 0.6, 0, 1)


def face_positions(face: Face, detected: Sequence[Face], crop: Square) -> list[FacePosition]:
    """Return the position of a face in a crop, then those of the other faces among `detected`."""
    in_crop = [(f.landmarks[:, :2] - crop[:2]) / crop[2] for f in (face, *detected)]
    target, *others = ((*points.mean(0).tolist(), float(np.ptp(points, axis=0).max())) for points in in_crop)
    min_distance = _OTHER_FACE_DISTANCE * target[2]
    return [target, *(f for f in others if np.hypot(f[0] - target[0], f[1] - target[1]) > min_distance)]


def nearest_face_weight(faces: Sequence[FacePosition], height: int, width: int) -> np.ndarray:
    """Return where the first of several faces is the nearest, in sizes of each face: float32 (H, W) in [0, 1]."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    first, *others = (np.hypot(x / width - face_x, y / height - face_y) / size for face_x, face_y, size in faces)
    return np.clip((np.min(others, axis=0) - first) / _PERSON_BORDER_WIDTH + 0.5, 0, 1)


def estimate_foreground(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Estimate the person's colours, uint8 (H, W, 3), without the background mixed in at the edges of `alpha` (H, W).

    Foreground and background colours are spread over the edge by blurs weighted towards sure pixels, and the residual
    of their mixture is added back (blur-fusion, Forte 2021). Far from the person, where alpha is 0, it is black.
    """
    picture, a = image.astype(np.float32), alpha[..., None]
    window = max(3, _COLOUR_WINDOW_PX * max(alpha.shape) // _NETWORK_SIDE_PX | 1)
    person, has_weight = _weighted_blur(picture, alpha**6, window)
    background, _ = _weighted_blur(picture, (1 - alpha) ** 6, window)
    person = person + a * (picture - a * person - (1 - a) * background)
    return np.where(has_weight, np.clip(person, 0, 255), 0).round().astype(np.uint8)


def _weighted_blur(picture: np.ndarray, weight: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean colours (H, W, 3) around each pixel, weighted by (H, W), and where any weight is, (H, W, 1)."""
    total = cv2.blur(weight, (window, window))[..., None]
    return cv2.blur(picture * weight[..., None], (window, window)) / (total + 1e-4), total > 1e-4


def _find_hair_strands(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the alpha (H, W) of strands near a mask (H, W) that have the person's colours, not the background's."""
    filtered = _guided_filter(picture, mask, 2, _GUIDED_RADIUS, _GUIDED_EPS)
    return np.clip((filtered - _STRAND_RANGE[0]) / (_STRAND_RANGE[1] - _STRAND_RANGE[0]), 0, 1)


def refine_alpha(image: np.ndarray, alpha: np.ndarray, radius: int) -> np.ndarray:
    """Align the edge of a matte (H, W) with the edges of its image, uint8 (H, W, 3); `radius` in pixels."""
    step = max(1, radius // 3)
    filtered = _guided_filter(image.astype(np.float32) / 255, alpha, step, radius // step, _EDGE_EPS)
    refined = np.clip((filtered - _EDGE_RANGE[0]) / (_EDGE_RANGE[1] - _EDGE_RANGE[0]), 0, 1)
    uncertain = cv2.blur(((alpha > 0.02) & (alpha < 0.98)).astype(np.float32), (2 * radius + 1,) * 2) > 0
    return np.where(uncertain, refined, alpha > 0.5).astype(np.float32)


def _guided_filter(picture: np.ndarray, mask: np.ndarray, step: int, radius: int, eps: float) -> np.ndarray:
    """Fit a mask (H, W) as a linear function of colour in every window (He et al. 2013), and evaluate the mean fit.

    The fits are made at 1 / `step` of the size of the picture (H, W, 3) in [0, 1], in windows of `radius` small pixels.
    """
    small = (max(1, picture.shape[1] // step), max(1, picture.shape[0] // step))
    window = (2 * radius + 1,) * 2

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.blur(x, window, borderType=cv2.BORDER_REPLICATE)

    colour = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
    inside = cv2.resize(mask, small, interpolation=cv2.INTER_AREA)
    mean_colour, mean_inside = mean(colour), mean(inside)
    products = mean((colour[..., :, None] * colour[..., None, :]).reshape(*small[::-1], 9)).reshape(*small[::-1], 3, 3)
    covariance = products - mean_colour[..., :, None] * mean_colour[..., None, :] + eps * np.eye(3, dtype=np.float32)
    cross = mean(colour * inside[..., None]) - mean_colour * mean_inside[..., None]
    slope = np.linalg.solve(covariance, cross[..., None])[..., 0]
    fit = mean(np.concatenate([slope, (mean_inside - (slope * mean_colour).sum(-1))[..., None]], axis=-1))
    fit = cv2.resize(fit, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return (fit[..., :3] * picture).sum(-1) + fit[..., 3]


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    """Fill the small holes of a mask (H, W) that the person surrounds."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask < 0.5).astype(np.uint8), connectivity=4)
    height, width = mask.shape
    left, top, w, h, area = stats.T
    hole = (area < _MAX_HOLE_AREA) & (left > 0) & (top > 0) & (left + w < width) & (top + h < height)
    hole[0] = False  # the person
    return np.where(hole[labels], 1.0, mask).astype(np.float32) if count > 1 and hole.any() else mask
