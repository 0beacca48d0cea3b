"""Soft masks: thresholds, dilation and box filters whose cost hardly grows with the radius; windows of images."""

from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Values = TypeVar("Values", Tensor, np.ndarray)


class Window(NamedTuple):
    """A part of square images: its borders in cells, and the number of cells along a side of the image."""

    left: int
    top: int
    right: int
    bottom: int
    cells: int

    def slices(self, size: int) -> tuple[slice, slice]:
        """Return the rows and columns of the pixels that the window touches in an image of side `size`."""
        left, top = (v * size // self.cells for v in self[:2])
        right, bottom = (-(-v * size // self.cells) for v in self[2:4])
        return slice(top, bottom), slice(left, right)

    def crop(self, x: Tensor) -> Tensor:
        """Return the window of images (..., s, s)."""
        rows, columns = self.slices(x.shape[-1])
        return x[..., rows, columns]

    def pad(self, x: Tensor, size: int) -> Tensor:
        """Return images (..., size, size) that are `x` in the window and 0 elsewhere."""
        rows, columns = self.slices(size)
        return F.pad(x, (columns.start, size - columns.stop, rows.start, size - rows.stop))


WHOLE = Window(0, 0, 1, 1, 1)


def linear_step(x: Tensor, low: float, high: float) -> Tensor:
    """Map `x` linearly to 0 at `low` and 1 at `high`, clamped to [0, 1]."""
    return ((x - low) / (high - low)).clamp(0, 1)


def smooth_step(x: Values, low: float, high: float) -> Values:
    """Return 0 below `low`, 1 above `high`, and a smooth ramp between."""
    t = ((x - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Return the maximum over a square of `radius` pixels to each side, clipped at the border; (B, C, h, w)."""
    out, window = F.pad(mask, (radius,) * 4, value=-torch.inf), 2 * radius + 1
    for dim in (-2, -1):
        covered = 1  # pixels that each value of `out` covers; doubles with every step
        while covered < window:
            step = min(covered, window - covered)
            length = out.shape[dim] - step
            out = torch.maximum(out.narrow(dim, 0, length), out.narrow(dim, step, length))
            covered += step
    return out


def box_mean(mask: Tensor, radius: int) -> Tensor:
    """Return the mean over a square of `radius` pixels to each side, clipped at the border; (B, C, s, s)."""
    pixel = torch.arange(mask.shape[-1], device=mask.device)
    low, high = (pixel - radius).clamp_min(0), (pixel + radius + 1).clamp_max(len(pixel))
    for _ in range(2):  # along rows, then along columns
        sums = mask.float().cumsum(-1)
        last = sums[..., -1:].expand(*sums.shape[:-1], radius)
        sums = torch.cat([F.pad(sums, (radius + 1, 0)), last], dim=-1)
        mask = ((sums[..., 2 * radius + 1 :] - sums[..., : len(pixel)]) / (high - low)).mT
    return mask
