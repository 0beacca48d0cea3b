"""Sizes that follow from a portrait's crop, and what larger frames show."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.novel_view import colour_depth
from export3d_cli.core.face.crop import crop_image
from export3d_cli.core.media.image import read_image, to_uint8
from export3d_cli.core.runtime.camera import head_pose, with_head_pose
from export3d_cli.core.runtime.weights import example_path

PHOTO = read_image(example_path("source.jpg"))


def test_larger_frames_are_nearer_to_the_larger_photo(animator: Animator) -> None:
    frames = {}
    for size in (64, 192):
        portrait = animator.portrait(PHOTO, crop="none", size=size)
        (frames[size],) = animator.animate(portrait, [portrait.motion])
        assert frames[size].shape == portrait.crop.shape == (size, size, 3)
    truth = crop_image(PHOTO, (0, 0, len(PHOTO)), 192).astype(float)[40:-40, 40:-40]
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
    camera = torch.from_numpy(with_head_pose(photo.camera, rotation, 1.4 * centre))[None]
    for portrait, is_green in ((photo, True), (crop, False)):
        with torch.inference_mode():  # the network's whole image; frames show its face
            output = portrait.model.drive(portrait.source, portrait.source.coefficients, camera)
            large = output.image if portrait.padded is None else output.upscale(portrait.padded, len(portrait.crop))
        frame = cv2.resize(to_uint8(large)[0], (64, 64), interpolation=cv2.INTER_AREA)
        red, green, blue = frame[-4:, 16:-16].reshape(-1, 3).mean(0)  # below the shoulders
        assert (green - max(red, blue) > 100) == is_green


def test_crop_of_the_network_s_size_has_no_detail(animator: Animator) -> None:
    motion = animator.portrait(PHOTO).motion
    portrait = animator.portrait_from_motion(crop_image(PHOTO, motion.crop, 64), motion)
    assert portrait.padded is None
    assert next(animator.edit(portrait, np.zeros((1, 10), np.float32))).shape == (64, 64, 3)


def test_depth_has_the_crop_s_size_and_is_warm_where_it_is_near(animator: Animator) -> None:
    portrait = animator.portrait(PHOTO, size=100)
    (layers,) = animator.view(portrait, portrait.motion.camera, layers=True)
    depth = colour_depth(layers.volume, portrait.motion.camera[0], len(portrait.crop))
    assert depth.shape == portrait.crop.shape
    flat = layers.volume._replace(opacity=np.ones((8, 8), np.float32), depth=np.full((8, 8), 2.4, np.float32))
    near, far = (colour_depth(flat._replace(depth=flat.depth + d), portrait.motion.camera[0], 9) for d in (0, 0.6))
    assert near[4, 4, 0] > near[4, 4, 2] and far[4, 4, 2] > far[4, 4, 0]
