"""Hidden textures: where they are rendered, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mesh_rendering import render_mesh
from torch import Tensor

from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.masks import Window
from export3d_cli.core.model.super_resolution import HiddenTextures


def test_hidden_textures_are_zero_outside_mouth_and_eyes(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    assert tiny.flow is not None
    opened = points.clone()
    opened[:, [14, 87, 317, 178, 402], 1] += 0.08
    mesh = render_mesh(tiny.flow, points, orbit(0), opened, orbit(0), 128)
    hidden_textures = HiddenTextures()
    textures = hidden_textures(mesh, 128)
    assert textures.shape == (1, hidden_textures.out_channels, 128, 128)
    assert textures[:, :, (mesh.mouth + mesh.eye)[0, 0] == 0].abs().max() == 0
    lower = textures[:, 8:16]
    assert lower[:, :, mesh.mouth[0, 0] > 0].abs().mean() > 0.05
    assert lower[:, :, mesh.eye[0, 0] > 0].abs().max() == 0  # only the mouth has a lower texture


def test_hidden_textures_get_gradients(tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    assert tiny.flow is not None
    opened = points.clone()
    opened[:, [14, 87, 317, 178, 402], 1] += 0.08
    mesh = render_mesh(tiny.flow, points, orbit(0), opened, orbit(0), 64)
    hidden_textures = HiddenTextures()
    hidden_textures(mesh, 64).square().sum().backward()
    assert hidden_textures.textures.grad is not None
    assert all(float(grad.abs().sum()) > 0 for grad in hidden_textures.textures.grad)


def test_hidden_textures_of_a_window_are_that_part_of_the_map(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    assert tiny.flow is not None
    opened = points.clone()
    opened[:, [14, 87, 317, 178, 402], 1] += 0.08
    mesh, window = render_mesh(tiny.flow, points, orbit(0), opened, orbit(0), 64), Window(2, 2, 5, 6, 8)
    hidden_textures = HiddenTextures()
    with torch.no_grad():
        part, whole = hidden_textures(mesh, 96, window), hidden_textures(mesh, 96)
    assert part.shape == (1, hidden_textures.out_channels, 48, 36) and part.abs().sum() > 1
    torch.testing.assert_close(part, window.crop(whole))
