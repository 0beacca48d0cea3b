"""Faces of pictures, followed through videos: what the face trackers share, one face, and the target face of several.

All state of the tracking is in `FaceTrack` and `TargetFaceTracker`: threads may share a `FaceTracker`.
"""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain

import numpy as np

from export3d_cli.core.face.crop import CROP_SCALE, ClipCalibration
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.scene_detection import SceneCutDetector
from export3d_cli.core.runtime.errors import InputError, NoFaceError

WARMUP_PASSES = 3  # see `FaceTrack.settle`
_THOROUGH_INTERVAL = 8  # frames without a face between thorough searches for small faces
CHUNK_FRAMES = 1024  # frames computed at once, which bounds the memory of double precision in a long video
_SAME_FACE_DISTANCE = 0.3  # face boxes; faces that are nearer are one
MAX_JUMP = (0.75, 0.03)  # face boxes a face may move between frames, and the addition per frame without a face
ROTATION_VOTES = 3  # frames with a face that must agree before a video is rotated
PATIENCE_S = 2  # how long a lost face is searched at its last position before another one is taken


@dataclass(frozen=True)
class Face:
    """A face's landmarks and expression, as a tracker finds them."""

    # (478, 3) float32; x, y in pixels, z on the scale of x, negative towards the camera; of `fan` (68, 3) with z = 0
    landmarks: np.ndarray
    blendshapes: np.ndarray  # (52,) float32 in [0, 1], in the order of ARKIT_NAMES; tongueOut, of `fan` all, are 0
    score: float  # probability that it is a face, in [0.5, 1]
    torso: np.ndarray | None = None  # (4,) float32, see `TorsoTracker`; None: not read
    code: np.ndarray | None = None  # (d,) float32, motion read from pixels, see `PlaneDict`; None: not read

    def distance_to(self, other: Face) -> float:
        """Return the distance of the centres of two faces, in boxes of the smaller one."""
        sizes = [float(np.ptp(face.landmarks[:, :2], axis=0).max()) for face in (self, other)]
        distance = np.linalg.norm(self.landmarks[:, :2].mean(0) - other.landmarks[:, :2].mean(0))
        return float(distance / max(1e-6, min(sizes)))


class FaceTracker(ABC):
    """Finds faces in images, uint8 (H, W, 3) RGB, and converts those of a clip to `Motion`."""

    detector: FaceDetector

    @abstractmethod
    def search(self, image: np.ndarray, *, thorough: bool) -> Iterator[Face]:
        """Yield the faces of an image, the largest first, some perhaps twice; `thorough`: small ones, too."""

    @abstractmethod
    def find_near(self, image: np.ndarray, face: Face) -> Face | None:
        """Return the face near the place of `face`, which another image showed, or None."""

    def find(self, image: np.ndarray, *, thorough: bool = True) -> Face | None:
        """Return the largest face, or None; `thorough` also searches for small faces."""
        return next(self.search(check_image(image), thorough=thorough), None)

    def find_all(self, image: np.ndarray) -> list[Face]:
        """Return every face, the largest first."""
        faces: list[Face] = []
        for face in self.search(check_image(image), thorough=True):
            if all(face.distance_to(other) > _SAME_FACE_DISTANCE for other in faces):
                faces.append(face)
        return sorted(faces, key=lambda face: -float(np.prod(np.ptp(face.landmarks[:, :2], axis=0))))

    def rotation_to_upright(self, image: np.ndarray) -> int | None:
        """Return the clockwise degrees (0, 90, 180, 270) that turn the largest face upright; None without a face.

        Asks the detector: landmark networks often find an upright face in one that is upside down.
        """
        return self.detector.rotation_to_upright(check_image(image))

    @abstractmethod
    def calibrate_clip(self, faces: Sequence[Face], size: tuple[int, int],
                       scale: tuple[float, float] = CROP_SCALE) -> ClipCalibration:  # fmt: skip
        """Measure what stays the same in a clip, from faces of its frames of `size`; `scale`: see `fit_clip_crop`."""

    @abstractmethod
    def fit(self, faces: Sequence[Face], clip: ClipCalibration) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return beta (F, 64), cameras (F, 25) and landmarks (F, N, 3) in crop units, float32, of faces of a clip."""

    def make_motion(self, faces: Sequence[Face | None], fps: Fraction, size: tuple[int, int], *,
                    clip: ClipCalibration | None = None) -> Motion:  # fmt: skip
        """Return the motion of a clip of `size` (width, height); raises `NoFaceError` if no frame has a face.

        A frame without a face repeats the face before it. `clip` None: calibrate on these faces.
        """
        found = np.array([face is not None for face in faces], dtype=bool)
        present = [face for face in faces if face is not None]
        if not present:
            raise NoFaceError("no face was found in any frame")
        clip = clip or self.calibrate_clip(present, size)
        chunks = [self.fit(present[i : i + CHUNK_FRAMES], clip) for i in range(0, len(present), CHUNK_FRAMES)]
        beta, cameras, landmarks = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        (x0, y0, side), unseen = clip.crop, np.full(4, np.nan, np.float32)
        torso = np.stack([unseen if face.torso is None else face.torso for face in present])
        torso = ((torso - (x0, y0, 0, 0)) / (side, side, 1, 1)).astype(np.float32)
        code = np.stack([np.zeros(0, np.float32) if face.code is None else face.code for face in present])
        motion = Motion(beta, cameras, landmarks, found[found], fps, clip.crop, size, torso, code)
        return motion if found.all() else replace(motion.select((np.cumsum(found) - 1).clip(0)), found=found)


def check_image(image: np.ndarray) -> np.ndarray:
    """Return the image as a contiguous array; raise `InputError` unless it is a uint8 (H, W, 3) RGB array."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(f"an image must be a uint8 (H, W, 3) RGB array, got {image.dtype} {image.shape}")
    return np.ascontiguousarray(image)


