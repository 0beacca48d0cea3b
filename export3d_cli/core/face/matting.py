"""Where the person is in a picture: MediaPipe's selfie segmentation on LiteRT, steady from frame to frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.face.crop import Square
from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.litert import LiteRTNetwork, quiet_stderr
from export3d_cli.core.runtime.errors import WeightsError

FacePosition = tuple[float, float, float]  # of a face: middle and size, in sizes of the picture
_NETWORK_SIDE_PX = 256  # input and output side of the network, pixels
_BACKGROUND_CONFIDENCE, _PERSON_CONFIDENCE = (
    0.1,
    0.5,
)  # confidences that mean nothing of the person, and all of it: loose hair is seldom sure
_MAX_HOLE_AREA = 1000  # gaps within the person of fewer network pixels are the network's mistakes
_EDGE_BLUR_SD = 1.3  # standard deviation of the edge's softening, network pixels
_GUIDED_RADIUS = (
    4  # half the window, pixels of a picture half as large, in which colours of hair and background are compared
)
_GUIDED_EPS = 1e-3  # squared difference of colours that tells nothing
_STRAND_RANGE = (0.2, 0.6)  # what of the comparison means nothing of the person, and all of it
_STILL_UPDATE_RATE = 0.3  # share of the new mask where it differs little from the last one
_MOTION_THRESHOLD = 0.5  # difference from which the new mask is taken as it is: something moved there
_OTHER_FACE_DISTANCE = 0.5  # sizes of a face from which on another one's middle is another's
_PERSON_BORDER_WIDTH = 0.1  # sizes of a face over which one person goes over into another
_COLOUR_WINDOW_PX = 25  # window, network pixels, over which the colours of the person and of what is behind are found


class PersonMatting:
    """Cuts the person out of pictures, uint8 (H, W, 3) RGB. Not safe to share between threads."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Load `selfie_segmentation.tflite`; raises WeightsError when it cannot be used."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise WeightsError(f"cannot read {path} ({error.strerror}): install export3d-cli again") from error
        with quiet_stderr():
            self._network = LiteRTNetwork(content, path, threads)
        self._previous_mask: np.ndarray | None = None

    def alpha(self, image: np.ndarray, faces: Sequence[FacePosition] = (), *, hair_strands: bool = False) -> np.ndarray:
        """How much of each pixel is the person's, float32 (H, W) in [0, 1], for a picture by itself.

        `faces` are the person's and those of others, who are left out. `strands` adds hair that stands off, for what
        is moved with its surroundings; before another background these would show as a rim.
        """
        height, width = image.shape[:2]
        small = _network_input(image)
        mask = self._predict_mask(small)
        if hair_strands:
            mask = np.maximum(mask, _find_hair_strands(small, mask))
        alpha = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
        return alpha * nearest_face_weight(faces, height, width) if len(faces) > 1 else alpha

    def next_alpha(self, image: np.ndarray) -> np.ndarray:
        """The same for the next frame of a video: edges that stand still do not flicker, those that move keep up."""
        mask = self._predict_mask(_network_input(image))
        if self._previous_mask is not None:
            share = _STILL_UPDATE_RATE + (1 - _STILL_UPDATE_RATE) * np.minimum(
                np.abs(mask - self._previous_mask) / _MOTION_THRESHOLD, 1
            )
            mask = self._previous_mask + share * (mask - self._previous_mask)
        self._previous_mask = mask
        height, width = image.shape[:2]
        return cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)

    def _predict_mask(self, small: np.ndarray) -> np.ndarray:
        """(256, 256) float32 of a `_small` picture: confidences, their steep edges softened inwards, so that no
        background shines through."""
        # loose hair that the network misses it often sees in the mirror
        found = np.maximum(self._network(small)[0][0, ..., 0], self._network(small[:, ::-1])[0][0, :, ::-1, 0])
        mask: np.ndarray = np.clip(
            (found - _BACKGROUND_CONFIDENCE) / (_PERSON_CONFIDENCE - _BACKGROUND_CONFIDENCE), 0, 1
        )
        mask = _fill_holes(mask)
        mask = cv2.GaussianBlur(mask, (0, 0), _EDGE_BLUR_SD, borderType=cv2.BORDER_REPLICATE)
        return np.clip((mask - 0.35) / 0.6, 0, 1)


def _network_input(image: np.ndarray) -> np.ndarray:
    """A picture as the network sees it, (256, 256, 3) float32 in [0, 1]."""
    return cv2.resize(image, (_NETWORK_SIDE_PX, _NETWORK_SIDE_PX), interpolation=cv2.INTER_AREA).astype(np.float32) * (
        1 / 255
    )


