"""Splits a video into segments that follow one face each, and decides which of them are fit for training.

Frames are read once and not kept. Memory holds one face per frame of the open segment, which is at most
`ClipFilter.max_seconds` long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np

from export3d_cli.core.face.face_track import Face, FaceTrack
from export3d_cli.core.face.landmarks import RIGID_POINTS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.tracker import LandmarkerTracker
from export3d_cli.core.media.scene_detection import DISSOLVE_SPANS, SceneCutDetector
from export3d_cli.core.runtime.camera import yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError

MAX_GAP_S = 0.2  # longest time without a face that does not end a segment
SHARPNESS_INTERVAL = 5  # frames between two sharpness measurements
SHARPNESS_SIZE_PX = 96  # side to which a face is scaled before its sharpness is measured
JUMP_THRESHOLD = 0.25  # mean landmark displacement between two frames, in face sizes, that no head motion reaches


@dataclass(frozen=True)
class ClipFilter:
    """Limits for training clips. The defaults accept ordinary talking heads, including small and soft ones."""

    min_seconds: float = 1.0
    max_seconds: float = 60.0  # a longer track is split into several clips, each with its own crop
    min_face_px: float = 64.0  # longer side of the face box, median over frames
    min_sharpness: float = 0.012  # of the face, >= 0: see `sharpness`
    max_yaw: float = 65.0  # degrees, 95th percentile over frames
    max_pitch: float = 50.0  # degrees, 95th percentile over frames
    max_jitter: float = 0.08  # of the rigid landmarks, in face sizes: see `landmark_jitter`
    min_tracked_ratio: float = 0.9  # frames with a face / frames

    def __post_init__(self) -> None:
        """Check that the duration range is not empty."""
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise InputError(f"clip duration must satisfy 0 <= min <= max, got {self.min_seconds} s and "
                             f"{self.max_seconds} s: change --min-seconds or --max-seconds")  # fmt: skip

    def rejection_reason(self, segment: Segment) -> str:
        """Return why a segment is unfit for training; an empty string if it is fit."""
        motion = segment.motion
        seconds = float(len(motion) / motion.fps)
        if seconds < self.min_seconds:
            return f"too short: {seconds:.2f} s, must be at least {self.min_seconds:g} s"
        if motion.found.mean() < self.min_tracked_ratio:
            found = f"{motion.found.mean():.0%} of the frames, must be at least {self.min_tracked_ratio:.0%}"
            return f"face found in only {found}"
        if segment.face_px < self.min_face_px:
            return f"face too small: {segment.face_px:.0f} px, must be at least {self.min_face_px:g} px"
        yaw, pitch, _ = np.percentile(np.abs(yaw_pitch_roll(motion.camera[motion.found])), 95, axis=0)
        if yaw > self.max_yaw or pitch > self.max_pitch:
            limits = f"{self.max_yaw:g} and {self.max_pitch:g}"
            return f"turned too far: yaw {yaw:.0f}, pitch {pitch:.0f} degrees, must be at most {limits}"
        if segment.sharpness < self.min_sharpness:
            return f"blurred: sharpness {segment.sharpness:.4f}, must be at least {self.min_sharpness:g}"
        jitter = landmark_jitter(motion, segment.face_px)
        if jitter > self.max_jitter:
            return f"unsteady landmarks: jitter {jitter:.4f} of the face size, must be at most {self.max_jitter:g}"
        return ""


@dataclass(frozen=True)
class Segment:
    """Frames `start` to `start + len(motion)` of a video; they follow one face."""

    start: int
    motion: Motion
    face_px: float  # longer side of the face box, median
    sharpness: float  # median


def track_segments(frames: Iterable[np.ndarray], tracker: LandmarkerTracker, fps: Fraction, size: tuple[int, int],
                   max_seconds: float) -> Iterator[Segment]:  # fmt: skip
    """Track uint8 (H, W, 3) frames of `size` (width, height) and yield every segment that follows one face.

    It ends at a cut, a jump, `max_seconds` and `MAX_GAP_S` without a face; dissolves and fades belong to none.
    """
    track, detect_cut = FaceTrack(tracker), SceneCutDetector()
    max_frames, max_gap = max(1, round(max_seconds * fps)), round(MAX_GAP_S * fps)
    builder = _SegmentBuilder(tracker, fps, size)
    face: Face | None = None
    previous: np.ndarray | None = None
    distinct: deque[int] = deque(maxlen=DISSOLVE_SPANS[0])  # indices of frames that differ from the one before
    for index, frame in enumerate(frames):
        mixed = None
        if previous is None or not np.array_equal(frame, previous):  # a repeated frame has the same face
            mixed = detect_cut(frame)
            if mixed is not None:
                track = FaceTrack(tracker)
            face = track.track(frame) if builder.faces and mixed is None else track.settle(frame)
            distinct.append(index)
        previous = frame
        ends = mixed is not None or len(builder.faces) >= max_frames or builder.frames_without_face > max_gap
        if ends or (face is not None and builder.is_jump_to(face)):
            yield from builder.close(distinct[-mixed - 1] if mixed else index)
        if face is not None or builder.faces:
            builder.add(index, face, frame)
    yield from builder.close()


class _SegmentBuilder:
    """Collects the faces of the open segment."""

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
        displacement = np.linalg.norm(face.landmarks[:, :2] - self.last_face.landmarks[:, :2], axis=1).mean()
        face_size = min(_face_size(face), _face_size(self.last_face))
        return bool(displacement > JUMP_THRESHOLD * (1 + self.frames_without_face) * face_size)

    def close(self, end: int | None = None) -> Iterator[Segment]:
        """Yield the segment up to frame `end`, without trailing frames that have no face, and start a new one."""
        faces = self.faces if end is None else self.faces[: max(0, end - self.start)]
        while faces and faces[-1] is None:
            faces = faces[:-1]
        if faces:
            motion = self.tracker.make_motion(faces, self.fps, self.size)
            face_px = float(np.median([_face_size(face) for face in faces if face is not None]))
            yield Segment(self.start, motion, face_px, float(np.median(self.sharpness_samples)))
        self._clear()


def sharpness(frame: np.ndarray, face: Face) -> float:
    """Return the variance of the face's Laplacian over that of its brightness: 0.03 if soft, 0.2 if crisp (about)."""
    low = np.floor(face.landmarks[:, :2].min(0)).astype(int).clip(0)
    high = np.ceil(face.landmarks[:, :2].max(0)).astype(int) + 1
    crop = frame[low[1] : high[1], low[0] : high[0]]
    if min(crop.shape[:2]) < 2:
        return 0.0
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SHARPNESS_SIZE_PX, SHARPNESS_SIZE_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    return float(cv2.Laplacian(small, cv2.CV_32F).var() / (small.var() + 25.0))


def landmark_jitter(motion: Motion, face_px: float) -> float:
    """Return the mean second difference over time of the rigid landmarks, in face sizes; 0 without 3 faces in a row."""
    consecutive = motion.found[2:] & motion.found[1:-1] & motion.found[:-2]
    if not consecutive.any():
        return 0.0
    points = motion.landmarks[:, list(RIGID_POINTS), :2].astype(np.float64) * motion.crop[2] / face_px
    second_difference = np.linalg.norm(points[2:] - 2 * points[1:-1] + points[:-2], axis=-1)
    return float(np.median(second_difference[consecutive], axis=1).mean())


def _face_size(face: Face) -> float:
    return float(np.ptp(face.landmarks[:, :2], axis=0).max())
