"""The photo taken apart into person and background, and put together again; without a model."""

from __future__ import annotations

import numpy as np
import pytest

from export3d_cli.core.animation.background_fill import fill_hole, find_loose_hair
from export3d_cli.core.animation.photo_canvas import (
    MAX_TRAVEL_CUT,
    TRAVEL_RANGE,
    FrameLayers,
    PhotoCanvas,
    VolumeRender,
)
from export3d_cli.core.model.warp.photo_flow import FLOW_SIZE, WINDOW_MARGIN

SQUARE = (100.0, 60.0, 80.0)
H, W = 200, 300


def disc_alpha(image: np.ndarray, faces: object = ()) -> np.ndarray:
    """Stand-in for the matting network: the person is what is bright."""
    return (image[..., 0] > 128).astype(np.float32)


@pytest.fixture
def photo() -> np.ndarray:
    """A bright person, a disc, before a dark wall with a gradient."""
    y, x = np.mgrid[:H, :W]
    photo = np.dstack([x // 6, y // 4, np.full_like(x, 30)]).astype(np.uint8)
    photo[(x - 140) ** 2 + (y - 100) ** 2 < 30**2] = (220, 200, 180)
    return photo


def layers(dx: float = 0.0, dy: float = 0.0, *, network: float = 0.0, image: np.ndarray | None = None) -> FrameLayers:
    """Layers in which everything in the window is displaced by (dx, dy) crop sides."""
    shape = (FLOW_SIZE, FLOW_SIZE)
    displacement = np.broadcast_to(np.float32([-dx, -dy]), (*shape, 2)).copy()
    weight = np.full(shape, network, np.float32)
    image = np.zeros((80, 80, 3), np.uint8) if image is None else image
    volume = VolumeRender(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2)), np.zeros((2, 2)), 1.0)
    return FrameLayers(image, displacement, weight, volume)


def centre_of_person(frame: np.ndarray) -> tuple[float, float]:
    y, x = np.nonzero(frame[..., 0] > 128)
    return float(x.mean()), float(y.mean())


def test_compose_without_motion_is_the_photo(photo: np.ndarray) -> None:
    frame = PhotoCanvas.from_photo(photo, SQUARE, disc_alpha).compose(layers())
    assert np.abs(frame.astype(int) - photo).mean() < 0.5
    assert np.abs(frame.astype(int) - photo).max() <= 40  # antialiased outline only


def test_compose_moves_the_person_and_leaves_no_ghost(photo: np.ndarray) -> None:
    canvas = PhotoCanvas.from_photo(photo, SQUARE, disc_alpha)
    frame = canvas.compose(layers(0.2, -0.1))
    x, y = centre_of_person(frame)
    assert (x, y) == pytest.approx((140 + 16, 100 - 8), abs=0.7)
    assert frame[100, 112, 0] < 60  # uncovered wall: filled in
    outside = np.ones((H, W), bool)
    outside[canvas.window] = False
    np.testing.assert_array_equal(frame[outside], photo[outside])


