"""Tri-plane sampling of coordinate ramps; the decoder's head prior."""

from __future__ import annotations

import pytest
import torch

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.model.triplane import (
    HEAD_AXES,
    HEAD_CENTRE,
    Decoder,
    ellipsoid_level,
    sample_face_field,
    sample_planes,
)

X, Y, Z = range(3)
SIDE = 16
RAMP = (torch.arange(SIDE) + 0.5) / SIDE - 0.5  # coordinates of the cell centres


@pytest.mark.parametrize(("plane", "column", "row"), [(0, X, Y), (1, Y, Z), (2, Z, X)], ids=["xy", "yz", "zx"])
def test_sample_planes_of_ramp_returns_the_coordinate(plane: int, column: int, row: int) -> None:
    planes = torch.zeros(1, 3, 2, SIDE, SIDE)
    planes[0, plane, 0] = RAMP  # along the columns
    planes[0, plane, 1] = RAMP[:, None]  # along the rows
    points = torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0)) * 0.9 - 0.45
    samples = 3 * sample_planes(planes, points)  # the other two planes are zero
    torch.testing.assert_close(samples, points[..., [column, row]], atol=1e-6, rtol=0)


def test_sample_planes_averages_three_planes() -> None:
    planes = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1, 1).expand(1, 3, 4, SIDE, SIDE)
    torch.testing.assert_close(sample_planes(planes, torch.zeros(1, 1, 3)), torch.full((1, 1, 4), 3.0))


def test_sample_planes_outside_the_cube_is_zero() -> None:
    planes = torch.ones(1, 3, 1, SIDE, SIDE)
    points = torch.tensor([[[0.6, 0.6, 0.0], [0.0, -0.6, 0.6], [0.6, 0.0, -0.6], [0.6, 0.0, 0.0]]])
    # outside along one axis: the plane across that axis still covers the point
    torch.testing.assert_close(sample_planes(planes, points)[0, :, 0], torch.tensor([0, 0, 0, 1 / 3]))


def test_sample_planes_keeps_batch_items_apart() -> None:
    planes = torch.rand(2, 3, 4, SIDE, SIDE)
    points = torch.rand(2, 7, 3) - 0.5
    alone = torch.cat([sample_planes(planes[b : b + 1], points[b : b + 1]) for b in range(2)])
    torch.testing.assert_close(sample_planes(planes, points), alone)


def test_head_prior_gives_high_density_inside_the_ellipsoid() -> None:
    centre, axes = torch.tensor(HEAD_CENTRE), torch.tensor(HEAD_AXES)
    points = torch.stack([centre, centre + torch.diag(axes)[1], centre + 2 * torch.diag(axes)[2]])[None]
    torch.testing.assert_close(ellipsoid_level(points), torch.tensor([[1.0, 0.0, -3.0]]), atol=1e-5, rtol=0)
    torch.manual_seed(0)
    decoder = Decoder(PRESETS["tiny"])
    colours, densities = decoder(torch.zeros(1, 3, 16), points)
    assert colours.shape == (1, 3, 8)
    assert colours.abs().max() <= 1.002
    assert densities[0, 0] > 10 > 1 > densities[0, 1] > 5 * densities[0, 2] > 0


def test_face_field_rises_and_moves_at_the_known_surface() -> None:
    surface = torch.tensor([-0.1, 1.0, 1.0, 0.01, 0.02, 0.03]).view(1, 6, 1, 1).repeat(1, 1, 8, 8)
    surface[..., :4] = 0  # surface points on one side only
    points = torch.tensor([[[0.05, 0.0, z] for z in (-0.2, -0.1, 0.0, 0.1, 0.4)]])
    prior, displacement = (x[0] for x in sample_face_field(points, surface))
    assert prior[0] == -4  # in front of the face
    assert prior[1] > 15
    assert (prior[2:4] > 15).all()  # inside the head
    assert prior[4] == -4  # behind the head
    torch.testing.assert_close(displacement[:2], torch.tensor([[0.01, 0.02, 0.03]] * 2), atol=1e-6, rtol=0)
    assert displacement[4].abs().max() < 1e-6
    elsewhere = points * torch.tensor([-1.0, 1, 1])
    prior, displacement = sample_face_field(elsewhere, surface)
    torch.testing.assert_close(prior, (20 * ellipsoid_level(elsewhere)).clamp(-4, 20))
    assert displacement.abs().max() == 0
