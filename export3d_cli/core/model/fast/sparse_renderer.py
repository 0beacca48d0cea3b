"""Sparse volume rendering for inference on a CPU: skips samples that do not change the result.

Rays stop behind opaque samples, empty rays get no fine samples, and colours are decoded only where they contribute. The
contributions left out are below `MIN_TRANSMITTANCE`, `MIN_RAY_OPACITY` and `MIN_SAMPLE_WEIGHT` of a ray. The plain path
is `Export3D.render`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.model.cached_tensors import cached_tensor
from export3d_cli.core.model.volume_renderer import RayOutputs, ray_weights, sample_importance_depths, split_camera

MIN_TRANSMITTANCE = 1e-3  # below this, the rest of a ray's samples are skipped
MIN_RAY_OPACITY = 1e-2  # below this after the coarse samples, a ray gets no fine ones
MIN_SAMPLE_WEIGHT = 4e-3  # of a ray; colours below it are not decoded, the others are rescaled
CHUNK_POINTS = 1 << 14  # points decoded at once, to stay in the CPU's cache
FIRST_PASS_RATIO = 9 / 16  # of the coarse samples are decoded before opaque rays are dropped

DecodeHidden = Callable[[Tensor], tuple[Tensor, Tensor]]  # points (M, 3) -> activations (M, h), densities (M,)
DecodeColours = Callable[[Tensor], Tensor]  # activations (M, h) -> features (M, C')
# Some rays (R',), their depths and densities (R', S'), and the samples' rows (R', S') in the table of activations
RayGroup = tuple[Tensor, Tensor, Tensor, Tensor]


class BilinearTaps(NamedTuple):
    """Bilinear sample positions along several axes."""

    cell: Tensor  # (axes, M) lower cell as fp32; -1 is the padding of `make_feature_table`
    weights: Tensor  # (2, axes, M) of the lower and the upper cell


def bilinear_taps(position: Tensor, size: int, *, border: bool) -> BilinearTaps:
    """Return the taps of positions (axes, M) in [-1, 1] on `size` cells, as `F.grid_sample(align_corners=False)`."""
    cells = (position + 1) * (0.5 * size) - 0.5
    cells = cells.clamp(0, size - 1) if border else cells.clamp(-1, size)
    lower = cells.floor().clamp_max(size - 1)
    fraction = cells - lower
    return BilinearTaps(lower, torch.stack([1 - fraction, fraction]))


def gather_bilinear(table: Tensor, x: BilinearTaps, y: BilinearTaps, size: int) -> Tensor:
    """Sum the bilinear samples of several grids of a feature table: (M, C). Both taps hold one axis per grid."""
    grids, width = len(x.cell), size + 2
    first_rows = tuple(k * width * width + width + 1.0 for k in range(grids))  # row of each grid's first cell
    corner = torch.add(x.cell, y.cell, alpha=width) + cached_tensor(first_rows, table.device)[:, None]
    corner = corner.T.contiguous().int()  # (M, grids)
    neighbours = cached_tensor((0, 1, width, width + 1), table.device, torch.int32)
    index = (corner[..., None] + neighbours).view(-1, 4 * grids)
    weights = (y.weights[:, None] * x.weights).permute(3, 2, 0, 1).reshape(-1, 4 * grids)
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)


def make_feature_table(planes: Tensor, weight: Tensor) -> Tensor:
    """Multiply planes (K, C, P, P) by weight (h, C) before they are sampled: rows (K * (P + 2)^2, h), padded by 0."""
    with torch.autocast(planes.device.type, enabled=False):
        cells = F.pad(planes.float().permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        return cells.reshape(-1, planes.shape[1]) @ weight.float().T


def sample_plane_table(table: Tensor, size: int, points: Tensor) -> Tensor:
    """Sum the bilinear samples of the three planes of one head at points (3, M): (M, h)."""
    columns = bilinear_taps(points * 2, size, border=False)
    rows = BilinearTaps(columns.cell.roll(-1, 0), columns.weights.roll(-1, 1))  # see `triplane.PLANE_AXES`
    return gather_bilinear(table, columns, rows, size)


def sample_view_table(table: Tensor, size: int, points: Tensor, camera: Tensor) -> Tensor:
    """Sample a one-plane table as `source_view.sample_view_plane` does: points (3, M), camera (1, 25) -> (M, h)."""
    cam2world, intrinsics = (x[0] for x in split_camera(camera))
    projection = intrinsics @ cam2world[:3, :3].T  # (3, 3)
    u, v, depth = torch.addmm(-projection @ cam2world[:3, 3:], projection, points).split(1)  # (1, M) each
    depth = depth.clamp_min(1e-3)
    x, y = (bilinear_taps(coordinate / depth * 2 - 1, size, border=True) for coordinate in (u, v))
    return gather_bilinear(table, x, y, size)


def render_rays(decode_hidden: DecodeHidden, decode_colours: DecodeColours, origin: Tensor, directions: Tensor,
                coarse: Tensor, fine_samples: int) -> RayOutputs:  # fmt: skip
    """Render rays of one head, origin (3,), directions (R, 3), depths `coarse` (R, S), as `volume_renderer` does."""
    R, S = coarse.shape
    device = coarse.device
    hidden: list[Tensor] = []  # activations of all samples decoded so far
    count = 0

    def decode(rays: Tensor | slice, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Return densities (R', S') at depths (R', S') of some rays, and the rows of their activations."""
        nonlocal count
        points = origin + directions[rays][:, None] * depths[..., None]  # (R', S', 3)
        chunks = [decode_hidden(chunk) for chunk in points.view(-1, 3).split(CHUNK_POINTS)]
        hidden.extend(x for x, _ in chunks)
        rows = torch.arange(count, count + depths.numel(), device=device).view(depths.shape)
        count += depths.numel()
        return torch.cat([densities for _, densities in chunks]).view(depths.shape), rows

    # The first samples of all rays, then the other ones of the rays that go on
    first = max(2, round(S * FIRST_PASS_RATIO))
    densities, rows = torch.zeros_like(coarse), torch.zeros(R, S, dtype=torch.int64, device=device)
    densities[:, :first], rows[:, :first] = decode(slice(None), coarse[:, :first])
    _, opacity = ray_weights(densities[:, :first], coarse[:, :first])
    open_rays = (opacity < 1 - MIN_TRANSMITTANCE).nonzero()[:, 0]
    if len(open_rays) and first < S:
        densities[open_rays, first:], rows[open_rays, first:] = decode(open_rays, coarse[open_rays, first:])
    weights, opacity = ray_weights(densities, coarse)

    # Importance samples for the rays that meet something
    hits = opacity > MIN_RAY_OPACITY if fine_samples else torch.zeros(R, dtype=torch.bool, device=device)
    hit, miss = hits.nonzero()[:, 0], (~hits).nonzero()[:, 0]
    groups = [(miss, coarse[miss], densities[miss], rows[miss])]
    if len(hit):
        fine = sample_importance_depths(coarse[hit][None], weights[hit][None], fine_samples, jitter=False)[0]
        fine_densities, fine_rows = decode(hit, fine)
        depths, order = torch.sort(torch.cat([coarse[hit], fine], -1), -1)
        hit_densities = torch.cat([densities[hit], fine_densities], -1).gather(-1, order)
        hit_rows = torch.cat([rows[hit], fine_rows], -1).gather(-1, order)
        groups.append((hit, depths, hit_densities, hit_rows))
    return _composite(groups, torch.cat(hidden), decode_colours, R)


