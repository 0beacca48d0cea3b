"""What a photo with shut lips hides: the hole in an opened mouth, and its painter. What the photo does show stays."""

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
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.model.warp.mouth_eye_interior import (
    EYE_RIMS,
    LOWER_INNER_LIP,
    MAX_OPENING_RATIO,
    UPPER_INNER_LIP,
    anchored_coords,
    interior_visibility,
    lip_edges,
    mouth_coords,
)
from export3d_cli.core.model.warp.rasterizer import interpolate_vertices

MOUTH_CROP_SCALE = 1.3  # than the lips
OUTER_LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)  # outer
MIN_MOUTH_OPENING = (
    0.012  # opening, in distances between the eyes, below which nothing is painted; all from twice that on
)
LOWER_LIP_VISIBILITY = (
    0.75  # `mouth.shown_above` at the lower lip of a mouth as open as in the photo: there nothing is hidden
)
# A slit between lips shows little: where a photo's lips are less than CLEAR apart, all the more by SLIT less, what is
# seen between them is soon given up for what is painted, as if they opened farther; unless they open no farther.
SLIT_OPENING, SLIT_FADE, SLIT_GAIN = 0.1, 0.06, 10.0
# Blue over green beyond that of the face around, in [-1, 1]: 95 of 100 pixels in mouths have less, and of more the
# painter, which errs to violet in wide open ones, may keep a part.
MAX_VIOLET, VIOLET_KEEP_RATIO = 0.14, 0.25


def mouth_crop(uv: Tensor) -> AlignedCrop:
    """The square around the lips of landmarks (B, 478, 2) in image sizes."""
    axes = level_axes(uv)
    lips = uv[:, list(OUTER_LIPS)] @ axes.transpose(1, 2)
    low, high = lips.amin(1), lips.amax(1)
    centre = ((low + high) / 2)[:, None] @ axes
    return AlignedCrop(centre[:, 0], axes, MOUTH_CROP_SCALE * (high - low).amax(1).clamp_min(0.01))


def mouth_opening(points: Tensor) -> Tensor:
    """How far apart the lips are in their middle, (B, 478, 3) -> (B,), in distances between the outer eye corners."""
    middle = len(UPPER_INNER_LIP) // 2
    gap = (points[:, UPPER_INNER_LIP[middle]] - points[:, LOWER_INNER_LIP[middle]]).norm(dim=-1)
    return gap / (points[:, EYE_RIMS[0][1][0]] - points[:, EYE_RIMS[1][1][0]]).norm(dim=-1).clamp_min(1e-6)


def mouth_hole(points: Tensor, uv: Tensor, opening_ratio: Tensor) -> tuple[AlignedCrop, Hole]:
    """The inside of a mouth, and what of it no photo shows.

    Args:
        points: (B, 478, 3) landmarks of the result, head frame. uv: (B, 478, 2) where they are seen.
        wider: (B, 478, 1) how much wider than in the photo the lips are open, see `mouth.lip_edges`.
    """
    view, triangles = mouth_crop(uv), strip_triangles(UPPER_INNER_LIP, LOWER_INNER_LIP, uv.device)
    raster, within = rasterize_in_crop(view, uv, triangles)
    places = mouth_coords().to(uv.device).expand(len(uv), -1, -1)
    vertex = torch.cat([places, anchored_coords(points).clamp(-2, 2), opening_ratio], dim=-1)  # (B, 478, 7)
    facts = interpolate_vertices(raster, vertex, triangles)  # (B, P, 7), 0 where no triangle is
    hidden = within * (1 - interior_visibility(facts[..., 1:2], facts[..., 6:]) / LOWER_LIP_VISIBILITY).clamp_min(0)
    fade = ((mouth_opening(points) - MIN_MOUTH_OPENING) / MIN_MOUTH_OPENING).clamp(0, 1)
    return view, Hole(
        dilate_and_blur(to_image(hidden)) * fade[:, None, None, None],
        to_image(torch.cat([within, facts[..., :6]], dim=-1)),
    )


def suppress_violet(colours: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """Painted colours (B, 3, s, s) without more violet than a mouth has; `around` is 0 where `hidden` (B, 1, s, s)."""
    red, green, blue = colours.split(1, dim=1)
    face = context.sum((2, 3)) / (1 - mask).sum((2, 3)).clamp_min(1)  # (B, 3)
    usual = (face[:, 2] - face[:, 1])[:, None, None, None]
    excess = (blue - green - usual - MAX_VIOLET).clamp_min(0)
    return torch.cat([red, green, blue - (1 - VIOLET_KEEP_RATIO) * excess], dim=1)


class MouthInpainter(Inpainter):
    """Its textures are upper and lower teeth, held by skull and jaw. Facts: inside; across and up; two places."""

    texture_count = 2

    def inpaint(
        self, image: Tensor, photo: Tensor, photo_points: Tensor, photo_camera: Tensor, points: Tensor, camera: Tensor
    ) -> list[InpaintedPatch]:
        """Fill mouths that are wider open than in the photo, see `HolePainter.paint`."""
        uv, _ = project(points, camera)
        uv_photo, _ = project(photo_points, photo_camera)
        wider = lip_edges(uv_photo, photo_points, points)[..., 4:]
        doubt = ((SLIT_OPENING - mouth_opening(photo_points)) / SLIT_FADE).clamp(0, 1) * SLIT_GAIN
        wider = (1 + (wider - 1) * (1 + doubt[:, None, None])).clamp(0, MAX_OPENING_RATIO)
        view, hole = mouth_hole(points, uv, wider)
        if not bool(hole.mask.any()):
            return []
        around = warp(image, view.pixel_positions(CROP_SIZE_PX)) * (1 - hole.mask)
        return [InpaintedPatch(view, suppress_violet(self(around, hole), around, hole.mask), hole.mask)]
