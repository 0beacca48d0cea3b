"""Sampling of the photo in two layers: discontinuities, detail, upscaling."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from export3d_cli.core.model.generator import lowpass
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.layer_warp import photo_residual, warp_discontinuity


def test_photo_residual_plus_downsampled_photo_is_the_photo() -> None:
    photo = torch.rand(1, 3, 160, 160)
    residual = photo_residual(photo, 128, 64)
    small = F.interpolate(photo[..., 16:-16, 16:-16], (64, 64), mode="area")
    upsampled = F.interpolate(small, (128, 128), mode="bilinear")
    torch.testing.assert_close(residual[..., 16:-16, 16:-16] + upsampled, photo[..., 16:-16, 16:-16])
    torch.testing.assert_close(residual[..., 16:-16, :16] + upsampled[..., :1], photo[..., 16:-16, :16])
    assert photo_residual(torch.full((1, 3, 160, 160), 0.3), 128, 64).abs().max() < 1e-6


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