class FaceTrack:
    """One face, followed from frame to frame of a video; cheaper and steadier than finding it in each frame."""

    def __init__(self, tracker: FaceTracker) -> None:
        self._tracker = tracker
        self._face: Face | None = None  # of the previous frame
        self._size: tuple[int, ...] = ()  # height, width of the previous frame
        self._lost_frames = 0  # since a face was found

    def track(self, image: np.ndarray) -> Face | None:
        """Return the next frame's face, or None; searched near the last one, then in the whole frame."""
        if image.shape[:2] != self._size:
            self._face, self._lost_frames = None, 0
        face = None if self._face is None else self._tracker.find_near(image, self._face)
        if face is None:
            face = self._tracker.find(image, thorough=self._lost_frames % _THOROUGH_INTERVAL == 0)
        self._lost_frames = 0 if face is not None else self._lost_frames + 1
        self._face, self._size = face, image.shape[:2]
        return face

    def settle(self, image: np.ndarray) -> Face | None:
        """Track a picture, or the first frame of a video, until the region of interest is the one kept in videos."""
        for _ in range(WARMUP_PASSES):
            face = self.track(image)
            if face is None:
                break
        return face

    def follow(self, face: Face, image: np.ndarray) -> None:
        """Let `track` follow this face of `image` from now on."""
        self._face, self._size = face, image.shape[:2]


def choose_face(faces: list[Face], choice: str, name: str) -> Face:
    """Return the largest, left, right or index:N face (from the left, from 0); `faces` are the largest first."""
    if not faces:
        raise NoFaceError(f"no face found in {name}: use a photo with one large, upright face")
    if choice == "largest":
        return faces[0]
    across = sorted(faces, key=lambda face: float(face.landmarks[:, 0].mean()))
    index = {"left": 0, "right": len(faces) - 1}.get(choice)
    if index is None:
        kind, _, number = choice.partition(":")
        if kind != "index" or not number.isdecimal():
            raise InputError(f"face must be largest, left, right or index:N, got {choice!r}")
        index = int(number)
    if index >= len(faces):
        raise InputError(f"{name} shows {len(faces)} face(s): {choice} does not exist, index:0 is the leftmost")
    return across[index]


