"""Learned textures of what closed mouths and eyes hide, read by super-resolution."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.model.masks import WHOLE, Window
from export3d_cli.core.model.warp.mesh_flow import MeshFlow, resize


class HiddenTextures(nn.Module):
    """Learned textures of teeth and eyes, for photos with closed mouth or eyes; they move with skull, jaw and iris."""

    texture_size = (24, 48)  # rows and columns
    texture_channels = 8  # per texture
    out_channels = 2 * texture_channels + 1  # of `forward`

    def __init__(self) -> None:
        super().__init__()
        # upper teeth, lower teeth, eye
        self.textures = nn.Parameter(torch.randn(3, self.texture_channels, *self.texture_size) * 0.3)

    def forward(self, mesh: MeshFlow, size: int, window: Window = WHOLE) -> Tensor:
        """Render (B, 17, size, size), or a window: upper teeth or eye, lower teeth, eye mask; 0 outside."""
        parts = (mesh.mouth, mesh.eye, mesh.anchored_coords)
        mouth, eye, coordinates = (window.crop(resize(x, size)) for x in parts)
        # coordinates fade to 0 at the mask's border; dividing by the mask keeps the texture from sliding there
        coordinates = (coordinates / (mouth + eye).clamp_min(0.1)).permute(0, 2, 3, 1)
        upper_grid, lower_grid = coordinates.split(2, dim=3)  # (B, h, w, 2)
        upper_teeth, lower_teeth, iris = self.textures.split(1)
        upper = _sample(upper_teeth, upper_grid) * mouth + _sample(iris, upper_grid) * eye
        return torch.cat([upper, _sample(lower_teeth, lower_grid) * mouth, eye], dim=1)


def _sample(texture: Tensor, grid: Tensor) -> Tensor:
    texture = texture.float().expand(len(grid), -1, -1, -1)
    return F.grid_sample(texture, grid, align_corners=False, padding_mode="border")
