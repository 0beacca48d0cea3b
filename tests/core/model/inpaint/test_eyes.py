"""Eyes: their crops, iris colours, holes and when they are inpainted, on the canonical face."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export3d_cli.core.face.head_pose import load_canonical_face
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

GREY = torch.zeros(1, 3, 64, 64)


def with_opening(points: Tensor, ratio: float) -> Tensor:
    """Return landmarks with eye openings scaled by `ratio`; the irises stay."""
    out = points.clone()
    for side in (0, 1):
        upper, lower = (list(lid) for lid in eyelid_rims(side))
        middle = (points[:, upper] + points[:, lower]) / 2
        for lid in (upper, lower):
            out[:, lid] = middle + (points[:, lid] - middle) * ratio
    return out


def with_irises(points: Tensor) -> Tensor:
    """Return landmarks with iris rims: the canonical face has only the centres."""
    out = points.clone()
    for iris, rim in EYE_RIMS:
        width = (points[:, rim[0]] - points[:, rim[8]]).norm()
        ring = torch.tensor([[1.0, 0, 0], [0, -1, 0], [-1, 0, 0], [0, 1, 0]]) * 0.2 * width
        out[:, iris + 1 : iris + 5] = points[:, iris : iris + 1] + ring
    return out


def test_eye_crops_of_both_eyes_are_mirrored(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    mirror = torch.from_numpy(load_canonical_face().mirror.copy())
    uv, _ = project(points, orbit(15.0))
    mirrored = uv[:, mirror] * torch.tensor([-1.0, 1.0]) + torch.tensor([1.0, 0.0])
    left, right = eye_crop(uv, 1), eye_crop(mirrored, 0)
    torch.testing.assert_close(left.side, right.side)
    torch.testing.assert_close(left.to_crop(uv)[:, mirror], right.to_crop(mirrored), atol=1e-5, rtol=0)
    corners = right.to_crop(mirrored)[0, [EYE_RIMS[0][1][0], EYE_RIMS[0][1][8]]]
    assert corners[0, 0] < 0.3 and corners[1, 0] > 0.7  # outer corner left, the nose to the right
    assert corners.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_iris_colour_measures_the_iris(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    camera, true_colour, points = orbit(0.0), torch.tensor([0.4, -0.2, -0.6]), with_irises(points)
    for side in (0, 1):
        for opening in (1.0, 0.4):
            uv, _ = project(with_opening(points, opening), camera)
            iris = uv[0, EYE_RIMS[side][0] : EYE_RIMS[side][0] + 5]
            radius = (iris[1:] - iris[0]).norm(dim=-1).mean()
            disc = ((pixel_grid(512) - iris[0]).norm(dim=-1) < radius).view(1, 1, 512, 512).float()
            image = disc * true_colour.view(1, 3, 1, 1) + (1 - disc)  # a white eye with a brown iris
            colour, confidence = iris_colour(image, uv, side)
            assert (colour[0] - true_colour).abs().max() < 0.15 and confidence.item() == 1
            band, _ = iris_colour(image, uv, side, torch.tensor([0.5]))
            assert (band[0] - true_colour).abs().max() < 0.15
        shut, _ = project(with_opening(points, 0.0), camera)
        assert iris_colour(image, shut, side)[1].item() == 0


def test_only_eyes_opened_wider_than_in_the_photo_are_inpainted(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    inpainter, camera = EyeInpainter(4), orbit(0.0)
    full = min(eye_opening(points, side).item() for side in (0, 1))
    assert full > 4 * MIN_EYE_OPENING

    def strengths(before: float, after: float) -> list[float]:
        photo, result = with_opening(points, before), with_opening(points, after)
        return [patch.mask.amax().item() for patch in inpainter.inpaint(GREY, GREY, photo, camera, result, camera)]

    assert strengths(1.0, 1.0) == strengths(1.0, 0.3) == strengths(0.5, 0.49 * EYE_OPENING_FADE[0]) == []
    assert strengths(0.0, 0.5 * MIN_EYE_OPENING / full) == []  # nearly shut in both
    half = sum(EYE_OPENING_FADE) / 2
    assert strengths(0.5, 0.5 * half) == pytest.approx([0.5, 0.5], abs=0.02)
    assert strengths(0.5, 1.0) == strengths(0.0, 1.0) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_eye_behind_the_nose_is_not_inpainted(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    narrow = with_opening(points, 0.4)
    for inpainter, photo, result in ((EyeInpainter(4), narrow, points), (EyelidInpainter(4), points, narrow)):
        is_inpainted = []
        for yaw in (-60.0, -30.0, 30.0, 60.0):
            patches = inpainter.inpaint(GREY, GREY, photo, orbit(0.0), result, orbit(yaw))
            is_inpainted.append([patch.mask.amax().item() > 0.1 for patch in patches])
        expected = [[True, False], [True, True], [True, True], [False, True]]
        assert is_inpainted in (expected, expected[::-1])


def test_eye_hole_covers_the_eye_and_holds_the_iris_colour(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv, _ = project(points, orbit(0.0))
    colour = torch.tensor([[0.5, 0.1, -0.3]])
    crop, hole = eye_hole(points, uv, 1, colour, torch.tensor([0.5]))
    inside = hole.condition[:, :1]
    upper, lower = eyelid_rims(1)
    x, y = crop.to_crop(uv)[0, [*upper, *lower[-2:0:-1]]].T
    area = (x * y.roll(-1) - y * x.roll(-1)).sum().abs() / 2
    assert inside.mean().item() == pytest.approx(float(area), rel=0.05)
    assert (hole.mask >= inside - 1e-6).all() and hole.mask.sum() < 2 * inside.sum()
    within = hole.condition[0][:, inside[0, 0] > 0]
    torch.testing.assert_close(within[1:5].T, torch.tensor([0.5, 0.25, 0.05, -0.15]).expand(within.shape[1], 4))
    assert (hole.condition[0][:, inside[0, 0] == 0] == 0).all()
    coords = hole.condition[0, 5:, 48, 48]  # the iris is in the middle of the eye
    assert coords.abs().max() < 0.25


def test_only_the_eyes_of_a_result_are_inpainted(
    points: Tensor, orbit: Callable[..., Tensor], inpainted_results: Callable[..., tuple[Output, Output, Output]],
    differ_only_near: Callable[..., bool],
) -> None:  # fmt: skip
    plain, inpainted, unchanged = inpainted_results("eyes", with_opening(points, 0.4), points)
    assert not unchanged.inpainted and len(inpainted.inpainted) == 2
    uv, _ = project(points, orbit(0.0))
    assert differ_only_near(plain, inpainted, *(uv[0, list(EYE_RIMS[side][1])] for side in (0, 1)))


def test_iris_colour_ignores_the_eye_behind_the_nose(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    inpainter, colours, points = EyeInpainter(4), [], with_irises(points)
    inpainter.register_forward_pre_hook(lambda _, args: colours.append(args[1].condition[0, 2].amax().item()))
    uv, _ = project(points, orbit(60.0))
    halves = (pixel_grid(256)[:, 0] > uv[0, 168, 0]).float().view(1, 1, 256, 256).expand(1, 3, -1, -1)
    for photo in (halves, 1 - halves):  # eyes of different colours
        inpainter.inpaint(GREY, photo, with_opening(points, 0.6), orbit(60.0), points, orbit(0.0))
    assert sorted(round(colour, 3) for colour in colours) == [0, 1]


def test_opened_eye_that_the_photo_shows_shut_is_brown(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """In the brightness of the skin; an eye that the photo shows gives the other one its colour."""
    inpainter, colours, points = EyeInpainter(4), [], with_irises(points)
    inpainter.register_forward_pre_hook(lambda _, args: colours.append(args[1].condition[:, 1:5, 48, 48]))
    skin = torch.tensor([0.5, 0.1, -0.1]).view(1, 3, 1, 1).expand(1, 3, 256, 256)
    for photo in (skin, (skin + 1) / 2 - 1):
        inpainter.inpaint(photo, photo, with_opening(points, 0.0), orbit(0.0), points, orbit(0.0))
    bright, dark = colours
    assert (bright[:, 0] == 1).all()
    red, green, blue = (bright[0, 1:] + 1) / 2
    assert red > 1.3 * green > 1.5 * blue and blue > 0.1 and red < 0.4
    torch.testing.assert_close((dark[:, 1:] + 1) * 2, bright[:, 1:] + 1)
    blink = points.clone()
    blink[:, list(EYE_RIMS[0][1])] = with_opening(points, 0.0)[:, list(EYE_RIMS[0][1])]
    inpainter.inpaint(skin, skin, blink, orbit(0.0), points, orbit(0.0))
    torch.testing.assert_close(colours[2][0, 1:], skin[0, :, 0, 0])
