"""The face trackers: `landmarker` (478 points) for sources and drivers, `fan` (68 points) for drivers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.face.crop import CROP_SCALE, ClipCalibration, fit_clip_crop
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.expression_coefficients import compute_measures
from export3d_cli.core.face.face_track import WARMUP_PASSES, FaceTrack, FaceTracker
from export3d_cli.core.face.fan_tracker import FanTracker
from export3d_cli.core.face.head_pose import fit_cameras, landmarks_to_head_frame
from export3d_cli.core.face.landmarker import Face, Landmarker
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.weights import resolve_weights

TrackerName = Literal["landmarker", "fan"]


class LandmarkerTracker(FaceTracker):
    """A `FaceTracker`: a landmarker and the canonical face."""

    landmarker: Landmarker

    def __init__(self, bundle: Path, detector: FaceDetector, *, threads: int = 1) -> None:
        """See `Landmarker`."""
        self.landmarker = Landmarker(bundle, detector, threads=threads)
        self.canonical = load_canonical_face()

    def track_frames(self, frames: Iterable[np.ndarray]) -> list[Face | None]:
        """Track the face through the frames of a video, uint8 (H, W, 3) RGB, read one at a time."""
        track = FaceTrack(self.landmarker)
        return [track.track(frame) for frame in frames]

    def track_crops(self, frames: Sequence[np.ndarray], *, independent: bool = False) -> Motion | None:
        """Track the face in square frames, which are the crop itself; None if no frame shows a face.

        With `independent` the frames do not follow each other in time.
        """
        side = len(frames[0])
        if independent:
            faces = [self.track_frames([frame] * WARMUP_PASSES)[-1] for frame in frames]
        else:
            faces = self.track_frames([*[frames[0]] * WARMUP_PASSES, *frames])[WARMUP_PASSES:]
        if all(face is None for face in faces):
            return None
        return self.make_motion(faces, Fraction(25), (side, side), clip=ClipCalibration((0.0, 0.0, float(side))))

    def calibrate_clip(
        self, faces: Sequence[Face], size: tuple[int, int], scale: tuple[float, float] = CROP_SCALE
    ) -> ClipCalibration:
        """Choose the crop of the clip that shows these faces."""
        return ClipCalibration(fit_clip_crop(np.stack([face.landmarks for face in faces]), size, scale))

    def fit(self, faces: Sequence[Face], clip: ClipCalibration) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit cameras to the landmarks, and measure the face in the head frame."""
        x0, y0, side = clip.crop
        points = (np.stack([face.landmarks for face in faces]).astype(np.float64) - [x0, y0, 0]) / side  # (F, 478, 3)
        cameras = fit_cameras(points, self.canonical.points)
        # at full relief: weights were trained on beta, so it must not change with RELIEF_SCALE
        measures = compute_measures(landmarks_to_head_frame(points, cameras, 1.0))
        beta = np.concatenate([[face.blendshapes for face in faces], measures], axis=1)
        return beta.astype(np.float32), cameras, points.astype(np.float32)


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
