"""What moves otherwise than the face mesh: cameras, necks, torsos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
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


def test_rigid_flow_of_one_camera_stays_where_it_is(orbit: Callable[..., Tensor]) -> None:
    camera = orbit(10, -20)
    origin, directions = camera_rays(camera, 8)
    uv = rigid_flow(2.5 + torch.rand(2, 1, 8, 8), directions, origin, camera)
    own = pixel_grid(8).T.view(1, 2, 8, 8).expand(2, -1, -1, -1)
    torch.testing.assert_close(uv, own, atol=1e-5, rtol=0)
    torch.testing.assert_close(warp(own, uv), own, atol=1e-5, rtol=0)


def test_a_drift_follows_the_neck_in_place_and_size_but_does_not_turn(orbit: Callable[..., Tensor]) -> None:
    front, own, neck = orbit(0), pixel_grid(16).T.view(1, 2, 16, 16), torch.tensor(NECK_PIVOT)
    turned = orbit(25)  # on its neck, which stays where it is
    first, second = (c[0, :16].view(4, 4) for c in (front, turned))
    turned[0, [3, 7, 11]] = neck - second[:3, :3] @ first[:3, :3].T @ (neck - first[:3, 3])
    torch.testing.assert_close(neck_flow(front, turned, 16), own, atol=1e-5, rtol=0)
    near = front.clone()
    near[0, [3, 7, 11]] = neck + 0.8 * (first[:3, 3] - neck)  # everything is 1.25 times as large about the neck
    at = project(neck.view(1, 1, 3), front)[0].view(1, 2, 1, 1)
    torch.testing.assert_close(neck_flow(front, near, 16) - at, (own - at) * 0.8, atol=1e-5, rtol=0)


def test_turn_is_axis_and_sine_of_the_angle(orbit: Callable[..., Tensor]) -> None:
    found = relative_rotation(orbit(0, 0), orbit(30, 0))
    torch.testing.assert_close(found[0].abs(), torch.tensor([0.0, 0.5, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(relative_rotation(orbit(30), orbit(0)), -found[:1], atol=1e-5, rtol=0)


def test_a_torso_follows_and_a_background_stays(flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """Untrained: the head by the mesh, the rest of the person by three quarters of the drift, all else not at all."""
    config, front, moved = PRESETS["tiny"], orbit(0), orbit(0)
    moved[:, 3] += 0.1
    blend = FlowBlend(config)
    body = torch.zeros(1, 1, flow.size, flow.size)
    body[:, :, -flow.size // 4 :] = 1
    mesh = flow(points, front, points, moved)
    small = torch.zeros(1, 2, 16, 16)
    drift = neck_flow(front, moved, 16)
    turned, change = relative_rotation(front, moved), torch.zeros(1, config.basis)
    found = blend(torch.zeros(1, 3, 64, 64), mesh, small, drift, small[:, :1], body * 0, body, turned, change)
    own = pixel_grid(flow.size).T.view(1, 2, flow.size, flow.size)
    went, whole = (found.background - own)[0, 0], (resize(drift, flow.size) - own)[0, 0]
    assert (whole.abs() > 0.02).all()
    torch.testing.assert_close(went[-2:], TORSO_FOLLOW_RATIO * whole[-2:], atol=2e-3, rtol=0)
    torch.testing.assert_close(went[: flow.size // 2], 0 * whole[: flow.size // 2], atol=2e-3, rtol=0)
    torch.testing.assert_close(found.head, mesh.uv.where(mesh.weight > 0.5, found.head), atol=5e-3, rtol=0)
    torch.testing.assert_close(found.head_weight, mesh.weight, atol=0.01, rtol=0)


def test_no_training_moves_a_background(flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """Away from the photo's person and from where that goes, also a network that shifts everything leaves it."""
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
    mesh = flow(points, front, points, moved)
    found = blend(
        torch.zeros(1, 3, 64, 64), mesh, small, neck_flow(front, moved, 16), small[:, :1], head, body, turned, change
    )
    went = (found.background - pixel_grid(size).T.view(1, 2, size, size)).norm(dim=1)[0]
    assert went[:, : size // 4].max() == 0
    assert went[: size // 4, -size // 4 :].min() > 0.05 and went[-2:, -size // 4 :].min() > 0.05


def test_a_face_takes_its_share_of_the_shift_that_an_expression_asks_for(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    mesh = flow(points, orbit(0), points, orbit(0))
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
