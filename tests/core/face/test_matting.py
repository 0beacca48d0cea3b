"""The person's alpha on the example portrait, its steadiness, and the colours at its edges."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from export3d_cli.core.face.matting import PersonMatting, _fill_holes, _find_hair_strands, estimate_foreground
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.weights import example_path, resolve_weights


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return cv2.resize(read_image(example_path("source.jpg")), (256, 256), interpolation=cv2.INTER_AREA)


@pytest.fixture
def matting() -> PersonMatting:
    return PersonMatting(resolve_weights("selfie_segmentation"))


def test_alpha_is_one_on_the_person_and_zero_in_the_corners(matting: PersonMatting, photo: np.ndarray) -> None:
    alpha = matting.alpha(photo)
    assert alpha.shape == (256, 256)
    assert alpha.dtype == np.float32
    assert (alpha.min(), alpha.max()) == (0, 1)
    assert alpha[60:200, 100:156].min() == 1  # face and neck
    assert max(alpha[0, 0], alpha[0, -1], alpha[80, 10], alpha[80, -10]) == 0
    assert matting.alpha(photo[:, :200]).shape == (256, 200)


def test_fill_holes_fills_only_small_enclosed_holes() -> None:
    mask = np.zeros((256, 256), np.float32)
    mask[50:, 50:200] = 1
    whole = mask.copy()
    mask[100:120, 100:120] = 0  # within the person
    mask[240:, 100:120] = 0  # open to the picture's border
    filled = _fill_holes(mask)
    np.testing.assert_array_equal(filled[:240], whole[:240])
    assert filled[250, 110] == 0
    mask[100:140, 100:140] = 0  # large: between an arm and the body
    assert _fill_holes(mask)[120, 120] == 0


def test_find_hair_strands_by_colour() -> None:
    picture = np.full((256, 256, 3), 0.8, np.float32) + np.random.default_rng(0).normal(0, 0.01, (256, 256, 3))
    mask = np.zeros((256, 256), np.float32)
    mask[100:, 80:180] = 1
    picture[100:, 80:180] = 0.2
    picture[94:100, 120:124] = picture[120:124, 180:192] = 0.2  # strands that the mask misses
    found = _find_hair_strands(picture.astype(np.float32), mask)
    assert found[95:100, 121:123].min() > 0.8
    assert found[121:123, 180:184].min() > 0.8
    assert found[95, 140] == found[140, 186] == found[60, 60] == 0  # between and far from them: unchanged
    assert found[120:, 90:170].min() == 1


def test_estimate_foreground_removes_background_at_edges() -> None:
    alpha = np.tile(np.clip((np.arange(256) - 120) / 8, 0, 1), (256, 1)).astype(np.float32)
    red, green = np.array([200, 40, 40]), np.array([20, 220, 20])
    image = (alpha[..., None] * red + (1 - alpha[..., None]) * green).round().astype(np.uint8)
    colours = estimate_foreground(image, alpha)
    edge = colours[128, 122:128].astype(int)  # alpha from 0.25 to 0.9
    assert np.abs(edge - red).max() <= 20
    assert colours[:, :60].max() == 0  # far from the person, where alpha is 0


def test_damaged_network_raises_weights_error(tmp_path: Path) -> None:
    (tmp_path / "bad.tflite").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"bad\.tflite"):
        PersonMatting(tmp_path / "bad.tflite")
