"""Inpainting of a face part in an aligned crop: the crop, the hole, the network, and pasting into the image.

A network trained to match a person's own teeth, which the photo does not show, would predict the mean of all teeth:
grey. So the inside of such a mouth or eye, or an eyelid, is cut out of the result and synthesised from its context by a
network of its own, trained adversarially on holes in images that show the part.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.face.landmarks import LEFT_EYE_OUTER, RIGHT_EYE_OUTER
from export3d_cli.core.model.generator import ResBlock, leaky_relu
from export3d_cli.core.model.masks import dilate
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.model.warp.rasterizer import interpolate_vertices, rasterize

INPAINT_SIZE_PX = 96  # side of the crops that are inpainted
CONDITION_CHANNELS = 7


class AlignedCrop(NamedTuple):
    """A square around a part of a face, level with the eyes. Positions in it are 0..1, image positions uv likewise."""

    centre: Tensor  # (B, 2) uv
    axes: Tensor  # (B, 2, 2) rows, unit vectors: to the face's right in the image and down; mirrored: left and down
    side: Tensor  # (B,) fraction of the image size

    def pixel_positions(self, size: int) -> Tensor:
        """Return the uv of the crop's pixels, (B, 2, size, size)."""
        grid = (pixel_grid(size, self.centre.device) - 0.5) @ self.axes * self.side[:, None, None]
        return (self.centre[:, None] + grid).transpose(1, 2).reshape(-1, 2, size, size)

    def sample(self, image: Tensor) -> Tensor:
        """Crop an image (B, C, H, W) -> (B, C, INPAINT_SIZE_PX, INPAINT_SIZE_PX)."""
        return warp(image, self.pixel_positions(INPAINT_SIZE_PX))

    def to_crop(self, uv: Tensor) -> Tensor:
        """Convert uv (B, N, 2) to positions in the crop."""
        return (uv - self.centre[:, None]) @ self.axes.transpose(1, 2) / self.side[:, None, None] + 0.5

    def draw(self, uv: Tensor, upper: tuple[int, ...], lower: tuple[int, ...], values: Tensor) -> Tensor:
        """Draw what lies between two edges of landmarks (B, 478, 2) that meet at both ends, from left to right.

        Returns (B, 1 + C, INPAINT_SIZE_PX, INPAINT_SIZE_PX): 1 inside, then `values` (B, 478, C) interpolated; else 0.
        """
        strip = []
        for k in range(len(upper) - 1):
            a, b, c, d = upper[k], upper[k + 1], lower[k + 1], lower[k]
            strip += ([[a, b, c]] if b != c else []) + ([[a, c, d]] if a != d else [])
        triangles, position = torch.tensor(strip, device=uv.device), self.to_crop(uv)
        raster = rasterize(position, torch.zeros_like(position[..., 0]), triangles, INPAINT_SIZE_PX)
        inside = (raster.triangle >= 0).float()[..., None]  # (B, P, 1)
        drawn = torch.cat([inside, interpolate_vertices(raster, values, triangles)], dim=-1)
        return drawn.transpose(1, 2).reshape(len(uv), -1, INPAINT_SIZE_PX, INPAINT_SIZE_PX)


class Hole(NamedTuple):
    """The inside of a mouth or an eye, or an eyelid, in a crop; each (B, ., INPAINT_SIZE_PX, INPAINT_SIZE_PX)."""

    mask: Tensor  # (B, 1) 1 where to inpaint, with a soft border
    condition: Tensor  # (B, 7) first 1 inside the part; last two coordinates, -1..1, for each learned texture


class InpaintedPatch(NamedTuple):
    """An inpainted hole."""

    crop: AlignedCrop
    colours: Tensor  # (B, 3, INPAINT_SIZE_PX, INPAINT_SIZE_PX)
    mask: Tensor  # (B, 1, INPAINT_SIZE_PX, INPAINT_SIZE_PX)

    def paste_into(self, image: Tensor) -> None:
        """Blend the patch into an image (B, 3, H, W) of any size, in place."""
        size = image.shape[-1]
        corners = self.crop.pixel_positions(2)  # centres of the quarters: the square reaches twice as far
        reach = (corners - self.crop.centre[:, :, None, None]).abs().amax((2, 3)) * 2  # (B, 2)
        low = ((self.crop.centre - reach).amin(0) * size).floor().clamp(0, size).long()
        high = ((self.crop.centre + reach).amax(0) * size).ceil().clamp(0, size).long()
        (left, top), (right, bottom) = low.tolist(), high.tolist()
        if left >= right or top >= bottom:
            return
        pixels = pixel_grid(size, image.device).view(size, size, 2)[top:bottom, left:right]
        grid = self.crop.to_crop(pixels.reshape(1, -1, 2)).view(-1, bottom - top, right - left, 2) * 2 - 1
        premultiplied = torch.cat([self.colours * self.mask, self.mask], dim=1).float()
        colours, alpha = F.grid_sample(premultiplied, grid, align_corners=False).split([3, 1], dim=1)
        region = image[:, :, top:bottom, left:right]
        region += colours - alpha * region


