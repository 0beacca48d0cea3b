"""A photo looked at: whose face it is, the crop that is animated, and what is around it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from export3d_cli.core.animation.options import Crop
from export3d_cli.core.animation.output_size import frame_size, with_rim
from export3d_cli.core.face.crop import crop_with_padding
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.face.matting import FacePosition, face_positions
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.target_face import find_photo_face
from export3d_cli.core.runtime.errors import InputError


class Portrait(NamedTuple):
    """What `Animator.set_source_motion` takes."""

    crop: np.ndarray  # uint8 (K, K, 3)
    motion: Motion  # one frame
    around: np.ndarray  # uint8 (M, M, 3), the crop with more of the photo on all sides
    faces: Sequence[FacePosition]  # the person's own and those of others, in the crop


def portrait_of(
    image: np.ndarray, tracker: LandmarkerTracker, side: int, *, name: str, face: str, crop: Crop, size: int
) -> Portrait:
    """Look at a photo, uint8 (H, W, 3) RGB, for a model of pictures of `side`; the rest as in `Animator.set_source`.

    Raises:
        NoFaceError: it shows none, or none that stands upright.
        InputError: `crop` is none and it is not square; `face` or `size` cannot be.
    """
    height, width = image.shape[:2]
    if crop == "none" and height != width:
        raise InputError(f"{name} is {width}x{height}: --crop none takes square pictures, use --crop auto")
    found = find_photo_face(tracker.landmarker, image, name=name, face=face)
    square = (0.0, 0.0, float(width)) if crop == "none" else None
    motion = tracker.make_motion([found], Fraction(25), (width, height), crop=square)
    size = frame_size(side, motion.crop[2], size)
    places = face_positions(found, tracker.landmarker.find_all(image), motion.crop)
    around = crop_with_padding(image, *with_rim(motion.crop, size))
    return Portrait(crop_with_padding(image, motion.crop, size), motion, around, places)
