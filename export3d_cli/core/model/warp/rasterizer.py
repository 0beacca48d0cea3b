"""Triangle rasteriser in plain PyTorch: the nearest triangle at each pixel, and vertex values interpolated over it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.model.volume_renderer import pixel_grid

SIZE_GROUPS = 6  # groups of triangles of similar size


class Raster(NamedTuple):
    """The triangle that covers each pixel; P = size * size, row by row."""

    triangle: Tensor  # (B, P) int64, -1 where there is none
    barycentric: Tensor  # (B, P, 3)


class RasterWindows:
    """Window widths on which `rasterize` tests the triangles of each size group: the width of the largest triangle.

    After `fixed` is set, the widths are the largest ever needed plus a quarter, and larger triangles are cut off: a
    CUDA graph cannot read the extents back.
    """

    def __init__(self) -> None:
        self.max_widths: dict[int, list[int]] = {}  # by image size
        self.fixed = False

    def __call__(self, extents: Tensor, size: int) -> list[int]:
        """Return the window widths for the groups' largest extents, in pixels."""
        previous = self.max_widths.get(size, [0] * len(extents))
        if self.fixed:
            return [min(round(w * 1.25) + 2, size + 1) for w in previous]
        widths = [int(x) + 1 for x in extents.tolist()]  # one transfer for all groups: it synchronises with the GPU
        self.max_widths[size] = [max(pair) for pair in zip(previous, widths, strict=True)]
        return widths


def rasterize(uv: Tensor, depth: Tensor, triangles: Tensor, size: int, windows: RasterWindows | None = None) -> Raster:
    """Find the nearest front-facing triangle at each pixel centre, batched, without a loop over triangles.

    Triangles (T, 3) of vertices at `uv` (B, V, 2), in image sizes, and `depth` (B, V) of similar size are tested
    together, each on a window as wide as the largest one needs; a scatter keeps the nearest.
    """
    B, T = uv.shape[0], triangles.shape[0]
    pixel = uv.float() * size - 0.5  # integers are pixel centres
    corner = pixel[:, triangles]  # (B, T, 3, 2)
    low = corner.amin(2).ceil()  # first pixel centre inside the bounding box
    extent = (corner.amax(2) - low).amax((0, 2)).clamp(0, size)  # (T,)
    sorted_extent, by_size = extent.sort()
    groups = [group for group in by_size.tensor_split(SIZE_GROUPS) if len(group)]
    largest = torch.stack([group[-1] for group in sorted_extent.tensor_split(SIZE_GROUPS) if len(group)])
    windows = windows or RasterWindows()
    sparse, candidates = uv.device.type == "cpu" and not windows.fixed, []
    for group, window in zip(groups, windows(largest, size), strict=True):
        group_depth = depth.float()[:, triangles[group]]
        candidates.append(_rasterize_group(corner[:, group], group_depth, low[:, group], group, window, size, sparse))
    z, pixel_index, number = (torch.cat(parts) for parts in zip(*candidates, strict=True))
    nearest = torch.full((B * size * size,), torch.inf, device=uv.device).scatter_reduce(0, pixel_index, z, "amin")
    is_nearest = (z < torch.inf) & (z <= nearest[pixel_index])
    index = torch.full(nearest.shape, -1, dtype=torch.int64, device=uv.device)
    index = index.scatter_reduce(0, pixel_index, torch.where(is_nearest, number, -1), "amax").view(B, -1)
    covering = gather_rows(corner.view(B, T, 6), index).view(B, -1, 3, 2)
    return Raster(index, _barycentric(covering, pixel_grid(size, uv.device) * size - 0.5))


