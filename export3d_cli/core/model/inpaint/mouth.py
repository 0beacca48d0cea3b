"""What a photo with shut lips hides: the hole in an opened mouth, and its painter. What the photo does show stays."""

from __future__ import annotations

import torch
from torch import Tensor

from export3d_cli.core.model.inpaint.inpainter import (
    SIDE,
    CloseUp,
    Hole,
    HolePainter,
    Painted,
    inside,
    level,
    picture,
    soften,
    strip,
)
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.model.warp.mouth_eye_interior import (
    LOWER_LIP,
    RIMS,
    UPPER_LIP,
    WIDEST,
    anchored_places,
    lip_edges,
    mouth_places,
    shown_above,
)
from export3d_cli.core.model.warp.rasterizer import interpolate

WIDER = 1.3  # than the lips
LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)  # outer
SHUT = 0.012  # opening, in distances between the eyes, below which nothing is painted; all from twice that on
AT_LIP = 0.75  # `mouth.shown_above` at the lower lip of a mouth as open as in the photo: there nothing is hidden
# A slit between lips shows little: where a photo's lips are less than CLEAR apart, all the more by SLIT less, what is
# seen between them is soon given up for what is painted, as if they opened farther; unless they open no farther.
CLEAR, SLIT, DOUBT = 0.1, 0.06, 10.0
# Blue over green beyond that of the face around, in [-1, 1]: 95 of 100 pixels in mouths have less, and of more the
# painter, which errs to violet in wide open ones, may keep a part.
VIOLET, KEPT = 0.14, 0.25


def close_up(uv: Tensor) -> CloseUp:
    """The square around the lips of landmarks (B, 478, 2) in image sizes."""
    axes = level(uv)
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
    view, triangles = close_up(uv), strip(UPPER_LIP, LOWER_LIP, uv.device)
    raster, within = inside(view, uv, triangles)
    places = mouth_places().to(uv.device).expand(len(uv), -1, -1)
    vertex = torch.cat([places, anchored_places(points).clamp(-2, 2), wider], dim=-1)  # (B, 478, 7)
    facts = interpolate(raster, vertex, triangles)  # (B, P, 7), 0 where no triangle is
    hidden = within * (1 - shown_above(facts[..., 1:2], facts[..., 6:]) / AT_LIP).clamp_min(0)
    fade = ((opening(points) - SHUT) / SHUT).clamp(0, 1)
    return view, Hole(
        soften(picture(hidden)) * fade[:, None, None, None], picture(torch.cat([within, facts[..., :6]], dim=-1))
    )


def less_violet(colours: Tensor, around: Tensor, hidden: Tensor) -> Tensor:
    """Painted colours (B, 3, s, s) without more violet than a mouth has; `around` is 0 where `hidden` (B, 1, s, s)."""
    red, green, blue = colours.split(1, dim=1)
    face = around.sum((2, 3)) / (1 - hidden).sum((2, 3)).clamp_min(1)  # (B, 3)
    usual = (face[:, 2] - face[:, 1])[:, None, None, None]
    excess = (blue - green - usual - VIOLET).clamp_min(0)
    return torch.cat([red, green, blue - (1 - KEPT) * excess], dim=1)


class MouthPainter(HolePainter):
    """Its textures are upper and lower teeth, held by skull and jaw. Facts: inside; across and up; two places."""

    count = 2

    def paint(
        self, image: Tensor, photo: Tensor, photo_points: Tensor, photo_camera: Tensor, points: Tensor, camera: Tensor
    ) -> list[Painted]:
        """Fill mouths that are wider open than in the photo, see `HolePainter.paint`."""
        uv, _ = project(points, camera)
        uv_photo, _ = project(photo_points, photo_camera)
        wider = lip_edges(uv_photo, photo_points, points)[..., 4:]
        doubt = ((CLEAR - opening(photo_points)) / SLIT).clamp(0, 1) * DOUBT
        wider = (1 + (wider - 1) * (1 + doubt[:, None, None])).clamp(0, WIDEST)
        view, hole = mouth_hole(points, uv, wider)
        if not bool(hole.hidden.any()):
            return []
        around = warp(image, view.positions(SIDE)) * (1 - hole.hidden)
        return [Painted(view, less_violet(self(around, hole), around, hole.hidden), hole.hidden)]
