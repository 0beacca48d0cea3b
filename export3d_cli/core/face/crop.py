"""The square crop of a clip: choosing it, and cutting it out of a frame."""

from typing import NamedTuple

import cv2
import numpy as np

Square = tuple[float, float, float]  # x0, y0, side in pixels
CROP_SCALE = (2.1, 1.6)  # crop side in face boxes: preferred, and the least accepted before borders are replicated
BLUR_SD_PER_DISTANCE = 0.5  # standard deviation of the padding's blur over the distance from the photo's edge
MIN_LEVEL_SIDE_PX = 8  # pyramid levels above this side are halved once more


class ClipCalibration(NamedTuple):
    """What stays the same in a clip."""

    crop: Square
    neutral_face: np.ndarray | None = None  # (68, 3), head frame: the person's, for the tracker `fan`


def fit_clip_crop(pixels: np.ndarray, size: tuple[int, int], scale: tuple[float, float] = CROP_SCALE) -> Square:
    """Choose one square for a clip with landmarks (F, 478, 3) in pixels of frames of `size` (width, height).

    Its centre is the median nose, its side `scale[0]` face boxes. Where that reaches outside the frame the square
    shrinks to stay inside, down to `scale[1]` face boxes.
    """
    box_sides = pixels[..., :2].max(1) - pixels[..., :2].min(1)  # (F, 2)
    return fit_crop_square(pixels[:, 1, :2], box_sides.max(-1), size, scale)


def fit_crop_square(noses: np.ndarray, boxes: np.ndarray, size: tuple[int, int], scale: tuple[float, float]) -> Square:
    """Do `fit_clip_crop` for noses (F, 2) and the longer sides of the face boxes (F,)."""
    nose, box = np.median(noses, axis=0), float(np.median(boxes))
    largest_inside = 2 * min(nose[0], nose[1], size[0] - nose[0], size[1] - nose[1])
    side = float(np.clip(largest_inside, scale[1] * box, scale[0] * box))
    return float(nose[0] - side / 2), float(nose[1] - side / 2), side


def crop_image(image: np.ndarray, crop: Square, size: int) -> np.ndarray:
    """Cut a square out of an image (H, W, 3) and resize it to (size, size, 3) uint8, replicating the border."""
    x0, y0, side = crop
    step = side / size
    if step > 1.5:  # warpAffine does not filter: shrink by area first
        height, width = image.shape[:2]
        image = cv2.resize(image, (round(width / step), round(height / step)), interpolation=cv2.INTER_AREA)
        fx, fy = image.shape[1] / width, image.shape[0] / height
    else:
        fx = fy = 1.0
    # The centre of output pixel u is at x0 + (u + 0.5) * step; pixel indices are 0.5 less.
    matrix = np.array([[step * fx, 0, (x0 + 0.5 * step) * fx - 0.5], [0, step * fy, (y0 + 0.5 * step) * fy - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def crop_with_padding(photo: np.ndarray, square: Square, size: int) -> np.ndarray:
    """Cut a square out of a photo, uint8 (H, W, 3) -> (size, size, 3).

    Beyond the photo its border is repeated, blurred more with the distance, so that it shows no streaks.
    """
    crop = crop_image(photo, square, size)
    distance = _distance_outside(square, size, (photo.shape[1], photo.shape[0]))
    if not distance.any():
        return crop
    octave = np.log2(np.maximum(BLUR_SD_PER_DISTANCE * distance, 0.25)).astype(np.float32)  # of the standard deviation
    levels: list[np.ndarray] = [crop.astype(np.float32)]  # each blurred twice as much as the one before
    weights: list[np.ndarray] = [octave + 0.5]  # of the levels after it
    while len(levels) <= octave.max() + 1 and len(levels[-1]) > MIN_LEVEL_SIDE_PX:
        levels.append(cv2.pyrDown(levels[-1]))
        weights.append(cv2.pyrDown(weights[-1]) - 1)
    blurred: np.ndarray = levels.pop()
    for level, weight in zip(levels[::-1], weights[-2::-1], strict=True):
        blurred = cv2.pyrUp(blurred, dstsize=level.shape[1::-1])
        blurred = level + (blurred - level) * weight.clip(0, 1)[..., None]
    return np.where(distance[..., None] > 0, np.rint(blurred), crop).astype(np.uint8)


def _distance_outside(square: Square, size: int, photo_size: tuple[int, int]) -> np.ndarray:
    """Return each crop pixel's distance from the photo (width, height), in crop pixels, (size, size); 0 inside."""
    side, axes = square[2], zip(square[:2], photo_size, strict=True)
    centres = (np.arange(size) + 0.5) * side / size
    x, y = (np.maximum(-centres - start, centres + start - length).clip(0) for start, length in axes)
    return np.hypot(x[None], y[:, None]) * size / side
