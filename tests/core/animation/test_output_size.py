"""How large frames are, and what is in those that are larger than the model's picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.output_size import RIM, frame_size, mesh_size, room_around
from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.crop import crop_image
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

PHOTO = read_image(example_path("source.jpg"))


def test_frames_are_as_large_as_asked_or_as_the_photo_allows() -> None:
    assert [frame_size(256, shown) for shown in (100.0, 383.0, 384.0, 4000.0)] == [256, 256, 512, 512]
    assert [frame_size(256, 4000.0, asked) for asked in (256, 300, 2048)] == [256, 300, 2048]
    for bad in (64, 254, 2050):
        with pytest.raises(InputError, match=f"size {bad} is out of range.* 256 to 2048"):
            frame_size(256, 4000.0, bad)


def test_a_photo_goes_on_around_a_crop_as_far_as_it_is_kept() -> None:
    assert room_around((20.0, 5.0, 100.0), (130, 90)).tolist() == pytest.approx([0.2, 0.05, 0.1])
    assert room_around((-20.0, 500.0, 100.0), (80, 700)).tolist() == pytest.approx([0, RIM, 0])


def test_larger_frames_are_nearer_to_the_larger_photo(animator: Animator) -> None:
    made = {}
    for size in (64, 192):
        motion = animator.set_source(PHOTO, size=size)
        (made[size],) = animator.drive([motion])
        assert made[size].shape == animator.source_crop().shape == (size, size, 3) and animator.size == size
    truth = crop_image(PHOTO, motion.crop, 192).astype(float)[40:-40, 40:-40]
    enlarged = cv2.resize(made[64], (192, 192), interpolation=cv2.INTER_CUBIC)
    errors = [np.square(frame[40:-40, 40:-40] - truth).mean() for frame in (enlarged, made[192])]
    assert errors[1] < 0.7 * errors[0]


def test_what_is_around_the_crop_comes_into_view_when_the_head_gets_smaller(animator: Animator) -> None:
    motion = animator.set_source(PHOTO)
    x, y, side = (round(value) for value in motion.crop)
    wide = np.full((1000, 1000, 3), (0, 255, 0), np.uint8)
    wide[250 : 250 + side, 250 : 250 + side] = PHOTO[y : y + side, x : x + side]
    motion = animator.set_source(wide, size=64)
    pose = np.linalg.inv(animator.source_camera().cam2world)
    pose[:3, 3] *= 1.4
    cameras = Camera(np.linalg.inv(pose), animator.source_camera().intrinsics).to_vector()[None]
    (known,) = animator.view(cameras)
    animator.set_source_motion(crop_image(wide, motion.crop, 64), motion)
    (unknown,) = animator.view(cameras)
    for picture, is_green in ((known, True), (unknown, False)):
        red, green, blue = picture[-4:, 16:-16].reshape(-1, 3).mean(0)  # below the shoulders
        assert (green - max(red, blue) > 100) == is_green


def test_a_crop_of_the_model_s_own_size_brings_no_detail(animator: Animator) -> None:
    motion = animator.set_source(PHOTO, size=128)
    animator.set_source_motion(crop_image(PHOTO, motion.crop, 64), motion)
    assert next(animator.edit(np.zeros((1, 10), np.float32))).shape == (64, 64, 3)


def test_depth_is_as_large_as_the_frames(animator: Animator) -> None:
    motion = animator.set_source(PHOTO, size=100)
    assert next(animator.view(motion.camera, depth=True)).shape == (100, 100, 3)


def test_larger_frames_have_a_finer_mesh() -> None:
    config = PRESETS["compact"]
    assert [mesh_size(config, size) for size in (256, 300, 512, 1024)] == [128, 150, 256, 256]
