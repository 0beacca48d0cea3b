"""Rigid and neck flow, and the blend of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from mesh_rendering import render_mesh
from torch import Tensor

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.model.volume_renderer import camera_rays, pixel_grid, project
from export3d_cli.core.model.warp.flow_blending import (
    NECK_PIVOT,
    TORSO_FOLLOW_RATIO,
    FlowBlend,
    neck_flow,
    relative_rotation,
    rigid_flow,
)
from export3d_cli.core.model.warp.mesh_flow import BasisFlow, resize, warp


def test_rigid_flow_with_equal_cameras_is_the_identity(orbit: Callable[..., Tensor]) -> None:
    camera = orbit(10, -20)
    origin, directions = camera_rays(camera, 8)
    uv = rigid_flow(2.5 + torch.rand(2, 1, 8, 8), directions, origin, camera)
    grid = pixel_grid(8).T.view(1, 2, 8, 8).expand(2, -1, -1, -1)
    torch.testing.assert_close(uv, grid, atol=1e-5, rtol=0)
    torch.testing.assert_close(warp(grid, uv), grid, atol=1e-5, rtol=0)


def test_neck_flow_follows_shift_and_scale_without_rotation(orbit: Callable[..., Tensor]) -> None:
    front, grid, neck = orbit(0), pixel_grid(16).T.view(1, 2, 16, 16), torch.tensor(NECK_PIVOT)
    turned = orbit(25)  # around the neck, which stays in place
    first, second = (c[0, :16].view(4, 4) for c in (front, turned))
    turned[0, [3, 7, 11]] = neck - second[:3, :3] @ first[:3, :3].T @ (neck - first[:3, 3])
    torch.testing.assert_close(neck_flow(front, turned, 16), grid, atol=1e-5, rtol=0)
    near = front.clone()
    near[0, [3, 7, 11]] = neck + 0.8 * (first[:3, 3] - neck)  # everything is scaled by 1.25 around the neck
    at = project(neck.view(1, 1, 3), front)[0].view(1, 2, 1, 1)
    torch.testing.assert_close(neck_flow(front, near, 16) - at, (grid - at) * 0.8, atol=1e-5, rtol=0)


def test_relative_rotation_is_axis_times_sine(orbit: Callable[..., Tensor]) -> None:
    rotation = relative_rotation(orbit(0, 0), orbit(30, 0))
    torch.testing.assert_close(rotation[0].abs(), torch.tensor([0.0, 0.5, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation[1], torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(relative_rotation(orbit(30), orbit(0)), -rotation[:1], atol=1e-5, rtol=0)


def test_untrained_blend_keeps_the_background(flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """The head follows the mesh, the rest of the person three quarters of the neck flow, all else stays."""
    config, front, moved = PRESETS["tiny"], orbit(0), orbit(0)
    moved[:, 3] += 0.1
    blend = FlowBlend(config)
    body = torch.zeros(1, 1, flow.size, flow.size)
    body[:, :, -flow.size // 4 :] = 1
    mesh = render_mesh(flow, points, front, points, moved)
    small = torch.zeros(1, 2, 16, 16)
    neck = neck_flow(front, moved, 16)
    turned, change = relative_rotation(front, moved), torch.zeros(1, config.basis)
    layers = blend(torch.zeros(1, 3, 64, 64), mesh, small, neck, small[:, :1], body * 0, body, turned, change)
    grid = pixel_grid(flow.size).T.view(1, 2, flow.size, flow.size)
    shift, full_shift = (layers.background - grid)[0, 0], (resize(neck, flow.size) - grid)[0, 0]
    assert (full_shift.abs() > 0.02).all()
    torch.testing.assert_close(shift[-2:], TORSO_FOLLOW_RATIO * full_shift[-2:], atol=2e-3, rtol=0)
    torch.testing.assert_close(shift[: flow.size // 2], 0 * full_shift[: flow.size // 2], atol=2e-3, rtol=0)
    torch.testing.assert_close(layers.head, mesh.uv.where(mesh.weight > 0.5, layers.head), atol=5e-3, rtol=0)
    torch.testing.assert_close(layers.head_weight, mesh.weight, atol=0.01, rtol=0)


def test_learned_shift_keeps_the_background(flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """A network that shifts everything leaves pixels away from the person, in the photo and in the result."""
    config, front, moved = PRESETS["tiny"], orbit(0), orbit(0)
    moved[:, 3] += 0.1
    blend = FlowBlend(config)
    for layer in (blend.shift, blend.leave):
        torch.nn.init.constant_(layer.bias, 3.0)
    size = flow.size
    head, body = torch.zeros(2, 1, 1, size, size)
    head[..., : size // 2, size // 2 :] = 1
    body[..., -size // 8 :, size // 2 :] = 1
    small, turned, change = torch.zeros(1, 2, 16, 16), relative_rotation(front, moved), torch.zeros(1, config.basis)
    mesh = render_mesh(flow, points, front, points, moved)
    layers = blend(
        torch.zeros(1, 3, 64, 64), mesh, small, neck_flow(front, moved, 16), small[:, :1], head,
        body, turned, change,
    )  # fmt: skip
    shift = (layers.background - pixel_grid(size).T.view(1, 2, size, size)).norm(dim=1)[0]
    assert shift[:, : size // 4].max() == 0
    assert shift[: size // 4, -size // 4 :].min() > 0.05 and shift[-2:, -size // 4 :].min() > 0.05


def test_face_takes_its_ratio_of_the_learned_shift(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    mesh = render_mesh(flow, points, orbit(0), points, orbit(0))
    blank, small = torch.zeros(1, 1, flow.size, flow.size), torch.zeros(1, 2, 16, 16)

    def head(face_shift: float, change: float) -> Tensor:
        torch.manual_seed(0)
        config = replace(PRESETS["tiny"], face_residual_ratio=face_shift)
        blend = FlowBlend(config)
        torch.nn.init.normal_(blend.shift.weight)
        if blend.expression is not None:
            torch.nn.init.ones_(blend.expression.weight)
        photo, none = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3)
        lam_change = torch.full((1, config.basis), change)
        return blend(photo, mesh, small, small, small[:, :1], blank, blank, none, lam_change).head

    face = (mesh.face > 0.999).expand(-1, 2, -1, -1)
    torch.testing.assert_close(head(0.0, 1.0)[face], mesh.uv[face], atol=1e-4, rtol=0)
    asked = head(1.0, 1.0)[face] - head(1.0, 0.0)[face]
    assert asked.abs().mean() > 0.01
    assert (head(0.15, 1.0)[face] - mesh.uv[face]).abs().max() <= 0.15 * 0.1 + 1e-4
    assert (head(0.15, 1.0)[face] - mesh.uv[face]).abs().max() > 0.005
