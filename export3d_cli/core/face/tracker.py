"""Opening the face trackers by name.

`landmarker` (478 points) reads sources and drivers; `fan` (68 points) reads drivers only.
"""

from __future__ import annotations

from typing import Literal

from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.face_track import FaceTracker
from export3d_cli.core.face.fan_tracker import FanTracker
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.runtime.weights import resolve_weights

TrackerName = Literal["landmarker", "fan"]


def open_landmarker_tracker(*, threads: int = 1) -> LandmarkerTracker:
    """Open the landmarker with its shipped networks, `threads` for each; raises `WeightsError`."""
    detector = FaceDetector(resolve_weights("yunet"))
    return LandmarkerTracker(resolve_weights("face_landmarker"), detector, threads=threads)


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
