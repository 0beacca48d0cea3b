"""Rendering qualities and paths compared on the shipped weights, as an `Animator` renders them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.options import Quality
from export3d_cli.core.media.image import read_image
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.weights import example_path

YAWS = (-25.0, 8.0)  # degrees; at -25 a thin strand of hair lies between coarse samples


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.square(a.astype(float) - b).mean())


def render(quality: Quality) -> np.ndarray:
    """Render two views and one edited expression of the example portrait in fp32 on the CPU."""
    animator = Animator.from_weights(None, device="cpu", precision="fp32", quality=quality)
    portrait = animator.portrait(read_image(example_path("source.jpg")))
    cameras = np.stack([Camera.orbit(yaw, 0).to_vector() for yaw in YAWS]).astype(np.float32)
    changes = np.zeros((1, animator.model.config.num_coefficients), np.float32)
    changes[0, 4] = 3
    return np.stack([*animator.view(portrait, cameras), *animator.edit(portrait, changes)])


@pytest.fixture(scope="module")
def balanced() -> np.ndarray:
    return render("balanced")


def test_sparse_path_matches_plain_path_on_shipped_weights(
    balanced: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: 45.9, 69.9 and 73.0 dB."""
    monkeypatch.setattr(Export3D, "_use_sparse_path", lambda *_: False)
    plain = render("balanced")
    for sparse_frame, plain_frame, floor in zip(balanced, plain, (42.8, 66.9, 69.9), strict=True):
        assert psnr(sparse_frame, plain_frame) > floor


def test_balanced_quality_is_close_to_best_on_shipped_weights(balanced: np.ndarray) -> None:
    """Measured: 37.4, 44.0 and 52.3 dB."""
    for frame, best, floor in zip(balanced, render("best"), (34.3, 40.9, 49.2), strict=True):
        assert psnr(frame, best) > floor
