"""The square crop of a clip: where it lies, and how it is cut out of a frame."""

from __future__ import annotations

import cv2
import numpy as np

CROP_SCALE = (2.1, 1.6)  # crop side in face boxes: wanted, and the least to fall back to before borders are replicated
Square = tuple[float, float, float]  # x0, y0, side in pixels
BLUR_SD_PER_DISTANCE = 0.5  # standard deviation of the blur, of the distance from the edge
MIN_LEVEL_SIDE_PX = 8  # side of a picture that is halved once more, pixels


def fit_clip_crop(pixels: np.ndarray, size: tuple[int, int], scale: tuple[float, float] = CROP_SCALE) -> Square:
    """One square for a clip: the median nose at its centre, its side the wanted number of face boxes.

    Where the frames are cut tighter than wanted the square shrinks to stay inside them, down to the least scale.
    """
    extent = pixels[..., :2].max(1) - pixels[..., :2].min(1)  # (F, 2)
    return fit_crop_square(pixels[:, 1, :2], extent.max(-1), size, scale)


def fit_crop_square(noses: np.ndarray, boxes: np.ndarray, size: tuple[int, int], scale: tuple[float, float]) -> Square:
    """`clip_crop` for noses (F, 2) and longer sides of the faces' boxes (F,)."""
    nose, box = np.median(noses, axis=0), float(np.median(boxes))
    room = 2 * min(nose[0], nose[1], size[0] - nose[0], size[1] - nose[1])
    side = float(np.clip(room, scale[1] * box, scale[0] * box))
    return float(nose[0] - side / 2), float(nose[1] - side / 2), side


def crop_image(image: np.ndarray, crop: tuple[float, float, float], size: int) -> np.ndarray:
    """Cut the square out of an image (H, W, 3) and resize it to (size, size, 3), uint8; borders replicated."""
    x0, y0, side = crop
    step = side / size
    if step > 1.5:  # warpAffine does not filter: shrink by area first
        height, width = image.shape[:2]
        image = cv2.resize(image, (round(width / step), round(height / step)), interpolation=cv2.INTER_AREA)
        fx, fy = image.shape[1] / width, image.shape[0] / height
    else:
        fx = fy = 1.0
    # output pixel centre (u + 0.5) maps to x0 + (u + 0.5) * step, minus 0.5 for the index of a pixel
    matrix = np.array([[step * fx, 0, (x0 + 0.5 * step) * fx - 0.5], [0, step * fy, (y0 + 0.5 * step) * fy - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


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
