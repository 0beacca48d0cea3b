"""What frames show of a photo: all of it, or a square around the head, at which size."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import cv2
import numpy as np

from export3d_cli.core.animation.options import Crop, Framing
from export3d_cli.core.face.crop import Square, fit_clip_crop
from export3d_cli.core.face.face_track import Face
from export3d_cli.core.runtime.errors import InputError

MAX_FRAME_SIZE_PX = 2048  # side of the crop's image
PHOTO_MARGIN = 0.25  # of the crop's side: photo kept around the crop, for hair and shoulders that move into view
DEFAULT_MAX_SIDE_PX = 1080  # longer side of frames of larger photos, unless asked otherwise
SIZE_RANGE_PX = (64, 4096)
MIN_CROP_PX = 16  # side of the network's crop
HEAD_MARGIN = 0.12  # face boxes kept free around the hair in a square framing
SEARCH_RADIUS = 1.6  # face boxes around the nose in which hair is looked for
MIN_SQUARE = 2.1  # face boxes: side of a square framing, if the photo has room


def place_on_canvas(
    photo: np.ndarray, faces: Sequence[Face], framing: Framing, crop: Crop, size: int,
    person_alpha: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, list[Face], Square, tuple[int, int, int, int]]:  # fmt: skip
    """Cut and scale a photo, uint8 (H, W, 3), to what frames show, and choose the network's crop in it.

    `faces` are the one to animate, then others, in pixels of `photo`. Return the canvas uint8 (h, w, 3), the faces in
    it, the network's crop in whole pixels (`crop` none: all of the canvas's width), and the part of the photo that the
    canvas shows: x0, y0, x1, y1, whole pixels of `photo`. Raises `InputError` if `size` is out of range.
    """
    if size and not SIZE_RANGE_PX[0] <= size <= SIZE_RANGE_PX[1]:
        raise InputError(f"size must be {SIZE_RANGE_PX[0]} to {SIZE_RANGE_PX[1]} pixels, got {size}")
    left = top = 0
    if framing == "face":
        left, top, width = _head_square(photo, faces[0], person_alpha)
        photo = np.ascontiguousarray(photo[top : top + width, left : left + width])
    longer = max(photo.shape[:2])
    shown = (left, top, left + photo.shape[1], top + photo.shape[0])
    scale = (size or min(longer, DEFAULT_MAX_SIDE_PX)) / longer
    if scale == 1:
        photo = photo.copy()  # the caller's array stays the caller's
    else:
        width, height = (max(2, round(n * scale)) for n in photo.shape[1::-1])
        photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    offset, factor = np.array([left, top, 0], np.float32), np.float32(scale)
    faces = [replace(face, landmarks=(face.landmarks - offset) * factor) for face in faces]
    if crop == "none":
        return photo, faces, (0.0, 0.0, float(photo.shape[1])), shown
    x0, y0, side = fit_clip_crop(faces[0].landmarks[None], (photo.shape[1], photo.shape[0]))
    grown = max(MIN_CROP_PX, round(side))
    x0, y0 = (round(v - (grown - side) / 2) for v in (x0, y0))
    return photo, faces, (float(x0), float(y0), float(grown)), shown


def _head_square(photo: np.ndarray, face: Face,
                 person_alpha: Callable[[np.ndarray], np.ndarray]) -> tuple[int, int, int]:  # fmt: skip
    """Return x0, y0, side of a square inside the photo that holds the head with its hair, if the photo does."""
    height, width = photo.shape[:2]
    points = face.landmarks[:, :2]
    box, nose, chin = float(np.ptp(points, axis=0).max()), points[1], float(points[:, 1].max())
    x0, x1 = (int(np.clip(nose[0] + s * SEARCH_RADIUS * box, 0, width)) for s in (-1, 1))
    y0 = int(np.clip(nose[1] - SEARCH_RADIUS * box, 0, height))
    y1 = int(np.clip(chin, y0 + 1, height))
    hair = person_alpha(np.ascontiguousarray(photo[y0 : min(height, y1 + round(box)), x0:x1]))[: y1 - y0] > 0.5
    rows, columns = np.flatnonzero(hair.any(1)), np.flatnonzero(hair.any(0))
    margin = HEAD_MARGIN * box
    top = (y0 + rows[0] if len(rows) else points[:, 1].min()) - margin
    left, right = x0 + columns[[0, -1]] if len(columns) else (points[:, 0].min(), points[:, 0].max())
    left, right = left - margin, right + margin
    bottom = chin + 0.35 * box
    side = round(min(max(right - left, bottom - top, MIN_SQUARE * box), width, height))
    centre = (left + right) / 2, (top + bottom) / 2
    x, y = (int(np.clip(round(c - side / 2), 0, n - side)) for c, n in zip(centre, (width, height), strict=True))
    return x, y, side
