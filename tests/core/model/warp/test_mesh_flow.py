"""The basis flow on the canonical face."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from mesh_rendering import render_mesh
from torch import Tensor

from export3d_cli.core.face.head_pose import CanonicalFace
from export3d_cli.core.face.landmarks import (
    CHIN,
    EYE_RIMS,
    FACE_OVAL,
    FOREHEAD_TOP,
    LEFT_EYE_OUTER,
    LEFT_IRIS,
    LOWER_INNER_LIP,
    NUM_LANDMARKS,
    RIGHT_EYE_OUTER,
    RIGHT_IRIS,
    UPPER_INNER_LIP,
)
from export3d_cli.core.model.triplane import SURFACE_HALF_EXTENT
from export3d_cli.core.model.volume_renderer import pixel_grid, project
from export3d_cli.core.model.warp.mesh_flow import (
    HEAD_RINGS,
    SURFACE_SIZE,
    BasisFlow,
    MeshFlow,
    add_head_rings,
    identity_grid,
    warp,
)
from export3d_cli.core.model.warp.mouth_eye_interior import anchored_coords, sample_behind_lips

SIZE = 64


@pytest.mark.parametrize(("yaw", "pitch"), [(0, 0), (20, -10)])
def test_equal_source_and_driver_give_the_identity_flow(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor], yaw: float, pitch: float
) -> None:
    camera = orbit(yaw, pitch=pitch)
    mesh = render_mesh(flow, points, camera, flow.deform_landmarks(points, torch.zeros(1, 10)), camera, SIZE)
    grid = pixel_grid(SIZE).T.view(1, 2, SIZE, SIZE)
    face = (mesh.weight == 1) & (mesh.valid == 1)
    assert face.float().mean() > 0.1
    moved = (mesh.uv - grid).norm(dim=1, keepdim=True) * SIZE
    assert moved[face].max() < 0.5
    assert moved.max() < 0.5  # also in the rings and outside
    assert mesh.stretch.abs().max() < 1e-4


@pytest.mark.parametrize("shift", [(0.006, 0.0), (-0.006, 0.0)])
def test_iris_moves_without_distortion(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor], shift: tuple[float, float]
) -> None:
    """All of the iris moves as its centre does, not less towards its edge; the corners of the eye stay."""
    ring = 0.012 * torch.tensor([[1.0, 0.0], [0.0, -1.0], [-1.0, 0.0], [0.0, 1.0]])
    for centre, *edge in (RIGHT_IRIS, LEFT_IRIS):
        points[:, edge, :2] = points[:, centre : centre + 1, :2] + ring
    moved, camera, size = points.clone(), orbit(0), 512
    irises = [*RIGHT_IRIS, *LEFT_IRIS]
    moved[:, irises, :2] += torch.tensor(shift)
    mesh = render_mesh(flow, points, camera, moved, camera, size)
    before, after = (project(x[:, irises], camera)[0].view(2, 5, 2) for x in (points, moved))
    offset = mesh.uv - identity_grid(size, mesh.uv)
    for eye in (0, 1):
        expected = before[eye, 0] - after[eye, 0]
        along = torch.linspace(-0.6, 0.6, 9)[:, None]  # across the iris, where no lid cuts it
        across = after[eye, 0] + along * (after[eye, 1] - after[eye, 0])
        actual = warp(offset, across.T[None, :, :, None])[0, :, :, 0].T
        torch.testing.assert_close(actual, expected.expand_as(actual), atol=0.16 * float(expected.norm()), rtol=0)
    corner = project(points[:, [RIGHT_EYE_OUTER, LEFT_EYE_OUTER]], camera)[0]
    assert warp(offset, corner.transpose(1, 2)[..., None]).norm(dim=1).max() < 0.3 * float(expected.norm())


def test_weight_falls_from_1_in_the_face_to_0_at_the_border(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    mesh = render_mesh(flow, points, orbit(0), points, orbit(0), SIZE)
    weight = mesh.weight[0, 0]
    middle = weight[SIZE // 2]
    assert middle[SIZE // 2] == 1
    assert middle[0] == middle[-1] == 0
    right = middle[SIZE // 2 :]
    assert (right.diff() <= 1e-5).all()
    assert ((right > 0.05) & (right < 0.95)).sum() >= 3
    uv, _ = project(points[:, list(FACE_OVAL)], orbit(0))
    inside = warp(mesh.weight, (uv + (0.5 - uv) * 0.1).transpose(1, 2)[..., None])
    assert inside.min() > 0.9


def test_head_mask_is_the_person_above_the_neck(flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    camera = orbit(0)
    (chin_x, chin_y), (_, top_y) = project(points[:, [CHIN, FOREHEAD_TOP]], camera)[0][0].tolist()
    mesh = render_mesh(flow, points, camera, points, camera)
    people = torch.ones(1, 1, 64, 64)
    people[..., 2:14] = 0
    alone, crowd, without = (flow.head_mask(points, camera, mask) for mask in (mesh.face, people, mesh.face * 0))
    assert (alone >= mesh.face - 1e-5).all() and (alone - mesh.face).max() < 0.25  # the face is part of the head
    torch.testing.assert_close(without, mesh.weight)  # a mask that misses the face is ignored

    def at(picture: Tensor, x: float, y: float) -> float:
        return float(warp(picture, torch.tensor([x, y]).view(1, 2, 1, 1)))

    above, below = top_y - 0.3 * (chin_y - top_y), chin_y + 0.15 * (chin_y - top_y)
    assert at(alone, chin_x, above) == 0 and at(crowd, chin_x, above) > 0.9
    assert 0.3 < at(crowd, chin_x, below) < 0.7 and at(crowd, chin_x, chin_y + 0.35 * (chin_y - top_y)) == 0
    assert crowd[..., 0].max() == 0  # other people at the border


def test_hair_moves_with_the_head_and_its_surroundings_do_not(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    """With hair on one side only, the rings carry that side."""
    source, driver = orbit(0), orbit(12)
    person = render_mesh(flow, points, source, points, source).face
    person[..., person.shape[-1] // 2 :] = 1
    head = flow.head_mask(points, source, person)
    mesh = render_mesh(flow, points, source, points, driver, 2 * SIZE, head)
    uv, _ = project(add_head_rings(points)[:, 478:514], driver)  # the inner ring
    weight = warp(mesh.weight, uv.transpose(1, 2)[..., None])[0, 0, :, 0]
    unmasked = render_mesh(flow, points, source, points, driver, 2 * SIZE)
    middle, above = uv[0, :, 0].mean(), uv[0, :, 1] < uv[0, :, 1].mean()
    right, left = (uv[0, :, 0] > middle + 0.1) & above, (uv[0, :, 0] < middle - 0.1) & above
    assert weight[right].mean() > 0.8 and weight[left].max() < 0.3
    differs = (mesh.uv - unmasked.uv).abs().amax(1, keepdim=True) > 1e-6  # only far out, where nothing moves
    assert mesh.weight[differs].max() < 0.06 and unmasked.weight[differs].max() == 0
    torch.testing.assert_close(mesh.uv, torch.where(differs, identity_grid(2 * SIZE, mesh.uv), unmasked.uv))


def test_high_hair_belongs_to_the_head_and_background_next_to_it_does_not(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    """A point above the forehead, beyond the second ring, moves with the head; one next to the head stays."""
    source, driver = orbit(0), orbit(20)
    for camera in (source, driver):
        camera[:, [16, 20]] *= 0.7  # a wider lens leaves space above the head
    uv, _ = project(points[:, [CHIN, FOREHEAD_TOP]], source)
    chin, brow = uv[0]
    face = chin[1] - brow[1]
    head = flow.head_mask(points, source, torch.ones(1, 1, 64, 64))

    def at(picture: Tensor, place: Tensor) -> Tensor:
        return warp(picture, place.view(1, 2, 1, 1)).flatten()

    assert at(head, brow - torch.stack([face * 0, 0.7 * face])) > 0.9
    assert at(head, brow + torch.stack([1.2 * face, 0.3 * face])) == 0
    outer = add_head_rings(points)[:, 514:].view(1, 2, 36, 3).mean(1)  # between the second and the last ring
    top = int(project(outer, source)[0][0, :, 1].argmin())
    before, after = (project(outer[:, top : top + 1], camera)[0].flatten() for camera in (source, driver))
    assert (after - before).norm() > 0.02
    mesh = render_mesh(flow, points, source, points, driver, 2 * SIZE, head)
    torch.testing.assert_close(at(mesh.uv, after), before, atol=0.01, rtol=0)
    assert at(mesh.weight, after) > 0.8


def test_hair_far_aside_does_not_belong_to_the_head(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another head, whether it is connected or not."""
    camera = orbit(0)
    camera[:, [16, 20]] *= 0.7  # a wider lens leaves space next to the head
    uv, _ = project(points[:, [CHIN, FOREHEAD_TOP]], camera)
    (middle, chin), (_, brow) = uv[0].tolist()
    face, size = chin - brow, 128
    monkeypatch.setattr(flow, "size", size)
    x, y = pixel_grid(size).T.view(2, size, size)
    person = render_mesh(flow, points, camera, points, camera, size).face
    person[0, 0][(y < brow + 0.35 * face) & (y > brow - 0.35 * face) & (x > middle - 0.4 * face)] = 1
    person[0, 0][(y < brow + 0.35 * face) & (y > brow - 0.35 * face) & (x < middle - 0.8 * face)] = 1
    head = flow.head_mask(points, camera, person)
    near, far, apart = (
        float(warp(head, torch.tensor([middle + aside * face, brow]).view(1, 2, 1, 1))) for aside in (0.5, 1.15, -0.87)
    )
    assert near > 0.95 and far < 0.05 and apart < 0.05


