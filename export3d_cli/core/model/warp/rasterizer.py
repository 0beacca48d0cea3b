"""Triangles as a picture: which one covers each pixel, and values of their corners blended over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from export3d_cli.core.model.volume_renderer import pixel_grid

SIZE_GROUPS = 6  # groups of triangles of like size


class Raster(NamedTuple):
    """Which triangle covers each pixel; P = size * size, row by row."""

    triangle: Tensor  # (B, P) int64, -1 where none does
    barycentric: Tensor  # (B, P, 3) barycentric coordinates


class RasterWindows:
    """How wide the windows are on which `rasterize` tests triangles of like size: as wide as the largest one needs.

    Once they are `fixed`, as wide as they ever were, and some more; what is larger still is cut off there. A CUDA graph
    cannot ask what it needs.
    """

    def __init__(self) -> None:
        self.max_widths: dict[int, list[int]] = {}  # by the size of the picture
        self.fixed = False

    def __call__(self, largest: Tensor, size: int) -> list[int]:
        """The largest extents of each group, pixels -> their windows."""
        before = self.max_widths.get(size, [0] * len(largest))
        if self.fixed:
            return [min(round(w * 1.25) + 2, size + 1) for w in before]
        found = [int(x) + 1 for x in largest.tolist()]  # asked at once: a GPU is waited for
        self.max_widths[size] = [max(pair) for pair in zip(before, found, strict=True)]
        return found


def rasterize(uv: Tensor, depth: Tensor, triangles: Tensor, size: int, windows: RasterWindows | None = None) -> Raster:
    """Nearest front-facing triangle at each pixel centre, batched, no loop over triangles.

    Triangles of like size are tested together, on a window as large as the largest one needs; a scatter keeps the
    nearest.

    Args:
        uv: (B, V, 2) positions in image sizes. depth: (B, V). triangles: (T, 3) int64. size: pixels a side.
        windows: how wide they are; None: as wide as needed.
    """
    B, T = uv.shape[0], triangles.shape[0]
    pixel = uv.float() * size - 0.5  # integers are pixel centres
    corner = pixel[:, triangles]  # (B, T, 3, 2)
    low = corner.amin(2).ceil()  # first pixel centre inside the bounding box
    reach = (corner.amax(2) - low).amax((0, 2)).clamp(0, size)  # (T,)
    extent, by_size = reach.sort()
    parts = [part for part in by_size.tensor_split(SIZE_GROUPS) if len(part)]
    largest = torch.stack([part[-1] for part in extent.tensor_split(SIZE_GROUPS) if len(part)])
    windows = windows or RasterWindows()
    few, found = uv.device.type == "cpu" and not windows.fixed, []
    for part, window in zip(parts, windows(largest, size), strict=True):
        found.append(
            _rasterize_group(corner[:, part], depth.float()[:, triangles[part]], low[:, part], part, window, size, few)
        )
    height, at, number = (torch.cat(each) for each in zip(*found, strict=True))
    nearest = torch.full((B * size * size,), torch.inf, device=uv.device).scatter_reduce(0, at, height, "amin")
    wins = (height < torch.inf) & (height <= nearest[at])
    index = torch.full(nearest.shape, -1, dtype=torch.int64, device=uv.device)
    index = index.scatter_reduce(0, at, torch.where(wins, number, -1), "amax").view(B, -1)
    mine = gather_rows(corner.view(B, T, 6), index).view(B, -1, 3, 2)
    bary, _ = _barycentric(mine, pixel_grid(size, uv.device) * size - 0.5)
    return Raster(index, bary)


def _rasterize_group(
    corner: Tensor, depth: Tensor, low: Tensor, numbers: Tensor, window: int, size: int, sparse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Triangles (B, T, 3, 2), (B, T, 3), numbered (T,), on windows from `low` (B, T, 2).

    Returns z, inf outside, of cells of the windows, which cells they are among B * size * size, and the triangles'
    numbers: (N,) each. `few` leaves out cells outside, which a GPU would have to be waited for.
    """
    step = torch.arange(window, device=corner.device, dtype=torch.float32)
    x, y = low[..., :1, None] + step, low[..., 1:, None] + step[:, None]  # (B, T, 1, w), (B, T, w, 1)
    # barycentric coordinates are linear in x and y: one product for each instead of many passes over the windows
    (a, b, c), (za, zb, zc) = corner.unbind(2), depth.unbind(2)
    area = cross_2d(b - a, c - a)
    safe = torch.where(area.abs() < 1e-12, 1e-12, area)
    ub, uc = c - a, b - a
    dx, dy = x - a[..., :1, None], y - a[..., 1:, None]
    wb = dx * (ub[..., 1] / safe)[..., None, None] - dy * (ub[..., 0] / safe)[..., None, None]
    wc = dy * (uc[..., 0] / safe)[..., None, None] - dx * (uc[..., 1] / safe)[..., None, None]
    inside = (torch.minimum(torch.minimum(wb, wc), 1 - wb - wc) >= -1e-4) & (area > 1e-8)[..., None, None]
    inside = inside & ((x >= 0) & (x < size)) & ((y >= 0) & (y < size))  # (B, T, w, w)
    z = za[..., None, None] + wb * (zb - za)[..., None, None] + wc * (zc - za)[..., None, None]
    if sparse:
        b, t, row, column = inside.nonzero(as_tuple=True)
        first = low.long()[b, t]  # (N, 2)
        at = (b * size + first[:, 1] + row) * size + first[:, 0] + column
        return z[inside], at, numbers[t]
    x, y = (each.clamp(0, size - 1).long() for each in (x, y))
    at = (torch.arange(len(z), device=z.device)[:, None, None, None] * size + y) * size + x
    each = numbers[:, None, None].expand_as(z)
    return torch.where(inside, z, torch.inf).flatten(), at.flatten(), each.flatten()


def _barycentric(corner: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Triangles (..., 3, 2), points (..., 2) -> barycentric coordinates (..., 3) and twice the signed area."""
    a, b, c = corner.unbind(-2)
    area = cross_2d(b - a, c - a)
    safe = torch.where(area.abs() < 1e-12, 1e-12, area)
    wb, wc = cross_2d(at - a, c - a) / safe, cross_2d(b - a, at - a) / safe
    return torch.stack([1 - wb - wc, wb, wc], dim=-1), area


def cross_2d(a: Tensor, b: Tensor) -> Tensor:
    """Twice the signed area that vectors (..., 2) span, (...)."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (B, T, K), index (B, P) with -1 for none -> (B, P, K)."""
    B, T, K = rows.shape
    first = torch.arange(B, device=rows.device)[:, None] * T
    return rows.reshape(B * T, K)[index.clamp_min(0) + first]  # whole rows at once: several times as fast as `gather`


def interpolate_vertices(raster: Raster, vertex: Tensor, triangles: Tensor) -> Tensor:
    """Values of vertices (B, V, K) over the triangles (T, 3) that cover the pixels -> (B, P, K), 0 where none does."""
    return interpolate_corners(raster, vertex[:, triangles].flatten(2)) * (raster.triangle >= 0)[..., None]


def interpolate_corners(raster: Raster, corners: Tensor) -> Tensor:
    """Values of the corners of triangles, (B, T, 3 * K), over the pixels -> (B, P, K); anything where none covers."""
    a, b, c = gather_rows(corners, raster.triangle).chunk(3, dim=-1)
    at_a, at_b, at_c = raster.barycentric.split(1, dim=-1)
    return torch.addcmul(torch.addcmul(a * at_a, b, at_b), c, at_c)