def test_compose_takes_the_networks_image_in_the_face(photo: np.ndarray) -> None:
    image = np.full((80, 80, 3), (200, 10, 10), np.uint8)
    turned = layers(network=1.0, image=image)
    turned.face_weight[:, FLOW_SIZE // 2 + 8 :] = 0  # the face ends right of the centre
    frame = PhotoCanvas.from_photo(photo, SQUARE, disc_alpha).compose(turned)
    assert (frame[100, 138] == (200, 10, 10)).all()
    assert np.abs(frame[100, 160].astype(int) - photo[100, 160]).max() <= 2


def test_border_that_cuts_the_person_holds_it_without_streaks() -> None:
    photo = np.zeros((H, W, 3), np.uint8)
    photo[:, :60] = 220  # reaches the whole left border ...
    photo[:, 4:60:8] = 140  # ... in stripes of 8 pixels
    frame = PhotoCanvas.from_photo(photo, (0.0, 40.0, 100.0), disc_alpha).compose(layers(0.2))
    assert (frame[60:120, :4, 0] > 128).all()
    row = frame[90, :70, 0].astype(int)
    stripes = np.flatnonzero((row[:-1] < 180) & (row[1:] >= 180))
    assert len(stripes) >= 6 and np.diff(stripes).max() <= 21  # stretched, at most to two and a half


def test_head_that_a_border_cuts_ends_in_a_rounded_outline(photo: np.ndarray) -> None:
    cut = np.roll(photo, -113, axis=1)  # the disc's centre is 27 pixels from the left border, its radius 30
    cut[:, -113:] = photo[:, :113]
    frame = PhotoCanvas.from_photo(cut, (-13.0, 60.0, 80.0), disc_alpha).compose(layers(0.2))
    person = frame[..., 0] > 128
    left = [int(np.flatnonzero(row)[0]) for row in person if row.any()]
    assert 10 <= min(left) < 16  # at most the extension beyond what the photo shows, moved by 16 pixels
    assert min(left) == left[len(left) // 2] and left[0] > 25 < left[-1]


def test_shoulder_that_a_border_cuts_stays_there() -> None:
    photo = np.zeros((H, W, 3), np.uint8)
    photo[150:, :160] = 220  # reaches the left and the lower border
    frame = PhotoCanvas.from_photo(photo, (10.0, 60.0, 80.0), disc_alpha).compose(layers(0.2, -0.1))
    assert (frame[152:, :160, 0] > 128).all()
    assert (frame[145, 30:130, 0] > 128).all()  # away from the borders it moves


def test_person_next_to_a_border_leaves_it(photo: np.ndarray) -> None:
    canvas = PhotoCanvas.from_photo(np.roll(photo, -108, axis=1), (-8.0, 60.0, 80.0), disc_alpha)  # 2 pixels from it
    x, _ = centre_of_person(canvas.compose(layers(0.2)))
    assert x == pytest.approx(32 + 16, abs=0.7)


def test_travel_is_limited_away_from_a_border_that_cuts_the_head() -> None:
    photo = np.zeros((H, W, 3), np.uint8)
    photo[:90, 110:170] = 220  # reaches the top
    limits = PhotoCanvas.from_photo(photo, (100.0, 0.0, 80.0), disc_alpha).limits
    assert limits.down == MAX_TRAVEL_CUT
    assert limits.up == pytest.approx(0.1)  # its room
    assert limits.left == limits.right == TRAVEL_RANGE[1]


def test_window_surrounds_the_crop_within_the_photo(photo: np.ndarray) -> None:
    rows, columns = PhotoCanvas.from_photo(photo, SQUARE, disc_alpha).window
    margin = WINDOW_MARGIN * SQUARE[2]
    assert (columns.start, columns.stop) == (100 - margin, 180 + margin)
    assert (rows.start, rows.stop) == (0, 200)


def test_fill_hole_continues_its_surroundings() -> None:
    y, x = np.mgrid[:60, :90]
    wall = np.dstack([2 * x, 3 * y, np.full_like(x, 77)]).astype(np.uint8)
    hole = (x - 45) ** 2 + (y - 30) ** 2 < 12**2
    broken = np.where(hole[..., None], 0, wall).astype(np.uint8)
    filled = fill_hole(broken, hole)
    np.testing.assert_array_equal(filled[~hole], wall[~hole])
    assert np.abs(filled.astype(int) - wall)[hole].mean() < 8
    np.testing.assert_array_equal(fill_hole(wall, np.zeros_like(hole)), wall)


def test_find_loose_hair_sees_strands_on_an_even_wall_but_no_texture(photo: np.ndarray) -> None:
    person = disc_alpha(photo) > 0
    photo[100, 172:180] = 0  # a strand next to the person
    photo[20:40, 20] = 0  # the same far away
    found = find_loose_hair(photo, person, SQUARE[2])
    assert found[100, 172:178].all() and found.sum() < 60 and not found[:, :60].any()
    photo[::2][~person[::2]] = 90  # a striped wall
    assert not find_loose_hair(photo, person, SQUARE[2])[100, 172:178].any()
