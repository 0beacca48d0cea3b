"""One face of several: chosen by its place, waited for, and not mixed with others."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.target_face import TargetFaceTracker
from export3d_cli.core.runtime.errors import InputError

Row = Sequence[tuple[float, float]]  # centre and size of each face of a frame


class Seen:
    """A landmarker that is told what it sees: frame after frame, faces at places along a line."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.at = rows, -1
        self.followed: float | None = None

    def faces(self) -> list[Face]:
        def face(centre: float, size: float) -> Face:
            corners = np.array([[centre - size / 2, 0, 0], [centre + size / 2, size, 0]], np.float32)
            return Face(corners, np.zeros(52, np.float32), 1.0)

        return [face(*row) for row in sorted(self.rows[self.at], key=lambda row: -row[1])]

    def find_all(self, image: np.ndarray) -> list[Face]:
        return self.faces()

    def track(self, image: np.ndarray) -> Face | None:
        faces = self.faces()
        near = [face for face in faces if self.followed is not None and abs(place(face) - self.followed) < 30]
        face = (near or faces or [None])[0]
        self.followed = None if face is None else place(face)
        return face

    def follow(self, face: Face, image: np.ndarray) -> None:
        self.followed = place(face)

    def reset(self) -> None:
        self.followed = None


def place(face: Face) -> float:
    return float(face.landmarks[:, 0].mean())


def followed(rows: Sequence[Row], which: str = "largest", scenes: Sequence[int] = ()) -> list[float | None]:
    """Where the face is in each frame; `scenes` are the frames at which the picture changes."""
    seen = Seen(rows)
    follow = TargetFaceTracker(seen, Fraction(5), choice=which, name="film.mp4")  # type: ignore[arg-type]
    out, rng = [], np.random.default_rng(0)
    picture = rng.integers(0, 255, (8, 8, 3))
    for k in range(len(rows)):
        seen.at = k
        if k in scenes:
            picture = rng.integers(0, 255, (8, 8, 3))
        frame = np.kron(picture, np.ones((8, 8, 1), int)).clip(k % 2, 255).astype(np.uint8)
        face = follow(frame)
        out.append(None if face is None else place(face))
    return out


TWO: Row = [(100, 80), (400, 100), (700, 60)]


@pytest.mark.parametrize(
    ("which", "where"), [("largest", 400), ("left", 100), ("right", 700), ("index:0", 100), ("index:2", 700)]
)
def test_the_face_is_chosen_by_its_place(which: str, where: float) -> None:
    assert followed([[], TWO, TWO], which) == [None, where, where]


def test_another_face_that_grows_is_not_taken() -> None:
    rows = [[(100, 80 + 3 * i), (400 - 2 * i, 100 - 2 * i)] for i in range(20)]
    assert followed(rows) == [400 - 2 * i for i in range(20)]


def test_a_lost_face_is_waited_for_then_another_is_taken() -> None:
    alone, both = [(100, 80)], [(100, 80), (400, 100)]
    assert followed([both] * 3 + [alone] * 5 + [both] * 3) == [400] * 3 + [None] * 5 + [400] * 3
    assert followed([both] * 3 + [alone] * 14) == [400] * 3 + [None] * 10 + [100] * 4


def test_after_a_cut_it_is_chosen_anew() -> None:
    other = [(250, 90), (500, 70)]
    assert followed([TWO] * 4 + [other] * 3, scenes=[4]) == [400] * 4 + [250] * 3
    assert followed([TWO] * 4 + [other] * 3, "right", scenes=[4]) == [700] * 4 + [500] * 3
    assert followed([TWO] * 4 + [other] * 3, "index:2", scenes=[4]) == [700] * 4 + [250] * 3  # there is no such one


def test_a_face_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InputError, match=r"film\.mp4 shows 3 face\(s\): index:3 does not exist"):
        followed([TWO], "index:3")
