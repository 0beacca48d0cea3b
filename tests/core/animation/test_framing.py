"""What frames show of a photo, at which size, and where the network's crop lies in it; without a model."""

from __future__ import annotations

import numpy as np
import pytest

from export3d_cli.core.animation.framing import DEFAULT_MAX_SIDE_PX, SIZE_RANGE_PX, place_on_canvas
from export3d_cli.core.face.face_track import Face
from export3d_cli.core.runtime.errors import InputError

PERSON = 255  # in the first channel; the other two hold x and y


def alpha_of(image: np.ndarray) -> np.ndarray:
    return (image[..., 0] == PERSON).astype(np.float32)


def scene(width: int, height: int, nose: tuple[float, float], hair: float = 0.0) -> tuple[np.ndarray, Face]:
    """Return a photo and its face, a box of 40 pixels; the head reaches `hair` pixels above it; it has a body below."""
    y, x = np.mgrid[:height, :width]
    across, down = np.abs(x - nose[0]), y - nose[1]
    head = (across < 22) & (down > -20 - hair) & (down < 20)
    photo = np.dstack([np.where(head | ((down >= 20) & (across < 50)), PERSON, 0), x % 256, y % 256]).astype(np.uint8)
    landmarks = np.random.default_rng(0).uniform(-20, 20, (478, 3)).astype(np.float32)
    landmarks[:3, :2] = (-20, -20), (0, 0), (20, 20)
    landmarks[:, :2] += nose
    return photo, Face(landmarks, np.zeros(52, np.float32), 1.0)


@pytest.mark.parametrize(("width", "height"), [(150, 200), (320, 180), (200, 200)])
def test_photo_keeps_its_aspect_and_size(width: int, height: int) -> None:
    photo, face = scene(width, height, (90, 95))
    canvas, (placed,), square, _ = place_on_canvas(photo, [face], "photo", "auto", 0, alpha_of)
    np.testing.assert_array_equal(canvas, photo)
    np.testing.assert_array_equal(placed.landmarks, face.landmarks)
    assert all(value == round(value) for value in square)
    x0, y0, side = square
    assert x0 <= 70 and y0 <= 75 and x0 + side >= 110 and y0 + side >= 115  # around the face


@pytest.mark.parametrize(
    ("size", "expected"), [(0, (DEFAULT_MAX_SIDE_PX, 540)), (2000, (2000, 1000)), (3000, (3000, 1500)), (64, (64, 32))]
)
def test_size_is_the_longer_side(size: int, expected: tuple[int, int]) -> None:
    photo, face = scene(2000, 1000, (600, 400))
    canvas, (placed, other), square, _ = place_on_canvas(photo, [face, face], "photo", "auto", size, alpha_of)
    scale = expected[0] / 2000
    assert canvas.shape[1::-1] == expected
    for moved in (placed, other):
        np.testing.assert_allclose(moved.landmarks, face.landmarks * scale, rtol=1e-5)
    assert square[0] + square[2] / 2 == pytest.approx(600 * scale, abs=1)
    assert square[1] + square[2] / 2 == pytest.approx(400 * scale, abs=1)
    assert np.abs(canvas.astype(int).mean((0, 1)) - photo.mean((0, 1))).max() < 3


def test_small_photos_are_not_enlarged_unless_asked() -> None:
    photo, face = scene(120, 90, (60, 45))
    assert place_on_canvas(photo, [face], "photo", "auto", 0, alpha_of)[0].shape == (90, 120, 3)
    canvas, (placed,), _, _ = place_on_canvas(photo, [face], "photo", "auto", 480, alpha_of)
    assert canvas.shape == (360, 480, 3)
    np.testing.assert_allclose(placed.landmarks, 4 * face.landmarks)


