"""Detection of covered mouths and eyes: masks, hands, microphones, scarves, dark lenses. Clear glasses are none.

Small networks, trained by `weights/make_cover_detector.py`, look at crops around the landmarks, which trackers find on
covers as well.
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from export3d_cli.core.face.landmarks import CHIN, EYE_RIMS, FOREHEAD_TOP, LEFT_EYE_OUTER, OUTER_LIPS, RIGHT_EYE_OUTER
from export3d_cli.core.runtime.weights import load_arrays

PICTURE_SIZE_PX = 256  # side of the face crop that the crops of parts are taken from
CROP_SIZE_PX = 48  # side of the network's input
# For mouths and for eyes, a network trained on covers that hide the whole part, and one also on covers that cross it.
NETWORKS = (("mouth.whole", "mouth.crossing"), ("eye.whole", "eye.crossing"))
_NETWORK_WEIGHTS = (1, 2)  # of their logits
_SAMPLE_SIZE_PX = 96  # crops are sampled at this side and reduced
_MOUTH_SIDE, _EYE_SIDE = 1.0, 0.62  # of crops, in distances between the outer eye corners
_MIN_EYE_DISTANCE = 0.45  # lower bound of that distance in heights of the face, for heads seen from the side
# Crops (shift right and down in sides, scale) whose logits are averaged.
_VIEWS = ((0, 0, 1), (0.05, 0, 1), (-0.05, 0, 1), (0, 0.05, 1), (0, -0.05, 1), (0, 0, 1.1), (0, 0, 0.9))
# Mean logit of mouth and eyes from which on they are covered; of 421 uncovered faces the highest are 1.5 and 0.2.
_COVERED_LOGITS = (1.85, 1.0, 1.0)
# If one eye alone is covered, the mouth is searched for what hides half of it, too: with this shift to that side, in
# crop sides, and from this mean logit on; of 44 faces with a patch on an eye the highest is 0.2.
_HALF_SHIFT, _HALF_LOGIT = 0.12, 1.0
# Covers are searched only in pictures of this size or more, with this mean detail or more that is lost at that size
# (over the contrast; sharp ones have 0.07): mouths in others look like covers.
_MIN_SIDE_PX = 48
_MIN_DETAIL = 0.03


class CoveredParts(NamedTuple):
    """Parts of a face that are covered."""

    mouth: bool = False
    right_eye: bool = False  # the person's
    left_eye: bool = False

    def note(self) -> str:
        """Return a note for the user."""
        eyes = ["the eyes"] if self.right_eye and self.left_eye else ["an eye"] * (self.right_eye or self.left_eye)
        parts = ["the mouth"] * self.mouth + eyes
        verbs = ("is", "it is") if parts in (["the mouth"], ["an eye"]) else ("are", "they are")
        return f"{' and '.join(parts)} of the portrait {verbs[0]} covered: {verbs[1]} not animated"


class CoverDetector:
    """The networks on NumPy. Keeps no state: threads may share it."""

    def __init__(self, path: Path) -> None:
        """Load `cover_detector.npz`; raises `WeightsError` if it does not load."""
        self._weights = {name: array.astype(np.float32) for name, array in load_arrays(path).items()}

    def covered_parts(self, image: np.ndarray, landmarks: np.ndarray) -> CoveredParts:
        """Return what is covered in a face crop, uint8 (K, K, 3), with landmarks (478, 2 or 3) in crop units."""
        picture = cv2.resize(image, (PICTURE_SIZE_PX,) * 2, interpolation=cv2.INTER_AREA)
        if len(image) < _MIN_SIDE_PX or _detail(picture) < _MIN_DETAIL:
            return CoveredParts()
        limits = enumerate(_COVERED_LOGITS)
        parts = CoveredParts(*(self.logit(picture, landmarks, part) >= limit for part, limit in limits))
        if parts.mouth or parts.right_eye == parts.left_eye:
            return parts
        shift = _HALF_SHIFT if parts.left_eye else -_HALF_SHIFT
        return parts._replace(mouth=self.logit(picture, landmarks, 0, shift) >= _HALF_LOGIT)

    def logit(self, picture: np.ndarray, landmarks: np.ndarray, part: int, shift: float = 0) -> float:
        """Return the logit that part 0 (mouth), 1 (right eye) or 2 (left eye) is covered in a 256 x 256 picture.

        Crops are shifted by `shift` of their sides to the right.
        """
        crops = np.stack([crop_part(picture, landmarks, part, x + shift, *view) for x, *view in _VIEWS])
        inputs, w = normalize_crops(crops), self._weights
        logits = []
        for net in NETWORKS[min(part, 1)]:
            x = inputs
            for layer in range(4):
                x = np.maximum(_strided_conv(x, w[f"{net}.{layer}"]) + w[f"{net}.{layer}.bias"], 0)
            logits.append(x.reshape(len(x), -1) @ w[f"{net}.out"] + w[f"{net}.out.bias"])
        return float(np.average(logits, axis=0, weights=_NETWORK_WEIGHTS).mean())


def _detail(picture: np.ndarray) -> float:
    """Return the mean detail that the middle of a picture loses at `_MIN_SIDE_PX`, over its contrast."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    coarse = cv2.resize(grey, (_MIN_SIDE_PX,) * 2, interpolation=cv2.INTER_AREA)
    coarse = cv2.resize(coarse, grey.shape, interpolation=cv2.INTER_CUBIC)
    middle = (slice(PICTURE_SIZE_PX // 5, -PICTURE_SIZE_PX // 5),) * 2
    return float(np.abs(grey - coarse)[middle].mean() / (grey[middle].std() + 6))


def crop_part(picture: np.ndarray, landmarks: np.ndarray, part: int, shift_x: float = 0, shift_y: float = 0,
              scale: float = 1, roll: float = 0, size: int = CROP_SIZE_PX) -> np.ndarray:  # fmt: skip
    """Crop part 0 (mouth), 1 (right eye) or 2 (left eye, mirrored), level with the eyes: uint8 (size, size, 3)."""
    points = landmarks[:, :2] * len(picture)
    right = points[LEFT_EYE_OUTER] - points[RIGHT_EYE_OUTER]
    distance = max(float(np.hypot(*right)), 1e-3)
    right = right / distance
    distance = max(distance, _MIN_EYE_DISTANCE * float(np.hypot(*(points[CHIN] - points[FOREHEAD_TOP]))))
    right = right * np.cos(roll) + np.array([-right[1], right[0]]) * np.sin(roll)
    axes = np.stack([-right if part == 2 else right, [-right[1], right[0]]], axis=1)
    if part == 0:
        centre, side = points[list(OUTER_LIPS[::5])].mean(0), _MOUTH_SIDE  # corners and middles
    else:
        rim = EYE_RIMS[part - 1][1]
        centre, side = points[[rim[0], rim[8]]].mean(0), _EYE_SIDE
    side = side * distance * scale
    matrix = axes * side / _SAMPLE_SIZE_PX
    offset = centre + axes @ np.array([shift_x, shift_y]) * side - matrix @ np.full(2, (_SAMPLE_SIZE_PX - 1) / 2)
    sampled = cv2.warpAffine(picture, np.column_stack([matrix, offset]), (_SAMPLE_SIZE_PX,) * 2,
                             flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                             borderMode=cv2.BORDER_REPLICATE)  # fmt: skip
    return sampled if size == _SAMPLE_SIZE_PX else cv2.resize(sampled, (size, size), interpolation=cv2.INTER_AREA)


def normalize_crops(crops: np.ndarray) -> np.ndarray:
    """Return crops uint8 (N, s, s, 3) as float32 without mean brightness, contrast and tint: brightness, 2 chroma."""
    x = crops.astype(np.float32)
    brightness = x.mean(-1, keepdims=True)
    mean, deviation = (f(brightness, axis=(1, 2), keepdims=True) for f in (np.mean, np.std))
    chroma = 2 * (x[..., [0, 2]] - x[..., 1:2]) / (mean + 20)
    chroma = chroma - chroma.mean((1, 2), keepdims=True)
    return np.concatenate([(brightness - mean) / (deviation + 6), chroma], axis=-1)


def _strided_conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve (N, h, w, C) with (3, 3, C, K), stride 2, zero padding 1."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]  # (N, h/2, w/2, C, 3, 3)
    return np.tensordot(windows, kernel, ((4, 5, 3), (0, 1, 2)))
