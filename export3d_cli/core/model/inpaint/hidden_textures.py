"""Learned textures of what closed mouths and eyes hide, read by super-resolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.model.fast.fused_conv import PatchWindow
from export3d_cli.core.model.masks import WHOLE, Window
from export3d_cli.core.model.warp.mesh_flow import MeshFlow, resize

WINDOW_STEP_PX = 32  # sides of the window are multiples of this, so that few shapes occur


class HiddenTextures(nn.Module):
    """Learned textures of teeth and eyes, for photos with closed mouth or eyes; they move with skull, jaw and iris."""

    texture_size = (24, 48)  # rows and columns
    texture_channels = 8  # per texture
    out_channels = 2 * texture_channels + 1  # of `forward`

    def __init__(self) -> None:
        super().__init__()
        # upper teeth, lower teeth, eye
        self.textures = nn.Parameter(torch.randn(3, self.texture_channels, *self.texture_size) * 0.3)

    def forward(self, mesh: MeshFlow, size: int) -> Tensor:
        """Render (B, 17, size, size): upper teeth or eye, lower teeth, eye mask; 0 outside mouth and eyes."""
        mouth, eye, coordinates = self._texture_coordinates(mesh, size)
        upper_grid, lower_grid = (x.permute(0, 2, 3, 1) for x in coordinates.split(2, dim=1))  # (B, size, size, 2)
        upper_teeth, lower_teeth, iris = self.textures.split(1)
        upper = _sample(upper_teeth, upper_grid) * mouth + _sample(iris, upper_grid) * eye
        return torch.cat([upper, _sample(lower_teeth, lower_grid) * mouth, eye], dim=1)

    def render_window(self, mesh: MeshFlow, size: int, part: Window = WHOLE) -> PatchWindow:
        """Render only the window of a `part` of the map that is not 0, with a border of zeros."""
        mouth, eye, coordinates = (part.crop(x) for x in self._texture_coordinates(mesh, size))
        b, row, column = ((mouth + eye)[:, 0] > 0).nonzero(as_tuple=True)
        if not len(b):
            return PatchWindow(mouth.new_zeros(len(mouth), self.out_channels, 0, 0), 0, 0)
        mouth_weight, eye_weight = mouth[b, 0, row, column][:, None], eye[b, 0, row, column][:, None]  # (M, 1)
        grid = coordinates[b, :, row, column].view(1, -1, 2, 2)  # (1, M, upper and lower, 2)
        upper_teeth, lower_teeth, iris = self.textures.split(1)
        parts = ((upper_teeth, grid[:, :, :1]), (iris, grid[:, :, :1]), (lower_teeth, grid[:, :, 1:]))
        upper, iris, lower = (_sample(texture, x)[0, :, :, 0].T for texture, x in parts)  # (M, 8) each
        upper, lower = upper * mouth_weight + iris * eye_weight, lower * mouth_weight
        top, height = _window_range(row, mouth.shape[-2])
        left, width = _window_range(column, mouth.shape[-1])
        out = mouth.new_zeros(len(mouth), height, width, self.out_channels)
        out[b, row - top, column - left] = torch.cat([upper, lower, eye_weight], dim=1)
        return PatchWindow(out.permute(0, 3, 1, 2), top, left)

    def _texture_coordinates(self, mesh: MeshFlow, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return mouth and eye masks (B, 1, s, s) and coordinates (B, 4, s, s) in the upper and lower texture."""
        mouth, eye, coordinates = (resize(x, size) for x in (mesh.mouth, mesh.eye, mesh.anchored_coords))
        # coordinates fade to 0 at the mask's border; dividing by the mask keeps the texture from sliding there
        return mouth, eye, coordinates / (mouth + eye).clamp_min(0.1)


def _sample(texture: Tensor, grid: Tensor) -> Tensor:
    texture = texture.float().expand(len(grid), -1, -1, -1)
    return F.grid_sample(texture, grid, align_corners=False, padding_mode="border")


def _window_range(indices: Tensor, size: int) -> tuple[int, int]:
    """Return start and length of the rows (or columns) of a window around `indices` with a border, within [0, size)."""
    first, last = (int(x) for x in indices.aminmax())
    length = min(size, -(-(last - first + 3) // WINDOW_STEP_PX) * WINDOW_STEP_PX)
    return max(0, min(first - 1, size - length)), length
