"""What a photo with narrow or shut eyes hides: the hole in an opened eye, and its painter.

Opened wider than the photo shows them, eyes would stare: an iris cut by the lids is drawn out, and what is around it is
made up from what all eyes have in common. The painter sees whose eyes they are: the colour of what the photo shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from export3d_cli.core.model.inpaint.inpainter import (
    CROP_SIZE_PX,
    AlignedCrop,
    Hole,
    InpaintedPatch,
    Inpainter,
    dilate_and_blur,
    level_axes,
    rasterize_in_crop,
    strip_triangles,
    to_image,
)
from export3d_cli.core.model.masks import dilate, linear_step
from export3d_cli.core.model.volume_renderer import pixel_grid, project
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.model.warp.mouth_eye_interior import EYE_RIMS, anchored_coords
from export3d_cli.core.model.warp.rasterizer import interpolate_vertices

EYE_CROP_SCALE = 1.8  # than the eye
UPPER_LID_MIDDLE, LOWER_LID_MIDDLE = 4, 12  # the middles of the lids in a rim
MIN_EYE_OPENING = 0.06  # opening, in widths of the eye, below which nothing is painted; all from twice that on
# How much wider open than in the photo: up to SAME times the photo's own eye is shown, from OTHER times on none of it.
SAME, OTHER = 1.1, 1.35
IRIS_SAMPLE_RADIUS = 0.8  # of its radius: where its colour is read
MIN_IRIS_PIXELS = 20.0  # pixels of a close-up that tell a colour
# Sine of how far an eye is turned away: up to the first all of it is seen, from the second on the nose is before it.
PROFILE_FADE = (0.8, 0.9)
CroppedHole = tuple[AlignedCrop, Hole]


def eyelid_rims(side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Upper and lower lid of an eye (0 the person's right one), from its outer corner to the inner one."""
    rim = EYE_RIMS[side][1]
    return rim[:9], (rim[0], *rim[:7:-1])


def eye_crop(uv: Tensor, side: int) -> AlignedCrop:
    """The square around an eye of landmarks (B, 478, 2) in image sizes; left ones mirrored: the nose to the right."""
    axes = level_axes(uv)
    if side == 1:
        axes = axes * axes.new_tensor([[-1.0], [1.0]])
    rim = uv[:, list(EYE_RIMS[side][1])]
    along = (rim @ axes.transpose(1, 2)).mT  # (B, 2, 16)
    return AlignedCrop(
        (rim[:, 0] + rim[:, 8]) / 2, axes, EYE_CROP_SCALE * (along.amax(2) - along.amin(2)).amax(1).clamp_min(0.01)
    )


def eye_opening(points: Tensor, side: int) -> Tensor:
    """How far apart the lids are in their middle, (B, 478, 3) -> (B,), in widths of the eye."""
    rim = points[:, list(EYE_RIMS[side][1])]
    return (rim[:, UPPER_LID_MIDDLE] - rim[:, LOWER_LID_MIDDLE]).norm(dim=-1) / (rim[:, 0] - rim[:, 8]).norm(
        dim=-1
    ).clamp_min(1e-6)


def eye_visibility(points: Tensor, depth: Tensor, side: int) -> Tensor:
    """How far an eye of landmarks (B, 478, 3) at depths (B, 478) is not behind the nose, (B,) in 0..1."""
    outer, inner = EYE_RIMS[side][1][0], EYE_RIMS[side][1][8]
    away = (depth[:, outer] - depth[:, inner]).abs()
    return 1 - linear_step(away / (points[:, outer] - points[:, inner]).norm(dim=-1).clamp_min(1e-6), *PROFILE_FADE)


