"""Inference paths (sparse rendering, fused convolutions) against the plain path."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.model import volume_renderer
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.fast import sparse_renderer
from export3d_cli.core.model.generator import attention
from export3d_cli.core.model.source_view import sample_view_plane
from export3d_cli.core.model.triplane import sample_planes


def psnr(a: Tensor, b: Tensor, span: float = 2.0) -> float:
    return -10 * math.log10(max(((a - b).float() / span).square().mean().item(), 1e-12))


def test_feature_table_samples_equal_sampling_then_linear_layer(orbit: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    planes, points = torch.randn(1, 3, 5, 8, 8), torch.rand(1, 400, 3) * 1.4 - 0.7  # some outside the cube
    weight, flat = torch.randn(6, 5), points[0].T.contiguous()
    samples = sparse_renderer.sample_plane_table(sparse_renderer.make_feature_table(planes[0], weight / 3), 8, flat)
    torch.testing.assert_close(samples, sample_planes(planes, points)[0] @ weight.T, atol=1e-5, rtol=0)
    view, camera = torch.randn(1, 5, 8, 8), orbit(10)
    samples = sparse_renderer.sample_view_table(sparse_renderer.make_feature_table(view, weight), 8, flat, camera)
    torch.testing.assert_close(samples, sample_view_plane(view, points, camera)[0] @ weight.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("density_scale", [1.0, 30.0])
def test_sparse_render_matches_plain_render(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor], density_scale: float
) -> None:
    """Fog and a solid head: 45 dB in colour, opacity and depth."""
    torch.manual_seed(2)
    image, beta, camera = torch.rand(1, 3, 64, 64) * 2 - 1, torch.rand(1, 64), orbit(-25, 30)
    with torch.no_grad():
        source = tiny.encode_source(image, beta, orbit(5), points).expand(2)
        posed = tiny.pose_head(source, source.lam)
        posed = replace(posed, planes=posed.planes * density_scale)
        sparse = tiny.drive(source, source.lam, camera, posed=posed, raw_size=32, samples=(8, 8))
    plain = tiny.drive(source, source.lam, camera, posed=posed, raw_size=32, samples=(8, 8))
    assert plain.image.requires_grad and not sparse.image.requires_grad
    for name, span in (("image", 2.0), ("raw", 2.0), ("opacity", 1.0), ("depth", 1.0)):
        assert psnr(getattr(sparse, name), getattr(plain, name), span) > 45, name
    assert plain.raw.std() > 0.02


def test_render_rays_skips_invisible_samples() -> None:
    """Half of the rays hit a wall behind the first samples, the others nothing."""
    counts: list[int] = []
    directions = torch.tensor([[0.0, 0.0, 1.0]]).repeat(8, 1)
    directions[4:, 0] = 1.0
    depths = torch.linspace(0.1, 1, 16).expand(8, 16)

    def decode(points: Tensor) -> tuple[Tensor, Tensor]:
        counts.append(len(points))
        wall = (points[:, 0] < 0.05) & (points[:, 2] > 0.4)
        return points, torch.where(wall, 500.0, 0.0)

    def paint(hidden: Tensor) -> Tensor:
        counts.append(-len(hidden))
        return hidden.new_ones(len(hidden), 2) * 0.5

    colours, depth, opacity = sparse_renderer.render_rays(decode, paint, torch.zeros(3), directions, depths, 16)
    assert counts[:3] == [8 * 9, 4 * 7, 4 * 16]  # first pass, second pass of open rays, fine samples of hits
    assert 0 < -counts[3] <= 4 * 16
    torch.testing.assert_close(colours, torch.tensor([0.5] * 4 + [0.0] * 4)[:, None].expand(-1, 2))
    torch.testing.assert_close(opacity, torch.tensor([1.0] * 4 + [0.0] * 4))
    assert (depth[:4] - 0.4).abs().max() < 0.06 and (depth[4:] == 1).all()


@pytest.mark.parametrize("fine", [0, 4])
def test_render_rays_matches_composite(fine: int) -> None:
    torch.manual_seed(0)
    field = torch.rand(3, 3)

    def decode(points: Tensor) -> tuple[Tensor, Tensor]:
        return points, 4 * (points @ field[:, :1]).sin().square()[:, 0]

    def paint(hidden: Tensor) -> Tensor:
        return (hidden @ field).sin()

    directions, depths = torch.rand(40, 3) + 0.5, torch.linspace(0.2, 2, 12).expand(40, 12)
    sparse = sparse_renderer.render_rays(decode, paint, torch.zeros(3), directions, depths, fine)

    def decode_samples(depths: Tensor) -> tuple[Tensor, Tensor]:
        points = directions[:, None] * depths[0, ..., None]
        _, densities = decode(points.view(-1, 3))
        return paint(points)[None], densities.view(depths.shape)

    plain = volume_renderer.render_rays(decode_samples, depths[None], fine)
    for a, b in zip(sparse, plain, strict=True):
        assert psnr(a, b[0], 1.0) > 45


def test_attention_in_bfloat16_matches_float32() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 64, 24).bfloat16()
    with torch.no_grad():
        assert psnr(attention(q, k, v), F.scaled_dot_product_attention(q.float(), k.float(), v.float())) > 45
