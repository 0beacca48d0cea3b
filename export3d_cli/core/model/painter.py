"""What a photo with shut lips hides, painted in a close-up of the mouth (beyond the paper).

Such a photo says nothing about teeth, and a network that is to match the person's own makes the mean of all: grey. So
the inside of the mouth is cut out of the result and filled again from what surrounds it, by a network that has learned
nothing else, on holes in pictures of open mouths, with a critic. What the photo does show of its mouth stays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.model.flow import interpolate, rasterize, warp
from export3d_cli.core.model.generator import ResBlock, leaky
from export3d_cli.core.model.mouth import (
    LOWER_LIP,
    RIMS,
    UPPER_LIP,
    WIDEST,
    anchored_places,
    lip_edges,
    mouth_places,
    shown_above,
)
from export3d_cli.core.model.render import pixel_grid, project

SIDE = 96  # of a close-up, pixels
WIDER = 1.3  # than the lips
LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)  # outer
SHUT = 0.012  # opening, in distances between the eyes, below which nothing is painted; all from twice that on
AT_LIP = 0.75  # `mouth.shown_above` at the lower lip of a mouth as open as in the photo: there nothing is hidden
# A slit between lips shows little: where a photo's lips are less than CLEAR apart, all the more by SLIT less, what is
# seen between them is soon given up for what is painted, as if they opened farther; unless they open no farther.
CLEAR, SLIT, DOUBT = 0.1, 0.06, 10.0
FACTS = 7  # channels of `Hole.facts`


class CloseUp(NamedTuple):
    """A square around the lips, level with the eyes; positions in it are 0..1."""

    centre: Tensor  # (B, 2) in image sizes
    axes: Tensor  # (B, 2, 2) rows: to the right and down in the face, unit vectors
    side: Tensor  # (B,) in image sizes

    def positions(self, size: int) -> Tensor:
        """Where in the picture the pixels of the close-up lie, (B, 2, size, size)."""
        grid = (pixel_grid(size, self.centre.device) - 0.5) @ self.axes * self.side[:, None, None]
        return (self.centre[:, None] + grid).transpose(1, 2).reshape(-1, 2, size, size)

    def place(self, uv: Tensor) -> Tensor:
        """Positions (B, N, 2) in the picture -> in the close-up."""
        return (uv - self.centre[:, None]) @ self.axes.transpose(1, 2) / self.side[:, None, None] + 0.5


class Hole(NamedTuple):
    """The inside of a mouth in close-up; each (B, ., SIDE, SIDE)."""

    hidden: Tensor  # (B, 1): 1 where it is to be painted, softly ending
    facts: Tensor  # (B, 7): 1 inside the mouth; where, across and up; where on the upper and the lower teeth


class Painted(NamedTuple):
    """A filled hole."""

    view: CloseUp
    colours: Tensor  # (B, 3, SIDE, SIDE)
    hidden: Tensor  # (B, 1, SIDE, SIDE)

    def on(self, image: Tensor) -> Tensor:
        """The picture (B, 3, H, W), of any size, with the mouth in it."""
        size = image.shape[-1]
        corners = self.view.positions(2)  # centres of the quarters: the square reaches twice as far
        reach = (corners - self.view.centre[:, :, None, None]).abs().amax((2, 3)) * 2  # (B, 2)
        low = ((self.view.centre - reach).amin(0) * size).floor().clamp(0, size).long()
        high = ((self.view.centre + reach).amax(0) * size).ceil().clamp(0, size).long()
        (left, top), (right, bottom) = low.tolist(), high.tolist()
        if left >= right or top >= bottom:
            return image
        pixels = pixel_grid(size, image.device).view(size, size, 2)[top:bottom, left:right]
        grid = self.view.place(pixels.reshape(1, -1, 2)).view(-1, bottom - top, right - left, 2) * 2 - 1
        layers = torch.cat([self.colours * self.hidden, self.hidden], dim=1).float()
        ahead, share = F.grid_sample(layers, grid, align_corners=False).split([3, 1], dim=1)
        out = image.clone()
        part = out[:, :, top:bottom, left:right]
        part += ahead - share * part
        return out


def close_up(uv: Tensor) -> CloseUp:
    """The square around the lips of landmarks (B, 478, 2) in image sizes."""
    (right, left) = (uv[:, rim[0]] for _, rim in RIMS)  # outer corners of the eyes
    along = left - right
    along = along / along.norm(dim=1, keepdim=True).clamp_min(1e-6)
    axes = torch.stack([along, torch.stack([-along[:, 1], along[:, 0]], dim=1)], dim=1)
    lips = uv[:, list(LIPS)] @ axes.transpose(1, 2)
    low, high = lips.amin(1), lips.amax(1)
    centre = ((low + high) / 2)[:, None] @ axes
    return CloseUp(centre[:, 0], axes, WIDER * (high - low).amax(1).clamp_min(0.01))


def opening(points: Tensor) -> Tensor:
    """How far apart the lips are in their middle, (B, 478, 3) -> (B,), in distances between the outer eye corners."""
    middle = len(UPPER_LIP) // 2
    gap = (points[:, UPPER_LIP[middle]] - points[:, LOWER_LIP[middle]]).norm(dim=-1)
    return gap / (points[:, RIMS[0][1][0]] - points[:, RIMS[1][1][0]]).norm(dim=-1).clamp_min(1e-6)


def mouth_hole(points: Tensor, uv: Tensor, wider: Tensor) -> tuple[CloseUp, Hole]:
    """The inside of a mouth, and what of it no photo shows.

    Args:
        points: (B, 478, 3) landmarks of the result, head frame. uv: (B, 478, 2) where they are seen.
        wider: (B, 478, 1) how much wider than in the photo the lips are open, see `mouth.lip_edges`.
    """
    view, triangles = close_up(uv), strip(uv.device)
    at = view.place(uv)
    raster = rasterize(at, torch.zeros_like(at[..., 0]), triangles, SIDE)
    places = mouth_places().to(uv.device).expand(len(uv), -1, -1)
    vertex = torch.cat([places, anchored_places(points).clamp(-2, 2), wider], dim=-1)  # (B, 478, 7)
    facts = interpolate(raster, vertex, triangles)  # (B, P, 7), 0 where no triangle is
    inside = (raster.triangle >= 0).float()[..., None]
    hidden = inside * (1 - shown_above(facts[..., 1:2], facts[..., 6:]) / AT_LIP).clamp_min(0)
    facts = torch.cat([inside, facts[..., :6]], dim=-1).transpose(1, 2).reshape(-1, FACTS, SIDE, SIDE)
    hidden = soften(hidden.transpose(1, 2).reshape(-1, 1, SIDE, SIDE))
    fade = ((opening(points) - SHUT) / SHUT).clamp(0, 1)
    return view, Hole(hidden * fade[:, None, None, None], facts)


def strip(device: torch.device) -> Tensor:
    """Triangles between the inner lips, (18, 3)."""
    rows = []
    for k in range(len(UPPER_LIP) - 1):
        a, b, c, d = UPPER_LIP[k], UPPER_LIP[k + 1], LOWER_LIP[k + 1], LOWER_LIP[k]
        rows += ([[a, b, c]] if b != c else []) + ([[a, c, d]] if a != d else [])
    return torch.tensor(rows, device=device)


def soften(mask: Tensor) -> Tensor:
    """A mask two pixels wider, and soft: landmarks are not exact, and the lips' inner rims belong to the inside."""
    wide = F.max_pool2d(mask, 5, stride=1, padding=2)
    return F.avg_pool2d(F.pad(wide, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


class MouthPainter(nn.Module):
    """Fills holes: a U-Net on the close-up, with learned textures of teeth that are held by skull and jaw."""

    texture = (12, 32, 64)  # features, rows and columns of each

    def __init__(self, width: int) -> None:
        super().__init__()
        w, (t, rows, columns) = width, self.texture
        self.textures = nn.Parameter(torch.randn(2, t, rows, columns) * 0.3)  # upper and lower teeth
        self.enter = nn.Conv2d(4 + FACTS + 2 * t, w, 3, stride=2, padding=1)
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
        self.see_teeth = nn.Conv2d(2 * t, t, 1)
        self.colour = nn.Conv2d(t, 3, 3, padding=1)

    def forward(self, around: Tensor, hole: Hole) -> Tensor:
        """Close-ups (B, 3, s, s) that are 0 where hidden -> their colours there, (B, 3, s, s) in about [-1, 1]."""
        teeth = self.teeth(hole.facts)  # (B, 2 t, s, s)
        x = torch.cat([around, hole.hidden, hole.facts, teeth], dim=1).contiguous(memory_format=torch.channels_last)
        half = self.at_half(self.enter(x))  # (B, w, s/2, s/2)
        quarter = self.at_quarter(self.to_quarter(leaky(half)))  # (B, 2w, s/4, s/4)
        x = self.at_eighth[0](self.to_eighth(leaky(quarter)))  # (B, 3w, s/8, s/8)
        x = leaky(self.at_eighth[1](x + self.whole(x.mean((2, 3)))[:, :, None, None]))
        x = self.join_quarter(torch.cat([F.pixel_shuffle(self.up_quarter(x), 2), quarter], dim=1))
        x = leaky(self.back_quarter(x))
        x = self.join_half(torch.cat([F.pixel_shuffle(self.up_half(x), 2), half], dim=1))
        x = self.up_full(leaky(self.back_half(x)))
        x = F.pixel_shuffle(x, 2) + self.see_teeth(teeth)  # (B, t, s, s)
        return torch.sigmoid(self.colour(leaky(x)).float()) * 2.004 - 1.002

    def teeth(self, facts: Tensor) -> Tensor:
        """The textures as they hang in the mouth, (B, 2 t, s, s); 0 outside of it."""
        inside, places = facts[:, :1], facts[:, 3:].permute(0, 2, 3, 1)  # (B, s, s, 4)
        rows = []
        for texture, place in zip(self.textures.float().split(1), places.split(2, dim=-1), strict=True):
            whole = texture.expand(len(place), -1, -1, -1)
            rows.append(F.grid_sample(whole, place, align_corners=False, padding_mode="border") * inside)
        return torch.cat(rows, dim=1)

    def paint(
        self, image: Tensor, photo: Tensor, photo_camera: Tensor, points: Tensor, camera: Tensor
    ) -> Painted | None:
        """Fill the mouths of results; None where none of them hides anything.

        Args:
            image: (B, 3, H, W). photo, photo_camera: landmarks (B, 478, 3) and camera (B, 25) of the photo.
            points, camera: those of the results.
        """
        uv, _ = project(points, camera)
        uv_photo, _ = project(photo, photo_camera)
        wider = lip_edges(uv_photo, photo, points)[..., 4:]
        doubt = ((CLEAR - opening(photo)) / SLIT).clamp(0, 1) * DOUBT
        wider = (1 + (wider - 1) * (1 + doubt[:, None, None])).clamp(0, WIDEST)
        view, hole = mouth_hole(points, uv, wider)
        if not bool(hole.hidden.any()):
            return None
        around = warp(image, view.positions(SIDE)) * (1 - hole.hidden)
        return Painted(view, self(around, hole), hole.hidden)
