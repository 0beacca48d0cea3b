"""What super-resolution knows of the inside of mouths and eyes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.superres import Inside


def test_textures_lie_inside_mouth_and_eyes_and_nowhere_else(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    assert tiny.flow is not None
    opened = points.clone()
    opened[:, [14, 87, 317, 178, 402], 1] += 0.08
    mesh = tiny.flow(points, orbit(0), opened, orbit(0), 128)
    inside = Inside()
    seen = inside(mesh, 128)
    assert seen.shape == (1, inside.channels, 128, 128)
    assert seen[:, :, (mesh.mouth + mesh.eye)[0, 0] == 0].abs().max() == 0
    lower = seen[:, 8:16]
    assert lower[:, :, mesh.mouth[0, 0] > 0].abs().mean() > 0.05
    assert lower[:, :, mesh.eye[0, 0] > 0].abs().max() == 0  # only teeth have a lower row


def test_textures_learn(tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    assert tiny.flow is not None
    opened = points.clone()
    opened[:, [14, 87, 317, 178, 402], 1] += 0.08
    mesh = tiny.flow(points, orbit(0), opened, orbit(0), 64)
    inside = Inside()
    inside(mesh, 64).square().sum().backward()
    assert inside.textures.grad is not None
    assert all(float(grad.abs().sum()) > 0 for grad in inside.textures.grad)
