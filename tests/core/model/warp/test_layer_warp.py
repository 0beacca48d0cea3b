"""Sampling of the photo in two layers: discontinuities, detail, upscaling."""

from __future__ import annotations

import math

import torch

from export3d_cli.core.model.generator import lowpass
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.layer_warp import LayerWarp, upscale_with_detail, warp_discontinuity


def test_moved_detail_is_as_sharp_as_in_the_photo() -> None:
    """Also in a photo no larger than the network's, whose bilinear samples are blurred."""
    wave = torch.cos(torch.arange(96) * 1.9).expand(1, 3, 96, 96)
    grid = pixel_grid(64).T.reshape(1, 2, 64, 64) + 0.5 / 64
    warp = LayerWarp(grid.repeat(1, 2, 1, 1), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 64, 64))
    sharp = upscale_with_detail(warp.sample(wave[..., 16:-16, 16:-16]), warp, wave, 64)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    truth = torch.cos((torch.arange(64) + 16.5) * 1.9).expand(1, 3, 64, 64)[inner]
    assert (sharp[inner] * truth).mean() > 0.7 * truth.square().mean()
    assert (warp.sample(wave[..., 16:-16, 16:-16])[inner] * truth).mean() < 0.6 * truth.square().mean()


def test_warp_discontinuity_is_the_distance_of_neighbours() -> None:
    grid = pixel_grid(16).T.reshape(1, 2, 16, 16)
    split = grid + 0.5 * (grid[:, :1] > 0.5)
    distances = warp_discontinuity(torch.cat([grid * 3, split], dim=1))
    torch.testing.assert_close(distances[:, 0], torch.full((1, 16, 16), 3.0))
    expected = torch.ones(16)
    expected[7:9] = math.hypot(1 + 8, 8)  # one pixel plus half an image across, half an image down
    torch.testing.assert_close(distances[0, 1], expected.expand(16, 16))


def test_lowpass_smooths_a_step() -> None:
    step = (torch.arange(16) > 7).float().expand(1, 1, 16, 16)
    torch.testing.assert_close(lowpass(step)[0, 0, 3, 6:10], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    torch.testing.assert_close(lowpass(torch.ones(1, 2, 8, 8)), torch.ones(1, 2, 8, 8))
