"""The flow beyond the network's crop: hair follows the head, the torso the neck, the window's border is still."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export3d_cli.core.face.landmarks import FACE_OVAL
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp.flow_blending import TORSO_FOLLOW_RATIO
from export3d_cli.core.model.warp.mesh_flow import add_head_rings, identity_grid
from export3d_cli.core.model.warp.photo_flow import FLOW_SIZE, WINDOW_MARGIN, PhotoFlow, extend_flow

CX = 18  # of a camera's 25 numbers: the principal point's x, crop units
SHIFT = 0.1  # crop units to the right
CROWN, NEXT_TO_THE_EAR, CHEST = (0.5, -0.2), (-0.15, 0.4), (0.5, 1.3)  # x, y in crop units; none is in the crop


def extend(
    points: Tensor, source_camera: Tensor, camera: Tensor, *, uv: Tensor | None = None, weight: Tensor | None = None,
    face: Tensor | None = None, photo_face: Tensor | None = None, torso: float | Tensor | None = None,
) -> PhotoFlow:  # fmt: skip
    """Extend a flow over a photo that shows the landmarks `points` from `source_camera`; default: no network flow."""
    count = len(camera)
    nowhere = torch.zeros(count, 1, 16, 16)
    weight, face, photo_face = (nowhere if mask is None else mask for mask in (weight, face, photo_face))
    source = points.expand(count, -1, -1)
    return extend_flow(
        add_head_rings(source), source, source_camera.expand(count, -1), camera, uv, weight, face, photo_face, torso
    )


def at(field: Tensor, place: tuple[float, float]) -> Tensor:
    """Return values (B, C) of a field (B, C, n, n) in the cell at x, y in crop units."""
    column, row = (int((v + WINDOW_MARGIN) / (1 + 2 * WINDOW_MARGIN) * FLOW_SIZE) for v in place)
    return field[:, :, row, column]


def shifted(camera: Tensor) -> Tensor:
    """Return the camera of a picture in which everything is `SHIFT` further to the right."""
    moved = camera.clone()
    moved[:, CX] += SHIFT
    return moved


@pytest.mark.parametrize("yaw", [0.0, 25.0])
def test_equal_cameras_and_expressions_give_no_displacement(
    points: Tensor, orbit: Callable[..., Tensor], yaw: float
) -> None:
    grid, camera = identity_grid(32, points), orbit(yaw)
    for uv in (None, grid):
        flow = extend(points, camera, camera, uv=uv, weight=torch.ones(1, 1, 16, 16))
        assert flow.displacement.shape == (1, 2, FLOW_SIZE, FLOW_SIZE)
        assert flow.displacement.abs().max() < 0.01
        border = torch.ones(FLOW_SIZE, FLOW_SIZE, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        assert flow.displacement[..., border].abs().max() < 1e-4


def test_shifted_head_takes_hair_outside_the_crop_along(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    flow = extend(points, orbit(0), shifted(orbit(0)))
    for place in (CROWN, NEXT_TO_THE_EAR):
        torch.testing.assert_close(at(flow.displacement, place)[0], torch.tensor([-SHIFT, 0.0]), atol=1e-4, rtol=0)


def test_turned_hair_moves_as_the_rings_of_the_mesh(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    flow, rings = extend(points, orbit(0), orbit(30)), add_head_rings(points)
    (photo, _), (result, _) = (project(rings, camera) for camera in (orbit(0), orbit(30)))
    for k in range(514, 514 + 36, 3):  # the second ring
        if (place := result[0, k])[1] < 0.3:  # below, the torso moves by itself
            moved = place + at(flow.displacement, (float(place[0]), float(place[1])))[0]
            assert (moved - photo[0, k]).norm() < 0.02


def test_turned_head_does_not_show_again_what_is_farther_inside(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """Beyond the outline of the photo's head a flow may turn back: there the outline is stretched."""
    fold, camera = 0.15, orbit(0)
    uv = identity_grid(32, points).clone()
    uv[:, 0] = torch.where(uv[:, 0] < fold, 2 * fold - uv[:, 0], uv[:, 0])
    flow = extend(points, camera, camera, uv=uv, weight=torch.ones(1, 1, 16, 16))
    for x in (0.06, 0.09, 0.12):
        assert x + at(flow.displacement, (x, 0.5))[0, 0] < fold + 0.02


@pytest.mark.parametrize("torso", [None, 0.0, 1.0])
def test_torso_follows_by_its_ratio(points: Tensor, orbit: Callable[..., Tensor], torso: float | None) -> None:
    flow = extend(points, orbit(0), shifted(orbit(0)), torso=torso)
    expected = -SHIFT * (TORSO_FOLLOW_RATIO if torso is None else torso)
    torch.testing.assert_close(at(flow.displacement, CHEST)[0], torch.tensor([expected, 0.0]), atol=1e-4, rtol=0)


