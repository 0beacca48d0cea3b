"""Convolutions of upsampled and concatenated features, computed without building them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.model.cached_tensors import cached_tensor

# Three rows of the upsampled image around an even and an odd row, as sums of three rows of the small image.
PHASE_WEIGHTS = (((0.75, 0.25, 0.0), (0.25, 0.75, 0.75), (0.0, 0.0, 0.25)),
                 ((0.25, 0.0, 0.0), (0.75, 0.75, 0.25), (0.0, 0.25, 0.75)))  # fmt: skip


class PatchWindow(NamedTuple):
    """A window of a map that is 0 elsewhere."""

    values: Tensor  # (B, C, h, w); empty if the map is 0
    top: int
    left: int


def upsample_2x(x: Tensor) -> Tensor:
    """Upsample (B, C, h, w) bilinearly to (B, C, 2h, 2w); channels_last is six times as fast on a CPU."""
    if x.shape[1] > 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def upsample_concat_conv(conv: nn.Conv2d, x: Tensor, others: list[Tensor]) -> Tensor:
    """Apply a 3x3 convolution to `upsample_2x(x)` and `others` (B, ., h, w), concatenated, without building that."""
    first, second = conv.weight.split([x.shape[1], conv.in_channels - x.shape[1]], dim=1)
    dense = torch.cat([part.to(x.dtype) for part in others], dim=1).contiguous(memory_format=torch.channels_last)
    return F.conv2d(upsample_2x(x), first, conv.bias, padding=1) + F.conv2d(dense, second, padding=1)


def upsample_concat_conv_inference(conv: nn.Conv2d, x: Tensor, others: list[Tensor], window: PatchWindow) -> Tensor:
    """Compute `upsample_concat_conv` with the window, zero-padded, as the last of `others`; CPU without gradients."""
    channels = [x.shape[1], sum(part.shape[1] for part in others)]
    first, second, third = conv.weight.split([*channels, conv.in_channels - sum(channels)], dim=1)
    out = upsample_conv(first, x)
    dense = torch.cat([part.to(x.dtype) for part in others], dim=1).contiguous(memory_format=torch.channels_last)
    out += F.conv2d(dense, second, conv.bias, padding=1)
    if window.values.numel():
        height, width = window.values.shape[-2:]
        target = out[:, :, window.top : window.top + height, window.left : window.left + width]
        target += F.conv2d(window.values.to(x.dtype), third, padding=1)
    return out


def upsample_conv(weight: Tensor, x: Tensor) -> Tensor:
    """Apply a zero-padded 3x3 convolution to `upsample_2x(x)`, as one convolution of `x` per output phase.

    (K, C, 3, 3), (B, C, h, w) -> (B, K, 2h, 2w). As many multiplications, without the large intermediate.
    """
    (K, C), (B, _, h, w) = weight.shape[:2], x.shape
    if min(h, w) < 4:
        return F.conv2d(upsample_2x(x), weight, padding=1)
    taps = cached_tensor(PHASE_WEIGHTS, x.device)
    kernels = torch.einsum("pau,qbv,kcuv->pqkcab", taps, taps, weight.float()).reshape(4 * K, C, 3, 3)
    phases = F.conv2d(x, kernels.to(weight.dtype, memory_format=torch.channels_last), padding=1)  # (B, 4K, h, w)
    phases = phases.permute(0, 2, 3, 1).reshape(B, h, w, 2, 2, K).transpose(2, 3)
    out = phases.reshape(B, 2 * h, 2 * w, K).permute(0, 3, 1, 2)
    # at the borders the upsampled image is padded with zeros, the small one with its last row
    for outer, inner in ((slice(0, 2), slice(0, 3)), (slice(-2, None), slice(-3, None))):
        out[:, :, outer] = F.conv2d(upsample_2x(x[:, :, inner]), weight, padding=1)[:, :, outer]
        out[..., outer] = F.conv2d(upsample_2x(x[..., inner]), weight, padding=1)[..., outer]
    return out
