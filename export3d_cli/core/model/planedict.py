"""PlaneDict (Yang et al., AAAI 2024): motion that is read from pixels, as factors of orthogonal plane bases.

The photo's identity deformation is the tri-plane of `Generator` for the mean expression. The encoder reads faces that
are cut out level with their eyes; the head's pose is the camera's, as everywhere here. The photo's pixels follow the
basis flow, so a linear layer reads lambda from the codes, too.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.model.expression import orthonormal_columns
from export3d_cli.core.model.generator import ResBlock, leaky_relu, zero_init
from export3d_cli.core.model.inpaint.inpainter import AlignedCrop, level_axes
from export3d_cli.core.model.warp.mesh_flow import warp

NUM_BASES = 20  # N, from which on the paper found no gain
FACE_SIZE_PX = 64  # side of the faces that E reads
FACE_MARGIN = 1.25  # side of them over that of the landmarks' bounding box
IDENTITY_DIM, MOTION_DIM = 32, 32
WIDTHS = (24, 48, 96, 160)  # of E's stages
FACTOR_WIDTH = 32  # channels of G_m
MAX_CORRECTION = 1.0  # by which pixels change each coefficient that the landmarks give


class Codes(NamedTuple):
    """What E reads from B faces."""

    identity: Tensor  # (B, IDENTITY_DIM)
    motion: Tensor  # (B, MOTION_DIM)


def cut_faces(images: Tensor, uv: Tensor) -> Tensor:
    """Cut the faces with landmarks (B, 478, 2), crop units, from images (B, 3, H, W): (B, 3, 64, 64)."""
    low, high = uv.amin(1), uv.amax(1)
    crop = AlignedCrop((low + high) / 2, level_axes(uv), FACE_MARGIN * (high - low).amax(1))
    return warp(images, crop.pixel_positions(FACE_SIZE_PX))


class MotionEncoder(nn.Module):
    """E of eq. 1: 13 layers, of four stages with a residual block each."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise((3, *WIDTHS)))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS)
        self.blocks = nn.ModuleList(map(ResBlock, WIDTHS))
        self.head = nn.Linear(4 * WIDTHS[-1], IDENTITY_DIM + MOTION_DIM)

    def forward(self, faces: Tensor) -> Codes:
        """Map faces (B, 3, 64, 64) in [-1, 1] to their codes."""
        with torch.autocast(faces.device.type, enabled=False):
            x = F.instance_norm(faces.float())  # without the light
            for down, norm, block in zip(self.downs, self.norms, self.blocks, strict=True):
                x = block(leaky_relu(norm(down(x))))
            x = F.adaptive_avg_pool2d(leaky_relu(x), 2).flatten(1)  # (B, 4 c), of the quarters of the face
            return Codes(*self.head(x).split([IDENTITY_DIM, MOTION_DIM], dim=1))


class PlaneDict(nn.Module):
    """E, the motion generator G_m, the plane bases, and the layer that reads lambda."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size, self.plane_size = config.plane_size // 2, config.plane_size
        self.encoder = MotionEncoder()
        self.bases_weight = nn.Parameter(torch.randn(3 * config.plane_channels, self.size**2, NUM_BASES))
        self.enter = nn.Linear(MOTION_DIM, FACTOR_WIDTH * (self.size // 4) ** 2)
        self.convs = nn.ModuleList(nn.Conv2d(FACTOR_WIDTH, FACTOR_WIDTH, 3, padding=1) for _ in range(2))
        self.to_factors = nn.Conv2d(FACTOR_WIDTH, 3 * NUM_BASES, 1)
        zero_init(self.to_factors)  # training starts without motion
        n = config.num_coefficients
        self.to_lambda = nn.Linear(MOTION_DIM, n)
        self.resting_lambda = nn.Linear(IDENTITY_DIM, n, bias=False)  # what a person's tracked lambda adds

    def code_parts(self) -> tuple[nn.Module, ...]:
        """Return the parts that the stage `planedict` trains; no other stage does."""
        return self.encoder, self.to_lambda, self.resting_lambda

    def encode(self, images: Tensor, uv: Tensor) -> Codes:
        """Return the codes of images (B, 3, H, W) with landmarks (B, 478, 2), crop units."""
        return self.encoder(cut_faces(images, uv.float()))

    def bases(self) -> Tensor:
        """Return the N plane bases (N, 3, C, s, s); those of a channel are orthonormal, times s."""
        columns = self.size * orthonormal_columns(self.bases_weight.float())  # (3 C, s * s, N)
        return columns.permute(2, 0, 1).reshape(NUM_BASES, 3, -1, self.size, self.size)

    def planes(self, motion: Tensor, bases: Tensor | None = None) -> Tensor:
        """Map motion codes (B, d) to the motion of the planes (B, 3, C, P, P), eq. 4, with `bases()`."""
        s = self.size
        x = leaky_relu(self.enter(motion)).unflatten(1, (FACTOR_WIDTH, s // 4, s // 4))
        for conv in self.convs:
            x = leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="bilinear")))  # (B, FACTOR_WIDTH, s, s)
        factors = self.to_factors(x).float().unflatten(1, (NUM_BASES, 3))  # L, (B, N, 3, s, s)
        bases = self.bases() if bases is None else bases
        planes = torch.einsum("bnkhw,nkchw->bkchw", factors, bases).flatten(1, 2)  # (B, 3 C, s, s)
        planes = F.interpolate(planes, (self.plane_size, self.plane_size), mode="bilinear")
        return planes.unflatten(1, (3, -1))

    def read_lambda(self, motion: Tensor, identity: Tensor | None = None) -> Tensor:
        """Return lambda (B, n) of motion codes; with an identity, as the tracker would for it."""
        with torch.autocast(motion.device.type, enabled=False):
            lam = self.to_lambda(motion)
            return lam if identity is None else lam + self.resting_lambda(identity)


def correct(lam: Tensor, read: Tensor) -> Tensor:
    """Return lambda of the landmarks (B, n) moved towards that of the pixels, by at most MAX_CORRECTION."""
    return lam + MAX_CORRECTION * torch.tanh((read - lam) / MAX_CORRECTION)