def test_torso_moves_by_its_own_shift_roll_and_growth(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    own = torch.tensor([[SHIFT, -0.02, 0.0, 0.0], [0.0, 0.0, 0.1, 0.05], [torch.nan] * 4])
    camera = shifted(orbit(0)).expand(3, -1)
    shift, turned, unseen = at(extend(points, orbit(0), camera, torso=own).displacement, CHEST)
    torch.testing.assert_close(shift, torch.tensor([-SHIFT, 0.02]), atol=1e-3, rtol=0)
    torch.testing.assert_close(unseen, at(extend(points, orbit(0), camera).displacement, CHEST)[0])
    below = at(extend(points, orbit(0), camera, torso=own).displacement, (CHEST[0], CHEST[1] + 0.1))[1]
    angle, size = 0.1, torch.exp(torch.tensor(-0.05))  # of a step of 0.1 downwards, before and after
    expected = 0.1 * torch.stack([size * torch.sin(torch.tensor(angle)), size * torch.cos(torch.tensor(angle)) - 1])
    torch.testing.assert_close(below - turned, expected, atol=2e-3, rtol=0)


def test_torso_ignores_a_nod(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """A turn about the head's centre moves the neck, but not the centre; a shift moves both."""
    nod = extend(points, orbit(0), orbit(0, pitch=12))
    assert at(nod.displacement, CHEST)[0, 1].abs() < 0.005


def test_motion_fades_between_head_and_torso_and_ends_at_the_windows_border(
    points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    displacement = extend(points, orbit(0), shifted(orbit(0))).displacement[0, 0]
    middle = displacement[:, FLOW_SIZE // 2]
    cell = (1 + 2 * WINDOW_MARGIN) / FLOW_SIZE
    assert middle.diff().abs().max() < 0.7 * cell  # nothing tears or folds
    inner = middle[FLOW_SIZE // 3 :]
    assert (inner.diff() > -0.02 * SHIFT).all() and inner[0] < -0.99 * SHIFT and inner[-1] > -0.01 * SHIFT
    for edge in (displacement[0], displacement[-1], displacement[:, 0], displacement[:, -1]):
        assert edge.abs().max() < 0.02 * SHIFT


def test_network_flow_is_exact_in_the_face_and_smooth_around_it(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv = identity_grid(32, points)
    uv = uv + 0.03 * (uv[:, :1] < 0.5)  # the flow jumps in the middle
    everywhere = torch.ones(1, 1, 16, 16)
    across = slice(FLOW_SIZE // 2 - 6, FLOW_SIZE // 2 + 6)
    for face, smooth in ((everywhere, False), (None, True)):
        flow = extend(points, orbit(0), orbit(0), uv=uv, weight=everywhere, face=face)
        for place, expected in (((0.3, 0.3), 0.03), ((0.7, 0.3), 0.0), (CROWN, 0.0), (CHEST, 0.0)):
            torch.testing.assert_close(at(flow.displacement, place)[0], torch.full((2,), expected), atol=2e-3, rtol=0)
        steps = flow.displacement[0, 0, FLOW_SIZE // 2 - 20, across].diff().abs()
        assert bool(steps.max() < 0.006) is smooth
        assert float(at(flow.face_weight, (0.3, 0.3))) == (not smooth)


def test_network_shows_where_the_photos_face_would_appear_again(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    photo_face = torch.zeros(1, 1, 40, 40)
    photo_face[..., 14:26, 14:26] = 1
    weight = extend(points, orbit(0), shifted(orbit(0)), photo_face=photo_face).face_weight
    assert float(at(weight, (0.5 + SHIFT, 0.3 + SHIFT))) == 1
    assert float(at(weight, (0.4, 0.3 + SHIFT)).round()) == 0 and float(at(weight, CHEST)) == 0


def test_batch_of_two_equals_two_single_calls(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    cameras = torch.cat([orbit(20, pitch=5), shifted(orbit(-10))])
    uv, weight = identity_grid(32, points) + 0.05 * torch.rand(2, 2, 32, 32), torch.rand(2, 1, 16, 16)
    both = extend(points, orbit(3), cameras, uv=uv, weight=weight, face=weight**2)
    for k in range(2):
        one = extend(
            points,
            orbit(3),
            cameras[k : k + 1],
            uv=uv[k : k + 1],
            weight=weight[k : k + 1],
            face=weight[k : k + 1] ** 2,
        )
        for name in ("displacement", "face_weight"):
            torch.testing.assert_close(getattr(both, name)[k : k + 1], getattr(one, name), atol=1e-5, rtol=0)
    assert (both.displacement[0] - both.displacement[1]).abs().max() > 0.05


def test_what_is_next_to_a_turned_face_is_next_to_the_face_in_the_photo(
    points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    """The right cheek turns away: it is seen compressed, and ends at x = 0.6; next to it must be no cheek."""
    oval = project(points[:, list(FACE_OVAL)], orbit(0))[0]
    cheek = float(oval[0, :, 0].max())
    y = float(oval[0, :, 1].mean())
    assert cheek > 0.63
    uv = identity_grid(64, points)
    x = uv[:, :1]
    compressed = torch.where(x > 0.56, 0.56 + 2.5 * (x - 0.56), x)
    weight = (torch.linspace(0, 1, 64) < 0.6).float().expand(1, 1, 64, 64)
    flow = extend(points, orbit(0), orbit(0), uv=torch.cat([compressed, uv[:, 1:]], dim=1), weight=weight, face=weight)
    for place in (0.61, 0.63):
        assert place + float(at(flow.displacement, (place, y))[0, 0]) > cheek - 0.01
    assert float(at(flow.displacement, (0.5, y))[0].abs().max()) < 1e-3
    row = int((y + WINDOW_MARGIN) / (1 + 2 * WINDOW_MARGIN) * FLOW_SIZE)
    jump = int(flow.displacement[0, 0, row].diff().abs().argmax())  # from the cheek to what is next to it
    assert float(flow.face_weight[0, 0, row, jump : jump + 2].min()) > 0.99  # the network's image hides it
