"""Covered mouths and eyes, drawn on real and synthetic faces, and faces without covers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from export3d_cli.core.face.cover_detection import CoverDetector, CoveredParts
from export3d_cli.core.face.crop import crop_with_padding
from export3d_cli.core.face.face_track import find_photo_face
from export3d_cli.core.face.tracker import LandmarkerTracker, open_landmarker_tracker
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.weights import example_path, resolve_weights
from tests.helpers.covers import draw_cover

DATA = Path(__file__).parents[2] / "data"
MOUTH, EYES = CoveredParts(mouth=True), CoveredParts(right_eye=True, left_eye=True)
HALF = CoveredParts(mouth=True, right_eye=True)

Photo = tuple[np.ndarray, np.ndarray]  # picture, landmarks


@pytest.fixture(scope="module")
def detector() -> CoverDetector:
    return CoverDetector(resolve_weights("cover_detector"))


@pytest.fixture(scope="module")
def tracker() -> LandmarkerTracker:
    return open_landmarker_tracker(threads=1)


@pytest.fixture(scope="module")
def photos(tracker: LandmarkerTracker) -> list[Photo]:
    """Return photos and the landmarks of their faces."""
    photos = [next(iter(VideoReader(DATA / name))) for name in ("head1.mp4", "head2.mp4")]
    photos += [read_image(example_path(name)) for name in ("source.jpg", "astronaut.jpg")]
    return [(photo, find_photo_face(tracker, photo).landmarks) for photo in photos]


def covered_parts(detector: CoverDetector, tracker: LandmarkerTracker, photo: np.ndarray) -> CoveredParts:
    """Track the photo with its cover, as the engine does."""
    face = find_photo_face(tracker, photo, name="photo", face="largest")
    motion = tracker.make_motion([face], Fraction(25), photo.shape[1::-1])
    return detector.covered_parts(crop_with_padding(photo, motion.crop, 256), motion.landmarks[0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("blue mask", MOUTH), ("black mask", MOUTH), ("scarf", MOUTH), ("hand", MOUTH), ("microphone", MOUTH),
        ("dark lenses", EYES), ("brown lenses", EYES), ("clear lenses", CoveredParts()),
        ("lowered cup", CoveredParts()), ("phone", HALF),
    ],
)  # fmt: skip
def test_drawn_covers_are_found(
    detector: CoverDetector, tracker: LandmarkerTracker, photos: list[Photo], kind: str, expected: CoveredParts
) -> None:
    for number, (photo, landmarks) in enumerate(photos):
        drawn = draw_cover(photo, landmarks, kind)
        if number % 2:
            drawn = np.repeat(drawn.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1)  # grey
        assert covered_parts(detector, tracker, drawn) == expected


@pytest.mark.parametrize("kind", ["cup", "low microphone"])
def test_covers_whose_edge_crosses_the_lips_are_found_on_three_of_four_faces(
    detector: CoverDetector, tracker: LandmarkerTracker, photos: list[Photo], kind: str
) -> None:
    found = [covered_parts(detector, tracker, draw_cover(photo, points, kind)) for photo, points in photos]
    assert found.count(MOUTH) >= 3
    assert all(not (parts.right_eye or parts.left_eye) for parts in found)


def test_one_covered_eye_is_the_right_one(
    detector: CoverDetector, tracker: LandmarkerTracker, photos: list[Photo]
) -> None:
    photo, landmarks = photos[2]
    for eye, expected in ((0, CoveredParts(right_eye=True)), (1, CoveredParts(left_eye=True))):
        drawn = draw_cover(photo, landmarks, "dark lenses", eyes=(eye,))
        assert covered_parts(detector, tracker, drawn) == expected


def test_open_mouths_and_blinks_are_not_covers(detector: CoverDetector, tracker: LandmarkerTracker) -> None:
    for clip in (example_path("drive.mp4"), DATA / "head1.mp4", DATA / "head2.mp4"):
        for frame in list(VideoReader(clip))[::16]:
            assert covered_parts(detector, tracker, frame) == CoveredParts()


@pytest.mark.parametrize(("side", "blur"), [(24, 0), (256, 6)])
def test_tiny_and_blurred_faces_are_not_covered(
    detector: CoverDetector, photos: list[Photo], side: int, blur: int
) -> None:
    """Their mouths look like covers."""
    for photo, landmarks in photos:
        low, high = (extreme(landmarks[:, :2], axis=0) for extreme in (np.min, np.max))
        size = 2.1 * float((high - low).max())
        x0, y0 = ((low + high - size) / 2).tolist()
        crop = crop_with_padding(photo, (x0, y0, size), side)
        crop = cv2.GaussianBlur(crop, (0, 0), blur) if blur else crop
        assert detector.covered_parts(crop, (landmarks[:, :2] - (x0, y0)) / size) == CoveredParts()


def test_note_names_what_is_covered() -> None:
    assert MOUTH.note() == "the mouth of the portrait is covered: it is not animated"
    assert EYES.note() == "the eyes of the portrait are covered: they are not animated"
    assert CoveredParts(left_eye=True).note() == "an eye of the portrait is covered: it is not animated"
    assert CoveredParts(True, True, False).note().startswith("the mouth and an eye of the portrait are covered: they")


def test_unreadable_weights_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cover_detector.npz"
    for content in (None, b"no archive"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(WeightsError, match="cover_detector"):
            CoverDetector(path)
