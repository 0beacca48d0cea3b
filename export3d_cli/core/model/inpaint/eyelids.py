"""What a photo with open eyes hides: the upper lid that comes down, and its painter.

An open eye keeps its lid folded away. Drawn out of the narrow band that the photo shows of it, a lid would be fold,
lashes and shade in one, and where the network cannot tell, grey. The painter sees that band, and the face around.
"""

from __future__ import annotations

import torch
from torch import Tensor

from export3d_cli.core.model.inpaint.eyes import CroppedHole, EyePairInpainter, eye_crop
from export3d_cli.core.model.inpaint.inpainter import (
    AlignedCrop,
    Hole,
    dilate_and_blur,
    rasterize_in_crop,
    strip_triangles,
    to_image,
)
from export3d_cli.core.model.masks import linear_step
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.model.warp.mouth_eye_interior import EYE_RIMS
from export3d_cli.core.model.warp.rasterizer import interpolate_vertices

# Landmarks along the fold above each eye, from its outer corner to the inner one, between the corners.
EYELID_FOLDS = ((247, 30, 29, 27, 28, 56, 190), (467, 260, 259, 257, 258, 286, 414))
LASH_LENGTH = 0.06  # how far they hang below the rim of the lid, in widths of the eye
# How much higher the lid is than in the photo: up to SAME times the photo's own is shown, from OTHER times on none.
SAME, OTHER = 1.15, 1.5
MIN_CONTEXT_COLOUR = 0.02  # of a channel of the face around, of 1


def eyelid_fold_and_rim(side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Fold and rim of an upper lid (0 the person's right one), from the outer corner of the eye to the inner one."""
    rim = EYE_RIMS[side][1]
    return (rim[0], *EYELID_FOLDS[side], rim[8]), rim[:9]


def eyelid_height(points: Tensor, side: int) -> Tensor:
    """From rim to fold in the middle of a lid, (B, 478, 3) -> (B,), in widths of the eye."""
    fold, rim = (points[:, list(edge)] for edge in eyelid_fold_and_rim(side))
    return (fold - rim)[:, 3:6].norm(dim=-1).mean(1) / (rim[:, 0] - rim[:, 8]).norm(dim=-1).clamp_min(1e-6)


def eyelid_hole(uv: Tensor, side: int, photo: Tensor, uv_photo: Tensor, visibility: Tensor) -> tuple[AlignedCrop, Hole]:
    """An upper lid and its lashes.

    Args:
        uv: (B, 478, 2) where the landmarks of the result are seen.
        photo, uv_photo: (B, 3, H, W), which shows the band of an open eye, and where it has the landmarks.
        known: (B,) 1 where it does, else 0: then the lid is made of the face around alone.
    """
    view, (fold, rim) = eye_crop(uv, side), eyelid_fold_and_rim(side)
    edge = uv.clone()
    width = (uv[:, rim[0]] - uv[:, rim[8]]).norm(dim=-1)[:, None, None]
    edge[:, list(rim[1:8])] += view.axes[:, 1:] * width * LASH_LENGTH
    triangles = strip_triangles(fold, rim, uv.device)
    raster, within = rasterize_in_crop(view, edge, triangles)
    places = uv.new_zeros(uv.shape[1], 2)  # on the lid: across -1..1, and from the fold, -1, to the lashes, 1
    across = torch.linspace(-1, 1, len(rim), device=uv.device)
    for line, down in ((fold, -1.0), (rim, 1.0)):
        places[list(line)] = torch.stack([across, torch.full_like(across, down)], dim=-1)
    vertex = torch.cat([places.expand(len(uv), -1, -1), uv_photo], dim=-1)
    about, at = interpolate_vertices(raster, vertex, triangles).split(2, dim=-1)  # (B, P, 2) each
    facts = to_image(torch.cat([within, within * visibility[:, None, None], about], dim=-1))
    drawn = warp(photo, to_image(at)) * facts[:, 1:2]  # the band, drawn out
    return view, Hole(dilate_and_blur(facts[:, :1]), torch.cat([facts[:, :2], drawn, facts[:, 2:]], dim=1))


class EyelidInpainter(EyePairInpainter):
    """Its texture is a lid. Facts: inside; whether a photo is known; what it has there; one place."""

    def forward(self, context: Tensor, hole: Hole) -> Tensor:
        """See `HolePainter.forward`. To the painter all faces are grey: it gives back the colour of skin and light."""
        seen = 1 - hole.mask
        mean = (context + seen).sum((2, 3), keepdim=True) / 2 / seen.sum((2, 3), keepdim=True).clamp_min(1)
        gain = mean.mean(1, keepdim=True).clamp_min(MIN_CONTEXT_COLOUR) / mean.clamp_min(
            MIN_CONTEXT_COLOUR
        )  # (B, 3, 1, 1)
        inside, known, drawn, about = hole.condition.split([1, 1, 3, 2], dim=1)
        facts = torch.cat([inside, known, (drawn + known) * gain - known, about], dim=1)
        colours = super().forward((context + seen) * gain - seen, Hole(hole.mask, facts))
        return ((colours + 1) / gain - 1).clamp(-1, 1)

    def strength(self, photo_points: Tensor, points: Tensor, side: int) -> Tensor:
        """Lids that are lower than in the photo."""
        return linear_step(eyelid_height(points, side) / eyelid_height(photo_points, side).clamp_min(1e-3), SAME, OTHER)

    def make_holes(
        self, photo: Tensor, uv_photo: Tensor, visibility: list[Tensor], points: Tensor, uv: Tensor
    ) -> list[CroppedHole]:
        """Both upper lids and their lashes."""
        return [eyelid_hole(uv, side, photo, uv_photo, visibility[side]) for side in (0, 1)]
