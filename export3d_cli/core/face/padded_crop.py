"""What a crop shows beyond the edge of a photo: its last pixels drawn out, the farther the softer, not streaks."""

from __future__ import annotations

import cv2
import numpy as np

from export3d_cli.core.face.motion import Square, crop_image

BLUR_SD_PER_DISTANCE = 0.5  # standard deviation of the blur, of the distance from the edge
MIN_LEVEL_SIDE_PX = 8  # side of a picture that is halved once more, pixels


def crop_with_padding(photo: np.ndarray, square: Square, size: int) -> np.ndarray:
    """`crop_image` of a photo, uint8 (H, W, 3), that may not show all of the square -> uint8 (size, size, 3)."""
    crop = crop_image(photo, square, size)
    away = _distance_outside(square, size, (photo.shape[1], photo.shape[0]))
    if not away.any():
        return crop
    octave = np.log2(np.maximum(BLUR_SD_PER_DISTANCE * away, 0.25)).astype(np.float32)  # of the standard deviation
    levels: list[np.ndarray] = [crop.astype(np.float32)]
    shares: list[np.ndarray] = [octave + 0.5]  # of what is softer than each level
    while (
        len(levels) <= octave.max() + 1 and len(levels[-1]) > MIN_LEVEL_SIDE_PX
    ):  # each twice as soft as the one before
        levels.append(cv2.pyrDown(levels[-1]))
        shares.append(cv2.pyrDown(shares[-1]) - 1)
    soft: np.ndarray = levels.pop()
    for level, share in zip(levels[::-1], shares[-2::-1], strict=True):
        soft = cv2.pyrUp(soft, dstsize=level.shape[1::-1])
        soft = level + (soft - level) * share.clip(0, 1)[..., None]
    return np.where(away[..., None] > 0, np.rint(soft), crop).astype(np.uint8)


def _distance_outside(square: Square, size: int, shown: tuple[int, int]) -> np.ndarray:
    """How many of the crop's pixels each of them is away from the photo, width and height `shown`; (size, size)."""
    first, side = square[:2], square[2]
    at = (np.arange(size) + 0.5) * side / size
    x, y = (np.maximum(-(at + low), at + low - full).clip(0) for low, full in zip(first, shown, strict=True))
    return np.hypot(x[None], y[:, None]) * size / side
