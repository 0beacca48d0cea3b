"""What a crop shows beyond the edge of a photo: its last pixels drawn out, the farther the softer, not streaks."""

from __future__ import annotations

import cv2
import numpy as np

from export3d_cli.core.face.motion import Square, crop_image

SPREAD = 0.5  # standard deviation of the blur, of the distance from the edge
COARSE = 4.0  # pixels of standard deviation above which a smaller picture is blurred instead


def photo_crop(photo: np.ndarray, square: Square, size: int) -> np.ndarray:
    """`crop_image` of a photo, uint8 (H, W, 3), that may not show all of the square -> uint8 (size, size, 3)."""
    crop = crop_image(photo, square, size)
    away = _beyond(square, size, (photo.shape[1], photo.shape[0]))
    if not away.any():
        return crop
    octave = np.log2(np.maximum(SPREAD * away, 0.25))  # of the standard deviation
    out, step = crop.astype(np.float32), 0
    while step < octave.max() + 1:  # softer and softer, each laid on where the blur is at least half as wide
        share = np.clip(octave - step + 1, 0, 1)[..., None]
        out += (_blurred(crop, 2.0**step) - out) * share
        step += 1
    return np.where(away[..., None] > 0, np.rint(out), crop).astype(np.uint8)


def _beyond(square: Square, size: int, shown: tuple[int, int]) -> np.ndarray:
    """How many of the crop's pixels each of them is away from the photo, width and height `shown`; (size, size)."""
    first, side = square[:2], square[2]
    at = (np.arange(size) + 0.5) * side / size
    x, y = (np.maximum(-(at + low), at + low - full).clip(0) for low, full in zip(first, shown, strict=True))
    return np.hypot(x[None], y[:, None]) * size / side


def _blurred(image: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur, float32; a wide one of a picture made smaller."""
    size = image.shape[1::-1]
    shrunk = max(1, int(deviation / COARSE))
    small = cv2.resize(image, (-(-size[0] // shrunk), -(-size[1] // shrunk)), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small.astype(np.float32), (0, 0), deviation / shrunk, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(small, size, interpolation=cv2.INTER_LINEAR)