@pytest.mark.parametrize("size", [SIZE_RANGE_PX[0] - 1, SIZE_RANGE_PX[1] + 1, -2])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    photo, face = scene(120, 90, (60, 45))
    with pytest.raises(InputError, match=f"size must be {SIZE_RANGE_PX[0]} to {SIZE_RANGE_PX[1]} pixels, got {size}"):
        place_on_canvas(photo, [face], "photo", "auto", size, alpha_of)
    for bound in SIZE_RANGE_PX:
        assert max(place_on_canvas(photo, [face], "photo", "auto", bound, alpha_of)[0].shape) == bound


def cut(photo: np.ndarray, face: Face, size: int = 0) -> tuple[int, int, int, Face]:
    """Return x0, y0, side of the face framing of a photo smaller than 256 pixels, and the face in it."""
    canvas, (placed,), _, shown = place_on_canvas(photo, [face], "face", "auto", size, alpha_of)
    x0, y0 = (int(value) for value in canvas[0, 0, 1:])
    side = len(canvas)
    assert shown == (x0, y0, x0 + side, y0 + side)
    np.testing.assert_array_equal(canvas, photo[y0 : y0 + side, x0 : x0 + side])  # a square inside the photo
    return x0, y0, side, placed


@pytest.mark.parametrize("hair", [0, 25, 45])
def test_face_square_holds_the_hair_if_the_photo_has_room(hair: int) -> None:
    photo, face = scene(250, 240, (120, 110), hair)
    x0, y0, side, _ = cut(photo, face)
    assert y0 < 90 - hair and x0 < 98 and x0 + side > 142 and y0 + side > 130
    assert not alpha_of(photo[y0, x0 : x0 + side]).any()  # free space above
    assert side < 200


@pytest.mark.parametrize("nose", [(22, 22), (228, 20), (25, 215), (230, 218), (125, 30)])
def test_face_square_never_leaves_the_photo(nose: tuple[int, int]) -> None:
    photo, face = scene(250, 240, nose, 40)
    x0, y0, side, placed = cut(photo, face)
    assert 0 <= x0 <= 250 - side and 0 <= y0 <= 240 - side and side > 80
    np.testing.assert_allclose(placed.landmarks, face.landmarks - np.float32([x0, y0, 0]), atol=1e-4)
    assert placed.landmarks[:, :2].min() >= 0 and placed.landmarks[:, :2].max() <= side


def test_face_square_of_a_photo_that_is_smaller_is_as_large_as_the_photo_allows() -> None:
    photo, face = scene(60, 200, (30, 100), 30)
    assert cut(photo, face)[2] == 60


def test_face_square_without_a_matte_surrounds_the_landmarks() -> None:
    photo, face = scene(250, 240, (120, 110))
    photo[..., 0] = 0
    x0, y0, side, _ = cut(photo, face)
    assert (x0 + side / 2, y0 + side / 2) == pytest.approx((120, 110), abs=8)
    assert side == pytest.approx(2.1 * 40, abs=1)


def test_face_square_is_scaled_to_the_size() -> None:
    photo, face = scene(250, 240, (120, 110), 25)
    side = cut(photo, face)[2]
    canvas, (placed,), square, _ = place_on_canvas(photo, [face], "face", "auto", 300, alpha_of)
    assert canvas.shape == (300, 300, 3)
    assert np.ptp(placed.landmarks[:, 0]) == pytest.approx(np.ptp(face.landmarks[:, 0]) * 300 / side, rel=1e-4)
    assert square[2] <= 300


def test_crop_none_is_all_of_what_frames_show() -> None:
    photo, face = scene(250, 240, (120, 110), 25)
    assert place_on_canvas(photo, [face], "face", "none", 300, alpha_of)[2] == (0, 0, 300)
    canvas, _, square, shown = place_on_canvas(photo[:, :240], [face], "photo", "none", 0, alpha_of)
    assert (square, shown) == ((0, 0, 240), (0, 0, 240, 240))
    np.testing.assert_array_equal(canvas, photo[:, :240])
