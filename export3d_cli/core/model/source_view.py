"""What the photo shows directly: the source-view plane and the background (beyond the paper; optional)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.model.generator import ResBlock, leaky_relu
from export3d_cli.core.model.masks import dilate
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp.mesh_flow import warp

MASK_MARGIN = 2 / 64  # unknown pixels are dilated by this, in image sizes


class SourceView(nn.Module):
    """Pixel-aligned features of the photo (as in pixelNeRF) and a background that does not turn with the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _, c4, c8 = config.stem
        self.quarter = nn.Conv2d(c4, config.plane_channels, 1)
        self.eighth = nn.Conv2d(c8, config.plane_channels, 1)
        self.background = nn.Sequential(nn.Conv2d(c4, config.raw_channels, 3, padding=1), ResBlock(config.raw_channels),
                                        nn.Conv2d(config.raw_channels, config.raw_channels, 3, padding=1))  # fmt: skip

    def make_view_plane(self, stem: list[Tensor]) -> Tensor:
        """Compute the fourth feature plane, in the source camera, from the stem features: (B, C, H/4, W/4)."""
        upsampled = F.interpolate(self.eighth(stem[2]), scale_factor=2, mode="bilinear", align_corners=False)
        return leaky_relu(self.quarter(stem[1]) + upsampled)

    def make_background(self, stem: list[Tensor], filled_photo: Tensor | None = None) -> Tensor:
        """Predict features behind the head (B, C', H/4, W/4), RGB first; adds `filled_photo` (B, 3, H/4, W/4)."""
        background = self.background(leaky_relu(stem[1]))  # (B, C', H/4, W/4)
        if filled_photo is None:
            return background
        return torch.cat([background[:, :3] + filled_photo, background[:, 3:]], dim=1)


def fill_push_pull(image: Tensor, known: Tensor, size: int) -> Tensor:
    """Fill pixels not `known` (B, 1, h, w) of images (B, C, H, W) by coarser means: (B, C, size, size) float32."""
    # mask edges are not exact and hair is stray: pixels next to unknown ones count as unknown
    known = F.interpolate(known.float(), (size, size), mode="area")
    known = 1 - dilate(1 - known, max(1, round(MASK_MARGIN * size)))
    levels = [(F.interpolate(image.float(), (size, size), mode="area") * known, known)]
    while levels[-1][0].shape[-1] % 2 == 0:
        levels.append((F.avg_pool2d(levels[-1][0], 2), F.avg_pool2d(levels[-1][1], 2)))
    filled = levels[-1][0] / levels[-1][1].clamp_min(1e-4)
    for total, weight in reversed(levels[:-1]):
        coarse = F.interpolate(filled, total.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.lerp(coarse, total / weight.clamp_min(1e-4), (weight * 4).clamp_max(1))
    return filled


def sample_view_plane(plane: Tensor, points: Tensor, camera: Tensor) -> Tensor:
    """Sample the plane (B, C, h, w) where the source camera (B, 25) projects the points (B, N, 3): (B, N, C)."""
    uv, _ = project(points, camera)
    return warp(plane, uv.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
