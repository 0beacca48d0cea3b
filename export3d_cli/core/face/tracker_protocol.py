"""What a tracker is: something that finds faces in frames, and something that tells their motion."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.motion import Motion, Square


class FaceFinder(Protocol):
    """Finds faces in images, uint8 (H, W, 3) RGB, and follows one of them from frame to frame."""

    def reset(self) -> None:
        """Forget the tracked face."""

    def track(self, image: np.ndarray) -> Face | None:
        """The face of the next frame, or None."""

    def find_all(self, image: np.ndarray) -> list[Face]:
        """Every face, the largest first."""

    def follow(self, face: Face, image: np.ndarray) -> None:
        """Track this face of `image` from now on."""


class FaceTracker(Protocol):
    """A finder and the way from its faces to `Motion`."""

    @property
    def num_landmarks(self) -> int:
        """Landmarks of a face."""

    @property
    def landmarker(self) -> FaceFinder:
        """Finds the faces."""

    def calibrate_clip(self, faces: Sequence[Face], size: tuple[int, int], scale: tuple[float, float]) -> Square:
        """Measure what stays the same in a clip, from faces of its frames; returns its crop."""

    def make_motion(
        self,
        faces: Sequence[Face | None],
        fps: Fraction,
        size: tuple[int, int],
        *,
        crop: Square | None = None,
        scale: tuple[float, float] = ...,
    ) -> Motion:
        """Motion of some frames of the clip in its crop; None settles it from these frames, with `scale`."""