def find_photo_face(tracker: FaceTracker, image: np.ndarray, *, name: str = "the photo", face: str = "largest") -> Face:
    """Return the face of a photo, uint8 (H, W, 3), see `choose_face`; raise `NoFaceError` if there is none upright."""
    degrees = tracker.rotation_to_upright(image)
    if degrees:
        pose = describe_rotation(degrees)
        raise NoFaceError(f"the face in {name} {pose}: rotate the photo by {degrees} degrees clockwise")
    track = FaceTrack(tracker)
    if face != "largest":
        track.follow(choose_face(tracker.find_all(image), face, name), image)
    tracked = track.settle(image)
    if tracked is None:
        hint = "use a photo with one large, upright face, or give its 68 or 478 points with --landmarks FILE"
        raise NoFaceError(f"no face found in {name}: {hint}")
    return tracked


class TargetFaceTracker:
    """Called with the frames of a video, uint8 (H, W, 3) RGB, in order; returns the target face of each, or None.

    The face is chosen in the first frame that shows any, and again after a cut. Within a shot, faces elsewhere in the
    picture are not taken for it. If a shot after a cut shows too few faces for index:N, its frames have no face, and
    `notes` says so: another person is never taken instead. `is_new_shot` says whether the last frame follows a cut, or
    shows another face than the frames before because that one was lost for long. For `choice` see `choose_face`.
    """

    def __init__(self, tracker: FaceTracker, fps: Fraction, *, choice: str = "largest",
                 name: str = "the video") -> None:  # fmt: skip
        self._tracker, self._choice, self._name = tracker, choice, name
        self._track = FaceTrack(tracker)
        self._fps = fps
        self._patience_frames = round(PATIENCE_S * fps)
        self._cuts = SceneCutDetector()
        self._previous_image: np.ndarray | None = None
        self._face: Face | None = None  # of the previous frame
        self._last_face: Face | None = None  # the last one found
        self._missing_frames = 0  # frames since the last face
        self._frame = -1
        self._cut_frame = 0
        self._chosen = False  # whether a face was chosen in any shot
        self.is_new_shot = False
        self.notes: list[str] = []  # for the user

    def __call__(self, image: np.ndarray) -> Face | None:
        """Return the target face in the next frame."""
        self._frame += 1
        self.is_new_shot = False
        if self._previous_image is not None and np.array_equal(image, self._previous_image):
            return self._face
        self._previous_image = image
        if self._cuts(image) is not None:
            self._track = FaceTrack(self._tracker)
            self._last_face, self._cut_frame, self.is_new_shot = None, self._frame, True
        self._face = self._choose(image) if self._last_face is None else self._follow_last(image, self._last_face)
        self._missing_frames = 0 if self._face is not None else self._missing_frames + 1
        self._last_face = self._face or self._last_face
        return self._face

    def _choose(self, image: np.ndarray) -> Face | None:
        face = self._track.track(image)
        if face is None:
            return None
        if self._choice != "largest":
            faces = self._tracker.find_all(image)
            index = self._choice.partition(":")[2]
            if self._chosen and len(faces) <= int(index or 0):
                self._track = FaceTrack(self._tracker)
                if index and not self.notes:
                    seconds = float(self._cut_frame / self._fps)
                    self.notes.append(f"{self._name} shows {len(faces)} face(s) after the cut at {seconds:.1f} s: "
                                      f"{self._choice} does not exist there, and its frames count as frames without "
                                      "a face")  # fmt: skip
                return None
            self._track.follow(choose_face(faces, self._choice, self._name), image)
        self._chosen = True
        for _ in range(WARMUP_PASSES - 1):
            face = self._track.track(image)
        return face

    def _follow_last(self, image: np.ndarray, last: Face) -> Face | None:
        max_jump = MAX_JUMP[0] + MAX_JUMP[1] * self._missing_frames
        face = self._track.track(image)
        if face is None or last.distance_to(face) <= max_jump:
            return face
        nearest = min(self._tracker.find_all(image), key=last.distance_to, default=face)
        if last.distance_to(nearest) > max_jump and self._missing_frames < self._patience_frames:
            self._track.follow(last, image)  # another face: search at the last position again
            return None
        self.is_new_shot = last.distance_to(nearest) > max_jump
        self._track.follow(nearest, image)
        return self._track.track(image)


