"""Soft masks: thresholds, dilation and box filters whose cost hardly grows with the radius."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_step(x: Tensor, low: float, high: float) -> Tensor:
    """Map `x` linearly to 0 at `low` and 1 at `high`, clamped to [0, 1]."""
    return ((x - low) / (high - low)).clamp(0, 1)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Return the maximum over a square of `radius` pixels to each side, clipped at the border; (B, C, h, w)."""
    wide, side = F.pad(mask, (radius,) * 4, value=-torch.inf), 2 * radius + 1
    for dim in (-2, -1):
        seen = 1  # pixels that each value of `wide` covers; doubles with every step
        while seen < side:
            step = min(seen, side - seen)
            left = wide.shape[dim] - step
            wide = torch.maximum(wide.narrow(dim, 0, left), wide.narrow(dim, step, left))
            seen += step
    return wide


def box_mean(mask: Tensor, radius: int) -> Tensor:
    """Return the mean over a square of `radius` pixels to each side, clipped at the border; (B, C, s, s)."""
    at = torch.arange(mask.shape[-1], device=mask.device)
    low, high = (at - radius).clamp_min(0), (at + radius + 1).clamp_max(len(at))
    for _ in range(2):  # along rows, then along columns
        sums = F.pad(mask.float().cumsum(-1), (1, 0))
        mask = ((sums[..., high] - sums[..., low]) / (high - low)).mT
    return mask
