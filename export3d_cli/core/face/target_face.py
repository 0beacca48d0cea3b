"""The target face among several in a picture: choosing it by position, and following it through a video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain

import numpy as np

from export3d_cli.core.face.face_track import WARMUP_PASSES, FaceFinder, FaceTrack
from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.media.scene_detection import SceneCutDetector
from export3d_cli.core.runtime.errors import InputError, NoFaceError

MAX_JUMP = (0.75, 0.03)  # face boxes a face may move between frames, and the addition per frame without a face
ROTATION_VOTES = 3  # frames with a face that must agree before a video is rotated
PATIENCE_S = 2  # how long a lost face is searched at its last position before another one is taken


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


def find_photo_face(finder: FaceFinder, image: np.ndarray, *, name: str = "the photo", face: str = "largest") -> Face:
    """Return the chosen face (see `choose_face`) of a photo, uint8 (H, W, 3) RGB, tracked like a video of one frame.

    Raises `NoFaceError` if the photo shows none, or it is not upright.
    """
    degrees = finder.rotation_to_upright(image)
    if degrees:
        pose = describe_rotation(degrees)
        raise NoFaceError(f"the face in {name} {pose}: rotate the photo by {degrees} degrees clockwise")
    track = FaceTrack(finder)
    tracked: Face | None = None
    if face != "largest":
        track.follow(choose_face(finder.find_all(image), face, name), image)
    for _ in range(WARMUP_PASSES):
        tracked = track.track(image)
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

    def __init__(self, finder: FaceFinder, fps: Fraction, *, choice: str = "largest", name: str = "the video") -> None:
        self._finder, self._choice, self._name = finder, choice, name
        self._track = FaceTrack(finder)
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
            self._track = FaceTrack(self._finder)
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
            faces = self._finder.find_all(image)
            index = self._choice.partition(":")[2]
            if self._chosen and len(faces) <= int(index or 0):
                self._track = FaceTrack(self._finder)
                if index and not self.notes:
                    seconds = float(self._cut_frame / self._fps)
                    self.notes.append(
                        f"{self._name} shows {len(faces)} face(s) after the cut at {seconds:.1f} s: {self._choice} "
                        "does not exist there, and its frames count as frames without a face"
                    )
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
        nearest = min(self._finder.find_all(image), key=last.distance_to, default=face)
        if last.distance_to(nearest) > max_jump and self._missing_frames < self._patience_frames:
            self._track.follow(last, image)  # another face: search at the last position again
            return None
        self.is_new_shot = last.distance_to(nearest) > max_jump
        self._track.follow(nearest, image)
        return self._track.track(image)


class UprightFrames:
    """The frames of a video, uint8 (H, W, 3) RGB, rotated so that the face is upright, as if no rotation tag were lost.

    The first three frames that show a face decide; `rotation` is the result, clockwise in degrees: 0, 90, 180 or 270.
    Frames before them stay as they are.
    """

    def __init__(self, finder: FaceFinder, frames: Iterable[np.ndarray]) -> None:
        self._finder, self._frames = finder, frames
        self.rotation = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        frames, undecided, votes = iter(self._frames), list[np.ndarray](), list[int]()
        for frame in frames:
            vote = self._finder.rotation_to_upright(frame)
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
