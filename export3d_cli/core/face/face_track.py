"""What all face trackers share: finding faces, following one through a video, and its conversion to `Motion`.

All state of the tracking is in `FaceTrack`: threads may share a finder and a tracker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Protocol

import numpy as np

from export3d_cli.core.face.crop import CROP_SCALE, ClipCalibration
from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.errors import NoFaceError

WARMUP_PASSES = 3  # a first frame is tracked this often: the region of interest converges to the one kept in videos
_THOROUGH_INTERVAL = 8  # frames without a face between thorough searches for small faces
CHUNK_FRAMES = 1024  # frames computed at once, which bounds the memory of double precision in a long video


class FaceFinder(Protocol):
    """Finds faces in images, uint8 (H, W, 3) RGB; keeps no state between calls."""

    def find(self, image: np.ndarray, *, thorough: bool = True) -> Face | None:
        """Return the largest face, or None; `thorough` also searches for small faces."""

    def find_all(self, image: np.ndarray) -> list[Face]:
        """Return every face, the largest first."""

    def rotation_to_upright(self, image: np.ndarray) -> int | None:
        """Return the clockwise degrees (0, 90, 180, 270) that turn the largest face upright; None without a face."""

    def find_near(self, image: np.ndarray, face: Face) -> Face | None:
        """Return the face near the place of `face`, which another image showed, or None."""


class FaceTracker(ABC):
    """A finder of faces, and the conversion of its faces to `Motion`."""

    landmarker: FaceFinder

    @abstractmethod
    def calibrate_clip(
        self, faces: Sequence[Face], size: tuple[int, int], scale: tuple[float, float] = CROP_SCALE
    ) -> ClipCalibration:
        """Measure what stays the same in a clip, from faces of its frames of `size`; `scale`: see `fit_clip_crop`."""

    @abstractmethod
    def fit(self, faces: Sequence[Face], clip: ClipCalibration) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return beta (F, 64), cameras (F, 25) and landmarks (F, N, 3) in crop units, float32, of faces of a clip."""

    def make_motion(
        self, faces: Sequence[Face | None], fps: Fraction, size: tuple[int, int], *, clip: ClipCalibration | None = None
    ) -> Motion:
        """Return the motion of a clip of `size` (width, height); raises `NoFaceError` if no frame has a face.

        A frame without a face repeats the face before it. `clip` None: calibrate on these faces.
        """
        found = np.array([face is not None for face in faces], dtype=bool)
        present = [face for face in faces if face is not None]
        if not present:
            raise NoFaceError("no face was found in any frame")
        clip = clip or self.calibrate_clip(present, size)
        chunks = [self.fit(present[i : i + CHUNK_FRAMES], clip) for i in range(0, len(present), CHUNK_FRAMES)]
        beta, cameras, landmarks = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        motion = Motion(beta, cameras, landmarks, found[found], fps, clip.crop, size)
        return motion if found.all() else replace(motion.select((np.cumsum(found) - 1).clip(0)), found=found)


class FaceTrack:
    """One face, followed from frame to frame of a video; cheaper and steadier than finding it in each frame."""

    def __init__(self, finder: FaceFinder) -> None:
        self._finder = finder
        self._face: Face | None = None  # of the previous frame
        self._size: tuple[int, ...] = ()  # height, width of the previous frame
        self._lost_frames = 0  # since a face was found

    def track(self, image: np.ndarray) -> Face | None:
        """Return the face of the next frame, or None.

        It is searched near the previous frame's face first; at the first frame, or if it left, in the whole frame.
        """
        if image.shape[:2] != self._size:
            self._face, self._lost_frames = None, 0
        face = None if self._face is None else self._finder.find_near(image, self._face)
        if face is None:
            face = self._finder.find(image, thorough=self._lost_frames % _THOROUGH_INTERVAL == 0)
        self._lost_frames = 0 if face is not None else self._lost_frames + 1
        self._face, self._size = face, image.shape[:2]
        return face

    def follow(self, face: Face, image: np.ndarray) -> None:
        """Let `track` follow this face of `image` from now on."""
        self._face, self._size = face, image.shape[:2]
