"""Inpainting of an eye opened wider than in the photo, and what eyes and eyelids share.

An iris cut off by the lids would be stretched, and the rest would be the mean of all eyes: a stare. The network gets
the iris colour that the photo shows.
"""

import torch
from torch import Tensor

from export3d_cli.core.face.landmarks import EYE_RIMS
from export3d_cli.core.model.inpaint import inpainter
from export3d_cli.core.model.inpaint.inpainter import INPAINT_SIZE_PX, AlignedCrop, Hole, InpaintedPatch, Inpainter
from export3d_cli.core.model.masks import dilate, linear_step
from export3d_cli.core.model.volume_renderer import pixel_grid, project
from export3d_cli.core.model.warp.mouth_eye_interior import anchored_coords

EYE_CROP_SCALE = 1.8  # side of the crop over the extent of the eye
UPPER_LID_MIDDLE, INNER_CORNER, LOWER_LID_MIDDLE = 4, 8, 12  # positions in a rim of `EYE_RIMS`
MIN_EYE_OPENING = 0.06  # in eye widths; inpainting fades in from this opening to twice it
# Opening in the result over that in the photo: up to the first the photo's eye is kept, from the second on replaced.
EYE_OPENING_FADE = (1.1, 1.35)
IRIS_SAMPLE_RADIUS = 0.8  # of the iris radius: where its colour is measured
BROWN_IRIS = (0.56, 0.37, 0.25)  # likely colour where the photo shows none, over the brightness of the skin around it
MIN_IRIS_PIXELS = 20.0  # pixels of a crop from which on a colour is fully trusted
# Sine of the angle by which an eye is turned away: fully visible up to the first, behind the nose from the second on.
PROFILE_FADE = (0.8, 0.9)
CroppedHole = tuple[AlignedCrop, Hole]


