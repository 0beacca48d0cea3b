"""Sparse volume rendering for inference on a CPU: skips samples that do not change the result.

Rays stop behind opaque samples, empty rays get no fine samples, and colours are decoded only where they contribute. The
contributions left out are below `MIN_TRANSMITTANCE`, `MIN_RAY_OPACITY` and `MIN_SAMPLE_WEIGHT` of a ray. The plain path
is `Export3D.render`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.model import volume_renderer as render
from export3d_cli.core.model.cached_tensors import cached_tensor

MIN_TRANSMITTANCE = 1e-3  # below this, the rest of a ray's samples are skipped
MIN_RAY_OPACITY = 1e-2  # below this after the coarse samples, a ray gets no fine ones
MIN_SAMPLE_WEIGHT = 4e-3  # of a ray; colours below it are not decoded, the others are rescaled
CHUNK_POINTS = 1 << 14  # points decoded at once, to stay in the CPU's cache
FIRST_PASS_RATIO = 9 / 16  # of the coarse samples are decoded before opaque rays are dropped

DecodeHidden = Callable[[Tensor], tuple[Tensor, Tensor]]  # points (M, 3) -> activations (M, h), densities (M,)
RayOutputs = tuple[Tensor, Tensor, Tensor]  # features (R, C'), depth (R,), opacity (R,)
DecodeColours = Callable[[Tensor], Tensor]  # activations (M, h) -> features (M, C')


class BilinearTaps(NamedTuple):
    """Bilinear sample positions along several axes."""

    cell: Tensor  # (axes, M) lower cell as fp32; -1 is the padding of `make_feature_table`
    weights: Tensor  # (2, axes, M) of the lower and the upper cell


def bilinear_taps(position: Tensor, size: int, *, border: bool) -> BilinearTaps:
    """Return the taps of positions (axes, M) in [-1, 1] on `size` cells, as `F.grid_sample(align_corners=False)`."""
    at = (position + 1) * (0.5 * size) - 0.5
    at = at.clamp(0, size - 1) if border else at.clamp(-1, size)
    low = at.floor().clamp_max(size - 1)
    part = at - low
    return BilinearTaps(low, torch.stack([1 - part, part]))


def gather_bilinear(table: Tensor, x: BilinearTaps, y: BilinearTaps, size: int) -> Tensor:
    """Sum the bilinear samples of several grids of a feature table: (M, C). Both taps hold one axis per grid."""
    grids, width = len(x.cell), size + 2
    begin = cached_tensor(
        tuple(k * width * width + width + 1.0 for k in range(grids)), table.device
    )  # row of each grid's first cell
    first = (torch.add(x.cell, y.cell, alpha=width) + begin[:, None]).T.contiguous().int()  # (M, grids)
    near = cached_tensor((0, 1, width, width + 1), table.device, torch.int32)
    index = (first[..., None] + near).view(-1, 4 * grids)
    weights = (y.weights[:, None] * x.weights).permute(3, 2, 0, 1).reshape(-1, 4 * grids)
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)


def make_feature_table(planes: Tensor, weight: Tensor) -> Tensor:
    """Multiply the cells of planes (K, C, P, P) by `weight` (h, C): rows (K * (P + 2)^2, h), fp32, zero-padded planes.

    Sampling is linear, so the linear layer can come before it; planes have fewer cells than there are samples.
    """
    with torch.autocast(planes.device.type, enabled=False):
        cells = F.pad(planes.float().permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        return cells.reshape(-1, planes.shape[1]) @ weight.float().T


def sample_plane_table(table: Tensor, size: int, points: Tensor) -> Tensor:
    """Sum the bilinear samples of the three planes of one head at points (3, M): (M, h)."""
    across = bilinear_taps(points * 2, size, border=False)
    down = BilinearTaps(across.cell.roll(-1, 0), across.weights.roll(-1, 1))  # see `triplane.PLANE_AXES`
    return gather_bilinear(table, across, down, size)


def sample_view_table(table: Tensor, size: int, points: Tensor, camera: Tensor) -> Tensor:
    """Sample a one-plane table as `source_view.sample_view_plane` does: points (3, M), camera (1, 25) -> (M, h)."""
    cam2world, intrinsics = (each[0] for each in render.split_camera(camera))
    seen = intrinsics @ cam2world[:3, :3].T  # (3, 3)
    u, v, depth = torch.addmm(-seen @ cam2world[:3, 3:], seen, points).split(1)  # (1, M) each
    depth = depth.clamp_min(1e-3)
    x, y = (bilinear_taps(each / depth * 2 - 1, size, border=True) for each in (u, v))
    return gather_bilinear(table, x, y, size)


def render_rays(
    decode_hidden: DecodeHidden,
    decode_colours: DecodeColours,
    origin: Tensor,
    directions: Tensor,
    coarse: Tensor,
    fine: int,
) -> RayOutputs:
    """Render the rays of one head.

    Args:
        decode_hidden: maps points to activations and densities.
        decode_colours: maps activations to colour features.
        origin: (3,).
        directions: (R, 3).
        coarse: depths (R, S).
        fine: number of importance samples per ray.

    Returns:
        Features (R, C'), depth (R,) and opacity (R,), as from `volume_renderer.composite`.
    """
    R, S = coarse.shape
    hidden: list[Tensor] = []
    count = 0

    def look(rays: Tensor | slice, depths: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        points = origin + directions[rays][:, None] * depths[..., None]  # (R', S', 3)
        parts = [decode_hidden(part) for part in points.view(-1, 3).split(CHUNK_POINTS)]
        hidden.extend(h for h, _ in parts)
        row = torch.arange(count, count + depths.numel(), device=depths.device).view(depths.shape)
        count += depths.numel()
        return torch.cat([sigma for _, sigma in parts]).view(depths.shape), row

    near = max(2, round(S * FIRST_PASS_RATIO))
    sigma, rows = torch.zeros_like(coarse), torch.zeros(R, S, dtype=torch.int64, device=coarse.device)
    sigma[:, :near], rows[:, :near] = look(slice(None), coarse[:, :near])
    _, stopped = render.ray_weights(sigma[:, :near], coarse[:, :near])
    on = (stopped < 1 - MIN_TRANSMITTANCE).nonzero()[:, 0]
    if len(on) and near < S:
        sigma[on, near:], rows[on, near:] = look(on, coarse[on, near:])
    weights, opacity = render.ray_weights(sigma, coarse)
    parts = [torch.arange(R, device=coarse.device)] * 2
    if fine:
        parts = [(opacity > MIN_RAY_OPACITY).nonzero()[:, 0], (opacity <= MIN_RAY_OPACITY).nonzero()[:, 0]]
    groups: list[tuple[Tensor, Tensor, Tensor, Tensor]] = [
        (parts[1], coarse[parts[1]], sigma[parts[1]], rows[parts[1]])
    ]
    if fine and len(parts[0]):
        some = parts[0]
        more = render.sample_importance_depths(coarse[some][None], weights[some][None], fine, jitter=False)[0]
        more_sigma, more_rows = look(some, more)
        depths, order = torch.sort(torch.cat([coarse[some], more], -1), -1)
        densities = torch.cat([sigma[some], more_sigma], -1).gather(-1, order)
        groups.append((some, depths, densities, torch.cat([rows[some], more_rows], -1).gather(-1, order)))
    return _composite(groups, torch.cat(hidden), decode_colours, R)


def _composite(
    groups: list[tuple[Tensor, Tensor, Tensor, Tensor]], hidden: Tensor, paint: DecodeColours, count: int
) -> RayOutputs:
    """Composite groups of (rays, depths, densities, rows of `hidden`) into features, depth and opacity of all rays."""
    depth, opacity = (hidden.new_zeros(count, dtype=torch.float32) for _ in range(2))
    chosen_rays, chosen_rows, chosen_shares = [], [], []
    for rays, depths, sigma, rows in groups:
        weights, opacity[rays] = render.ray_weights(sigma, depths)
        middle = 0.5 * (depths[:, 1:] + depths[:, :-1])
        depth[rays] = (weights * middle).sum(-1) + (1 - opacity[rays]) * depths[:, -1]
        # eq. 9 over intervals (mean colour of both ends), rewritten as a sum over samples
        share = 0.5 * (F.pad(weights, (1, 0)) + F.pad(weights, (0, 1)))  # (R', S')
        kept = share * (share > MIN_SAMPLE_WEIGHT)
        kept = kept * (share.sum(-1) / kept.sum(-1).clamp_min(MIN_SAMPLE_WEIGHT))[:, None]
        where = kept.nonzero(as_tuple=True)
        chosen_rays.append(rays[where[0]])
        chosen_rows.append(rows[where])
        chosen_shares.append(kept[where])
    chosen = zip(*(torch.cat(c).split(CHUNK_POINTS) for c in (chosen_rays, chosen_rows, chosen_shares)), strict=True)
    out: Tensor | None = None
    for rays, rows, shares in chosen:
        colours = paint(hidden[rows]).mul_(shares[:, None])
        out = colours.new_zeros(count, colours.shape[-1]) if out is None else out
        out.index_add_(0, rays, colours)
    assert out is not None
    return out, depth, opacity