def _rasterize_group(corner: Tensor, depth: Tensor, low: Tensor, numbers: Tensor, window: int, size: int,
                     sparse: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Test triangles (B, T, 3, 2) with depths (B, T, 3) and numbers (T,) on windows that start at `low` (B, T, 2).

    Returns, for the N cells of all windows, z (inf outside the triangle), the index of the pixel among B * size * size,
    and the triangle's number, (N,) each. `sparse` drops cells outside, which on a GPU would need a synchronisation.
    """
    step = torch.arange(window, device=corner.device, dtype=torch.float32)
    x, y = low[..., :1, None] + step, low[..., 1:, None] + step[:, None]  # (B, T, 1, w), (B, T, w, 1)
    # barycentric coordinates are linear in x and y: one product for each instead of many passes over the windows
    (a, b, c), (za, zb, zc) = corner.unbind(2), depth.unbind(2)
    area = cross_2d(b - a, c - a)
    safe_area = torch.where(area.abs() < 1e-12, 1e-12, area)
    ac, ab = c - a, b - a
    dx, dy = x - a[..., :1, None], y - a[..., 1:, None]
    wb = dx * (ac[..., 1] / safe_area)[..., None, None] - dy * (ac[..., 0] / safe_area)[..., None, None]
    wc = dy * (ab[..., 0] / safe_area)[..., None, None] - dx * (ab[..., 1] / safe_area)[..., None, None]
    inside = (torch.minimum(torch.minimum(wb, wc), 1 - wb - wc) >= -1e-4) & (area > 1e-8)[..., None, None]
    inside = inside & ((x >= 0) & (x < size)) & ((y >= 0) & (y < size))  # (B, T, w, w)
    if sparse:
        cell = inside.flatten().nonzero()[:, 0]
        triangle = cell.div(window * window, rounding_mode="floor")  # of B * T
        place = cell - triangle * (window * window)
        row = place.div(window, rounding_mode="floor")
        column = place - row * window
        z, zb, zc = (value.flatten()[triangle] for value in (za, zb - za, zc - za))
        z = z + wb.flatten()[cell] * zb + wc.flatten()[cell] * zc
        first = torch.arange(len(low), device=low.device)[:, None] * size * size + low[..., 1].long() * size
        first = (first + low[..., 0].long()).flatten()[triangle]
        return z, first + row * size + column, numbers.expand(len(low), -1).flatten()[triangle]
    z = za[..., None, None] + wb * (zb - za)[..., None, None] + wc * (zc - za)[..., None, None]
    x, y = (coordinate.clamp(0, size - 1).long() for coordinate in (x, y))
    pixel_index = (torch.arange(len(z), device=z.device)[:, None, None, None] * size + y) * size + x
    number = numbers[:, None, None].expand_as(z)
    return torch.where(inside, z, torch.inf).flatten(), pixel_index.flatten(), number.flatten()


def _barycentric(corner: Tensor, position: Tensor) -> Tensor:
    """Return the barycentric coordinates (..., 3) of positions (..., 2) in triangles (..., 3, 2)."""
    a, b, c = corner.unbind(-2)
    area = cross_2d(b - a, c - a)
    safe_area = torch.where(area.abs() < 1e-12, 1e-12, area)
    wb, wc = cross_2d(position - a, c - a) / safe_area, cross_2d(b - a, position - a) / safe_area
    return torch.stack([1 - wb - wc, wb, wc], dim=-1)


def cross_2d(a: Tensor, b: Tensor) -> Tensor:
    """Return the signed area (...) of the parallelogram of vectors (..., 2)."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Gather rows (B, T, K) by index (B, P) -> (B, P, K); index -1 gives an arbitrary row."""
    B, T, K = rows.shape
    first = torch.arange(B, device=rows.device)[:, None] * T
    return rows.reshape(B * T, K)[index.clamp_min(0) + first]  # copying whole rows: several times as fast as `gather`


def interpolate_vertices(raster: Raster, vertex: Tensor, triangles: Tensor) -> Tensor:
    """Interpolate vertex values (B, V, K) over the triangles (T, 3) -> (B, P, K), 0 where there is none."""
    return interpolate_corners(raster, vertex[:, triangles].flatten(2)) * (raster.triangle >= 0)[..., None]


def interpolate_corners(raster: Raster, corners: Tensor) -> Tensor:
    """Interpolate values of triangle corners (B, T, 3 * K) -> (B, P, K), arbitrary where there is no triangle."""
    B, T, _ = corners.shape
    first = torch.arange(B, device=corners.device)[:, None] * T
    rows = 3 * (raster.triangle.clamp_min(0) + first)[..., None] + torch.arange(3, device=corners.device)  # (B, P, 3)
    table, weights = corners.reshape(B * T * 3, -1), raster.barycentric.reshape(-1, 3)
    # one pass; on a CPU 20 times as fast as gathering the corners and summing them
    return F.embedding_bag(rows.view(-1, 3), table, mode="sum", per_sample_weights=weights).view(*rows.shape[:2], -1)
