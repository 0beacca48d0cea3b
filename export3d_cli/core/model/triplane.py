"""Tri-plane sampling (eq. 7) and the light decoder (eq. 8)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.model.cached_tensors import cached_tensor, index_tensor

# The planes are xy, yz, zx, each pair of axes once. The first axis is the column, the second the row.
PLANE_AXES = ((0, 1), (1, 2), (2, 0))

# The head as an ellipsoid: centre and half axes, head frame.
HEAD_CENTRE = (0.0, -0.02, 0.03)
HEAD_AXES = (0.14, 0.2, 0.17)
SURFACE_HALF_EXTENT = 0.35  # head-frame units that a surface reaches from the origin along x and y
SURFACE_STEEPNESS = 800.0  # log density per head-frame unit of depth behind a known surface
SURFACE_OFFSET = 0.035  # head-frame units in front of the surface at which the log density starts to rise
DISPLACEMENT_DEPTH = 0.08  # depth behind the surface in which an expression's displacement fades, head-frame units


def sample_planes(planes: Tensor, points: Tensor) -> Tensor:
    """Average planes (B, 3, C, P, P), 0 beyond [-0.5, 0.5], at head-frame points (B, N, 3) -> (B, N, C) (eq. 7)."""
    B, K, C, P, _ = planes.shape
    N = points.shape[1]
    grid = torch.stack([points[..., index_tensor(axes, points)] for axes in PLANE_AXES], dim=1) * 2  # (B, 3, N, 2)
    planes = planes.float().reshape(B * K, C, P, P)
    samples = F.grid_sample(planes, grid.float().view(B * K, 1, N, 2), align_corners=False)  # (B*3, C, 1, N)
    return samples.view(B, K, C, N).mean(1).transpose(1, 2)


def ellipsoid_level(points: Tensor) -> Tensor:
    """Return the level of points in the head ellipsoid: 1 at its centre, 0 on its surface, negative outside; (B, N)."""
    centre = cached_tensor(HEAD_CENTRE, points.device, points.dtype)
    axes = cached_tensor(HEAD_AXES, points.device, points.dtype)
    return 1 - ((points - centre) / axes).square().sum(-1)


class FaceField(NamedTuple):
    """What a head's front surface tells about points of the volume."""

    log_density: Tensor  # (B, N); the ellipsoid's where the surface is not known
    displacement: Tensor  # (B, N, 3) how far the expression has moved the head at the points, head-frame units


def sample_face_field(points: Tensor, surface: Tensor | None) -> FaceField | None:
    """Evaluate a surface (B, 6, s, s) from `BasisFlow.rasterize_surface` at points (B, N, 3) of the head frame."""
    if surface is None:
        return None
    grid = (points[..., :2] / SURFACE_HALF_EXTENT)[:, None]  # (B, 1, N, 2)
    samples = F.grid_sample(surface, grid, align_corners=False)[:, :, 0]  # (B, 6, N)
    height, certainty, coverage = samples[:, :3].unbind(1)  # (B, N) each
    z = points[..., 2]
    behind = z - height / coverage.clamp_min(1e-3)
    front = SURFACE_STEEPNESS * (behind + SURFACE_OFFSET)
    back = 20 * (1 - ((z - HEAD_CENTRE[2]).clamp_min(0) / HEAD_AXES[2]).square())
    face = torch.minimum(front, back * 2).clamp(-4, 40)
    log_density = certainty * face + (1 - certainty) * (20 * ellipsoid_level(points)).clamp(-4, 20)
    fade = torch.exp(-(behind.clamp_min(0) / DISPLACEMENT_DEPTH).square())
    return FaceField(log_density, (samples[:, 3:] * fade[:, None]).transpose(1, 2))


class Decoder(nn.Module):
    """Light MLP with softplus and two linear heads, colour and density (eq. 8)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inputs = config.plane_channels * (2 if config.source_plane else 1)
        self.hidden = nn.Linear(inputs, config.decoder_hidden)
        self.colour = nn.Linear(config.decoder_hidden, config.raw_channels)
        self.density = nn.Linear(config.decoder_hidden, 1)
        self.has_head_prior = config.head_prior

    def forward(self, features: Tensor, points: Tensor, log_prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decode features (B, N, C) at points (B, N, 3) to colours (B, N, C'), about [-1, 1], and densities (B, N).

        `log_prior` (B, N) is a known log density, used instead of the ellipsoid.
        """
        x = self.activate(self.hidden(features))  # (B, N, hidden)
        return self.decode_colours(x), self.decode_densities(x, points, log_prior)

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation to the output of `hidden`; both heads read the result."""
        return F.softplus(x)

    def decode_colours(self, x: Tensor) -> Tensor:
        """Map activations (..., hidden) to colour features (..., C'), fp32."""
        return torch.sigmoid(self.colour(x).float()) * 2.004 - 1.002

    def density_logits(self, x: Tensor) -> Tensor:
        """Map activations (..., hidden) to the network's term of the log density (...), fp32."""
        return self.density(x).float().squeeze(-1)

    def decode_densities(self, x: Tensor, points: Tensor, log_prior: Tensor | None = None) -> Tensor:
        """Map activations (..., hidden) at points (..., 3) to densities (...), fp32; for `log_prior` see `forward`."""
        logit = self.density_logits(x) - 1
        if log_prior is not None:
            logit = logit + log_prior
        elif self.has_head_prior:
            logit = logit + (20 * ellipsoid_level(points)).clamp(-4, 20)
        return F.softplus(logit)
