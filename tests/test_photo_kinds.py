"""Unusual portraits with the shipped weights: without colour, in coloured light, with covered faces."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.weights import example_path
from tests.helpers.covers import MASK_BLUE, draw_cover

RED_LIGHT = np.array([1.4, 0.55, 0.45])
DRIVER_FRAMES = (0, 7, 9, 13)  # of the example: mouth shut, a blink, mouth open


@pytest.fixture(scope="module")
def animator() -> Animator:
    return Animator.from_weights(device="cpu", precision="fp32", quality="fast")


@pytest.fixture(scope="module")
def driver(animator: Animator) -> list[Motion]:
    frames = list(VideoReader(example_path("drive.mp4")))
    return [animator.portrait(frames[k]).motion for k in DRIVER_FRAMES]


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    return read_image(example_path("source.jpg").with_name("astronaut.jpg"))


def animate(animator: Animator, photo: np.ndarray, driver: list[Motion]) -> np.ndarray:
    return np.stack(list(animator.animate(animator.portrait(photo, size=256), driver))).astype(float)


def animate_crop(animator: Animator, photo: np.ndarray, driver: list[Motion]) -> np.ndarray:
    """Return frames of the face crop alone, 256 x 256."""
    portrait = animator.portrait(photo)
    crop = cv2.resize(portrait.crop, (256, 256), interpolation=cv2.INTER_CUBIC)
    portrait = animator.portrait_from_motion(crop, portrait.motion)
    return np.stack(list(animator.animate(portrait, driver))).astype(float)


def chroma(frames: np.ndarray) -> np.ndarray:
    return frames.max(-1) - frames.min(-1)


def test_frames_of_a_grey_photo_are_grey(animator: Animator, driver: list[Motion], astronaut: np.ndarray) -> None:
    grey = np.repeat(astronaut.mean(-1, keepdims=True).round().astype(np.uint8), 3, axis=-1)
    assert chroma(animate(animator, grey, driver)).max() <= 1


def test_frames_of_a_sepia_photo_are_sepia(animator: Animator, driver: list[Motion], astronaut: np.ndarray) -> None:
    """All colours lie on the photo's curve from black over brown to cream."""
    levels = np.arange(256)
    curve = np.stack([levels**0.9 * 255**0.1, levels * 0.9, levels**1.1 * 0.8 / 255**0.1], axis=-1).round()
    sepia = curve[astronaut.mean(-1).round().astype(int)].astype(np.uint8)
    frames = animate_crop(animator, sepia, driver)
    distance = np.abs(frames[..., None, :] - curve[::2]).max(-1).min(-1)
    assert np.percentile(distance, 99.9) <= 3


def test_frames_in_coloured_light_are_those_in_white_light_times_the_light(
    animator: Animator, driver: list[Motion], astronaut: np.ndarray
) -> None:
    dark = (astronaut * 0.7).astype(np.uint8)  # nothing is clipped
    white, red = (animate_crop(animator, photo, driver) for photo in (dark, (dark * RED_LIGHT).astype(np.uint8)))
    face = np.abs(red - np.minimum(white * RED_LIGHT, 255))[:, 80:180, 80:180]
    assert face.mean() < 2.5
    assert np.percentile(face, 99) < 16


def drawn_on_example(animator: Animator, kind: str) -> np.ndarray:
    photo = read_image(example_path("source.jpg"))
    motion = animator.portrait(photo).motion
    x, y, side = motion.crop
    return draw_cover(photo, motion.landmarks[0, :, :2] * side + [x, y], kind)


def spread_within(frame: np.ndarray, colour: tuple[int, ...]) -> float:
    """Return the fraction of other colours in the convex hull of the largest area of a colour."""
    near = (np.abs(frame - colour).max(-1) < 45).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(near)
    area = (labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()).astype(np.uint8)
    hull = cv2.fillConvexPoly(np.zeros_like(area), cv2.convexHull(cv2.findNonZero(area)), 1)
    return 1 - float(area.sum() / hull.sum())


@pytest.mark.parametrize(("kind", "colour"), [("blue mask", MASK_BLUE), ("dark lenses", (16, 16, 18))])
def test_nothing_is_shown_on_a_cover(
    animator: Animator, driver: list[Motion], kind: str, colour: tuple[int, ...]
) -> None:
    notes: list[str] = []
    portrait = animator.portrait(drawn_on_example(animator, kind), size=256)
    before = spread_within(portrait.canvas.photo.astype(float), colour)
    frames = list(animator.animate(portrait, driver, notify=notes.append))
    assert max(spread_within(frame.astype(float), colour) for frame in frames) < before + 0.03
    assert notes == [portrait.covered.note()]
