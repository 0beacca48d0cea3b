"""The target face among several: chosen by position, searched when lost, never confused with another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest

from export3d_cli.core.face.face_track import Face, TargetFaceTracker
from export3d_cli.core.runtime.errors import InputError

FaceRow = Sequence[tuple[float, float]]  # centre and size of each face of a frame


class FakeTracker:
    """A tracker whose faces are given for each frame, at places along a line."""

    def __init__(self, rows: Sequence[FaceRow]) -> None:
        self.rows, self.frame = rows, -1

    def find_all(self, image: np.ndarray) -> list[Face]:
        def face(x: float, size: float) -> Face:
            corners = np.array([[x - size / 2, 0, 0], [x + size / 2, size, 0]], np.float32)
            return Face(corners, np.zeros(52, np.float32), 1.0)

        return [face(*row) for row in sorted(self.rows[self.frame], key=lambda row: -row[1])]

    def find(self, image: np.ndarray, *, thorough: bool = True) -> Face | None:
        return next(iter(self.find_all(image)), None)

    def find_near(self, image: np.ndarray, face: Face) -> Face | None:
        return next((other for other in self.find_all(image) if abs(centre(other) - centre(face)) < 30), None)


def centre(face: Face) -> float:
    return float(face.landmarks[:, 0].mean())


def images(count: int, cuts: Sequence[int] = ()) -> Iterator[np.ndarray]:
    """Yield frames; those in `cuts` show a new picture."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (8, 8, 3))
    for k in range(count):
        if k in cuts:
            picture = rng.integers(0, 255, (8, 8, 3))
        frame = np.kron(picture, np.ones((8, 8, 1), int)).astype(np.uint8)
        frame[0, 0] = k  # no frame repeats the one before
        yield frame


def track(
    rows: Sequence[FaceRow], choice: str = "largest", cuts: Sequence[int] = ()
) -> tuple[list[float | None], list[str]]:
    """Return the position of the target face in each frame and the notes; `cuts` are frames with a new picture."""
    tracker = FakeTracker(rows)
    target = TargetFaceTracker(tracker, Fraction(5), choice=choice, name="film.mp4")
    positions = []
    for tracker.frame, image in enumerate(images(len(rows), cuts)):
        face = target(image)
        positions.append(None if face is None else centre(face))
    return positions, target.notes


THREE: FaceRow = [(100, 80), (400, 100), (700, 60)]
TWO: FaceRow = [(250, 90), (500, 70)]


@pytest.mark.parametrize(
    ("choice", "position"), [("largest", 400), ("left", 100), ("right", 700), ("index:0", 100), ("index:2", 700)]
)
def test_tracker_chooses_the_face_by_position(choice: str, position: float) -> None:
    assert track([[], THREE, THREE], choice) == ([None, position, position], [])


def test_tracker_keeps_its_face_when_another_grows() -> None:
    rows = [[(100, 80 + 3 * i), (400 - 2 * i, 100 - 2 * i)] for i in range(20)]
    assert track(rows)[0] == [400 - 2 * i for i in range(20)]


def test_tracker_waits_for_a_lost_face_before_it_takes_another() -> None:
    alone, both = [(100, 80)], [(100, 80), (400, 100)]
    assert track([both] * 3 + [alone] * 5 + [both] * 3)[0] == [400] * 3 + [None] * 5 + [400] * 3
    assert track([both] * 3 + [alone] * 14)[0] == [400] * 3 + [None] * 10 + [100] * 4


@pytest.mark.parametrize(
    ("choice", "before", "after"),
    [("largest", 400, 250), ("left", 100, 250), ("right", 700, 500), ("index:0", 100, 250), ("index:1", 400, 500)],
)
def test_tracker_chooses_again_after_a_cut(choice: str, before: float, after: float) -> None:
    assert track([THREE] * 4 + [TWO] * 3, choice, cuts=[4]) == ([before] * 4 + [after] * 3, [])


def test_index_beyond_the_faces_after_a_cut_gives_no_face_and_a_note() -> None:
    positions, notes = track([THREE] * 4 + [TWO] * 6 + [THREE] * 3, "index:2", cuts=[4, 10])
    assert positions == [700] * 4 + [None] * 6 + [700] * 3
    assert notes == [
        "film.mp4 shows 2 face(s) after the cut at 0.8 s: index:2 does not exist there, and its frames count as "
        "frames without a face"
    ]


def test_index_beyond_the_faces_after_a_cut_waits_for_another_face() -> None:
    positions, _ = track([THREE] * 4 + [TWO] * 2 + [[*TWO, (900, 80)]] * 3, "index:2", cuts=[4])
    assert positions == [700] * 4 + [None] * 2 + [900] * 3


def test_index_beyond_the_faces_of_the_first_frame_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"film\.mp4 shows 3 face\(s\): index:3 does not exist"):
        track([THREE], "index:3")


def test_tracker_reports_cuts_and_other_faces_as_new_shots() -> None:
    alone, both = [(100, 80)], [(100, 80), (400, 100)]
    for rows, cuts, expected in (
        ([THREE] * 4 + [TWO] * 3, [4], [4]),
        ([both] * 3 + [alone] * 5 + [both] * 3, [], []),
        ([both] * 3 + [alone] * 14, [], [13]),  # another face, after the patience
    ):
        tracker = FakeTracker(rows)
        target = TargetFaceTracker(tracker, Fraction(5))
        new_shots = []
        for tracker.frame, image in enumerate(images(len(rows), cuts)):
            target(image)
            new_shots += [tracker.frame] * target.is_new_shot
        assert new_shots == expected
