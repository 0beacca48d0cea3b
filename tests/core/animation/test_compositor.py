"""Paste-back and backgrounds, without a model."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from export3d_cli.core.animation.compositor import (
    FEATHER,
    Compositor,
    PasteBack,
    check_outputs,
    load_backdrop,
    read_portrait,
)
from export3d_cli.core.face.crop import crop_image
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

SQUARE = (151.3, 90.6, 301.7)  # within the photo


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """Return a portrait in a wide photo, 640 x 481."""
    face = cv2.resize(read_image(example_path("source.jpg")), (400, 400), interpolation=cv2.INTER_AREA)
    wide = np.full((481, 640, 3), 140, np.uint8)
    wide[60:460, 100:500] = face
    return wide


def test_blend_keeps_the_photo_outside_and_the_result_inside_the_square(photo: np.ndarray) -> None:
    paste = PasteBack(photo, SQUARE, 64)
    frame = paste.blend(np.full((64, 64, 3), 7, np.uint8), photo)
    x0, y0, side = SQUARE
    y, x = np.mgrid[: photo.shape[0], : photo.shape[1]] + 0.5
    depth = np.minimum(np.minimum(x - x0, x0 + side - x), np.minimum(y - y0, y0 + side - y))
    np.testing.assert_array_equal(frame[depth <= 0], photo[depth <= 0])
    assert (frame[depth > FEATHER * side] == 7).all()
    ramp = paste.weight[paste.weight.shape[0] // 2].astype(float)  # across the middle
    assert np.abs(np.diff(ramp)).max() < 1.6 / (FEATHER * side)  # no step anywhere


def test_blend_of_the_photo_s_own_crop_gives_the_photo(photo: np.ndarray) -> None:
    """Cropping and pasting is the identity except for resolution: no shift, and no step at the borders."""
    smooth = cv2.GaussianBlur(photo, (0, 0), 3)
    frame = PasteBack(smooth, SQUARE, 256).blend(crop_image(smooth, SQUARE, 256), smooth)
    error = np.abs(frame.astype(int) - smooth)
    assert error.max() <= 4
    assert error.mean() < 0.3
    shifted = np.abs(frame[:, 1:].astype(int) - smooth[:, :-1])[150:350, 200:400]
    assert error[150:350, 200:400].mean() < 0.3 * shifted.mean()


@pytest.mark.parametrize("square", [(-40.5, -30.0, 560.0), (10.0, 20.0, 40.0), (500.0, 300.0, 300.0)])
def test_blend_of_squares_outside_the_photo_or_smaller_than_the_result(photo: np.ndarray, square: tuple) -> None:
    smooth = cv2.GaussianBlur(photo, (0, 0), 3)
    frame = PasteBack(smooth, square, 128).blend(crop_image(smooth, square, 128), smooth)
    assert frame.shape == photo.shape
    error = np.abs(frame.astype(int) - smooth)
    assert error.mean() < 0.8
    grey = PasteBack(smooth, square, 128).blend(np.zeros((128, 128, 3), np.uint8), smooth)
    if square[0] < 0:  # no fade at the photo's border
        assert (grey[:400, 0] == 0).all()


def test_compositor_without_options_returns_the_result(photo: np.ndarray) -> None:
    source = crop_image(photo, SQUARE, 64)
    result = source[::-1].copy()
    composer = Compositor(photo, source, SQUARE)
    assert composer(result) is result
    assert composer.size == (64, 64)
    compared = Compositor(photo, source, SQUARE, compare=True, paste_back=True)
    assert compared.size == (640 * 2 + 481, 481)
    frame = compared(result, np.full((481, 481, 3), 9, np.uint8))
    assert frame.shape == (481, 1761, 3)
    np.testing.assert_array_equal(frame[:, :640], photo)
    assert (frame[:, 640:1121] == 9).all()


def test_background_is_composited_behind_the_person(photo: np.ndarray, tmp_path: Path) -> None:
    source = crop_image(photo, SQUARE, 256)
    green = Compositor(photo, source, SQUARE, background="#00ff10")(source)
    assert (green[3, 3] == (0, 255, 16)).all()
    assert np.abs(green[100:150, 110:150].astype(int) - source[100:150, 110:150]).max() <= 2  # the face
    cut = Compositor(photo, source, SQUARE, background="transparent")(source)
    assert cut.shape == (256, 256, 4)
    assert (cut[3, 3, 3], cut[128, 128, 3]) == (0, 255)
    assert cut[..., 3][(cut[..., 3] > 0) & (cut[..., 3] < 255)].size > 200  # soft edges
    write_image(tmp_path / "wall.png", np.full((20, 90, 3), (1, 2, 3), np.uint8))
    whole = Compositor(photo, source, SQUARE, background=str(tmp_path / "wall.png"), paste_back=True)(source)
    assert whole.shape == photo.shape
    assert (whole[3, 3] == (1, 2, 3)).all()
    assert (whole[3, 630] == (1, 2, 3)).all()
    both = Compositor(photo, source, SQUARE, background="transparent", paste_back=True, compare=True)
    frame = both(source, np.zeros((481, 481, 3), np.uint8))
    assert frame.shape == (481, 1761, 4)
    assert (frame[:, :1121, 3] == 255).all()
    assert (frame[3, 1124, 3], frame[250, 1121 + 300, 3]) == (0, 255)


def test_paste_back_continues_the_person_s_edge_across_the_square_s_border(photo: np.ndarray) -> None:
    """The square shows the same image as the photo: both alphas blend into one."""
    source = crop_image(photo, SQUARE, 256)
    composer = Compositor(photo, source, SQUARE, background="transparent", paste_back=True)
    first = composer(source)
    np.testing.assert_array_equal(composer(source), first)  # still
    assert (first[300:450, 280:330, 3] == 255).all()  # neck to chest, across the lower border at 392


def test_load_backdrop_crops_an_image_around_its_centre(tmp_path: Path) -> None:
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 200
    write_image(tmp_path / "wide.png", stripes)
    cover = load_backdrop(str(tmp_path / "wide.png"), (40, 40))
    assert cover.shape == (40, 40, 3)
    assert cover[:, 8:32].min() > 190
    assert (load_backdrop("#0a0B0c", (4, 2)) == (10, 11, 12)).all()


def test_check_outputs_refuses_unusable_outputs_and_backgrounds(tmp_path: Path) -> None:
    for name in ("a.webm", "a.mov", "frames/%05d.png"):
        check_outputs([tmp_path / name], "transparent")
    for name in ("a.mp4", "a.mkv", "a.gif"):
        check_outputs([tmp_path / name], "#ffffff")
        with pytest.raises(InputError, match=r"\.webm, \.mov or FOLDER"):
            check_outputs([tmp_path / name], "transparent")
    with pytest.raises(InputError, match=r"\.xyz"):
        check_outputs([tmp_path / "a.xyz"], "source")
    for bad in ("#12", "#gggggg", "nowhere.png"):
        with pytest.raises(InputError, match=bad):
            check_outputs([tmp_path / "a.mp4"], bad)
    with pytest.raises(InputError, match="not an image"):
        check_outputs([tmp_path / "a.mp4"], str(example_path("drive.mp4")))
    with pytest.raises(InputError, match="must be a photo"):
        read_portrait(example_path("drive.mp4"))