def level_axes(uv: Tensor) -> Tensor:
    """Return axes level with the eyes of landmarks (B, 478, 2): unit vectors (B, 2, 2), right and down."""
    right = uv[:, LEFT_EYE_OUTER] - uv[:, RIGHT_EYE_OUTER]
    right = right / right.norm(dim=1, keepdim=True).clamp_min(1e-6)
    return torch.stack([right, torch.stack([-right[:, 1], right[:, 0]], dim=1)], dim=1)


def dilate_and_blur(mask: Tensor) -> Tensor:
    """Widen a mask by two pixels and soften it: landmarks are inexact, and the rims of lips and lids are part of it."""
    wide = F.pad(dilate(mask, 2), (2, 2, 2, 2), mode="replicate")
    return F.avg_pool2d(wide, 5, stride=1)


class Inpainter(nn.Module):
    """A U-Net on the crop, with learned textures placed at the last coordinates of the hole's condition."""

    texture_shape = (12, 32, 64)  # features, rows and columns of each
    texture_count = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        w, n, (t, rows, columns) = width, self.texture_count, self.texture_shape
        self.textures = nn.Parameter(torch.randn(n, t, rows, columns) * 0.3)
        self.enter = nn.Conv2d(4 + CONDITION_CHANNELS + n * t, w, 3, stride=2, padding=1)
        self.at_half = ResBlock(w)
        self.to_quarter = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.at_quarter = ResBlock(2 * w)
        self.to_eighth = nn.Conv2d(2 * w, 3 * w, 3, stride=2, padding=1)
        self.at_eighth = nn.ModuleList([ResBlock(3 * w), ResBlock(3 * w)])
        self.whole = nn.Linear(3 * w, 3 * w)  # light and colours of the whole crop
        self.up_quarter = nn.Conv2d(3 * w, 8 * w, 1)
        self.join_quarter = nn.Conv2d(4 * w, 2 * w, 1)
        self.back_quarter = ResBlock(2 * w)
        self.up_half = nn.Conv2d(2 * w, 4 * w, 1)
        self.join_half = nn.Conv2d(2 * w, w, 1)
        self.back_half = ResBlock(w)
        self.up_full = nn.Conv2d(w, 4 * t, 1)
        self.see_textures = nn.Conv2d(n * t, t, 1)
        self.colour = nn.Conv2d(t, 3, 3, padding=1)

    def forward(self, context: Tensor, hole: Hole) -> Tensor:
        """Inpaint crops (B, 3, s, s) that are 0 inside the hole -> its colours, (B, 3, s, s) in about [-1, 1]."""
        textures = self.place_textures(hole.condition)
        x = torch.cat([context, hole.mask, hole.condition, textures], 1).contiguous(memory_format=torch.channels_last)
        half = self.at_half(self.enter(x))  # (B, w, s/2, s/2)
        quarter = self.at_quarter(self.to_quarter(leaky_relu(half)))  # (B, 2w, s/4, s/4)
        x = self.at_eighth[0](self.to_eighth(leaky_relu(quarter)))  # (B, 3w, s/8, s/8)
        x = leaky_relu(self.at_eighth[1](x + self.whole(x.mean((2, 3)))[:, :, None, None]))
        x = self.join_quarter(torch.cat([F.pixel_shuffle(self.up_quarter(x), 2), quarter], dim=1))
        x = leaky_relu(self.back_quarter(x))
        x = self.join_half(torch.cat([F.pixel_shuffle(self.up_half(x), 2), half], dim=1))
        x = self.up_full(leaky_relu(self.back_half(x)))
        x = F.pixel_shuffle(x, 2) + self.see_textures(textures)  # (B, t, s, s)
        return torch.sigmoid(self.colour(leaky_relu(x)).float()) * 2.004 - 1.002

    def place_textures(self, condition: Tensor) -> Tensor:
        """Sample the textures at the condition's coordinates, (B, n t, s, s); 0 outside the part."""
        inside = condition[:, :1]
        grids = condition[:, -2 * self.texture_count :].permute(0, 2, 3, 1).split(2, dim=-1)  # (B, s, s, 2) each
        placed = []
        for texture, grid in zip(self.textures.float().split(1), grids, strict=True):
            batch = texture.expand(len(grid), -1, -1, -1)
            placed.append(F.grid_sample(batch, grid, align_corners=False, padding_mode="border") * inside)
        return torch.cat(placed, dim=1)

    def inpaint(self, image: Tensor, photo: Tensor, photo_points: Tensor, photo_camera: Tensor, points: Tensor,
                camera: Tensor) -> list[InpaintedPatch]:  # fmt: skip
        """Inpaint results `image` (B, 3, H, W) with landmarks (B, 478, 3), head frame, and cameras (B, 25).

        Returns no patches if the photo shows all that they need.
        """
        raise NotImplementedError