def test_flow_of_a_turned_head_maps_landmarks_to_the_photo(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    """At a landmark of the result the flow holds its position in the photo."""
    source, driver = orbit(0), orbit(15)
    mesh = render_mesh(flow, points, source, points, driver, 4 * SIZE)
    nose_and_cheeks = [1, 4, 50, 280, 101, 330]
    before, _ = project(points[:, nose_and_cheeks], source)
    after, _ = project(points[:, nose_and_cheeks], driver)
    assert (after - before).norm(dim=-1).max() > 0.02
    sampled = warp(mesh.uv, after.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
    torch.testing.assert_close(sampled, before, atol=0.004, rtol=0)


def test_skin_hidden_in_the_photo_is_invalid(flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """In the photo the head looks to the image's right, which hides that cheek."""
    mesh = render_mesh(flow, points, orbit(45), points, orbit(0), SIZE)
    face = mesh.weight[0, 0] == 1
    hidden = (mesh.valid[0, 0] == 0) & face & (mesh.mouth[0, 0] == 0)
    left, right = hidden[:, : SIZE // 2], hidden[:, SIZE // 2 :]
    assert right.sum() > 20
    assert left.sum() < 0.2 * right.sum()
    straight = render_mesh(flow, points, orbit(0), points, orbit(0), SIZE)
    assert ((straight.valid == 0) & (straight.weight == 1) & (straight.mouth == 0)).sum() < 0.02 * face.sum()


def test_jaw_displacement_opens_the_mouth(flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    height = points[0, :, 1]
    jaw = ((height - height[78]) / 0.003).clamp(0, 1)  # all landmarks below the corners of the mouth
    flow.basis[2, :, 1] = 0.02 * jaw  # b_2 moves it down
    camera = orbit(0)

    def opened(amount: float) -> MeshFlow:
        change = torch.zeros(1, 10)
        change[0, 2] = amount
        return render_mesh(flow, points, camera, flow.deform_landmarks(points, change), camera, 2 * SIZE)

    closed, half, wide = opened(0), opened(1), opened(2)
    areas = [float(mesh.mouth.sum()) for mesh in (closed, half, wide)]
    assert areas[0] < 0.4 * areas[1]
    assert areas[1] < 0.7 * areas[2]
    assert wide.valid[wide.mouth == 1].mean() < 0.2  # the photo does not show the inside
    assert wide.valid[(wide.mouth == 0) & (wide.weight == 1)].mean() > 0.95
    assert wide.stretch[wide.mouth == 1].mean() > 1
    rows = torch.nonzero(((wide.uv - closed.uv).abs().amax(1) > 1e-4)[0])[:, 0] / (2 * SIZE)
    nose, _ = project(points[:, [2]], camera)
    assert rows.min() > nose[0, 0, 1]  # nothing moves above the mouth


def test_teeth_stay_behind_the_upper_lip(flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    camera = orbit(0)
    parted = points.clone()
    parted[0, list(LOWER_INNER_LIP[1:-1]), 1] += 0.03

    def opened(more: float) -> MeshFlow:
        target = parted.clone()
        target[0, list(LOWER_INNER_LIP[1:-1]), 1] += more
        return render_mesh(flow, parted, camera, target, camera, 4 * SIZE)

    unchanged, wider = opened(0), opened(0.03)
    inside = (unchanged.mouth[0, 0] == 1) & (wider.mouth[0, 0] == 1)
    rows = torch.nonzero(inside)[:, 0]
    upper = inside & (torch.arange(4 * SIZE)[:, None] < rows.float().quantile(0.4))
    assert (unchanged.uv - wider.uv).abs()[0, :, upper].max() < 0.5 / SIZE  # nothing moves
    assert wider.valid[0, 0][upper].mean() > 0.9
    low = (wider.mouth[0, 0] == 1) & (torch.arange(4 * SIZE)[:, None] > rows.max() + 1)
    assert wider.valid[0, 0][low].mean() < 0.1  # not shown in the photo
    assert wider.closed_in_photo[0, 0][low].mean() > 0.9


def test_sample_behind_lips_stops_at_the_lower_lip_of_the_photo() -> None:
    edges = torch.tensor([0.5, 0.4, 0.5, 0.5, 2.0]).expand(1, 3, 5)
    uv, visibility = sample_behind_lips(torch.tensor([1.0, 0.5, -1.0]).view(1, 3, 1), edges)
    torch.testing.assert_close(uv[0, :, 1], torch.tensor([0.4, 0.45, 0.5]))
    assert visibility.flatten().tolist() == [1, 1, 0]


def test_deform_landmarks_sums_the_fields(flow: BasisFlow, points: Tensor) -> None:
    flow.basis.copy_(torch.randn(flow.basis.shape, generator=torch.Generator().manual_seed(0)))
    change = torch.randn(3, 10)
    expected = points + torch.einsum("bn,npc->bpc", change, flow.basis)
    torch.testing.assert_close(flow.deform_landmarks(points.expand(3, -1, -1), change), expected)


def test_anchored_coords_do_not_move_with_the_lips(points: Tensor) -> None:
    opened = points.clone()
    opened[:, 14, 1] += 0.05  # the middle of the lower lip moves down
    before, after = anchored_coords(points), anchored_coords(opened)
    torch.testing.assert_close(before[:, 13], after[:, 13])
    assert after[0, 14, 1] > before[0, 14, 1] + 0.1  # a lower part of the upper teeth
    moved = anchored_coords(points + torch.tensor([0.3, -0.2, 0.1]))
    torch.testing.assert_close(moved, before, atol=1e-4, rtol=0)


def test_anchored_coords_of_both_eyes_are_mirrored(points: Tensor) -> None:
    (_, right), (_, left) = EYE_RIMS
    coords = anchored_coords(points)[0]
    torch.testing.assert_close(coords[list(right)], coords[list(left)], atol=0.05, rtol=0)
    assert coords[right[8], 0] > 0 > coords[right[0], 0]  # x towards the nose


def test_anchored_coords_are_0_outside_mouth_and_eyes(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    mesh = render_mesh(flow, points, orbit(0), points, orbit(0), 2 * SIZE)
    inside = (mesh.mouth + mesh.eye)[0, 0] > 0
    assert 0 < mesh.eye.mean() < 0.02
    assert mesh.anchored_coords[:, :, ~inside].abs().max() == 0
    assert mesh.anchored_coords[:, :, inside].abs().max() > 0.2


def test_landmark_tables_are_symmetric(canonical: CanonicalFace) -> None:
    (right_iris, right), (left_iris, left) = EYE_RIMS
    assert canonical.mirror[[right_iris, *right]].tolist() == [left_iris, *left]
    for table in (UPPER_INNER_LIP, LOWER_INNER_LIP, FACE_OVAL[1:]):
        assert canonical.mirror[list(table)].tolist() == list(table[::-1])


def test_rasterize_surface_is_the_front_of_the_head(flow: BasisFlow, points: Tensor) -> None:
    displacement = torch.tensor([0.01, -0.02, 0.03]).expand_as(points)
    surface = flow.rasterize_surface(points, displacement)[0]
    height, confidence, coverage = surface[:3]
    cells = ((points[0, :, :2] / (2 * SURFACE_HALF_EXTENT) + 0.5) * SURFACE_SIZE).long()
    x, y = cells[1]  # the tip of the nose
    assert height[y, x] == pytest.approx(float(points[0, 1, 2]), abs=0.01)
    assert confidence[y, x] == coverage[y, x] == 1
    assert height[coverage == 1].min() == pytest.approx(float(points[0, :, 2].min()), abs=0.01)
    assert height[coverage == 0].abs().max() == 0
    torch.testing.assert_close(surface[3:, y, x], displacement[0, 1], atol=1e-4, rtol=0)
    assert surface[3:, 0].abs().max() == 0
    assert confidence[0, 0] == 0


def test_inner_ring_shrinks_to_the_outline_of_the_person(
    flow: BasisFlow, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    camera, size = orbit(0), 512
    on_outline, _ = project(add_head_rings(points, torch.full((1, len(FACE_OVAL)), 1.15)), camera)
    ring = (on_outline[0, NUM_LANDMARKS : NUM_LANDMARKS + len(FACE_OVAL)] * size).round().int().numpy()
    person = cv2.fillPoly(np.zeros((size, size), np.float32), [ring], 1.0)
    person[size // 2 :, : size // 2] = 1  # a neighbour: there the person has no outline next to the face
    outline = flow.find_outline(points, camera, torch.from_numpy(person)[None, None])
    uv, _ = project(points[:, list(FACE_OVAL)], camera)
    free = (uv[0, :, 0] > 0.5) | (uv[0, :, 1] < 0.5)
    usual = torch.tensor(HEAD_RINGS[0][0])
    assert outline[0, free].sub(1.15).abs().max() < 0.03
    assert torch.isclose(outline[0, ~free].max(), usual)
    assert torch.allclose(flow.find_outline(points, camera, torch.zeros(1, 1, 8, 8)), usual)
