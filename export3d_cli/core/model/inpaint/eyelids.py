"""Inpainting of an upper eyelid that closes farther than in the photo.

An open eye keeps its lid folded away. Stretched from the narrow band that the photo shows, it would be fold, lashes and
shadow in one, and grey where the network is unsure. The inpainter gets that band and the face around it.
"""

import torch
from torch import Tensor

from export3d_cli.core.face.landmarks import EYELID_FOLDS
from export3d_cli.core.model.inpaint.eyes import CroppedHole, EyePairInpainter, eye_crop, eye_width, eyelid_rims
from export3d_cli.core.model.inpaint.inpainter import Hole, dilate_and_blur
from export3d_cli.core.model.masks import linear_step
from export3d_cli.core.model.warp.mesh_flow import warp

LASH_LENGTH = 0.06  # below the rim of the lid, in eye widths
# Lid height in the result over that in the photo: up to the first the photo's lid is kept, from the second on replaced.
EYELID_HEIGHT_FADE = (1.15, 1.5)
MIN_CONTEXT_COLOUR = 0.02  # lower bound of the surrounding face's mean channels, 0..1


def eyelid_fold_and_rim(side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return fold and rim of an upper lid (0 the person's right one), from the eye's outer corner to the inner one."""
    rim, _ = eyelid_rims(side)
    return (rim[0], *EYELID_FOLDS[side], rim[-1]), rim


def eyelid_height(points: Tensor, side: int) -> Tensor:
    """Return the distance from rim to fold in the middle of a lid, (B, 478, 3) -> (B,), in eye widths."""
    fold, rim = (points[:, list(edge)] for edge in eyelid_fold_and_rim(side))
    return (fold - rim)[:, 3:6].norm(dim=-1).mean(1) / eye_width(points, side)


def eyelid_hole(uv: Tensor, side: int, photo: Tensor, uv_photo: Tensor, visibility: Tensor) -> CroppedHole:
    """Return an upper lid and its lashes.

    The condition holds: inside 1, visibility in the photo 1, the photo's stretched lid 3, coordinates on the lid 2. At
    `visibility` (B,) 0 the lid is inpainted from the surrounding face alone.
    """
    crop, (fold, rim) = eye_crop(uv, side), eyelid_fold_and_rim(side)
    uv_lashes = uv.clone()
    width = eye_width(uv, side)[:, None, None]
    uv_lashes[:, list(rim[1:-1])] += crop.axes[:, 1:] * width * LASH_LENGTH
    coords = uv.new_zeros(uv.shape[1], 2)  # x -1..1 across the lid, y -1 at the fold and 1 at the lashes
    across = torch.linspace(-1, 1, len(rim), device=uv.device)
    for edge, down in ((fold, -1.0), (rim, 1.0)):
        coords[list(edge)] = torch.stack([across, torch.full_like(across, down)], dim=-1)
    vertex = torch.cat([coords.expand(len(uv), -1, -1), uv_photo], dim=-1)
    inside, lid_coords, lid_uv = crop.draw(uv_lashes, fold, rim, vertex).split([1, 2, 2], dim=1)
    visible = inside * visibility[:, None, None, None]
    condition = torch.cat([inside, visible, warp(photo, lid_uv) * visible, lid_coords], dim=1)
    return crop, Hole(dilate_and_blur(inside), condition)


class EyelidInpainter(EyePairInpainter):
    """Its texture is an eyelid."""

    def forward(self, context: Tensor, hole: Hole) -> Tensor:
        """See `Inpainter.forward`; the network sees grey faces: skin and light colour are divided out and restored."""
        outside = 1 - hole.mask
        mean = (context + outside).sum((2, 3), keepdim=True) / 2 / outside.sum((2, 3), keepdim=True).clamp_min(1)
        gain = mean.mean(1, keepdim=True).clamp_min(MIN_CONTEXT_COLOUR) / mean.clamp_min(MIN_CONTEXT_COLOUR)
        inside, visibility, lid, coords = hole.condition.split([1, 1, 3, 2], dim=1)
        condition = torch.cat([inside, visibility, (lid + visibility) * gain - visibility, coords], dim=1)
        colours = super().forward((context + outside) * gain - outside, Hole(hole.mask, condition))
        return ((colours + 1) / gain - 1).clamp(-1, 1)

    def strength(self, photo_points: Tensor, points: Tensor, side: int) -> Tensor:
        """Select lids that are lower than in the photo."""
        ratio = eyelid_height(points, side) / eyelid_height(photo_points, side).clamp_min(1e-3)
        return linear_step(ratio, *EYELID_HEIGHT_FADE)

    def make_holes(self, photo: Tensor, uv_photo: Tensor, visibility: list[Tensor], points: Tensor,
                   uv: Tensor) -> list[CroppedHole]:  # fmt: skip
        """Return both upper lids and their lashes."""
        return [eyelid_hole(uv, side, photo, uv_photo, visibility[side]) for side in (0, 1)]
