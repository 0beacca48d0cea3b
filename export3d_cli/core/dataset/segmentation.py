"""A video as clips of one face each: where it is cut, and which clips are fit for training.

Frames pass once and none is kept: what waits is one face per frame of the clip that is open, which never gets longer
than `Gates.max_seconds`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np

from export3d_cli.core.face.landmarker import WARMUP_PASSES, Face
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.face.landmarks import RIGID_POINTS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.scene_detection import DISSOLVE_SPANS, SceneCutDetector
from export3d_cli.core.runtime.camera import head_pose
from export3d_cli.core.runtime.errors import InputError

MAX_GAP_S = 0.2  # seconds without a face that do not end a clip
SHARPNESS_INTERVAL = 5  # frames between measures of sharpness
SHARPNESS_SIZE_PX = 96  # pixels to which a face is scaled before its sharpness is measured
JUMP_THRESHOLD = 0.25  # mean way of the landmarks from one frame to the next, in face boxes, that no head makes


@dataclass(frozen=True)
class ClipFilter:
    """What a training clip must keep to. The defaults let ordinary talking heads pass, small and soft ones too."""

    min_seconds: float = 1.0
    max_seconds: float = 60.0  # a longer track becomes several clips, each with a crop of its own
    min_face_px: float = 64.0  # pixels: longer side of the face box, median
    min_sharpness: float = 0.012  # of the face, 0..: see `sharpness`
    max_yaw: float = 65.0  # degrees, 95 of 100 frames
    max_pitch: float = 50.0  # degrees, 95 of 100 frames
    max_jitter: float = 0.08  # of the rigid landmarks, in face boxes: see `jitter`
    min_tracked_ratio: float = 0.9  # share of frames with a face

    def __post_init__(self) -> None:
        """Refuse gates that nothing can pass."""
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise InputError(
                f"clips of {self.min_seconds} s at least and {self.max_seconds} s at most: give min <= max"
            )

    def rejection_reason(self, segment: Segment) -> str:
        """Why a segment is no training clip; empty when it is one."""
        motion = segment.motion
        seconds = float(len(motion) / motion.fps)
        if seconds < self.min_seconds:
            return f"too short: {seconds:.2f} s, at least {self.min_seconds:g} s wanted"
        if motion.found.mean() < self.min_tracked_ratio:
            return f"a face in only {motion.found.mean():.0%} of the frames"
        if segment.face_px < self.min_face_px:
            return f"face too small: {segment.face_px:.0f} px, at least {self.min_face_px:g} px wanted"
        yaw, pitch, _ = np.percentile(np.abs(yaw_pitch_roll(motion.camera[motion.found])), 95, axis=0)
        if yaw > self.max_yaw or pitch > self.max_pitch:
            most = f"{self.max_yaw:g} and {self.max_pitch:g}"
            return f"turned too far: yaw {yaw:.0f}, pitch {pitch:.0f} degrees, at most {most} wanted"
        if segment.sharpness < self.min_sharpness:
            return f"blurred: sharpness {segment.sharpness:.4f}, at least {self.min_sharpness:g} wanted"
        shake = landmark_jitter(motion, segment.face_px)
        if shake > self.max_jitter:
            return f"unsteady landmarks: {shake:.4f} of the face from frame to frame, at most {self.max_jitter:g}"
        return ""


@dataclass(frozen=True)
class Segment:
    """Frames `start` to `start + len(motion)` of a video, which follow one face."""

    start: int
    motion: Motion
    face_px: float  # pixels: longer side of the face box, median
    sharpness: float  # median


def track_segments(
    frames: Iterable[np.ndarray], tracker: LandmarkerTracker, fps: Fraction, size: tuple[int, int], max_seconds: float
) -> Iterator[Segment]:
    """Track uint8 (H, W, 3) frames of `size` (width, height), one at a time; every stretch that follows one face.

    Cuts, leaps of the landmarks and more than `GAP` seconds without a face end a segment; so does `max_seconds`. The
    frames of a dissolve or fade, which show two scenes at once, belong to none.
    """
    landmarker, is_cut = tracker.landmarker, SceneCutDetector()
    landmarker.reset()
    longest, gap = max(1, round(max_seconds * fps)), round(MAX_GAP_S * fps)
    open_ = _SegmentBuilder(tracker, fps, size)
    face: Face | None = None
    before: np.ndarray | None = None
    different: deque[int] = deque(maxlen=DISSOLVE_SPANS[0])  # frames that did not just repeat the one before
    for index, frame in enumerate(frames):
        mixed = None
        if before is None or not np.array_equal(frame, before):  # a frame that is repeated has the same face
            mixed = is_cut(frame)
            if mixed is not None:
                landmarker.reset()
            for _ in range(1 if open_.faces and mixed is None else WARMUP_PASSES):
                face = landmarker.track(frame)
                if face is None:
                    break
            different.append(index)
        before = frame
        ends = mixed is not None or len(open_.faces) >= longest or open_.frames_without_face > gap
        if ends or (face is not None and open_.is_jump_to(face)):
            yield from open_.close(different[-mixed - 1] if mixed else index)
        if face is not None or open_.faces:
            open_.add(index, face, frame)
    yield from open_.close()


class _SegmentBuilder:
    """The segment that is being followed."""

    def __init__(self, tracker: LandmarkerTracker, fps: Fraction, size: tuple[int, int]) -> None:
        self.tracker, self.fps, self.size = tracker, fps, size
        self._clear()

    def _clear(self) -> None:
        self.start, self.frames_without_face = 0, 0
        self.faces: list[Face | None] = []
        self.sharpness_samples: list[float] = []
        self.last_face: Face | None = None

    def add(self, index: int, face: Face | None, frame: np.ndarray) -> None:
        if not self.faces:
            self.start = index
        self.faces.append(face)
        self.frames_without_face = 0 if face is not None else self.frames_without_face + 1
        if face is not None:
            self.last_face = face
            if (index - self.start) % SHARPNESS_INTERVAL == 0:
                self.sharpness_samples.append(sharpness(frame, face))

    def is_jump_to(self, face: Face) -> bool:
        if self.last_face is None:
            return False
        way = np.linalg.norm(face.landmarks[:, :2] - self.last_face.landmarks[:, :2], axis=1).mean()
        return bool(
            way > JUMP_THRESHOLD * (1 + self.frames_without_face) * min(_face_size(face), _face_size(self.last_face))
        )

    def close(self, end: int | None = None) -> Iterator[Segment]:
        """The segment up to frame `end`, if there is one, but for frames at its end that show no face; it is left."""
        faces = self.faces if end is None else self.faces[: max(0, end - self.start)]
        while faces and faces[-1] is None:
            faces = faces[:-1]
        if faces:
            motion = self.tracker.make_motion(faces, self.fps, self.size)
            side = float(np.median([_face_size(face) for face in faces if face is not None]))
            yield Segment(self.start, motion, side, float(np.median(self.sharpness_samples)))
        self._clear()


def sharpness(frame: np.ndarray, face: Face) -> float:
    """Energy of the face's finest detail over its contrast: about 0.03 of a soft face, 0.2 of a crisp one."""
    low = np.floor(face.landmarks[:, :2].min(0)).astype(int).clip(0)
    high = np.ceil(face.landmarks[:, :2].max(0)).astype(int) + 1
    part = frame[low[1] : high[1], low[0] : high[0]]
    if min(part.shape[:2]) < 2:
        return 0.0
    grey = cv2.cvtColor(part, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SHARPNESS_SIZE_PX, SHARPNESS_SIZE_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    return float(cv2.Laplacian(small, cv2.CV_32F).var() / (small.var() + 25.0))


def landmark_jitter(motion: Motion, face_px: float) -> float:
    """Trembling of the rigid landmarks, in face boxes: the mean second difference over time, of steady rows only."""
    steady = motion.found[2:] & motion.found[1:-1] & motion.found[:-2]
    if not steady.any():
        return 0.0
    points = motion.landmarks[:, list(RIGID_POINTS), :2].astype(np.float64) * motion.crop[2] / face_px
    bend = np.linalg.norm(points[2:] - 2 * points[1:-1] + points[:-2], axis=-1)
    return float(np.median(bend[steady], axis=1).mean())


def yaw_pitch_roll(camera: np.ndarray) -> np.ndarray:
    """Cameras (T, 25) -> yaw, pitch, roll in degrees, (T, 3), as `Camera.angles` reads them."""
    r, _ = head_pose(camera)
    yaw = -np.arctan2(r[:, 0, 2], np.hypot(r[:, 1, 2], r[:, 2, 2]))
    pitch = np.arctan2(r[:, 1, 2], r[:, 2, 2])
    roll = np.arctan2(-r[:, 0, 1], r[:, 0, 0])
    return np.degrees(np.stack([yaw, pitch, roll], axis=1))


def _face_size(face: Face) -> float:
    return float(np.ptp(face.landmarks[:, :2], axis=0).max())
