"""Choosing and cutting the crop, and the blurred padding beyond the edge of a photo."""

from __future__ import annotations

import numpy as np
import pytest

from export3d_cli.core.face.crop import Square, crop_image, crop_with_padding

STRIPES = np.tile(np.repeat([40, 200], 4).astype(np.uint8)[None, :, None], (96, 12, 3))  # 96 x 96, 8 pixels a period


@pytest.mark.parametrize("square", [(0.0, 0.0, 96.0), (10.5, 3.25, 60.0)])
def test_crop_with_padding_inside_the_photo_equals_crop_image(square: Square) -> None:
    np.testing.assert_array_equal(crop_with_padding(STRIPES, square, 64), crop_image(STRIPES, square, 64))


@pytest.mark.parametrize("scale", [1, 8])
def test_padding_blurs_stripes_and_keeps_their_mean(scale: int) -> None:
    crop = crop_with_padding(STRIPES, (0.0, 48.0, 96.0), 96 * scale)  # its lower half is outside the photo
    replicated = crop_image(STRIPES, (0.0, 48.0, 96.0), 96 * scale)
    np.testing.assert_array_equal(crop[: 48 * scale], replicated[: 48 * scale])
    middle = crop[:, 40 * scale : -40 * scale]  # two periods
    contrast = [float(middle[row * scale].std()) for row in (47, 49, 51, 53, 95)]
    assert all(after < before for before, after in zip(contrast[:-1], contrast[1:], strict=True)), contrast
    assert contrast[1] > 0.7 * contrast[0] and contrast[-1] < 0.05 * contrast[0]
    assert abs(float(middle[-8 * scale :].mean()) - 120) < 4


def test_padding_of_a_corner_continues_the_corner() -> None:
    gradient = np.repeat(np.arange(96, dtype=np.uint8)[:, None, None] * 2, 96, axis=1).repeat(3, axis=2)
    crop = crop_with_padding(gradient, (40.0, 40.0, 96.0), 96)
    np.testing.assert_array_equal(crop[:56, :56], gradient[40:, 40:])
    assert crop.shape == (96, 96, 3) and crop[80, 80].min() > 150  # the colour of the nearest corner
