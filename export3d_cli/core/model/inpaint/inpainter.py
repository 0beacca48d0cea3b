"""Holes in results, painted in close-up (beyond the paper): what a photo with shut lips, narrow or open eyes hides.

A photo says nothing about teeth that it does not show, and a network that is to match the person's own makes the mean
of all: grey. So the inside of such a mouth or eye, or a lid, is cut out of the result and filled again from what
surrounds it, by a network that has learned nothing else, on holes in pictures that show it, with a critic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.model.generator import ResBlock, leaky_relu
from export3d_cli.core.model.masks import dilate
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.mouth_eye_interior import EYE_RIMS
from export3d_cli.core.model.warp.rasterizer import Raster, rasterize

CROP_SIZE_PX = 96  # of a close-up, pixels
CONDITION_CHANNELS = 7  # channels of `Hole.facts`


class AlignedCrop(NamedTuple):
    """A square around a part of a face, level with the eyes; positions in it are 0..1."""

    centre: Tensor  # (B, 2) in image sizes
    axes: Tensor  # (B, 2, 2) rows: to the right and down in the face, unit vectors; or, mirrored, to the left and down
    side: Tensor  # (B,) in image sizes

    def pixel_positions(self, size: int) -> Tensor:
        """Where in the picture the pixels of the close-up lie, (B, 2, size, size)."""
        grid = (pixel_grid(size, self.centre.device) - 0.5) @ self.axes * self.side[:, None, None]
        return (self.centre[:, None] + grid).transpose(1, 2).reshape(-1, 2, size, size)

    def to_crop(self, uv: Tensor) -> Tensor:
        """Positions (B, N, 2) in the picture -> in the close-up."""
        return (uv - self.centre[:, None]) @ self.axes.transpose(1, 2) / self.side[:, None, None] + 0.5


class Hole(NamedTuple):
    """The inside of a mouth or an eye, or a lid, in close-up; each (B, ., SIDE, SIDE)."""

    mask: Tensor  # (B, 1): 1 where it is to be painted, softly ending
    condition: Tensor  # (B, 7): 1 inside; what tells where and how; last, where on each of the learned textures it is


class InpaintedPatch(NamedTuple):
    """A filled hole."""

    crop: AlignedCrop
    colours: Tensor  # (B, 3, SIDE, SIDE)
    mask: Tensor  # (B, 1, SIDE, SIDE)

    def paste_into(self, image: Tensor) -> None:
        """Fill the hole in a picture (B, 3, H, W) of any size, which is written into."""
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
        layers = torch.cat([self.colours * self.mask, self.mask], dim=1).float()
        ahead, share = F.grid_sample(layers, grid, align_corners=False).split([3, 1], dim=1)
        part = image[:, :, top:bottom, left:right]
        part += ahead - share * part


def level_axes(uv: Tensor) -> Tensor:
    """Axes of a view that is level with the eyes: landmarks (B, 478, 2) -> unit vectors (B, 2, 2), right and down."""
    (right, left) = (uv[:, rim[0]] for _, rim in EYE_RIMS)  # outer corners of the eyes
    along = left - right
    along = along / along.norm(dim=1, keepdim=True).clamp_min(1e-6)
    return torch.stack([along, torch.stack([-along[:, 1], along[:, 0]], dim=1)], dim=1)


def strip_triangles(upper: tuple[int, ...], lower: tuple[int, ...], device: torch.device) -> Tensor:
    """Triangles (T, 3) between two edges that meet at both ends, from left to right in a close-up."""
    rows = []
    for k in range(len(upper) - 1):
        a, b, c, d = upper[k], upper[k + 1], lower[k + 1], lower[k]
        rows += ([[a, b, c]] if b != c else []) + ([[a, c, d]] if a != d else [])
    return torch.tensor(rows, device=device)


def rasterize_in_crop(view: AlignedCrop, uv: Tensor, triangles: Tensor) -> tuple[Raster, Tensor]:
    """What of a close-up the triangles (T, 3) of landmarks `uv` (B, 478, 2) cover, and the mask of it, (B, P, 1)."""
    at = view.to_crop(uv)
    raster = rasterize(at, torch.zeros_like(at[..., 0]), triangles, CROP_SIZE_PX)
    return raster, (raster.triangle >= 0).float()[..., None]


def to_image(values: Tensor) -> Tensor:
    """Values (B, SIDE * SIDE, C) of a close-up -> (B, C, SIDE, SIDE)."""
    return values.transpose(1, 2).reshape(len(values), -1, CROP_SIZE_PX, CROP_SIZE_PX)


def dilate_and_blur(mask: Tensor) -> Tensor:
    """A mask two pixels wider, and soft: landmarks are not exact, and rims of lips and lids belong to the inside."""
    wide = F.pad(dilate(mask, 2), (2, 2, 2, 2), mode="replicate")
    return F.avg_pool2d(wide, 5, stride=1)


class Inpainter(nn.Module):
    """Fills holes: a U-Net on the close-up, with learned textures that hang where the last facts of a hole say."""

    texture_shape = (12, 32, 64)  # features, rows and columns of each
    texture_count = 1  # textures

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
        self.whole = nn.Linear(3 * w, 3 * w)  # light and colours of the whole close-up
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
        """Close-ups (B, 3, s, s) that are 0 where hidden -> their colours there, (B, 3, s, s) in about [-1, 1]."""
        textures = self.place_textures(hole.condition)
        x = torch.cat([context, hole.mask, hole.condition, textures], dim=1).contiguous(
            memory_format=torch.channels_last
        )
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
        """The textures where they belong, (B, n t, s, s); 0 outside of the hole."""
        inside, places = condition[:, :1], condition[:, -2 * self.texture_count :].permute(0, 2, 3, 1)  # (B, s, s, 2 n)
        rows = []
        for texture, place in zip(self.textures.float().split(1), places.split(2, dim=-1), strict=True):
            whole = texture.expand(len(place), -1, -1, -1)
            rows.append(F.grid_sample(whole, place, align_corners=False, padding_mode="border") * inside)
        return torch.cat(rows, dim=1)

    def inpaint(
        self, image: Tensor, photo: Tensor, photo_points: Tensor, photo_camera: Tensor, points: Tensor, camera: Tensor
    ) -> list[InpaintedPatch]:
        """What is to be laid on results; none where none of them hides anything.

        Args:
            image: (B, 3, H, W). photo, photo_points, photo_camera: the photo (B, 3, H, W), its landmarks (B, 478, 3) in
                the head frame and its camera (B, 25).
            points, camera: those of the results.
        """
        raise NotImplementedError
