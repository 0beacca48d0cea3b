"""Rays, depths and compositing against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from export3d_cli.core.model.volume_renderer import (
    HALF_EXTENT,
    camera_rays,
    composite,
    pixel_grid,
    project,
    sample_coarse_depths,
    sample_importance_depths,
    split_camera,
)
from export3d_cli.core.runtime.camera import RADIUS, orbit_camera, project_points


@pytest.mark.parametrize("sigma", [0.0, 0.5, 3.0, 40.0])
def test_composite_of_constant_slab(sigma: float) -> None:
    near, thick, S = 2.2, 1.0, 2000
    depths = torch.linspace(near, near + thick, S).view(1, 1, S)
    colour = torch.tensor([0.3, -0.7, 1.0])
    out, depth, opacity = composite(colour.expand(1, 1, S, 3), torch.full((1, 1, S), sigma), depths)
    expected = 1 - math.exp(-sigma * thick)
    assert opacity.item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(out[0, 0], colour * expected, atol=1e-4, rtol=0)
    # mean depth of absorption; transmitted light counts as the far end
    mean = near + (expected / sigma if sigma else thick)
    assert depth.item() == pytest.approx(mean, abs=1e-3)


def test_composite_of_opaque_wall_hides_samples_behind_it() -> None:
    depths = torch.arange(8.0).view(1, 1, 8)
    densities = torch.tensor([0, 0, 0, 500, 500, 0, 500, 500.0]).view(1, 1, 8)
    colours = torch.where(depths > 4.5, 9.0, 1.0)[..., None]
    out, depth, opacity = composite(colours, densities, depths)
    assert out.item() == pytest.approx(1.0)
    assert opacity.item() == pytest.approx(1.0)
    assert 2 < depth.item() < 4


def test_composite_is_differentiable() -> None:
    generator = torch.Generator().manual_seed(0)
    colours, densities = (torch.rand(1, 2, 5, *c, generator=generator, dtype=torch.float64) for c in ((3,), ()))
    depths = torch.linspace(1, 2, 5, dtype=torch.float64).expand(1, 2, 5)
    inputs = (colours.requires_grad_(), densities.requires_grad_())
    assert torch.autograd.gradcheck(lambda c, d: composite(c, d, depths), inputs)


def test_project_inverts_rays(orbit: Callable[..., Tensor]) -> None:
    camera = orbit(-25, 0, 40, pitch=10)
    origin, directions = camera_rays(camera, 6)
    depth = 2 + torch.rand(3, 36)
    uv, projected_depth = project(origin[:, None] + directions * depth[..., None], camera)
    torch.testing.assert_close(uv, pixel_grid(6).expand(3, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(projected_depth, depth, atol=1e-5, rtol=0)


def test_project_agrees_with_the_camera() -> None:
    camera = orbit_camera(20, -10, 5)
    points = np.random.default_rng(0).uniform(-0.3, 0.3, (20, 3))
    uv, _ = project(torch.from_numpy(points)[None], torch.from_numpy(camera)[None])
    np.testing.assert_allclose(uv[0].numpy(), project_points(camera, points), atol=1e-5)


def test_pixel_grid_is_row_major_from_the_top_left() -> None:
    assert pixel_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_split_camera_with_wrong_shape_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"\(B, 25\), got \(25,\)"):
        split_camera(torch.zeros(25))


def test_coarse_depths_are_bin_midpoints(orbit: Callable[..., Tensor]) -> None:
    camera, S = orbit(0, 30), 4
    depths = sample_coarse_depths(camera, 5, S, jitter=False)
    middles = RADIUS - HALF_EXTENT + (torch.arange(S) + 0.5) / S
    torch.testing.assert_close(depths, middles.expand(2, 5, S))
    jittered = sample_coarse_depths(camera, 5, S, jitter=True)
    assert (jittered != depths).any()
    assert ((jittered - depths).abs() <= 0.5 / S + 1e-6).all()  # each stays in its bin


def test_importance_depths_concentrate_at_the_weights() -> None:
    depths = torch.linspace(0, 1, 33).view(1, 1, 33)
    weights = torch.zeros(1, 1, 32)
    weights[..., 20] = 1.0
    fine = sample_importance_depths(depths, weights, 64, jitter=False)
    assert fine.shape == (1, 1, 64)
    assert ((fine >= depths[0, 0, 20]) & (fine <= depths[0, 0, 21])).float().mean() > 0.9
    assert (fine.diff() >= 0).all()
    assert torch.equal(fine, sample_importance_depths(depths, weights, 64, jitter=False))
    jittered = sample_importance_depths(depths, weights, 64, jitter=True)
    assert jittered.min() >= 0
    assert jittered.max() <= 1


def test_importance_depths_of_equal_weights_are_uniform() -> None:
    depths = torch.linspace(0, 1, 11).view(1, 1, 11)
    fine = sample_importance_depths(depths, torch.ones(1, 1, 10), 18, jitter=False)
    expected = (torch.arange(18) + 0.5) / 18
    torch.testing.assert_close(fine[0, 0], expected, atol=1e-5, rtol=0)


def test_importance_depths_match_the_weight_distribution() -> None:
    """The fraction of fine depths in a bin equals the bin's fraction of the weight."""
    depths = torch.linspace(0, 1, 9).view(1, 1, 9)
    weights = torch.rand(1, 1, 8, generator=torch.Generator().manual_seed(1)) + 0.1
    fine = sample_importance_depths(depths, weights, 20_000, jitter=False)[0, 0]
    fraction = torch.histogram(fine, depths[0, 0]).hist / len(fine)
    inner = weights[0, 0] + 1e-3
    torch.testing.assert_close(fraction, inner / inner.sum(), atol=1e-3, rtol=0)
