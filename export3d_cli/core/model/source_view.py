"""What the photo already shows: the source-view plane and the still background (beyond the paper; options)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config import ModelConfig
from export3d_cli.core.model.flow import warp
from export3d_cli.core.model.generator import ResBlock, leaky
from export3d_cli.core.model.render import project


class SourceView(nn.Module):
    """Pixel-aligned features of the photo (as pixelNeRF), and a background that does not turn with the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _, c4, c8 = config.stem
        self.quarter = nn.Conv2d(c4, config.plane_channels, 1)
        self.eighth = nn.Conv2d(c8, config.plane_channels, 1)
        self.background = nn.Sequential(
            nn.Conv2d(c4, config.raw_channels, 3, padding=1), ResBlock(config.raw_channels),
            nn.Conv2d(config.raw_channels, config.raw_channels, 3, padding=1),
        )  # fmt: skip

    def plane(self, stem: list[Tensor]) -> Tensor:
        """Stem features -> the fourth plane, (B, C, H/4, W/4), in the source camera."""
        up = F.interpolate(self.eighth(stem[2]), scale_factor=2, mode="bilinear", align_corners=False)
        return leaky(self.quarter(stem[1]) + up)

    def still(self, stem: list[Tensor]) -> Tensor:
        """Stem features -> what is behind the head, (B, C', H/4, W/4), in the image."""
        return self.background(leaky(stem[1]))


def sample_source(plane: Tensor, points: Tensor, camera: Tensor) -> Tensor:
    """Features of the plane (B, C, h, w) where the source camera (B, 25) sees points (B, N, 3) -> (B, N, C)."""
    uv, _ = project(points, camera)
    return warp(plane, uv.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
