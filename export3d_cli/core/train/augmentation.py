"""Adaptive augmentation of what the discriminator sees (Karras et al. 2020), so that few images do not overfit it.

Results and real images are changed alike; while the probability stays below about 0.8 the generator does not learn to
make changed images. Geometry is sampled bilinearly with reflected borders, once, by the product of all its matrices.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from export3d_cli.core.config.schema import AdversarialConfig

# deviations of the changes: as published, but for the pixel-exact shifts, which are bilinear here as everything else
SCALE, ANISOTROPY, SHIFT = 0.2, 0.2, 0.25  # octaves, octaves, halves of a side (also the most of the even shift)
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.5, 1.0  # of [-1, 1]; octaves; octaves
P_MOST = 0.999


class Adaptive:
    """The probability of augmentation, and what it follows: the mean sign of the logits of real images."""

    def __init__(self, config: AdversarialConfig) -> None:
        self.config = config
        self.p, self.sum, self.count = config.augment, 0.0, 0

    def update(self, sign: float, batch: int) -> None:
        """One step of the discriminator in which mean(sign(D(real))) was `sign`, -1..1."""
        config = self.config
        if config.ada <= 0:
            return
        self.sum, self.count = self.sum + sign, self.count + 1
        if self.count < config.ada_every:
            return
        step = batch * self.count / config.ada_images
        self.p = min(max(self.p + math.copysign(step, self.sum / self.count - config.ada), 0.0), P_MOST)
        self.sum, self.count = 0.0, 0

    @property
    def state(self) -> Tensor:
        """All of it as three numbers, for a checkpoint."""
        return torch.tensor([self.p, self.sum, self.count], dtype=torch.float64)

    @state.setter
    def state(self, value: Tensor) -> None:
        self.p, self.sum, self.count = float(value[0]), float(value[1]), int(value[2])


def draw(count: int, p: float, seed: int) -> tuple[Tensor, Tensor]:
    """Random changes of `count` images, a function of the seed: geometry (count, 3, 3) and colour (count, 4, 4).

    Geometry maps places of the result to places of the image, both in [-1, 1]; colour maps (r, g, b, 1).
    """
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=rng)

    def normal(size: float) -> Tensor:
        return size * torch.randn(count, generator=rng)

    def sometimes(value: Tensor, otherwise: float, chance: float = p) -> Tensor:
        return torch.where(torch.rand(count, generator=rng) < chance, value, torch.full_like(value, otherwise))

    either = 1 - math.sqrt(1 - p)  # of each of two rotations, so that one of them happens with probability p
    size, wide = torch.exp2(sometimes(normal(SCALE), 0.0)), torch.exp2(sometimes(normal(ANISOTROPY), 0.0))
    geometry = _eye(3, count)
    for matrix in (
        _scale(sometimes(1 - 2 * uniform(0, 2).floor(), 1.0), torch.ones(count)),  # mirrored
        _rotation(sometimes(uniform(0, 4).floor() * (math.pi / 2), 0.0)),
        _shift(*sometimes(torch.stack([uniform(-SHIFT, SHIFT), uniform(-SHIFT, SHIFT)]), 0.0)),
        _scale(size, size),
        _rotation(sometimes(uniform(-math.pi, math.pi), 0.0, either)),
        _scale(wide, 1 / wide),
        _rotation(sometimes(uniform(-math.pi, math.pi), 0.0, either)),
        _shift(*sometimes(torch.stack([normal(SHIFT), normal(SHIFT)]), 0.0)),
    ):  # fmt: skip
        geometry = geometry @ matrix
    colour = _eye(4, count)
    colour[:, :3, 3] = sometimes(normal(BRIGHTNESS), 0.0)[:, None]
    gain = torch.exp2(sometimes(normal(CONTRAST), 0.0))
    colour = torch.diag_embed(torch.stack([gain, gain, gain, torch.ones(count)], dim=1)) @ colour
    grey = torch.tensor([1.0, 1.0, 1.0, 0.0]) / math.sqrt(3)
    along = torch.outer(grey, grey)  # the axis of greys
    flip = sometimes(uniform(0, 2).floor(), 0.0)
    colour = (torch.eye(4) - 2 * along * flip[:, None, None]) @ colour
    colour = _hue(sometimes(uniform(-math.pi, math.pi), 0.0)) @ colour
    vivid = torch.exp2(sometimes(normal(SATURATION), 0.0))[:, None, None]
    rest = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])) - along
    return geometry, (torch.eye(4) - rest + vivid * rest) @ colour


def apply(image: Tensor, geometry: Tensor, colour: Tensor) -> Tensor:
    """Images (B, 3, H, W) changed by the matrices of `draw`; differentiable in the images."""
    grid = F.affine_grid(geometry[:, :2].to(image), list(image.shape), align_corners=False)
    image = F.grid_sample(image, grid, align_corners=False, padding_mode="reflection")
    matrix = colour.to(image)
    return torch.einsum("bij,bjhw->bihw", matrix[:, :3, :3], image) + matrix[:, :3, 3, None, None]


def augment(image: Tensor, p: float, seed: int, rows: range, batch: int) -> Tensor:
    """Images (B, 3, H, W), the rows `rows` of a batch of `batch`, each changed as it would be in the whole batch."""
    if p <= 0:
        return image
    geometry, colour = draw(batch, p, seed)
    return apply(image.float(), geometry[rows.start : rows.stop], colour[rows.start : rows.stop])


def _eye(side: int, count: int) -> Tensor:
    return torch.eye(side).repeat(count, 1, 1)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=1))


def _shift(x: Tensor, y: Tensor) -> Tensor:
    matrix = _eye(3, len(x))
    matrix[:, 0, 2], matrix[:, 1, 2] = x, y
    return matrix


def _rotation(angle: Tensor) -> Tensor:
    matrix = _eye(3, len(angle))
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 0, 1], matrix[:, 1, 0] = -angle.sin(), angle.sin()
    return matrix


def _hue(angle: Tensor) -> Tensor:
    """Rotation of colours about the axis of greys (Rodrigues' formula)."""
    unit = 1 / math.sqrt(3)
    cross = unit * torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    sin, cos = angle.sin()[:, None, None], angle.cos()[:, None, None]
    matrix = _eye(4, len(angle))
    matrix[:, :3, :3] = torch.eye(3) + sin * cross + (1 - cos) * (cross @ cross)
    return matrix
