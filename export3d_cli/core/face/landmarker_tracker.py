"""The tracker `landmarker`: the 478 points and 52 blendshapes of the Face Landmarker as `Motion`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.face.beta import ARKIT_NAMES, BETA_NAMES, compute_measures
from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.face.crop import CROP_SCALE, Square, fit_clip_crop
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.head_pose import fit_cameras, landmarks_to_head_frame
from export3d_cli.core.face.landmarker import WARMUP_PASSES, Face, Landmarker, hold_missing_faces
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.errors import NoFaceError

CHUNK_FRAMES = 1024  # frames computed at once: a long video's landmarks are in memory, but not in double precision


class LandmarkerTracker:
    """A landmarker, the canonical face that goes with it, and the way from its faces to `Motion`."""

    num_landmarks = mesh.NUM_LANDMARKS

    def __init__(self, bundle: Path, *, detector: FaceDetector | None = None, threads: int = 1) -> None:
        """See `Landmarker`."""
        self.landmarker = Landmarker(bundle, detector=detector, threads=threads)
        self.canonical = load_canonical_face(bundle)

    def track_frames(self, frames: Iterable[np.ndarray]) -> list[Face | None]:
        """Track the face through frames, uint8 (H, W, 3) RGB, taken one at a time."""
        self.landmarker.reset()
        return [self.landmarker.track(frame) for frame in frames]

    def track_crops(self, frames: Sequence[np.ndarray], *, independent: bool = False) -> Motion | None:
        """The face in square frames, which are the crop; `apart`: frames that do not follow each other.

        None where no frame shows one.
        """
        side = len(frames[0])
        if independent:
            faces = [self.track_frames([frame] * WARMUP_PASSES)[-1] for frame in frames]
        else:
            faces = self.track_frames([*[frames[0]] * WARMUP_PASSES, *frames])[WARMUP_PASSES:]
        self.landmarker.reset()
        try:
            return self.make_motion(faces, Fraction(25), (side, side), crop=(0.0, 0.0, float(side)))
        except NoFaceError:
            return None

    def calibrate_clip(
        self, faces: Sequence[Face], size: tuple[int, int], scale: tuple[float, float] = CROP_SCALE
    ) -> Square:
        """The crop of a clip of which these faces are known."""
        return fit_clip_crop(np.stack([face.landmarks for face in faces]), size, scale)

    def make_motion(
        self,
        faces: Sequence[Face | None],
        fps: Fraction,
        size: tuple[int, int],
        *,
        crop: Square | None = None,
        scale: tuple[float, float] = CROP_SCALE,
    ) -> Motion:
        """Faces of one clip, in pixels of frames of `size` (width, height) -> Motion in one fixed crop.

        Raises `NoFaceError` when no frame has a face.
        """
        present, found, held = hold_missing_faces(faces)
        landmarks = np.stack([face.landmarks for face in present]).astype(np.float32, copy=False)  # (F, 478, 3)
        x0, y0, side = crop if crop is not None else fit_clip_crop(landmarks, size, scale)
        cameras = np.empty((len(present), 25), np.float32)
        beta = np.empty((len(present), len(BETA_NAMES)), np.float32)
        for at in range(0, len(present), CHUNK_FRAMES):
            part = slice(at, at + CHUNK_FRAMES)
            points = (landmarks[part].astype(np.float64) - [x0, y0, 0]) / side
            cameras[part] = fit_cameras(points, self.canonical.points)
            beta[part, : len(ARKIT_NAMES)] = [face.blendshapes for face in present[part]]
            # at full relief: beta, which weights were trained on, does not change with it
            beta[part, len(ARKIT_NAMES) :] = compute_measures(landmarks_to_head_frame(points, cameras[part], 1.0))
            landmarks[part] = points
        if not found.all():
            beta, cameras, landmarks = beta[held], cameras[held], landmarks[held]
        return Motion(beta, cameras, landmarks, found, fps, (x0, y0, side), size)
