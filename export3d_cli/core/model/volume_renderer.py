"""Rays, sample depths, compositing and projection: pure functions (sec. 3.3, eq. 9 and 10).

Points are in the head frame (see `export3d_cli.core.runtime.camera`). Image positions are in image sizes, with (0, 0)
at the top left corner. Everything is computed in fp32, also under autocast.
"""

from collections.abc import Callable

import torch
from torch import Tensor

HALF_EXTENT = 0.5  # the volume is the cube of side 1 at the origin; rays are sampled this far around the head centre


def split_camera(camera: Tensor) -> tuple[Tensor, Tensor]:
    """Split cameras (B, 25) into cam2world (B, 4, 4) and intrinsics (B, 3, 3)."""
    if camera.ndim != 2 or camera.shape[1] != 25:
        raise ValueError(f"camera must be (B, 25), got {tuple(camera.shape)}")
    camera = camera.float()
    return camera[:, :16].view(-1, 4, 4), camera[:, 16:].view(-1, 3, 3)


def pixel_grid(size: int, device: torch.device | None = None) -> Tensor:
    """Return the pixel centres of a square image as (x, y) in image sizes, row by row: (size * size, 2)."""
    centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def camera_rays(camera: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return ray origins (B, 3) and directions (B, R, 3) through the pixel centres; R = size * size, camera depth 1."""
    cam2world, intrinsics = split_camera(camera)
    grid = pixel_grid(size, camera.device)  # (R, 2)
    focal = torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], dim=-1)  # (B, 2)
    xy = (grid[None] - intrinsics[:, None, :2, 2]) / focal[:, None]  # (B, R, 2)
    local = torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)  # (B, R, 3)
    directions = (cam2world[:, None, :3, :3] * local[:, :, None, :]).sum(-1)
    return cam2world[:, :3, 3], directions


def project(points: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
    """Project points (B, N, 3) to image positions (B, N, 2) in image sizes and camera depths (B, N)."""
    cam2world, intrinsics = split_camera(camera)
    offset = points.float() - cam2world[:, None, :3, 3]  # (B, N, 3)
    local = (offset[..., None] * cam2world[:, None, :3, :3]).sum(-2)  # R^T (x - t), without matmul to stay in fp32
    depth = local[..., 2].clamp_min(1e-3)
    focal = torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], dim=-1)
    uv = local[..., :2] / depth[..., None] * focal[:, None] + intrinsics[:, None, :2, 2]
    return uv, depth


BatchRows = tuple[int, int, int]  # (first, end, total): the rows of a larger batch
RayOutputs = tuple[Tensor, Tensor, Tensor]  # features (B, R, C), depth (B, R) and opacity (B, R) in [0, 1]


def uniform_noise(like: Tensor, batch_rows: BatchRows | None) -> Tensor:
    """Return uniform noise in [0, 1) of the shape of `like`.

    With `batch_rows`, draw the noise of the whole batch and return these rows of it, so that a batch that is split
    over devices or accumulation steps gets the same noise.
    """
    if batch_rows is None:
        return torch.rand_like(like)
    first, end, total = batch_rows
    return torch.rand(total, *like.shape[1:], device=like.device, dtype=like.dtype)[first:end]


def sample_coarse_depths(camera: Tensor, ray_count: int, samples: int, *, jitter: bool,
                         batch_rows: BatchRows | None = None) -> Tensor:  # fmt: skip
    """Return camera depths (B, R, S) in equal bins around the head centre: mid-points, or jittered per bin."""
    cam2world, _ = split_camera(camera)
    distance = cam2world[:, :3, 3].norm(dim=-1).clamp_min(HALF_EXTENT + 0.1)  # (B,)
    edges = torch.arange(samples, device=camera.device, dtype=torch.float32)
    edges = edges.expand(camera.shape[0], ray_count, samples)
    bins = edges + (uniform_noise(edges, batch_rows) if jitter else 0.5)
    return (distance - HALF_EXTENT)[:, None, None] + bins / samples * (2 * HALF_EXTENT)


def sample_importance_depths(depths: Tensor, weights: Tensor, samples: int, *, jitter: bool,
                             batch_rows: BatchRows | None = None) -> Tensor:  # fmt: skip
    """Sample depths (B, R, samples) by the CDF of weights (B, R, S-1): mid-points, or with `jitter` random ones."""
    density = weights + 1e-3
    cdf = torch.cumsum(density / density.sum(-1, keepdim=True), dim=-1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], dim=-1)  # (B, R, S)
    edges = torch.arange(samples, device=depths.device, dtype=torch.float32).expand(*depths.shape[:2], samples)
    u = (edges + (uniform_noise(edges, batch_rows) if jitter else 0.5)) / samples
    above = torch.searchsorted(cdf.contiguous(), u.contiguous(), right=True).clamp(1, cdf.shape[-1] - 1)
    below = above - 1
    c0, c1 = cdf.gather(-1, below), cdf.gather(-1, above)
    d0, d1 = depths.gather(-1, below), depths.gather(-1, above)
    fraction = (u - c0) / (c1 - c0).clamp_min(1e-6)
    return d0 + fraction.clamp(0, 1) * (d1 - d0)


def ray_weights(densities: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
    """Return interval weights (B, R, S-1) between samples and ray opacities (B, R) (eq. 10, mid-point rule)."""
    sigma = 0.5 * (densities[..., 1:] + densities[..., :-1])
    optical = sigma * (depths[..., 1:] - depths[..., :-1])
    after = torch.exp(-torch.cumsum(optical, dim=-1))  # transmittance at each interval's end
    before = torch.cat([torch.ones_like(after[..., :1]), after[..., :-1]], dim=-1)
    return before - after, 1 - after[..., -1]


def composite(features: Tensor, densities: Tensor, depths: Tensor) -> RayOutputs:
    """Composite (B, R, S, C) by densities (B, R, S) at ascending depths (eq. 9); transparency counts as the far end."""
    weights, opacity = ray_weights(densities, depths)
    middle = 0.5 * (features[..., 1:, :] + features[..., :-1, :])
    out = (weights[..., None] * middle).sum(-2)  # (B, R, C)
    middle_depth = 0.5 * (depths[..., 1:] + depths[..., :-1])
    depth = (weights * middle_depth).sum(-1) + (1 - opacity) * depths[..., -1]
    return out, depth, opacity


def render_rays(decode: Callable[[Tensor], tuple[Tensor, Tensor]], coarse: Tensor, fine_samples: int, *,
                jitter: bool = False, batch_rows: BatchRows | None = None) -> RayOutputs:  # fmt: skip
    """Render rays with ascending depths `coarse` (B, R, S) and `fine_samples` importance samples each.

    `decode` maps depths (B, R, S) to features (B, R, S, C) and densities (B, R, S).
    """
    depths = coarse
    features, densities = decode(depths)
    if fine_samples:
        with torch.no_grad():
            weights, _ = ray_weights(densities, depths)
            fine = sample_importance_depths(depths, weights, fine_samples, jitter=jitter, batch_rows=batch_rows)
        fine_features, fine_densities = decode(fine)
        depths, order = torch.sort(torch.cat([depths, fine], dim=-1), dim=-1)
        densities = torch.cat([densities, fine_densities], dim=-1).gather(-1, order)
        features = torch.cat([features, fine_features], dim=-2)
        features = features.gather(-2, order[..., None].expand_as(features))
    return composite(features, densities, depths)
