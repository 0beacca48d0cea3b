"""Two people in a photo: one is animated, the other stays where they are."""

from __future__ import annotations

import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.source_crop import portrait_of
from export3d_cli.core.face.matting import nearest_face_weight
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path


@pytest.fixture
def couple(animator: Animator) -> np.ndarray:
    """Two bundled portraits side by side, 256 x 384: their middles are some 128 pixels apart."""
    both = []
    for name in ("source.jpg", "astronaut.jpg"):
        seen = portrait_of(
            read_image(example_path(name)), animator.tracker, 64, name=name, face="largest", crop="auto", size=256
        )
        both.append(seen.crop)
    return np.concatenate([both[0][:, :192], both[1][:, 64:]], axis=1)


@pytest.mark.parametrize(("face", "beside"), [("left", 1), ("right", -1)])
def test_the_own_face_comes_first_and_the_other_is_beside_it(
    animator: Animator, couple: np.ndarray, face: str, beside: int
) -> None:
    seen = portrait_of(couple, animator.tracker, 64, name="it", face=face, crop="auto", size=64)
    (own, _, size), (other, _, _) = seen.faces
    points = seen.motion.landmarks[0, :, :2]
    np.testing.assert_allclose(own, points[:, 0].mean(), atol=0.02)
    np.testing.assert_allclose(size, np.ptp(points, axis=0).max(), atol=0.02)
    np.testing.assert_allclose((other - own) * seen.motion.crop[2] * beside, 128, atol=20)
    assert seen.crop.shape == (64, 64, 3) and seen.around.shape == (96, 96, 3)


def test_the_other_is_no_part_of_the_person(animator: Animator, couple: np.ndarray) -> None:
    animator.set_source(couple, face="left")
    source, (_, (x, y, _)) = animator._source, animator._faces
    assert source is not None and source.head_mask is not None and source.body_mask is not None
    person = (source.head_mask + source.body_mask)[0, 0]
    at = [int(v * person.shape[-1]) for v in (y, min(x, 0.99))]
    assert person[at[0], at[1]] < 0.01
    animator.set_source_motion(animator.source_crop(), animator.source_motion())  # nothing is known of others
    assert (
        animator._source is not None
        and animator._source.head_mask is not None
        and animator._source.body_mask is not None
    )
    assert (animator._source.head_mask + animator._source.body_mask)[0, 0, at[0], at[1]] > 0.9


def test_nearest_is_counted_in_sizes_of_the_faces() -> None:
    share = nearest_face_weight([(0.25, 0.5, 0.1), (0.85, 0.5, 0.2)], 1, 200)  # the border: 0.2 from the smaller one
    assert share.shape == (1, 200)
    np.testing.assert_array_equal(share[:, 10:80], 1)
    np.testing.assert_array_equal(share[:, 100:], 0)
    assert abs(float(share[0].sum()) / 200 - 0.45) < 0.01


def test_a_crop_that_is_not_square_is_told(animator: Animator, couple: np.ndarray) -> None:
    with pytest.raises(InputError, match="it is 384x256: --crop none takes square pictures"):
        portrait_of(couple, animator.tracker, 64, name="it", face="left", crop="none", size=0)