def face_positions(own: Face, found: Sequence[Face], crop: Square) -> list[FacePosition]:
    """Where in a crop of a photo a face is, first, and those of all that were `found` that are others."""
    flat = [(face.landmarks[:, :2] - crop[:2]) / crop[2] for face in (own, *found)]
    first, *rest = ((*points.mean(0).tolist(), float(np.ptp(points, axis=0).max())) for points in flat)
    return [
        first,
        *(
            place
            for place in rest
            if np.hypot(place[0] - first[0], place[1] - first[1]) > _OTHER_FACE_DISTANCE * first[2]
        ),
    ]


def nearest_face_weight(faces: Sequence[FacePosition], height: int, width: int) -> np.ndarray:
    """Where the first of two or more faces is the nearest, counted in sizes of each: float32 (H, W) in [0, 1]."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    own, *rest = (np.hypot(x / width - across, y / height - down) / size for across, down, size in faces)
    return np.clip((np.min(rest, axis=0) - own) / _PERSON_BORDER_WIDTH + 0.5, 0, 1)


def estimate_foreground(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The person's own colours, uint8 (H, W, 3), without what shines through at the edges of `alpha` (H, W).

    Colours of both sides are spread over the edge by blurs, in which pixels count that are surely of that side, and
    what their mixture lacks is added back (after blur-fusion, Forte 2021). Far from the person it is black: nothing
    hides where alpha is 0.
    """
    picture, a = image.astype(np.float32), alpha[..., None]
    window = max(3, _COLOUR_WINDOW_PX * max(alpha.shape) // _NETWORK_SIDE_PX | 1)
    near, some = _weighted_blur(picture, alpha**6, window)
    far, _ = _weighted_blur(picture, (1 - alpha) ** 6, window)
    person = near + a * (picture - a * near - (1 - a) * far)
    return np.where(some, np.clip(person, 0, 255), 0).round().astype(np.uint8)


def _weighted_blur(picture: np.ndarray, weight: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean colours (H, W, 3) around each pixel, weighted by (H, W); and where there is any weight, (H, W, 1)."""
    total = cv2.blur(weight, (window, window))[..., None]
    return cv2.blur(picture * weight[..., None], (window, window)) / (total + 1e-4), total > 1e-4


def _find_hair_strands(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Hair that stands off a mask (H, W): what in its neighbourhood has the person's colours, not those behind.

    A guided filter (He et al. 2013): in every window of the picture (H, W, 3) in [0, 1] the mask is fitted as a linear
    function of colour, at half the size, and the mean of the fits is asked for each pixel.
    """
    half = (picture.shape[1] // 2, picture.shape[0] // 2)
    window = (2 * _GUIDED_RADIUS + 1,) * 2

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.blur(x, window, borderType=cv2.BORDER_REPLICATE)

    colour = cv2.resize(picture, half, interpolation=cv2.INTER_AREA)
    inside = cv2.resize(mask, half, interpolation=cv2.INTER_AREA)
    average, share = mean(colour), mean(inside)
    products = mean((colour[..., :, None] * colour[..., None, :]).reshape(*half[::-1], 9)).reshape(*half[::-1], 3, 3)
    spread = products - average[..., :, None] * average[..., None, :] + _GUIDED_EPS * np.eye(3, dtype=np.float32)
    along = mean(colour * inside[..., None]) - average * share[..., None]
    slope = np.linalg.solve(spread, along[..., None])[..., 0]
    fit = mean(np.concatenate([slope, (share - (slope * average).sum(-1))[..., None]], axis=-1))
    fit = cv2.resize(fit, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    found = (fit[..., :3] * picture).sum(-1) + fit[..., 3]
    strands: np.ndarray = np.clip((found - _STRAND_RANGE[0]) / (_STRAND_RANGE[1] - _STRAND_RANGE[0]), 0, 1)
    return strands


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) with the small gaps filled that the person surrounds."""
    count, label, boxes, _ = cv2.connectedComponentsWithStats((mask < 0.5).astype(np.uint8), connectivity=4)
    height, width = mask.shape
    hole = boxes[:, cv2.CC_STAT_AREA] < _MAX_HOLE_AREA
    hole &= (boxes[:, cv2.CC_STAT_LEFT] > 0) & (boxes[:, cv2.CC_STAT_TOP] > 0)
    hole &= boxes[:, cv2.CC_STAT_LEFT] + boxes[:, cv2.CC_STAT_WIDTH] < width
    hole &= boxes[:, cv2.CC_STAT_TOP] + boxes[:, cv2.CC_STAT_HEIGHT] < height
    hole[0] = False  # the person
    return np.where(hole[label], 1.0, mask).astype(np.float32) if count > 1 and hole.any() else mask
