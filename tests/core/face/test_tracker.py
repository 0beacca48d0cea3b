"""Opening the trackers by name, and the error for a portrait that is not upright."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.dataset.preprocess import preprocess
from export3d_cli.core.face import fan_tracker as fan
from export3d_cli.core.face.landmarks import IBUG68
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.tracker import open_landmarker_tracker, open_tracker
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.errors import InputError, NoFaceError, WeightsError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli

MakeClip = Callable[..., Path]


@pytest.mark.parametrize(
    ("quarters", "message"),
    [
        (1, "lies on its side: rotate the photo by 90 degrees clockwise"),
        (2, "is upside down: rotate the photo by 180 degrees clockwise"),
        (3, "lies on its side: rotate the photo by 270 degrees clockwise"),
    ],
)
def test_portrait_that_is_not_upright_raises_with_the_rotation(animator: Animator, quarters: int, message: str) -> None:
    photo = np.ascontiguousarray(np.rot90(read_image(example_path("source.jpg")), quarters))
    with pytest.raises(NoFaceError, match=f"the face in photo {message}"):
        animator.portrait(photo, name="photo")


def test_opened_landmarker_finds_small_faces() -> None:
    photo = read_image(example_path("source.jpg"))[::8, ::8]
    canvas = np.full((720, 1280, 3), 90, np.uint8)
    canvas[600 : 600 + len(photo), 1000 : 1000 + photo.shape[1]] = photo
    assert open_landmarker_tracker().find(canvas) is not None


def test_fan_tracks_a_driver_but_no_source(
    make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeNetwork:
        landmarker = open_landmarker_tracker()

        def get_landmarks_from_image(self, image: np.ndarray, **_: object) -> list[np.ndarray]:
            face = self.landmarker.find(image)
            assert face is not None
            return [face.landmarks[list(IBUG68), :2]]

    monkeypatch.setattr(fan, "_load_network", lambda device: FakeNetwork())
    out = tmp_path / "a.motion.npz"
    preprocess([make_clip("clip.mp4")], out, tracker="fan")
    motion = Motion.load(out, landmark_counts=(68,))
    assert motion.found.all()
    with pytest.raises(InputError, match="478"):  # it is no source
        Motion.load(out)
    with pytest.raises(InputError, match="--tracker applies to a motion file"):
        preprocess([make_clip("clip.mp4")], tmp_path / "set", tracker="fan")
    assert ReenactOptions().tracker == "landmarker"


def test_fan_without_its_package_raises_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(WeightsError, match=r"pip install 'export3d-cli\[fan\]'") as caught:
        open_tracker("fan", device="cpu")
    assert caught.value.exit_code == 4
    command = ["preprocess", str(example_path("drive.mp4")), "-o", str(tmp_path / "a.motion.npz"), "--tracker", "fan"]
    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, WeightsError) or result.exit_code == 4
    assert not (tmp_path / "a.motion.npz").exists()