def eyelid_rims(side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return upper and lower lid of an eye (0 the person's right one), from its outer corner to the inner one."""
    rim = EYE_RIMS[side][1]
    return rim[: INNER_CORNER + 1], (rim[0], *rim[: INNER_CORNER - 1 : -1])


def eye_crop(uv: Tensor, side: int) -> AlignedCrop:
    """Return the square around an eye of landmarks (B, 478, 2); left eyes are mirrored: the nose is to the right."""
    axes = inpainter.level_axes(uv)
    if side == 1:
        axes = axes * axes.new_tensor([[-1.0], [1.0]])
    rim = uv[:, list(EYE_RIMS[side][1])]
    along = (rim @ axes.transpose(1, 2)).mT  # (B, 2, 16)
    extent = (along.amax(2) - along.amin(2)).amax(1)
    return AlignedCrop((rim[:, 0] + rim[:, INNER_CORNER]) / 2, axes, EYE_CROP_SCALE * extent.clamp_min(0.01))


def eye_width(points: Tensor, side: int) -> Tensor:
    """Return the distance between the corners of an eye, (B, 478, .) -> (B,)."""
    rim = EYE_RIMS[side][1]
    return (points[:, rim[0]] - points[:, rim[INNER_CORNER]]).norm(dim=-1).clamp_min(1e-6)


def eye_opening(points: Tensor, side: int) -> Tensor:
    """Return the gap between the middles of the lids, (B, 478, 3) -> (B,), in eye widths."""
    rim = EYE_RIMS[side][1]
    gap = (points[:, rim[UPPER_LID_MIDDLE]] - points[:, rim[LOWER_LID_MIDDLE]]).norm(dim=-1)
    return gap / eye_width(points, side)


def eye_visibility(points: Tensor, depth: Tensor, side: int) -> Tensor:
    """Return how far an eye of landmarks (B, 478, 3) at depths (B, 478) is not behind the nose, (B,) in 0..1."""
    rim = EYE_RIMS[side][1]
    depth_gap = (depth[:, rim[0]] - depth[:, rim[INNER_CORNER]]).abs()
    return 1 - linear_step(depth_gap / eye_width(points, side), *PROFILE_FADE)


def iris_colour(image: Tensor, uv: Tensor, side: int, visible_height: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Measure the mean colour (B, 3) of the iris in images (B, 3, H, W), and its confidence (B,), 0 in a shut eye.

    `visible_height` (B,) is the fraction of the iris's height, around its centre, that is used; None: all of it.
    """
    crop, iris = eye_crop(uv, side), EYE_RIMS[side][0]
    inside = crop.draw(uv, *eyelid_rims(side), uv)[:, :1]
    eroded = -dilate(-inside, 1)  # lashes have another colour
    position = crop.to_crop(uv)[:, iris : iris + 5]
    radius = (position[:, 1:] - position[:, :1]).norm(dim=-1).mean(1)[:, None, None] * IRIS_SAMPLE_RADIUS
    offset = (pixel_grid(INPAINT_SIZE_PX, uv.device) - position[:, :1]) / radius.clamp_min(1e-4)
    disc = offset.square().sum(-1, keepdim=True) < 1
    if visible_height is not None:
        disc = disc & (offset[..., 1:].abs() < visible_height[:, None, None])
    weight = eroded * disc.float().view(-1, 1, INPAINT_SIZE_PX, INPAINT_SIZE_PX)
    total = weight.sum((1, 2, 3))
    mean = (crop.sample(image) * weight).sum((2, 3)) / total.clamp_min(1)[:, None]
    return mean, (total / MIN_IRIS_PIXELS).clamp(0, 1)


def eye_hole(points: Tensor, uv: Tensor, side: int, colour: Tensor, confidence: Tensor) -> CroppedHole:
    """Return the whole inside of an eye with the iris colour (B, 3) of `iris_colour`.

    The condition holds: inside 1, confidence of the colour 1, colour 3, coordinates around the iris 2.
    """
    crop = eye_crop(uv, side)
    inside, coords = crop.draw(uv, *eyelid_rims(side), anchored_coords(points)[..., :2].clamp(-2, 2)).split([1, 2], 1)
    iris = torch.cat([confidence[:, None], colour * confidence[:, None]], dim=1)[..., None, None]  # (B, 4, 1, 1)
    return crop, Hole(inpainter.dilate_and_blur(inside), torch.cat([inside, inside * iris, coords], dim=1))


class EyePairInpainter(Inpainter):
    """Inpaints a part of both eyes, unless the nose hides it."""

    def strength(self, photo_points: Tensor, points: Tensor, side: int) -> Tensor:
        """Return how much the landmarks (B, 478, 3) of a result need inpainting, (B,) in 0..1."""
        raise NotImplementedError

    def make_holes(self, photo: Tensor, uv_photo: Tensor, visibility: list[Tensor], points: Tensor,
                   uv: Tensor) -> list[CroppedHole]:  # fmt: skip
        """Return the hole of each eye; `visibility` holds, for each, how far the photo shows it, (B,) in 0..1."""
        raise NotImplementedError

    def inpaint(self, image: Tensor, photo: Tensor, photo_points: Tensor, photo_camera: Tensor, points: Tensor,
                camera: Tensor) -> list[InpaintedPatch]:  # fmt: skip
        """See `Inpainter.inpaint`."""
        strengths = [self.strength(photo_points, points, side) for side in (0, 1)]
        if not any(bool(strength.any()) for strength in strengths):
            return []
        (uv, depth), (uv_photo, depth_photo) = project(points, camera), project(photo_points, photo_camera)
        strengths = [strength * eye_visibility(points, depth, side) for side, strength in enumerate(strengths)]
        visibility = [eye_visibility(photo_points, depth_photo, side) for side in (0, 1)]
        crops, holes = zip(*self.make_holes(photo, uv_photo, visibility, points, uv), strict=True)
        hole = Hole(*(torch.cat(parts) for parts in zip(*holes, strict=True)))  # both eyes in one batch
        context = torch.cat([crop.sample(image) for crop in crops]) * (1 - hole.mask)
        mask = hole.mask * torch.cat(strengths)[:, None, None, None]
        per_eye = zip(crops, self(context, hole).chunk(2), mask.chunk(2), strict=True)
        return [InpaintedPatch(*patch) for patch in per_eye]


class EyeInpainter(EyePairInpainter):
    """Its texture is an eye, fixed to the iris."""

    def strength(self, photo_points: Tensor, points: Tensor, side: int) -> Tensor:
        """Select eyes that are wider open than in the photo."""
        before, after = eye_opening(photo_points, side), eye_opening(points, side)
        wider = linear_step(after / before.clamp_min(1e-3), *EYE_OPENING_FADE)
        return wider * ((after - MIN_EYE_OPENING) / MIN_EYE_OPENING).clamp(0, 1)

    def make_holes(self, photo: Tensor, uv_photo: Tensor, visibility: list[Tensor], points: Tensor,
                   uv: Tensor) -> list[CroppedHole]:  # fmt: skip
        """Return the whole inside of both eyes, with the mean iris colour of the photo's visible eyes, or a brown."""
        colours, confidences = zip(*(iris_colour(photo, uv_photo, side) for side in (0, 1)), strict=True)
        weight = torch.stack([c * v for c, v in zip(confidences, visibility, strict=True)])  # (2, B)
        colour = (torch.stack(colours) * weight[..., None]).sum(0) / weight.sum(0).clamp_min(1e-3)[:, None]
        skin = torch.stack([eye_crop(uv_photo, side).sample(photo).mean((1, 2, 3)) + 1 for side in (0, 1)]).amax(0)
        brown = skin[:, None] * skin.new_tensor(BROWN_IRIS) - 1  # (B, 3)
        colour = torch.lerp(brown, colour, weight.amax(0)[:, None])
        return [eye_hole(points, uv, side, colour, torch.ones_like(skin)) for side in (0, 1)]