_RECORD = np.dtype([  # of a frame in `TrackCache`
    ("is_new_shot", "?"), ("score", "f4"), ("count", "i4"),  # score 0: no face; number of landmarks
    ("landmarks", "f4", (NUM_LANDMARKS, 3)), ("blendshapes", "f4", len(ARKIT_NAMES)),
    ("torso", "f4", 4),  # NaN: not seen, or not read
])  # fmt: skip


class TrackCache(contextlib.AbstractContextManager["TrackCache"]):
    """The faces of the last pass over a driver, in a temporary file; a context manager.

    With it a driver is tracked once for several sources, in constant memory. Its key is all that its faces depend on.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="export3d-")  # noqa: SIM115 - closed by __exit__
        self._key: object = None
        self._complete = False
        self.size = (0, 0)  # width, height of the rotated frames
        self.rotation = 0  # clockwise degrees by which the frames were rotated
        self.notes: tuple[str, ...] = ()  # for the user, about the pass

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def is_complete(self, key: object) -> bool:
        """Return whether all faces of the pass `key` are recorded."""
        return self._complete and self._key == key

    def restart(self, key: object) -> None:
        """Remove all records and begin to record the pass `key`."""
        self._file.seek(0)
        self._file.truncate()
        self._key, self._complete, self.notes = key, False, ()

    def append(self, face: Face | None, size: tuple[int, int], *, is_new_shot: bool = False) -> None:
        """Record the face of the next frame, None if it shows none; `size` is its (width, height)."""
        record = np.zeros((), _RECORD)
        record["is_new_shot"] = is_new_shot
        if face is not None:
            record["score"], record["count"] = face.score, len(face.landmarks)
            record["landmarks"][: len(face.landmarks)], record["blendshapes"] = face.landmarks, face.blendshapes
            record["torso"] = np.nan if face.torso is None else face.torso
        self.size = size
        self._file.write(record.tobytes())

    def finish(self, notes: Iterable[str] = ()) -> None:
        """Mark the pass as complete."""
        self._complete, self.notes = True, tuple(notes)

    def __iter__(self) -> Iterator[tuple[Face | None, bool]]:
        """Yield the face of each frame, and whether a shot begins there."""
        self._file.seek(0)
        while content := self._file.read(_RECORD.itemsize):
            record = np.frombuffer(content, _RECORD)[0]
            landmarks = record["landmarks"][: record["count"]]
            face = Face(landmarks, record["blendshapes"], float(record["score"]), record["torso"])
            yield face if record["score"] else None, bool(record["is_new_shot"])


class UprightFrames:
    """The frames of a video, uint8 (H, W, 3) RGB, rotated so that the face is upright, as if no rotation tag were lost.

    The first three frames that show a face decide; `rotation` is the result, clockwise in degrees: 0, 90, 180 or 270.
    Frames before them stay as they are.
    """

    def __init__(self, tracker: FaceTracker, frames: Iterable[np.ndarray]) -> None:
        self._tracker, self._frames = tracker, frames
        self.rotation = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        frames, undecided, votes = iter(self._frames), list[np.ndarray](), list[int]()
        for frame in frames:
            vote = self._tracker.rotation_to_upright(frame)
            if vote is None and not votes:
                yield frame
                continue
            undecided.append(frame)
            votes += [] if vote is None else [vote]
            if len(votes) == ROTATION_VOTES or len(undecided) == 2 * ROTATION_VOTES:
                break
        self.rotation = votes[0] if len(set(votes)) == 1 else 0
        for frame in chain(undecided, frames):
            yield rotate_clockwise(frame, self.rotation)


def rotate_clockwise(image: np.ndarray, degrees: int) -> np.ndarray:
    """Rotate an image (H, W, 3) by a multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(image, -degrees // 90))


def describe_rotation(degrees: int) -> str:
    """Return the predicate of a face that has to be rotated clockwise by these degrees to be upright."""
    return "is upside down" if degrees == 180 else "lies on its side"
