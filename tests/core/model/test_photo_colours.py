"""Colours of photos: the light on the face, the chroma range, and results that stay within them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.photo_colours import ColourRange, PhotoColours, add_light, light_colour, remove_light
from export3d_cli.core.model.volume_renderer import pixel_grid, project

SKIN = torch.tensor([0.75, 0.54, 0.48]).view(1, 3, 1, 1)
RED_LIGHT = torch.tensor([2.0, 0.6, 0.4]).view(1, 3, 1, 1)
WHOLE = torch.ones(1, 1, 64, 64)


def skin_photo(skin: Tensor = SKIN) -> Tensor:
    """Return a photo of skin in uneven light, (1, 3, 64, 64) in [-1, 1]."""
    torch.manual_seed(0)
    return skin * (0.3 + 0.3 * torch.rand(1, 1, 64, 64)) * 2 - 1


def chroma(image: Tensor) -> float:
    return float((image.amax(1) - image.amin(1)).max())


def test_light_colour_is_the_ratio_to_skin_in_white_light(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv, _ = project(points, orbit(0.0))
    light = light_colour(add_light(skin_photo(), RED_LIGHT), uv)
    expected = RED_LIGHT / RED_LIGHT.mean()
    torch.testing.assert_close(light, expected, atol=0.06, rtol=0)
    torch.testing.assert_close(remove_light(add_light(SKIN, light), light), SKIN)
    grey = light_colour(skin_photo(SKIN.mean(1, keepdim=True).expand(-1, 3, -1, -1)), uv)
    assert grey[0, 0] < 0.9 and grey[0, 2] > 1.05  # the networks see a grey face in the colour of skin


@pytest.mark.parametrize("skin", [(0.75, 0.54, 0.48), (0.9, 0.8, 0.74), (0.3, 0.2, 0.17), (0.8, 0.5, 0.4)])
def test_light_on_usual_skin_is_white(skin: tuple[float, ...], points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv, _ = project(points, orbit(0.0))
    photo = skin_photo(torch.tensor(skin).view(1, 3, 1, 1))
    assert (light_colour(photo, uv) == 1).all()
    below_nose = pixel_grid(64).view(1, 1, 64, 64, 2)[..., 1] > uv[0, 2, 1]
    masked = torch.where(below_nose, torch.tensor([-0.2, 0.2, 0.6]).view(1, 3, 1, 1), photo)
    assert (light_colour(masked, uv) == 1).all()  # a blue mask is not blue light


def test_colour_range_of_one_tint_brings_any_colour_to_it() -> None:
    torch.manual_seed(0)
    y = torch.rand(1, 1, 64, 64) * 1.2 - 0.7
    sepia = torch.cat([1.07 * y + 0.04, 0.9 * y, 0.7 * y - 0.1 * y**2], dim=1)
    noisy = sepia + 0.008 * torch.randn(1, 3, 64, 64)  # as after JPEG compression
    limited = ColourRange.measure(noisy, WHOLE).limit(sepia + 0.3 * torch.randn(1, 3, 1, 1))
    usual = ColourRange.measure(sepia, WHOLE).limit(limited)
    torch.testing.assert_close(limited, usual, atol=4 / 255, rtol=0)
    grey = ColourRange.measure(y.expand(-1, 3, -1, -1), WHOLE)
    colours = torch.rand(1, 3, 64, 64) * 2.4 - 1.2  # also darker and brighter than the photo
    assert chroma(grey.limit(colours)) < 1e-5
    torch.testing.assert_close(grey.limit(colours).mean(1), colours.mean(1))
    tinted = ColourRange.measure(remove_light(y.expand(-1, 3, -1, -1), RED_LIGHT), WHOLE)
    assert chroma(add_light(tinted.limit(colours), RED_LIGHT)) < 1e-4


def test_colour_range_keeps_the_colours_of_a_photo_in_colour() -> None:
    torch.manual_seed(0)
    photo = skin_photo() + 0.06 * torch.randn(1, 3, 64, 64)
    teeth = torch.tensor([0.55, 0.5, 0.45]).view(1, 3, 1, 1)
    colour_range = ColourRange.measure(photo, WHOLE)
    torch.testing.assert_close(colour_range.limit(teeth), teeth)
    green = torch.tensor([-1.0, 1.0, -1.0]).view(1, 3, 1, 1)
    assert 0 < chroma(colour_range.limit(green)) < chroma(green)


def test_result_of_a_photo_in_coloured_light_has_that_light(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    """Untrained weights give arbitrary colours: grey photos stay grey, and light only multiplies the result."""
    photo = skin_photo() + 0.06 * torch.randn(1, 3, 64, 64)
    uv, _ = project(points, orbit(0.0))
    assert PhotoColours.measure(photo, uv, WHOLE) is None

    def result(image: Tensor) -> Tensor:
        with torch.no_grad():
            source = tiny.encode_source(image, torch.zeros(1, 64), orbit(0.0), points, torch.ones(1, 1, 64, 64))
            output = tiny.drive(source.expand(2), tiny.coefficients(torch.ones(2, 64)), orbit(-20.0, 20.0))
        assert source.colours is None or source.highpass is not None
        return output.image

    white = result(photo)
    light = light_colour(add_light(photo, RED_LIGHT), uv)
    red = result(add_light(photo, light))
    torch.testing.assert_close(red, add_light(white, light), atol=0.1, rtol=0)
    assert chroma(white) > 0.1
    assert chroma(result(photo.mean(1, keepdim=True).expand(-1, 3, -1, -1))) < 1 / 255


def test_colours_are_not_limited_in_training(tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    grey = torch.zeros(1, 3, 64, 64)
    assert tiny.encode_source(grey, torch.zeros(1, 64), orbit(0.0), points).colours is None
