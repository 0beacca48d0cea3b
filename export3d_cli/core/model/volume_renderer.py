"""Rays, depths, compositing and projection: pure functions (sec. 3.3, eq. 9 and 10).

Everything is in the head frame (see `export3d_cli.core.runtime.camera`); image positions are in image sizes, (0, 0) the top
left corner. Always computed in fp32, whatever autocast says.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_EXTENT = 0.5  # the volume is the cube of side 1 at the origin: rays look this far around the head centre


def split_camera(camera: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 25) -> cam2world (B, 4, 4), intrinsics (B, 3, 3)."""
    if camera.ndim != 2 or camera.shape[1] != 25:
        raise ValueError(f"camera must be (B, 25), got {tuple(camera.shape)}")
    camera = camera.float()
    return camera[:, :16].view(-1, 4, 4), camera[:, 16:].view(-1, 3, 3)


def pixel_grid(size: int, device: torch.device | None = None) -> Tensor:
    """Pixel centres of a square image, (size * size, 2) as (x, y) in image sizes, row by row."""
    centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def camera_rays(camera: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Origins (B, 3) and directions (B, R, 3) through the pixel centres, R = size * size, scaled to camera depth 1."""
    cam2world, intrinsics = split_camera(camera)
    grid = pixel_grid(size, camera.device)  # (R, 2)
    focal = torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], dim=-1)  # (B, 2)
    xy = (grid[None] - intrinsics[:, None, :2, 2]) / focal[:, None]  # (B, R, 2)
    local = torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)  # (B, R, 3)
    directions = (cam2world[:, None, :3, :3] * local[:, :, None, :]).sum(-1)
    return cam2world[:, :3, 3], directions


def project(points: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
    """Points (B, N, 3) -> positions (B, N, 2) in image sizes and camera depths (B, N)."""
    cam2world, intrinsics = split_camera(camera)
    offset = points.float() - cam2world[:, None, :3, 3]  # (B, N, 3)
    local = (offset[..., None] * cam2world[:, None, :3, :3]).sum(-2)  # R^T (x - t), without matmul: stays fp32
    depth = local[..., 2].clamp_min(1e-3)
    focal = torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], dim=-1)
    uv = local[..., :2] / depth[..., None] * focal[:, None] + intrinsics[:, None, :2, 2]
    return uv, depth


BatchRows = tuple[int, int, int]  # (first, end, all): which rows of a larger batch these are


def uniform_noise(like: Tensor, batch_rows: BatchRows | None) -> Tensor:
    """Random numbers in [0, 1); with `rows` the same that the whole batch would get."""
    if batch_rows is None:
        return torch.rand_like(like)
    first, end, all_rows = batch_rows
    return torch.rand(all_rows, *like.shape[1:], device=like.device, dtype=like.dtype)[first:end]


def sample_coarse_depths(
    camera: Tensor, ray_count: int, samples: int, *, jitter: bool, batch_rows: BatchRows | None = None
) -> Tensor:
    """Camera depths (B, R, S) in equal bins around the head centre: mid-points, or in training a random one a bin."""
    cam2world, _ = split_camera(camera)
    distance = cam2world[:, :3, 3].norm(dim=-1).clamp_min(HALF_EXTENT + 0.1)  # (B,)
    edges = torch.arange(samples, device=camera.device, dtype=torch.float32)
    where = edges.expand(camera.shape[0], ray_count, samples)
    where = where + (uniform_noise(where, batch_rows) if jitter else 0.5)
    return (distance - HALF_EXTENT)[:, None, None] + where / samples * (2 * HALF_EXTENT)


def sample_importance_depths(
    depths: Tensor, weights: Tensor, samples: int, *, jitter: bool, batch_rows: BatchRows | None = None
) -> Tensor:
    """More depths (B, R, samples) where the weights of the intervals between depths (B, R, S) are.

    `weights` is (B, R, S-1), as `ray_weights` gives it; its distribution is inverted.
    """
    density = weights + 1e-3
    cdf = torch.cumsum(density / density.sum(-1, keepdim=True), dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], dim=-1)  # (B, R, S)
    where = torch.arange(samples, device=depths.device, dtype=torch.float32).expand(*depths.shape[:2], samples)
    u = (where + (uniform_noise(where, batch_rows) if jitter else 0.5)) / samples
    above = torch.searchsorted(cdf.contiguous(), u.contiguous(), right=True).clamp(1, cdf.shape[-1] - 1)
    below = above - 1
    c0, c1 = cdf.gather(-1, below), cdf.gather(-1, above)
    d0, d1 = depths.gather(-1, below), depths.gather(-1, above)
    part = (u - c0) / (c1 - c0).clamp_min(1e-6)
    return d0 + part.clamp(0, 1) * (d1 - d0)


def ray_weights(densities: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, R, S-1) of the intervals between samples and their opacity (B, R) (eq. 10, mid-point rule)."""
    sigma = 0.5 * (densities[..., 1:] + densities[..., :-1])
    optical = sigma * (depths[..., 1:] - depths[..., :-1])
    through = torch.exp(-torch.cumsum(optical, dim=-1))  # what passes each interval's end
    before = torch.cat([torch.ones_like(through[..., :1]), through[..., :-1]], dim=-1)
    return before - through, 1 - through[..., -1]


def composite(features: Tensor, densities: Tensor, depths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Volume rendering (eq. 9) of sorted samples.

    Args:
        features: (B, R, S, C). densities: (B, R, S), not negative. depths: (B, R, S), ascending.

    Returns:
        Composite (B, R, C), expected depth (B, R) over what is opaque, opacity (B, R) in [0, 1].
    """
    weights, opacity = ray_weights(densities, depths)
    middle = 0.5 * (features[..., 1:, :] + features[..., :-1, :])
    out = (weights[..., None] * middle).sum(-2)
    middle_depth = 0.5 * (depths[..., 1:] + depths[..., :-1])
    far = depths[..., -1]
    depth = (weights * middle_depth).sum(-1) + (1 - opacity) * far
    return out, depth, opacity