def iris_colour(image: Tensor, uv: Tensor, side: int, visible_height: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean colour of what pictures (B, 3, H, W) with landmarks (B, 478, 2) show of an iris.

    Args:
        shown: (B,) which part of its height is looked at, about its centre; None: all.

    Returns:
        (B, 3), and how much it is to be trusted, (B,) in 0..1: 0 where the eye is shut.
    """
    view, iris = eye_crop(uv, side), EYE_RIMS[side][0]
    _, within = rasterize_in_crop(view, uv, strip_triangles(*eyelid_rims(side), uv.device))
    clear = -dilate(-to_image(within), 1)  # lashes have another colour
    at = view.to_crop(uv)[:, iris : iris + 5]
    radius = (at[:, 1:] - at[:, :1]).norm(dim=-1).mean(1)[:, None, None] * IRIS_SAMPLE_RADIUS
    away = (pixel_grid(CROP_SIZE_PX, uv.device) - at[:, :1]) / radius.clamp_min(1e-4)
    disc = away.square().sum(-1, keepdim=True) < 1
    if visible_height is not None:
        disc = disc & (away[..., 1:].abs() < visible_height[:, None, None])
    weight = clear * to_image(disc.float())
    total = weight.sum((1, 2, 3))
    mean = (warp(image, view.pixel_positions(CROP_SIZE_PX)) * weight).sum((2, 3)) / total.clamp_min(1)[:, None]
    return mean, (total / MIN_IRIS_PIXELS).clamp(0, 1)


def eye_hole(points: Tensor, uv: Tensor, side: int, colour: Tensor, confidence: Tensor) -> tuple[AlignedCrop, Hole]:
    """The whole inside of an eye.

    Args:
        points: (B, 478, 3) landmarks of the result, head frame. uv: (B, 478, 2) where they are seen.
        colour, known: (B, 3) and (B,), of the iris, see `iris_colour`.
    """
    view, triangles = eye_crop(uv, side), strip_triangles(*eyelid_rims(side), uv.device)
    raster, within = rasterize_in_crop(view, uv, triangles)
    about = interpolate_vertices(raster, anchored_coords(points)[..., :2].clamp(-2, 2), triangles)  # (B, P, 2)
    told = torch.cat([confidence[:, None], colour * confidence[:, None]], dim=1)[:, None]  # (B, 1, 4)
    return view, Hole(dilate_and_blur(to_image(within)), to_image(torch.cat([within, within * told, about], dim=-1)))


class EyePairInpainter(Inpainter):
    """Paints something of both eyes, so far as the nose does not hide it."""

    def strength(self, photo_points: Tensor, points: Tensor, side: int) -> Tensor:
        """How far landmarks (B, 478, 3) of a result need it, (B,) in 0..1."""
        raise NotImplementedError

    def make_holes(
        self, photo: Tensor, uv_photo: Tensor, visibility: list[Tensor], points: Tensor, uv: Tensor
    ) -> list[CroppedHole]:
        """Of each eye; `known` (B,), of each, is how far the photo shows it."""
        raise NotImplementedError

    def inpaint(
        self, image: Tensor, photo: Tensor, photo_points: Tensor, photo_camera: Tensor, points: Tensor, camera: Tensor
    ) -> list[InpaintedPatch]:
        """See `HolePainter.paint`."""
        amounts = [self.strength(photo_points, points, side) for side in (0, 1)]
        if not any(bool(amount.any()) for amount in amounts):
            return []
        (uv, depth), (uv_photo, depth_photo) = project(points, camera), project(photo_points, photo_camera)
        amounts = [amount * eye_visibility(points, depth, side) for side, amount in enumerate(amounts)]
        known = [eye_visibility(photo_points, depth_photo, side) for side in (0, 1)]
        views, holes = zip(*self.make_holes(photo, uv_photo, known, points, uv), strict=True)
        hole = Hole(*(torch.cat(parts) for parts in zip(*holes, strict=True)))  # both eyes at once
        around = torch.cat([warp(image, view.pixel_positions(CROP_SIZE_PX)) for view in views]) * (1 - hole.mask)
        shown = hole.mask * torch.cat(amounts)[:, None, None, None]
        both = zip(views, self(around, hole).chunk(2), shown.chunk(2), strict=True)
        return [InpaintedPatch(view, colours, hidden) for view, colours, hidden in both]


class EyeInpainter(EyePairInpainter):
    """Its texture is an eye, held by the iris. Facts: inside; how surely the colour is known; the colour; one place."""

    def strength(self, photo_points: Tensor, points: Tensor, side: int) -> Tensor:
        """Eyes that are wider open than in the photo."""
        before, after = eye_opening(photo_points, side), eye_opening(points, side)
        wider = linear_step(after / before.clamp_min(1e-3), SAME, OTHER)
        return wider * ((after - MIN_EYE_OPENING) / MIN_EYE_OPENING).clamp(0, 1)

    def make_holes(
        self, photo: Tensor, uv_photo: Tensor, visibility: list[Tensor], points: Tensor, uv: Tensor
    ) -> list[CroppedHole]:
        """The whole inside of both, in the colour that they have in the photo."""
        seen = [iris_colour(photo, uv_photo, side) for side in (0, 1)]
        share = torch.stack([told * own for (_, told), own in zip(seen, visibility, strict=True)])  # (2, B)
        colour = (torch.stack([c for c, _ in seen]) * share[..., None]).sum(0) / share.sum(0).clamp_min(1e-3)[:, None]
        return [eye_hole(points, uv, side, colour, share.amax(0)) for side in (0, 1)]
