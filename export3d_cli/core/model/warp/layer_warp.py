"""Sampling of the photo along the blended flow: two layers, their weights, and the photo's fine detail."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.model.fast.resampling import can_resample, sample_bicubic
from export3d_cli.core.model.generator import lowpass
from export3d_cli.core.model.warp.flow_blending import LayeredFlow
from export3d_cli.core.model.warp.mesh_flow import resize, warp


class LayerWarp(NamedTuple):
    """Where an image (B, ., s, s) samples the photo, for its two layers, and the weight of each."""

    sample_grid: Tensor  # (B, 4, s, s) photo positions (x, y) of the head layer and the background layer
    blend_weights: Tensor  # (B, 2, s, s) of head and background, sum <= 1

    def sample(self, photo: Tensor, *, mode: str = "bilinear") -> Tensor:
        """Sample photo channels (B or 1, C, ., .) along both layers: (B, C, s, s), 0 where neither has weight."""
        head, background = self.sample_grid.split(2, dim=1)
        head_weight, background_weight = self.blend_weights.split(1, dim=1)
        if mode == "bicubic" and can_resample(photo):
            head, background = sample_bicubic(photo, head), sample_bicubic(photo, background)
        else:
            photo = photo.expand(len(head), -1, -1, -1)
            head, background = warp(photo, head, mode), warp(photo, background, mode)
        return torch.addcmul(head * head_weight, background, background_weight)

    def sample_over(self, photo: Tensor, fill: Tensor) -> Tensor:
        """Composite the sampled photo over `fill` (B, C, s, s)."""
        return torch.addcmul(self.sample(photo), fill, 1 - self.blend_weights.sum(1, keepdim=True))


def make_layer_warp(
    flow: LayeredFlow, background_visibility: Tensor, size: int, residual_flow: Tensor | None = None
) -> LayerWarp:
    """Resize both layers of a flow to `size`.

    The background layer has weight where `background_visibility` (B, 1, m, m) says that the photo shows it. A
    `residual_flow` shifts both; with it the head's outline is smoothed, which otherwise shows the triangles' steps.
    """
    grid, head_weight = torch.cat([flow.head, flow.background], dim=1), flow.head_weight
    if residual_flow is not None:
        grid = resize(grid, residual_flow.shape[-1]) + residual_flow.repeat(1, 2, 1, 1)
        head_weight, background_visibility = lowpass(resize(head_weight, size)), resize(background_visibility, size)
    weights = torch.cat([head_weight, background_visibility * (1 - head_weight)], dim=1)
    return LayerWarp(resize(grid, size), resize(weights, size))


def warp_discontinuity(sample_grid: Tensor) -> Tensor:
    """Return the largest distance of neighbours in the photo: sample grid (B, 4, s, s) -> (B, 2, s, s), in pixels."""
    B, _, s, _ = sample_grid.shape
    pixels = sample_grid.view(B, 2, 2, s, s) * s  # layer, coordinate
    across, down = (pixels.diff(dim=dim).square().sum(2) for dim in (4, 3))  # (B, 2, s, s - 1), (B, 2, s - 1, s)
    across = torch.maximum(F.pad(across, (1, 0)), F.pad(across, (0, 1)))
    down = torch.maximum(F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1)))
    return torch.maximum(across, down).sqrt()


def highpass(photo: Tensor) -> Tensor:
    """Return the luminance detail of images (B, 3, s, s) that `lowpass` removes: (B, 1, s, s).

    It is computed before warping, and so contains no edges from jumps of the photo positions.
    """
    x = photo.float().mean(1, keepdim=True)
    return x - lowpass(x)


def upscale_with_detail(image: Tensor, layer_warp: LayerWarp, photo: Tensor, size: int) -> Tensor:
    """Resize the result to `size` and give it the detail of another copy of the photo, which no network sees.

    What the network sampled is replaced by what the copy shows there, with the same weights: along outlines both
    differ by detail only, and draw no lines. Bicubic sampling keeps the sharpness of pixels that move. The central
    `size` pixels of `photo` (1, 3, M, M) are the network's photo.
    """
    margin, side = (photo.shape[-1] - size) // 2, image.shape[-1]
    centre = photo[..., margin : margin + size, margin : margin + size]
    coarse = F.interpolate(centre, (side, side), mode="area") if size > side else resize(centre, side)
    grid = (resize(layer_warp.sample_grid, size) + margin / size) / (1 + 2 * margin / size)
    fine = LayerWarp(grid, resize(layer_warp.blend_weights, size)).sample(photo, mode="bicubic")
    return resize(image - layer_warp.sample(coarse), size) + fine
