"""The trackers by name: `landmarker` reads sources and drivers, `fan` is another way to read drivers."""

from __future__ import annotations

from typing import Literal

from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.fan_tracker import FanTracker
from export3d_cli.core.face.motion import LandmarkerTracker
from export3d_cli.core.face.tracker_protocol import FaceTracker
from export3d_cli.core.runtime.weights import resolve_weights

TrackerName = Literal["landmarker", "fan"]


def open_landmarker_tracker(*, threads: int = 1) -> LandmarkerTracker:
    """The landmarker with its shipped networks, `threads` of each. Raises `WeightsError`."""
    return LandmarkerTracker(
        resolve_weights("face_landmarker"), detector=FaceDetector(resolve_weights("yunet")), threads=threads
    )


def open_tracker(name: TrackerName, *, device: str | None = None) -> FaceTracker:
    """A tracker for drivers; `fan` runs on `device`, None taking CUDA where it is usable.

    Raises `WeightsError` where what it needs is not there and cannot be fetched.
    """
    if name == "landmarker":
        return open_landmarker_tracker()
    if device is None:
        from export3d_cli.core.runtime.device import pick_device  # imports torch, which only fan needs

        device = str(pick_device("auto"))
    return FanTracker(resolve_weights("fan_basis"), FaceDetector(resolve_weights("yunet")), device=device)
