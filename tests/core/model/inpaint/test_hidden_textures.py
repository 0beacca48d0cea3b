"""Hidden textures: where they are rendered, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mesh_rendering import render_mesh
from torch import Tensor

from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.inpaint.hidden_textures import HiddenTextures


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


def test_hidden_textures_window_equals_full_map(tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    assert tiny.flow is not None
    opened = points.repeat(2, 1, 1)
    opened[:, [14, 87, 317, 178, 402], 1] += torch.tensor([[0.08], [0.03]])
    camera = orbit(0, 20)
    mesh, hidden_textures = (
        render_mesh(tiny.flow, points.expand(2, -1, -1), camera, opened, camera, 64),
        HiddenTextures(),
    )
    for size in (24, 96, 160):  # at the smallest size the window is the whole map
        with torch.no_grad():
            values, top, left = hidden_textures.render_window(mesh, size)
            plain = hidden_textures(mesh, size)
        assert plain.abs().sum() > 1
        height, width = values.shape[-2:]
        padded = torch.zeros_like(plain)
        padded[:, :, top : top + height, left : left + width] = values
        torch.testing.assert_close(padded, plain, atol=1e-6, rtol=0)
    assert height < size and width < size
    assert values[..., [0, -1]].abs().sum() + values[:, :, [0, -1]].abs().sum() == 0  # border for the kernel
    with torch.no_grad():
        closed = mesh._replace(mouth=mesh.mouth * 0, eye=mesh.eye * 0)
        assert hidden_textures.render_window(closed, 96).values.numel() == 0
