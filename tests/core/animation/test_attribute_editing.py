"""Another look of a photo: what changes, by how much, and what stays."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from export3d_cli.core.animation import attribute_editing
from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.attribute_editing import RANGES, Look, change_look, spread
from export3d_cli.core.animation.compositor import load_photo
from export3d_cli.core.animation.options import PortraitOptions
from export3d_cli.core.animation.person import Person
from export3d_cli.core.animation.watermark import find_marks
from export3d_cli.core.evaluation.scorer import load_embedder
from export3d_cli.core.face.landmarks import FACE_OVAL, LEFT_EYE_OUTER, RIGHT_EYE_OUTER
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.runtime.errors import Export3DWarning, InputError
from export3d_cli.core.runtime.weights import example_path, resolve_weights
from export3d_cli.main import cli

TRACKER, MATTING = open_landmarker_tracker(), PersonMatting(resolve_weights("selfie_segmentation"))
JAW_CORNERS = (172, 397)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return read_image(example_path("source.jpg"))


def change(photo: np.ndarray, **values: float | str) -> np.ndarray:
    return change_look(photo, Look(**values), TRACKER, MATTING)[0]  # type: ignore[arg-type]


def landmarks(photo: np.ndarray) -> np.ndarray:
    face = TRACKER.find(photo)
    assert face is not None
    return face.landmarks[:, :2]


def jaw_width(photo: np.ndarray) -> float:
    """Return the distance of the jaw's corners over that of the eyes' outer corners."""
    points = landmarks(photo)
    jaw, eyes = (
        np.linalg.norm(np.subtract(*points[list(p)])) for p in (JAW_CORNERS, (LEFT_EYE_OUTER, RIGHT_EYE_OUTER))
    )
    return float(jaw / eyes)


def test_weight_widens_and_narrows_the_jaw(photo: np.ndarray) -> None:
    own = jaw_width(photo)
    assert jaw_width(change(photo, weight=1)) / own == pytest.approx(1.08, abs=0.03)
    assert jaw_width(change(photo, weight=-1)) / own == pytest.approx(0.93, abs=0.03)


def test_background_stays(photo: np.ndarray) -> None:
    """Outside the person and the fringe that the warp moves, all pixels are the photo's."""
    result = change(photo, age=20, weight=1, hair="#a03020", beard=1)
    far = cv2.erode((MATTING.alpha(photo) == 0).astype(np.uint8), np.ones((41, 41))) > 0
    assert far.mean() > 0.2
    assert np.array_equal(result[far], photo[far])
    assert result.shape == photo.shape


def test_photo_of_a_very_large_head_is_reduced(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribute_editing, "MAX_WINDOW_PX", 90_000)
    with pytest.warns(Export3DWarning, match="reduced to 3"):
        result, moved = change_look(photo, Look(weight=1), TRACKER, MATTING)
    assert 250 < max(result.shape) < max(photo.shape)
    assert np.abs(moved[:, :2] - landmarks(result)).mean() < 1.5
    assert jaw_width(result) > 1.04 * jaw_width(photo)


def test_no_change_of_shape_moves_no_pixel(photo: np.ndarray) -> None:
    result = change(photo, hair="#a03020")
    eyes = landmarks(photo)[[159, 386]].round().astype(int)
    for x, y in eyes:
        assert np.array_equal(result[y - 9 : y + 9, x - 9 : x + 9], photo[y - 9 : y + 9, x - 9 : x + 9])


def test_hair_gets_the_colour(photo: np.ndarray) -> None:
    result = change(photo, hair="#a03020").astype(int)
    x, y = landmarks(photo)[10].round().astype(int)
    top = slice(y - 45, y - 25), slice(x - 20, x + 20)
    before, after = photo[top].mean((0, 1)), result[top].mean((0, 1))
    assert np.abs(after - [0xA0, 0x30, 0x20]).max() < np.abs(before - [0xA0, 0x30, 0x20]).max()
    assert after[0] - after[2] > 60  # red


