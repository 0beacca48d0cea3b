"""Inpainting of an opened mouth: the part of its inside that the photo does not show. What it does show is kept."""

import torch
from torch import Tensor

from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.model.inpaint import inpainter
from export3d_cli.core.model.inpaint.inpainter import AlignedCrop, Hole, InpaintedPatch, Inpainter
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp import mouth_eye_interior as interior

MOUTH_CROP_SCALE = 1.3  # side of the crop over the extent of the lips
# Openings are in distances between the outer eye corners.
MIN_MOUTH_OPENING = 0.012  # inpainting fades in from this opening to twice it
LOWER_LIP_VISIBILITY = 0.75  # `interior_visibility` at the lower lip of a mouth as open as in the photo: nothing hidden
# A slit between lips shows little: where the photo's lips are less than SLIT_OPENING apart, the mouth is treated as
# opening farther than it does, by up to SLIT_GAIN at SLIT_FADE less; unless it opens no farther than in the photo.
SLIT_OPENING, SLIT_FADE, SLIT_GAIN = 0.1, 0.06, 10.0
# Excess of blue over green, relative to the surrounding face, in [-1, 1]: 95 % of mouth pixels have less. The network
# errs to violet in wide open mouths; of the excess beyond MAX_VIOLET it keeps this ratio.
MAX_VIOLET, VIOLET_KEEP_RATIO = 0.14, 0.25


def mouth_crop(uv: Tensor) -> AlignedCrop:
    """Return the square around the lips of landmarks (B, 478, 2)."""
    axes = inpainter.level_axes(uv)
    lips = uv[:, list(mesh.OUTER_LIPS)] @ axes.transpose(1, 2)
    low, high = lips.amin(1), lips.amax(1)
    centre = ((low + high) / 2)[:, None] @ axes
    return AlignedCrop(centre[:, 0], axes, MOUTH_CROP_SCALE * (high - low).amax(1).clamp_min(0.01))


def mouth_opening(points: Tensor) -> Tensor:
    """Return the gap between the middles of the lips, (B, 478, 3) -> (B,), in distances between outer eye corners."""
    middle = len(mesh.UPPER_INNER_LIP) // 2
    gap = (points[:, mesh.UPPER_INNER_LIP[middle]] - points[:, mesh.LOWER_INNER_LIP[middle]]).norm(dim=-1)
    return gap / (points[:, mesh.RIGHT_EYE_OUTER] - points[:, mesh.LEFT_EYE_OUTER]).norm(dim=-1).clamp_min(1e-6)


def mouth_hole(points: Tensor, uv: Tensor, opening_ratio: Tensor) -> tuple[AlignedCrop, Hole]:
    """Return the inside of a mouth, masked where the photo does not show it.

    The condition holds: inside 1, mouth coordinates 2, coordinates of upper and of lower teeth, 2 each.
    `opening_ratio` (B, 478, 1): how much wider open the lips are than in the photo, see `lip_edges`.
    """
    crop = mouth_crop(uv)
    coords = interior.mouth_coords().to(uv.device).expand(len(uv), -1, -1)
    vertex = torch.cat([coords, interior.anchored_coords(points).clamp(-2, 2), opening_ratio], dim=-1)  # (B, 478, 7)
    condition, ratio = crop.draw(uv, mesh.UPPER_INNER_LIP, mesh.LOWER_INNER_LIP, vertex).split([7, 1], dim=1)
    inside, visibility = condition[:, :1], interior.interior_visibility(condition[:, 2:3], ratio)
    hidden = inside * (1 - visibility / LOWER_LIP_VISIBILITY).clamp_min(0)
    fade = ((mouth_opening(points) - MIN_MOUTH_OPENING) / MIN_MOUTH_OPENING).clamp(0, 1)
    return crop, Hole(inpainter.dilate_and_blur(hidden) * fade[:, None, None, None], condition)


def suppress_violet(colours: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """Reduce violet beyond that of a mouth in colours (B, 3, s, s); `context` is 0 inside the `mask` (B, 1, s, s)."""
    red, green, blue = colours.split(1, dim=1)
    face = context.sum((2, 3)) / (1 - mask).sum((2, 3)).clamp_min(1)  # (B, 3)
    usual = (face[:, 2] - face[:, 1])[:, None, None, None]
    excess = (blue - green - usual - MAX_VIOLET).clamp_min(0)
    return torch.cat([red, green, blue - (1 - VIOLET_KEEP_RATIO) * excess], dim=1)


class MouthInpainter(Inpainter):
    """Its textures are the upper and lower teeth, fixed to skull and jaw."""

    texture_count = 2

    def inpaint(self, image: Tensor, photo: Tensor, photo_points: Tensor, photo_camera: Tensor, points: Tensor,
                camera: Tensor) -> list[InpaintedPatch]:  # fmt: skip
        """Inpaint mouths that are wider open than in the photo, see `Inpainter.inpaint`."""
        uv, _ = project(points, camera)
        uv_photo, _ = project(photo_points, photo_camera)
        ratio = interior.lip_edges(uv_photo, photo_points, points)[..., 4:]
        slit_gain = ((SLIT_OPENING - mouth_opening(photo_points)) / SLIT_FADE).clamp(0, 1) * SLIT_GAIN
        ratio = (1 + (ratio - 1) * (1 + slit_gain[:, None, None])).clamp(0, interior.MAX_OPENING_RATIO)
        crop, hole = mouth_hole(points, uv, ratio)
        if not bool(hole.mask.any()):
            return []
        context = crop.sample(image) * (1 - hole.mask)
        return [InpaintedPatch(crop, suppress_violet(self(context, hole), context, hole.mask), hole.mask)]
