"""Portraits of photos with several people, and photos that cannot be portraits."""

from __future__ import annotations

import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.face.crop import crop_image
from export3d_cli.core.face.matting import nearest_face_weight
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path


@pytest.fixture
def couple(animator: Animator) -> np.ndarray:
    """Two bundled portraits side by side, 256 x 384: their faces are some 128 pixels apart."""
    crops = []
    for name in ("source.jpg", "astronaut.jpg"):
        photo = read_image(example_path(name))
        crops.append(crop_image(photo, animator.portrait(photo).square, 256))
    return np.concatenate([crops[0][:, :192], crops[1][:, 64:]], axis=1)


@pytest.mark.parametrize(("face", "direction"), [("left", 1), ("right", -1)])
def test_faces_start_with_the_person_s_and_list_the_other(
    animator: Animator, couple: np.ndarray, face: str, direction: int
) -> None:
    portrait = animator.portrait(couple, face=face)
    (own, _, size), (other, _, _) = portrait.faces
    points = portrait.motion.landmarks[0, :, :2]
    np.testing.assert_allclose(own, points[:, 0].mean(), atol=0.02)
    np.testing.assert_allclose(size, np.ptp(points, axis=0).max(), atol=0.02)
    np.testing.assert_allclose((other - own) * portrait.square[2] * direction, 128, atol=20)
    side = round(portrait.square[2])
    assert portrait.crop.shape == (side, side, 3)
    assert portrait.padded is not None and portrait.padded.shape == (1, 3, *2 * (side + 2 * round(side / 4),))


def test_other_person_is_not_part_of_the_person_mask(animator: Animator, couple: np.ndarray) -> None:
    photo = animator.portrait(couple, face="left")
    _, (x, y, _) = photo.faces
    crop = animator.portrait_from_motion(photo.crop, photo.motion)  # knows nothing of other people
    weights = []
    for portrait in (photo, crop):
        source = portrait.source
        assert source.head_mask is not None and source.body_mask is not None
        person = (source.head_mask + source.body_mask)[0, 0]
        row, column = (int(v * person.shape[-1]) for v in (y, min(x, 0.99)))
        weights.append(float(person[row, column]))
    assert weights[0] < 0.01
    assert weights[1] > 0.9


def test_distance_to_a_face_is_counted_in_its_sizes() -> None:
    weight = nearest_face_weight([(0.25, 0.5, 0.1), (0.85, 0.5, 0.2)], 1, 200)  # the border: 0.2 from the smaller one
    assert weight.shape == (1, 200)
    np.testing.assert_array_equal(weight[:, 10:80], 1)
    np.testing.assert_array_equal(weight[:, 100:], 0)
    assert abs(float(weight[0].sum()) / 200 - 0.45) < 0.01


def test_crop_none_of_a_photo_that_is_not_square_is_refused(animator: Animator, couple: np.ndarray) -> None:
    with pytest.raises(InputError, match="it is 384x256: --crop none takes square pictures"):
        animator.portrait(couple, name="it", face="left", crop="none")


def test_additional_photo_changes_frames_and_none_changes_nothing(animator: Animator) -> None:
    photo = read_image(example_path("source.jpg"))
    blue = photo.copy()
    blue[..., 0] //= 2
    alone, again = (animator.portrait(photo, also=also) for also in (None, {}))
    both = animator.portrait(photo, also={"blue": blue, "mirrored": photo[:, ::-1].copy()})
    assert [len(portrait.source.others) for portrait in (alone, again, both)] == [0, 0, 2]
    assert both.padded is not None and len(both.padded) == 3
    matched = np.abs(both.others[0].crop.astype(float) - alone.crop).mean()
    assert matched < np.abs(alone.crop // (2, 1, 1) - alone.crop.astype(float)).mean() / 2  # in the first one's colours
    camera = np.repeat(alone.motion.camera, 2, axis=0)
    frames = [list(animator.view(portrait, camera)) for portrait in (alone, again, both)]
    np.testing.assert_array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])
