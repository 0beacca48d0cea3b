"""Following one face through the frames of a video. All state of the tracking is here: threads may share a finder."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from export3d_cli.core.face.landmarker import Face

WARMUP_PASSES = 3  # a first frame is tracked this often: the region of interest converges to the one kept in videos
_THOROUGH_INTERVAL = 8  # frames without a face between thorough searches for small faces


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