def _composite(groups: list[RayGroup], hidden: Tensor, decode_colours: DecodeColours, ray_count: int) -> RayOutputs:
    """Composite groups of samples with activations `hidden` (M, h) into features, depth and opacity of all rays."""
    depth, opacity = (hidden.new_zeros(ray_count, dtype=torch.float32) for _ in range(2))
    visible: list[tuple[Tensor, Tensor, Tensor]] = []  # ray, row and weight of each sample that counts
    for rays, depths, densities, rows in groups:
        weights, opacity[rays] = ray_weights(densities, depths)
        middle = 0.5 * (depths[:, 1:] + depths[:, :-1])
        depth[rays] = (weights * middle).sum(-1) + (1 - opacity[rays]) * depths[:, -1]
        # eq. 9 over intervals (mean colour of both ends), rewritten as a sum over samples
        weights = 0.5 * (F.pad(weights, (1, 0)) + F.pad(weights, (0, 1)))  # (R', S')
        kept = weights * (weights > MIN_SAMPLE_WEIGHT)
        kept = kept * (weights.sum(-1) / kept.sum(-1).clamp_min(MIN_SAMPLE_WEIGHT))[:, None]
        ray, sample = kept.nonzero(as_tuple=True)
        visible.append((rays[ray], rows[ray, sample], kept[ray, sample]))
    features: Tensor | None = None
    for ray, row, weight in zip(*(torch.cat(x).split(CHUNK_POINTS) for x in zip(*visible, strict=True)), strict=True):
        colours = decode_colours(hidden[row]).mul_(weight[:, None])  # (M', C')
        features = colours.new_zeros(ray_count, colours.shape[-1]) if features is None else features
        features.index_add_(0, ray, colours)
    assert features is not None
    return features, depth, opacity
