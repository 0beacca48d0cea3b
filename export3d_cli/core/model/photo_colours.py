"""The colours of a photo: the light on the face, and the range that synthesised colours must stay within.

The network and its inpainters are trained on faces in white light. They see a face in coloured light, or a black-and-
white one, with a usual skin colour, and their result gets the light back. What they synthesise then stays within the
photo's own chroma: grey photos stay grey, sepia stays sepia.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.model.masks import linear_step
from export3d_cli.core.model.warp.mesh_flow import resize, warp

SKIN_POINTS = (151, 5, 50, 280, 199)  # landmarks on forehead, nose, both cheeks and chin
SKIN_GRID = 16  # cells along the photo's side; the skin around a point is as large as one
# log(R / G) and log(B / G) of gamma-encoded skin in white light: mean, and half axes of an ellipse. Of 376 colour
# portraits, 2 % lie outside by more than the first radius of SKIN_FADE; grey has the radius 1.3.
SKIN_MEAN, SKIN_EXTENT = (0.34, -0.10), (0.27, 0.32)
SKIN_FADE = (1.1, 1.3)  # radii in which the light counts as white, and from which on as coloured
MIN_CHANNEL = 0.02  # lower bound of measured channels, 0..1
MAX_LIGHT = 5.0  # largest ratio of a light's channel to the mean of all
# Orthonormal chroma axes: red against green, yellow against blue.
CHROMA_AXES = ((0.5**0.5, -(0.5**0.5), 0.0), (6**-0.5, 6**-0.5, -2 * 6**-0.5))
CURVE_DEGREE = 3
CHROMA_NOISE = 0.02  # standard deviation of chroma up to which a photo is of one tint; in colour it is 0.025 and more
CHROMA_SPREAD = 16.0  # how far synthesised chroma may be from the curve, over the deviation beyond CHROMA_NOISE
FREE_REACH = 0.3  # from this reach on, no colours are limited: faces in colour have few such chromas


def light_colour(photo: Tensor, uv: Tensor) -> Tensor:
    """Return the ratio (B, 3, 1, 1) of each gamma-encoded channel to that in white light, on the face in photos.

    1 unless all parts of the face have an unusual colour: a mask or a beard covers only some of them.
    """
    cells = F.adaptive_avg_pool2d(photo.float(), 2 * SKIN_GRID)
    points = uv[:, list(SKIN_POINTS)].transpose(1, 2)[..., None].float()  # (B, 2, 5, 1)
    place = (points * 2 * SKIN_GRID - 0.5) / (2 * SKIN_GRID - 1)
    skin = (warp(F.avg_pool2d(cells, 2, stride=1), place)[..., 0] + 1) / 2
    log = skin.clamp_min(MIN_CHANNEL).log()  # (B, 3, 5)
    ratio = torch.stack([log[:, 0] - log[:, 1], log[:, 2] - log[:, 1]], dim=1)  # (B, 2, 5)
    deviation = ratio - ratio.new_tensor(SKIN_MEAN)[:, None]
    radius = (deviation / ratio.new_tensor(SKIN_EXTENT)[:, None]).norm(dim=1)  # (B, 5)
    radius, usual = radius.min(1, keepdim=True)
    deviation = deviation.gather(2, usual[:, None].expand(-1, 2, -1))[..., 0]  # (B, 2)
    deviation = deviation * linear_step(radius, *SKIN_FADE)
    light = torch.stack([deviation[:, 0], torch.zeros_like(deviation[:, 0]), deviation[:, 1]], dim=1).exp()
    light = (light / light.mean(1, keepdim=True)).clamp(1 / MAX_LIGHT, MAX_LIGHT)
    return light[..., None, None]


def add_light(image: Tensor, light: Tensor) -> Tensor:
    """Show images (B, 3, H, W) in [-1, 1], seen in white light, in the light of `light_colour`."""
    return (image + 1) * light - 1


def remove_light(image: Tensor, light: Tensor) -> Tensor:
    """Undo `add_light`."""
    return (image + 1) / light - 1


class ColourRange(NamedTuple):
    """The chroma of a photo's pixels: a curve over luminance, the channels' mean, and how far others may be from it."""

    curve: Tensor  # (B, 2, CURVE_DEGREE + 1) coefficients of the powers of luminance
    reach: Tensor  # (B,) along each axis
    luminance: Tensor  # (B, 2) least and greatest

    @classmethod
    def measure(cls, photo: Tensor, weight: Tensor) -> ColourRange:
        """Measure photos (B, 3, H, W) in [-1, 1] where `weight` (B, 1, H, W) is not 0."""
        pixels, weights = photo.flatten(2).cpu().double(), weight.flatten(1).cpu().double()
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-6)
        chroma = pixels.new_tensor(CHROMA_AXES) @ pixels  # (B, 2, P)
        y = pixels.mean(1)
        counts = weights > weights.amax(1, keepdim=True) / 2
        span = torch.stack([y.where(counts, torch.inf).amin(1), y.where(counts, -torch.inf).amax(1)], dim=1)
        powers = torch.stack([y**k for k in range(CURVE_DEGREE + 1)], dim=1)  # (B, K, P)
        moments = (powers * weights[:, None]) @ powers.mT + 1e-9 * torch.eye(CURVE_DEGREE + 1, dtype=y.dtype)
        curve = torch.linalg.solve(moments, (powers * weights[:, None]) @ chroma.mT).mT  # (B, 2, K)
        deviation = (((chroma - curve @ powers).square() * weights[:, None]).sum((1, 2))).sqrt()
        reach = CHROMA_SPREAD * (deviation - CHROMA_NOISE).clamp_min(0)
        return cls(*(x.to(photo.device, torch.float32) for x in (curve, reach, span)))

    def limit(self, image: Tensor) -> Tensor:
        """Return images (B, 3, H, W) with their chroma brought within the range; luminance is kept."""
        with torch.autocast(image.device.type, enabled=False):
            axes = image.new_tensor(((1 / 3,) * 3, *CHROMA_AXES))
            y, chroma = (axes @ image.flatten(2)).split([1, 2], dim=1)  # (B, 1, P), (B, 2, P)
            t = y.clamp(self.luminance[:, :1, None], self.luminance[:, 1:, None])
            first, *others = self.curve.flip(2).split(1, dim=2)  # (B, 2, 1) each, of falling powers
            curve = first
            for coefficient in others:
                curve = torch.addcmul(coefficient, curve, t)
            curve = curve * ((y + 1) / (t + 1).clamp_min(1e-3))  # in proportion to luminance beyond the measured range
            chroma = chroma.clamp(curve - self.reach[:, None, None], curve + self.reach[:, None, None])
            return torch.baddbmm(y, axes[1:].T.expand(len(y), -1, -1), chroma).view_as(image)


class PhotoColours(NamedTuple):
    """What is known of a photo's colours; its images are in the light of the photo."""

    light: Tensor  # (B, 3, 1, 1), see `light_colour`
    range: ColourRange  # of the head in white light

    @classmethod
    def measure(cls, photo: Tensor, uv: Tensor, head_mask: Tensor) -> PhotoColours | None:
        """Measure photos (B, 3, H, W), landmarks uv (B, 478, 2), head (B, 1, ., .); None: nothing has to change."""
        light = light_colour(photo, uv)
        photo = remove_light(photo, light)
        head = ColourRange.measure(photo, resize(head_mask, photo.shape[-1]))
        if bool((light == 1).all() and (head.reach >= FREE_REACH).all()):
            return None
        return cls(light, head)

    def show(self, image: Tensor) -> Tensor:
        """Bring synthesised images (B, 3, s, s) in white light within the range, and show them in the photo's light."""
        return add_light(self.range.limit(image), self.light)
