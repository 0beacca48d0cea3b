"""Sizes and margins that follow from a portrait's crop, and what larger frames show."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.framing import uncropped_frame_size
from export3d_cli.core.face.crop import crop_image
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.camera import head_pose, with_head_pose
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

PHOTO = read_image(example_path("source.jpg"))


def test_frame_size_of_an_uncropped_photo_is_the_given_one_or_as_the_photo_allows() -> None:
    assert [uncropped_frame_size(side, 256) for side in (100, 383, 384, 4000)] == [256, 256, 512, 512]
    assert [uncropped_frame_size(4000, 256, size) for size in (256, 300, 2048)] == [256, 300, 2048]
    for bad in (64, 254, 2050):
        with pytest.raises(InputError, match=f"size must be 256 to 2048 .*got {bad}"):
            uncropped_frame_size(4000, 256, bad)


def test_larger_frames_are_nearer_to_the_larger_photo(animator: Animator) -> None:
    frames = {}
    for size in (64, 192):
        portrait = animator.portrait(PHOTO, crop="none", size=size)
        (frames[size],) = animator.animate(portrait, [portrait.motion])
        assert frames[size].shape == portrait.crop.shape == (size, size, 3)
    truth = crop_image(PHOTO, portrait.motion.crop, 192).astype(float)[40:-40, 40:-40]
    enlarged = cv2.resize(frames[64], (192, 192), interpolation=cv2.INTER_CUBIC)
    errors = [np.square(frame[40:-40, 40:-40] - truth).mean() for frame in (enlarged, frames[192])]
    assert errors[1] < 0.75 * errors[0]


def test_photo_around_the_crop_comes_into_view_when_the_head_gets_smaller(animator: Animator) -> None:
    x, y, side = (round(value) for value in animator.portrait(PHOTO).square)
    wide = np.full((1000, 1000, 3), (0, 255, 0), np.uint8)
    wide[250 : 250 + side, 250 : 250 + side] = PHOTO[y : y + side, x : x + side]
    photo = animator.portrait(wide)
    crop = animator.portrait_from_motion(crop_image(wide, photo.motion.crop, 64), photo.motion)
    rotation, centre = head_pose(photo.camera)
    cameras = with_head_pose(photo.camera, rotation, 1.4 * centre)[None]
    for portrait, is_green in ((photo, True), (crop, False)):
        (frame,) = animator.view(portrait, cameras, layers=True)
        if portrait.canvas is not None:
            frame = cv2.resize(frame.image, (64, 64), interpolation=cv2.INTER_AREA)
        red, green, blue = frame[-4:, 16:-16].reshape(-1, 3).mean(0)  # below the shoulders
        assert (green - max(red, blue) > 100) == is_green


def test_crop_of_the_network_s_size_has_no_detail(animator: Animator) -> None:
    motion = animator.portrait(PHOTO).motion
    portrait = animator.portrait_from_motion(crop_image(PHOTO, motion.crop, 64), motion)
    assert portrait.padded is None
    assert next(animator.edit(portrait, np.zeros((1, 10), np.float32))).shape == (64, 64, 3)


def test_depth_has_the_crop_s_size(animator: Animator) -> None:
    for portrait in (animator.portrait(PHOTO, crop="none", size=100), animator.portrait(PHOTO, size=100)):
        (depth,) = animator.view(portrait, portrait.motion.camera, depth=True)
        assert depth.shape == portrait.crop.shape
