"""The tracker `landmarker`: 478 points and 52 blendshapes of the Face Landmarker, turned into `Motion`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.face.crop import CROP_SCALE, ClipCalibration, fit_clip_crop
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, BETA_NAMES, compute_measures
from export3d_cli.core.face.face_track import WARMUP_PASSES, FaceTrack
from export3d_cli.core.face.head_pose import fit_cameras, landmarks_to_head_frame
from export3d_cli.core.face.landmarker import Face, Landmarker, hold_missing_faces
from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.errors import NoFaceError

CHUNK_FRAMES = 1024  # frames computed at once, which bounds the memory of double precision in a long video


class LandmarkerTracker:
    """A `FaceTracker`: a landmarker and the canonical face of its bundle."""

    num_landmarks = NUM_LANDMARKS

    def __init__(self, bundle: Path, *, detector: FaceDetector | None = None, threads: int = 1) -> None:
        """See `Landmarker`."""
        self.landmarker = Landmarker(bundle, detector=detector, threads=threads)
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
        try:
            return self.make_motion(faces, Fraction(25), (side, side), clip=ClipCalibration((0.0, 0.0, float(side))))
        except NoFaceError:
            return None

    def calibrate_clip(
        self, faces: Sequence[Face], size: tuple[int, int], scale: tuple[float, float] = CROP_SCALE
    ) -> ClipCalibration:
        """Choose the crop of the clip that shows these faces."""
        return ClipCalibration(fit_clip_crop(np.stack([face.landmarks for face in faces]), size, scale))

    def make_motion(
        self,
        faces: Sequence[Face | None],
        fps: Fraction,
        size: tuple[int, int],
        *,
        clip: ClipCalibration | None = None,
        scale: tuple[float, float] = CROP_SCALE,
    ) -> Motion:
        """Return the motion of one clip from the faces of its frames, in one fixed crop.

        Raises `NoFaceError` if no frame has a face.

        Args:
            faces: of each frame, in pixels; None where the frame shows none.
            fps: frames a second.
            size: width, height of the frames.
            clip: from `calibrate_clip`; None: calibrate on these faces, with `scale`.
            scale: see `fit_clip_crop`.
        """
        present, found, held_rows = hold_missing_faces(faces)
        landmarks = np.stack([face.landmarks for face in present]).astype(np.float32, copy=False)  # (F, 478, 3)
        x0, y0, side = fit_clip_crop(landmarks, size, scale) if clip is None else clip.crop
        cameras = np.empty((len(present), 25), np.float32)
        beta = np.empty((len(present), len(BETA_NAMES)), np.float32)
        for start in range(0, len(present), CHUNK_FRAMES):
            chunk = slice(start, start + CHUNK_FRAMES)
            points = (landmarks[chunk].astype(np.float64) - [x0, y0, 0]) / side
            cameras[chunk] = fit_cameras(points, self.canonical.points)
            beta[chunk, : len(ARKIT_NAMES)] = [face.blendshapes for face in present[chunk]]
            # at full relief: weights were trained on beta, so it must not change with RELIEF_SCALE
            beta[chunk, len(ARKIT_NAMES) :] = compute_measures(landmarks_to_head_frame(points, cameras[chunk], 1.0))
            landmarks[chunk] = points
        if not found.all():
            beta, cameras, landmarks = beta[held_rows], cameras[held_rows], landmarks[held_rows]
        return Motion(beta, cameras, landmarks, found, fps, (x0, y0, side), size)
