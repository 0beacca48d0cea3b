"""The close-up of an eye, the colour of its iris, and when it is painted, on the canonical face."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.face.landmarks import EYE_RIMS
from export3d_cli.core.model.export3d import Output
from export3d_cli.core.model.inpaint.eyelids import EyelidInpainter
from export3d_cli.core.model.inpaint.eyes import (
    EYE_OPENING_FADE,
    MIN_EYE_OPENING,
    EyeInpainter,
    eye_crop,
    eye_hole,
    eye_opening,
    eyelid_rims,
    iris_colour,
)
from export3d_cli.core.model.volume_renderer import pixel_grid, project
from export3d_cli.core.runtime.weights import weights_dir

GREY = torch.zeros(1, 3, 64, 64)


def lidded(points: Tensor, share: float) -> Tensor:
    """Landmarks whose eyes are open by `share` of what they were; the irises stay."""
    out = points.clone()
    for side in (0, 1):
        upper, lower = (list(lid) for lid in eyelid_rims(side))
        middle = (points[:, upper] + points[:, lower]) / 2
        for lid in (upper, lower):
            out[:, lid] = middle + (points[:, lid] - middle) * share
    return out


def with_irises(points: Tensor) -> Tensor:
    """Landmarks with irises: the canonical face has no more than their centres."""
    out = points.clone()
    for iris, rim in EYE_RIMS:
        width = (points[:, rim[0]] - points[:, rim[8]]).norm()
        ring = torch.tensor([[1.0, 0, 0], [0, -1, 0], [-1, 0, 0], [0, 1, 0]]) * 0.2 * width
        out[:, iris + 1 : iris + 5] = points[:, iris : iris + 1] + ring
    return out


def test_both_eyes_look_alike_in_close_up(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    mirror = torch.from_numpy(load_canonical_face(weights_dir() / "face_landmarker.task").mirror.copy())
    uv, _ = project(points, orbit(15.0))
    mirrored = uv[:, mirror] * torch.tensor([-1.0, 1.0]) + torch.tensor([1.0, 0.0])
    left, right = eye_crop(uv, 1), eye_crop(mirrored, 0)
    torch.testing.assert_close(left.side, right.side)
    torch.testing.assert_close(left.to_crop(uv)[:, mirror], right.to_crop(mirrored), atol=1e-5, rtol=0)
    corners = right.to_crop(mirrored)[0, [EYE_RIMS[0][1][0], EYE_RIMS[0][1][8]]]
    assert corners[0, 0] < 0.3 and corners[1, 0] > 0.7  # outer corner left, the nose to the right
    assert corners.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_the_colour_is_that_of_the_iris(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    camera, own, points = orbit(0.0), torch.tensor([0.4, -0.2, -0.6]), with_irises(points)
    for side in (0, 1):
        for open_ in (1.0, 0.4):
            uv, _ = project(lidded(points, open_), camera)
            iris = uv[0, EYE_RIMS[side][0] : EYE_RIMS[side][0] + 5]
            radius = (iris[1:] - iris[0]).norm(dim=-1).mean()
            disc = ((pixel_grid(512) - iris[0]).norm(dim=-1) < radius).view(1, 1, 512, 512).float()
            image = disc * own.view(1, 3, 1, 1) + (1 - disc)  # a white eye with a brown iris
            colour, known = iris_colour(image, uv, side)
            assert (colour[0] - own).abs().max() < 0.15 and known.item() == 1
            band, _ = iris_colour(image, uv, side, torch.tensor([0.5]))
            assert (band[0] - own).abs().max() < 0.15
        shut, _ = project(lidded(points, 0.0), camera)
        assert iris_colour(image, shut, side)[1].item() == 0


def test_only_eyes_that_open_wider_than_in_the_photo_are_painted(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    painter, camera = EyeInpainter(4), orbit(0.0)
    full = min(eye_opening(points, side).item() for side in (0, 1))
    assert full > 4 * MIN_EYE_OPENING

    def amounts(before: float, after: float) -> list[float]:
        photo, result = lidded(points, before), lidded(points, after)
        return [fill.mask.amax().item() for fill in painter.inpaint(GREY, GREY, photo, camera, result, camera)]

    assert amounts(1.0, 1.0) == amounts(1.0, 0.3) == amounts(0.5, 0.49 * EYE_OPENING_FADE[0]) == []
    assert amounts(0.0, 0.5 * MIN_EYE_OPENING / full) == []  # nearly shut in both
    half = sum(EYE_OPENING_FADE) / 2
    assert amounts(0.5, 0.5 * half) == pytest.approx([0.5, 0.5], abs=0.02)
    assert amounts(0.5, 1.0) == amounts(0.0, 1.0) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_an_eye_behind_the_nose_is_not_painted(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    narrow = lidded(points, 0.4)
    for painter, photo, result in ((EyeInpainter(4), narrow, points), (EyelidInpainter(4), points, narrow)):
        shown = []
        for yaw in (-60.0, -30.0, 30.0, 60.0):
            fills = painter.inpaint(GREY, GREY, photo, orbit(0.0), result, orbit(yaw))
            shown.append([fill.mask.amax().item() > 0.1 for fill in fills])
        near = [[True, False], [True, True], [True, True], [False, True]]
        assert shown in (near, near[::-1])


def test_the_hole_is_the_eye_and_tells_what_is_known(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv, _ = project(points, orbit(0.0))
    colour = torch.tensor([[0.5, 0.1, -0.3]])
    view, hole = eye_hole(points, uv, 1, colour, torch.tensor([0.5]))
    inside = hole.condition[:, :1]
    upper, lower = eyelid_rims(1)
    x, y = view.to_crop(uv)[0, [*upper, *lower[-2:0:-1]]].T
    area = (x * y.roll(-1) - y * x.roll(-1)).sum().abs() / 2
    assert inside.mean().item() == pytest.approx(float(area), rel=0.05)
    assert (hole.mask >= inside - 1e-6).all() and hole.mask.sum() < 2 * inside.sum()
    within = hole.condition[0][:, inside[0, 0] > 0]
    torch.testing.assert_close(within[1:5].T, torch.tensor([0.5, 0.25, 0.05, -0.15]).expand(within.shape[1], 4))
    assert (hole.condition[0][:, inside[0, 0] == 0] == 0).all()
    about = hole.condition[0, 5:, 48, 48]  # in the middle of the eye is the iris
    assert about.abs().max() < 0.25


def test_only_the_eyes_of_a_result_are_painted(
    points: Tensor, orbit: Callable[..., Tensor], painted_results: Callable[..., tuple[Output, Output, Output]],
    differ_only_near: Callable[..., bool],
) -> None:  # fmt: skip
    plain, painted, same = painted_results("eyes", lidded(points, 0.4), points)
    assert not same.inpainted and len(painted.inpainted) == 2
    uv, _ = project(points, orbit(0.0))
    assert differ_only_near(plain, painted, *(uv[0, list(EYE_RIMS[side][1])] for side in (0, 1)))


def test_the_colour_of_an_eye_behind_the_nose_is_not_asked_for(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    painter, told, points = EyeInpainter(4), [], with_irises(points)
    painter.register_forward_pre_hook(lambda _, args: told.append(args[1].condition[0, 2].amax().item()))
    uv, _ = project(points, orbit(60.0))
    halves = (pixel_grid(256)[:, 0] > uv[0, 168, 0]).float().view(1, 1, 256, 256).expand(1, 3, -1, -1)
    for photo in (halves, 1 - halves):  # eyes of two colours
        painter.inpaint(GREY, photo, lidded(points, 0.6), orbit(60.0), points, orbit(0.0))
    assert sorted(round(colour, 3) for colour in told) == [0, 1]
