"""Sampling of photos along the blended flow: its layers, their weights, and the photos' fine detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.model.fast.resampling import can_resample, sample_bicubic
from export3d_cli.core.model.generator import lowpass
from export3d_cli.core.model.masks import WHOLE, Window
from export3d_cli.core.model.warp.flow_blending import LayeredFlow
from export3d_cli.core.model.warp.mesh_flow import resize, warp


class LayerWarp(NamedTuple):
    """Where an image (B, ., s, s) samples its photos: the first one's head and background, then each other's head."""

    sample_grid: Tensor  # (B, 2 L, s, s) photo positions (x, y) of each layer
    blend_weights: Tensor  # (B, L, s, s) sum <= 1

    def crop(self, window: Window) -> LayerWarp:
        """Return a part of the image."""
        return self if window == WHOLE else LayerWarp(*(window.crop(x) for x in self))

    def sample(self, photos: Sequence[Tensor], *, mode: str = "bilinear") -> Tensor:
        """Sample channels (B or 1, C, ., .) of each photo along all layers: (B, C, s, s), 0 where none has weight."""

        def look_up(photo: Tensor, grid: Tensor) -> Tensor:
            if mode == "bicubic" and can_resample(photo):
                return sample_bicubic(photo, grid)
            return warp(photo.expand(len(grid), -1, -1, -1), grid, mode)

        grids, weights = self.sample_grid.split(2, dim=1), self.blend_weights.split(1, dim=1)
        layers = (photos[0], *photos)
        sampled = look_up(layers[0], grids[0]) * weights[0]
        for photo, grid, weight in zip(layers[1:], grids[1:], weights[1:], strict=True):
            sampled = torch.addcmul(sampled, look_up(photo, grid), weight)
        return sampled

    def sample_over(self, photos: Sequence[Tensor], fill: Tensor) -> Tensor:
        """Composite the sampled photos over `fill` (B, C, s, s)."""
        return torch.addcmul(self.sample(photos), fill, 1 - self.blend_weights.sum(1, keepdim=True))


def make_layer_warp(flow: LayeredFlow, background_visibility: Tensor, size: int,
                    residual_flow: Tensor | None = None) -> LayerWarp:  # fmt: skip
    """Resize a flow's layers, shifted by `residual_flow`; `background_visibility` (B, 1, m, m) weights the second."""
    grid, head_weight = torch.cat([flow.head, flow.background, *flow.additional], dim=1), flow.head_weight
    if residual_flow is not None:
        grid = resize(grid, residual_flow.shape[-1]) + residual_flow.repeat(1, grid.shape[1] // 2, 1, 1)
    weights = torch.cat([head_weight, background_visibility * (1 - head_weight)], dim=1)
    if flow.fractions is not None:
        first = head_weight * (1 - flow.fractions.sum(1, keepdim=True))
        weights = torch.cat([first, weights[:, 1:], head_weight * flow.fractions], dim=1)
    return LayerWarp(resize(grid, size), resize(weights, size))


def warp_discontinuity(sample_grid: Tensor) -> Tensor:
    """Return the largest distance of neighbours in the photo: sample grid (B, 2 L, s, s) -> (B, L, s, s), in pixels."""
    B, _, s, _ = sample_grid.shape
    pixels = sample_grid.view(B, -1, 2, s, s) * s  # layer, coordinate
    across, down = (pixels.diff(dim=dim).square().sum(2) for dim in (4, 3))  # (B, L, s, s - 1), (B, L, s - 1, s)
    across = torch.maximum(F.pad(across, (1, 0)), F.pad(across, (0, 1)))
    down = torch.maximum(F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1)))
    return torch.maximum(across, down).sqrt()


def highpass(photo: Tensor) -> Tensor:
    """Return the luminance detail (B, 1, s, s) of unwarped images (B, 3, s, s) that `lowpass` removes."""
    x = photo.float().mean(1, keepdim=True)
    return x - lowpass(x)


def upscale_with_detail(image: Tensor, layer_warp: LayerWarp, photos: Tensor, size: int,
                        window: Window = WHOLE) -> Tensor:  # fmt: skip
    """Resize the result to `size` and give it the detail of other copies of the N photos, which no network sees.

    What the network sampled is replaced by what the copies show there, with the same weights: along outlines both
    differ by detail only, and draw no lines. Bicubic sampling keeps the sharpness of pixels that move. The central
    `size` pixels of `photos` (N, 3, M, M) are the network's photos. Outside the `window` the result is 0.
    """
    margin, side = (photos.shape[-1] - size) // 2, image.shape[-1]
    centre = photos[..., margin : margin + size, margin : margin + size]
    coarse = F.interpolate(centre, (side, side), mode="area") if size > side else resize(centre, side)
    large = LayerWarp(*(resize(x, size) for x in layer_warp)).crop(window)
    fine = large._replace(sample_grid=(large.sample_grid + margin / size) / (1 + 2 * margin / size))
    rest = window.crop(image) - layer_warp.crop(window).sample(coarse.split(1))
    rest = window.crop(resize(window.pad(rest, side), size))
    return window.pad(rest + fine.sample(photos.split(1), mode="bicubic"), size)
