"""One face of a video among several: chosen by its place, and stayed with."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from export3d_cli.core.face.landmarker import SETTLE, Face, Landmarker
from export3d_cli.core.face.tracker_protocol import FaceFinder
from export3d_cli.core.media.scene_detection import SceneCuts
from export3d_cli.core.runtime.errors import InputError, NoFaceError

REACH = (0.75, 0.03)  # face boxes that a face may go from one frame to the next, and more for each frame without it
PATIENCE = 2  # seconds for which a lost face is waited for at its place before another one is taken


def choose_face(faces: list[Face], which: str, name: str) -> Face:
    """largest, left, right or index:N (from the left, from 0) of the faces in a photo, given the largest first."""
    if not faces:
        raise NoFaceError(f"no face found in {name}: use a photo with one large, upright face")
    if which == "largest":
        return faces[0]
    across = sorted(faces, key=lambda face: float(face.landmarks[:, 0].mean()))
    index = {"left": 0, "right": len(faces) - 1}.get(which)
    if index is None:
        kind, _, number = which.partition(":")
        if kind != "index" or not number.isdecimal():
            raise InputError(f"face {which!r} is none: use largest, left, right or index:N")
        index = int(number)
    if index >= len(faces):
        raise InputError(f"{name} shows {len(faces)} face(s): {which} does not exist, index:0 is the leftmost")
    return across[index]


def find_face(landmarker: Landmarker, image: np.ndarray, *, name: str = "the photo", face: str = "largest") -> Face:
    """The face of a photo, uint8 (H, W, 3) RGB, as if it were a video's; `face` as in `choose_face`.

    Raises:
        NoFaceError: there is none, or it is not upright.
    """
    turn = landmarker.upright_turn(image)
    if turn:
        how = "is upside down" if turn == 180 else "lies on its side"
        raise NoFaceError(f"the face in {name} {how}: rotate the photo by {turn} degrees clockwise")
    landmarker.reset()
    found: Face | None = None
    if face != "largest":
        landmarker.follow(choose_face(landmarker.find_all(image), face, name), image)
    for _ in range(SETTLE):
        found = landmarker.track(image)
    if found is None:
        raise NoFaceError(f"no face found in {name}: use a photo with one large, upright face")
    return found


class Follower:
    """Fed the frames of a video, uint8 (H, W, 3) RGB, one after the other; gives the face of each, or None.

    The face is chosen in the first frame that shows any, and again after a cut. In between, faces elsewhere in the
    picture are not taken for it.

    Args:
        landmarker: tracks; what it followed before is forgotten.
        fps: frames a second.
        which: largest, left, right or index:N, as in `choose_face`.
        name: of the video, for errors.
    """

    def __init__(
        self, landmarker: FaceFinder, fps: Fraction, *, which: str = "largest", name: str = "the video"
    ) -> None:
        self._landmarker, self._which, self._name = landmarker, which, name
        self._patience = round(PATIENCE * fps)
        self._cuts = SceneCuts()
        self._before: np.ndarray | None = None
        self._face: Face | None = None  # of the frame before
        self._last: Face | None = None  # the last one there was
        self._missing = 0  # frames since then
        landmarker.reset()

    def __call__(self, image: np.ndarray) -> Face | None:
        """The face in the next frame."""
        if self._before is not None and np.array_equal(image, self._before):  # a repeated frame has the same face
            return self._face
        self._before = image
        if self._cuts(image) is not None:
            self._landmarker.reset()
            self._last, self._which = None, self._which if ":" not in self._which else "largest"
        self._face = self._choose(image) if self._last is None else self._stay(image, self._last)
        self._missing = 0 if self._face is not None else self._missing + 1
        self._last = self._face or self._last
        return self._face

    def _choose(self, image: np.ndarray) -> Face | None:
        face = self._landmarker.track(image)
        if face is None:
            return None
        if self._which != "largest":
            self._landmarker.follow(choose_face(self._landmarker.find_all(image), self._which, self._name), image)
        for _ in range(SETTLE - 1):
            face = self._landmarker.track(image)
        return face

    def _stay(self, image: np.ndarray, last: Face) -> Face | None:
        face = self._landmarker.track(image)
        if face is None or _way(last, face) <= REACH[0] + REACH[1] * self._missing:
            return face
        nearest = min(self._landmarker.find_all(image), key=lambda other: _way(last, other), default=face)
        if _way(last, nearest) > REACH[0] + REACH[1] * self._missing and self._missing < self._patience:
            self._landmarker.follow(last, image)  # another one: look at the old place again in the next frame
            return None
        self._landmarker.follow(nearest, image)
        return self._landmarker.track(image)


def _way(one: Face, two: Face) -> float:
    """Distance of two faces, in boxes of the smaller."""
    boxes = [face.landmarks[:, :2].max(0) - face.landmarks[:, :2].min(0) for face in (one, two)]
    way = np.linalg.norm(one.landmarks[:, :2].mean(0) - two.landmarks[:, :2].mean(0))
    return float(way / max(1e-6, min(box.max() for box in boxes)))
