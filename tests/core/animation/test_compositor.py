"""Frames with other backgrounds and next to the driver; without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export3d_cli.core.animation.compositor import Compositor, load_backdrop, read_portrait
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.photo_canvas import FrameLayers, PhotoCanvas, VolumeRender
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.model.warp.photo_flow import FLOW_SIZE
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path, resolve_weights

SQUARE = (136.0, 76.0, 240.0)


@pytest.fixture(scope="module")
def portrait() -> Any:
    """The example's head in a wide photo, 640 x 360."""
    photo = np.full((360, 640, 3), 140, np.uint8)
    photo[:, 76:436] = read_image(example_path("source.jpg"))[76:436, 76:436]
    matting = PersonMatting(resolve_weights("selfie_segmentation"))
    canvas = PhotoCanvas.from_photo(photo, SQUARE, lambda image, faces: matting.alpha(image))
    return SimpleNamespace(canvas=canvas, crop=photo[76:316, 136:376])


def still(portrait: Any) -> FrameLayers:
    """Layers of a frame in which nothing moves, and the network takes over nothing."""
    zero = np.zeros((FLOW_SIZE, FLOW_SIZE), np.float32)
    volume = VolumeRender(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2)), np.zeros((2, 2)), 1.0)
    return FrameLayers(portrait.crop, np.zeros((FLOW_SIZE, FLOW_SIZE, 2), np.float32), zero, volume)


def test_frame_without_motion_is_the_photo_also_for_several_persons(portrait: Any) -> None:
    photo = portrait.canvas.photo
    alone = Compositor([portrait])(still(portrait))
    np.testing.assert_array_equal(alone, portrait.canvas.compose(still(portrait)))
    twice = Compositor([portrait, portrait])(still(portrait), still(portrait))
    for frame in (alone, twice):
        assert np.abs(frame.astype(int) - photo).mean() < 1


def test_compare_shows_photo_driver_and_frame(portrait: Any) -> None:
    compositor = Compositor([portrait], compare=True)
    assert compositor.size == (640 * 2 + 360, 360)
    frame = compositor(still(portrait), driver=np.full((360, 360, 3), 9, np.uint8))
    np.testing.assert_array_equal(frame[:, :640], portrait.canvas.photo)
    assert (frame[:, 640:1000] == 9).all()
    assert np.abs(frame[:, 1000:].astype(int) - portrait.canvas.photo).mean() < 1


def test_background_is_replaced_in_the_whole_photo(portrait: Any, tmp_path: Path) -> None:
    photo = portrait.canvas.photo
    green = Compositor([portrait], background="#00ff10")(still(portrait))
    assert (green[3, 3] == (0, 255, 16)).all() and (green[3, 636] == (0, 255, 16)).all()
    face = slice(180, 220), slice(240, 280)
    assert np.abs(green[face].astype(int) - photo[face]).max() <= 2
    cut = Compositor([portrait], background="transparent")(still(portrait))
    assert cut.shape == (360, 640, 4)
    assert (cut[3, 3, 3], cut[200, 256, 3]) == (0, 255)
    assert ((cut[..., 3] > 0) & (cut[..., 3] < 255)).sum() > 200  # soft edges
    write_image(tmp_path / "wall.png", np.full((20, 90, 3), (1, 2, 3), np.uint8))
    wall = Compositor([portrait], background=str(tmp_path / "wall.png"))(still(portrait))
    assert (wall[3, 3] == (1, 2, 3)).all() and (wall[3, 630] == (1, 2, 3)).all()
    both = Compositor([portrait], background="transparent", compare=True)
    frame = both(still(portrait), driver=np.zeros((360, 360, 3), np.uint8))
    assert frame.shape == (360, 1640, 4) and (frame[:, :1000, 3] == 255).all()
    assert (frame[3, 1003, 3], frame[200, 1256, 3]) == (0, 255)


def test_load_backdrop_crops_an_image_around_its_centre(tmp_path: Path) -> None:
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 200
    write_image(tmp_path / "wide.png", stripes)
    cover = load_backdrop(str(tmp_path / "wide.png"), (40, 40))
    assert cover.shape == (40, 40, 3)
    assert cover[:, 8:32].min() > 190
    assert (load_backdrop("#0a0B0c", (4, 2)) == (10, 11, 12)).all()


def test_unusable_outputs_and_backgrounds_are_refused(tmp_path: Path) -> None:
    def check(name: str, background: str) -> None:
        ReenactOptions(background=background).check_outputs(tmp_path / name)

    for name in ("a.webm", "a.mov", "frames/%05d.png"):
        check(name, "transparent")
    for name in ("a.mp4", "a.mkv", "a.gif"):
        check(name, "#ffffff")
        with pytest.raises(InputError, match=r"\.webm, \.mov or FOLDER"):
            check(name, "transparent")
    with pytest.raises(InputError, match=r"\.xyz"):
        check("a.xyz", "source")
    for bad in ("#12", "#gggggg", "nowhere.png"):
        with pytest.raises(InputError, match=bad):
            check("a.mp4", bad)
    with pytest.raises(InputError, match="not an image"):
        check("a.mp4", str(example_path("drive.mp4")))
    (tmp_path / "a.mp4").touch()
    with pytest.raises(InputError, match="exists: choose another"):
        check("a.mp4", "source")
    with pytest.raises(InputError, match="must be a photo"):
        read_portrait(example_path("drive.mp4"))