def test_grey_photo_stays_grey_unless_hair_gets_a_colour(photo: np.ndarray) -> None:
    grey = np.repeat(photo.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    result = change(grey, age=30, weight=0.5, beard=0.5)
    assert np.ptp(result.astype(int), axis=-1).max() <= 2
    assert np.abs(result.astype(int) - grey).max() > 10
    assert np.ptp(change(grey, hair="#a03020").astype(int), axis=-1).max() > 60


def test_beard_darkens_the_chin_and_not_the_forehead(photo: np.ndarray) -> None:
    result = change(photo, beard=0.8)
    points = landmarks(photo).round().astype(int)

    def darker(point: int) -> float:
        x, y = points[point]
        part = slice(y - 4, y + 5), slice(x - 4, x + 5)
        return float(photo[part].mean() / result[part].mean())

    assert darker(199) > 1.2  # the chin
    assert darker(151) == pytest.approx(1, abs=0.02)  # the forehead


def test_age_raises_the_contrast_of_detail_and_youth_lowers_it(photo: np.ndarray) -> None:
    x, y = landmarks(photo)[50].round().astype(int)
    part = slice(y - 20, y + 20), slice(x - 20, x + 20)

    def contrast(image: np.ndarray) -> float:
        luma = image.mean(-1)
        return float((luma - cv2.GaussianBlur(luma, (0, 0), 2))[part].std())

    assert contrast(change(photo, age=-20)) < contrast(photo) < contrast(change(photo, age=40))


def test_identity_stays_at_the_limits(photo: np.ndarray) -> None:
    """Dlib's cosines are about .97 for one person and at most .92 for strangers."""
    embed = load_embedder("dlib", torch.device("cpu"))
    looks = [{name: end} for name, ends in RANGES.items() for end in ends if end]
    images = [photo, *(change(photo, **look) for look in looks)]
    vectors = embed(images, np.stack([landmarks(image) for image in images]))
    assert (vectors[1:] @ vectors[0]).min() > 0.93


def test_photo_without_hair_is_noted(photo: np.ndarray) -> None:
    """All around the face has the skin's colour, as a bald head would."""
    points = landmarks(photo).round().astype(np.int32)
    inside = cv2.fillPoly(np.zeros(photo.shape[:2], np.uint8), [points[list(FACE_OVAL)]], 1) > 0
    bald = np.where(inside[..., None], photo, np.median(photo[inside], axis=0).astype(np.uint8))
    with pytest.warns(Export3DWarning, match="no hair was found in the photo"):
        assert np.array_equal(change(bald, hair="#a03020"), bald)


def test_spread_keeps_values_at_nodes_and_fades() -> None:
    nodes = np.array([[0.0, 0.0], [1.0, 0.0]])
    values = np.array([[1.0], [-1.0]])
    result = spread(nodes, values, np.array([[0, 0], [1, 0], [0.5, 0], [9, 0]]), 0.05, 1.0)
    assert result[:, 0] == pytest.approx([1, -1, 0, 0], abs=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agee=3", "there is no attribute 'agee': did you mean age?"),
        ("gender=1", "there is no attribute 'gender': did you mean"),
        ("age=90", "age must be -20 to"),
        ("weight=nan", "weight must be -1 to 1"),
        ("beard=much", "beard must be a number, got 'much'"),
        ("hair=red", "hair must be a colour such as #5b3a1e, got 'red'"),
        ("", "there is no attribute ''"),
    ],
)
def test_unusable_looks_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        Look.parse(text)


def test_look_of_a_text() -> None:
    assert Look.parse("age=15,weight=-.3,hair=#5b3a1e,beard=.4") == Look(15, -0.3, "#5b3a1e", 0.4)
    assert not Look()


def test_portrait_of_a_photo_shows_the_look(animator: Animator, photo: np.ndarray) -> None:
    """A look is applied to every photo of the person before it is encoded."""
    source = example_path("source.jpg")
    options = PortraitOptions(look=Look(weight=0.5), also=(source,))
    portrait = load_photo(animator, source, options)
    assert np.array_equal(portrait.canvas.photo, change(photo, weight=0.5))
    own = portrait.motion.landmarks[0, JAW_CORNERS, 0]
    other = portrait.others[0].motion.landmarks[0, JAW_CORNERS, 0]
    assert np.ptp(own) == pytest.approx(np.ptp(other), rel=0.02)


def test_given_landmarks_move_with_the_face(animator: Animator, photo: np.ndarray, tmp_path: Path) -> None:
    """The portrait gets the landmarks that a tracker finds in the changed photo, not the old ones."""
    file = tmp_path / "points.csv"
    np.savetxt(file, landmarks(photo), delimiter=",")
    portrait = load_photo(animator, example_path("source.jpg"), PortraitOptions(look=Look(weight=1), landmarks=file))
    found, own = landmarks(portrait.canvas.photo), portrait.motion.landmarks[0, :, :2]
    used = own * portrait.motion.crop[2] + portrait.motion.crop[:2]
    moved, error = (np.linalg.norm(found - points, axis=1).mean() for points in (landmarks(photo), used))
    assert moved > 1
    assert error < 0.6 * moved


def test_person_file_keeps_its_look(animator: Animator, photo: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "me.safetensors"
    Person((photo,), None, animator.fingerprint, {}).save(path)
    with pytest.raises(InputError, match="is tuned to the person's own look"):
        load_photo(animator, path, PortraitOptions(look=Look(age=5)))


def test_command_writes_a_marked_photo_of_the_same_size(tmp_path: Path, photo: np.ndarray) -> None:
    source, out = tmp_path / "me.png", tmp_path / "out.png"
    write_image(source, photo)
    run = CliRunner().invoke
    result = run(cli, ["look", str(source), "--age", "+15", "--weight", "-.3", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert read_image(out).shape == photo.shape
    report = find_marks(out)
    assert report.metadata
    assert report.invisible
    for arguments, message in (
        (["-o", str(out), "--age", "15"], "exists"),
        (["-o", str(tmp_path / "a.mp4"), "--age", "15"], "must end in .png or .jpg"),
        (["-o", str(tmp_path / "a.png")], "nothing to change: give age, weight, hair or beard"),
        (["-o", str(tmp_path / "a.png"), "--beard", "2"], "beard must be 0 to"),
    ):
        result = run(cli, ["look", str(source), *arguments])
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "a.png").exists()
