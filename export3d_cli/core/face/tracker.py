"""The face trackers: their common protocol, and opening one by name.

`landmarker` (478 points) reads sources and drivers; `fan` (68 points) reads drivers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, Protocol

from export3d_cli.core.face.crop import ClipCalibration
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.face_track import FaceFinder
from export3d_cli.core.face.fan_tracker import FanTracker
from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.weights import resolve_weights

TrackerName = Literal["landmarker", "fan"]


class FaceTracker(Protocol):
    """A `FaceFinder`, and the conversion of its faces to `Motion`."""

    @property
    def num_landmarks(self) -> int:
        """Number of landmarks per face."""

    @property
    def landmarker(self) -> FaceFinder:
        """The finder of the faces."""

    def calibrate_clip(
        self, faces: Sequence[Face], size: tuple[int, int], scale: tuple[float, float]
    ) -> ClipCalibration:
        """Measure what stays the same in a clip, from faces of its frames."""

    def make_motion(
        self,
        faces: Sequence[Face | None],
        fps: Fraction,
        size: tuple[int, int],
        *,
        clip: ClipCalibration | None = None,
        scale: tuple[float, float] = ...,
    ) -> Motion:
        """Return the motion of some frames of a clip in its crop; `clip` None: calibrate on these frames."""


def open_landmarker_tracker(*, threads: int = 1) -> LandmarkerTracker:
    """Open the landmarker with its shipped networks, `threads` for each; raises `WeightsError`."""
    return LandmarkerTracker(
        resolve_weights("face_landmarker"), detector=FaceDetector(resolve_weights("yunet")), threads=threads
    )


def open_tracker(name: TrackerName, *, device: str | None = None, threads: int = 1) -> FaceTracker:
    """Open a tracker for drivers; `fan` runs on `device` (None: CUDA if usable, else the CPU), others on `threads`.

    Raises `WeightsError` if a package or a file of weights is missing and cannot be fetched.
    """
    if name == "landmarker":
        return open_landmarker_tracker(threads=threads)
    if device is None:
        from export3d_cli.core.runtime.device import pick_device  # imports torch, which only fan needs

        device = str(pick_device("auto"))
    return FanTracker(resolve_weights("fan_basis"), FaceDetector(resolve_weights("yunet")), device=device)
