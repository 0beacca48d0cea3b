"""Masks from measures; and made wider and softer, in time that hardly grows with how far, as that of pooling does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_step(x: Tensor, low: float, high: float) -> Tensor:
    """0 up to `low`, 1 from `high` on."""
    return ((x - low) / (high - low)).clamp(0, 1)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """The largest value of the square up to `reach` pixels to each side, within the picture: (B, C, h, w) as it was."""
    wide, side = F.pad(mask, (radius,) * 4, value=-torch.inf), 2 * radius + 1
    for dim in (-2, -1):
        seen = 1  # by every pixel of `wide`: itself and what follows, which doubles with each step
        while seen < side:
            step = min(seen, side - seen)
            left = wide.shape[dim] - step
            wide = torch.maximum(wide.narrow(dim, 0, left), wide.narrow(dim, step, left))
            seen += step
    return wide


def box_mean(mask: Tensor, radius: int) -> Tensor:
    """The mean of the same square, of a picture (B, C, s, s)."""
    at = torch.arange(mask.shape[-1], device=mask.device)
    low, high = (at - radius).clamp_min(0), (at + radius + 1).clamp_max(len(at))
    for _ in range(2):  # along rows, then along columns
        sums = F.pad(mask.float().cumsum(-1), (1, 0))
        mask = ((sums[..., high] - sums[..., low]) / (high - low)).mT
    return mask
