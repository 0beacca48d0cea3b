"""Covered parts keep still: landmarks, expression codes and the driven picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from export3d_cli.core.face.landmarks import CHIN, FOREHEAD_TOP, LEFT_BROW, LEFT_EYE, LIPS, RIGHT_EYE
from export3d_cli.core.model.export3d import Export3D, Output
from export3d_cli.core.model.face_cover import cover_motion, make_code_filter
from export3d_cli.core.model.volume_renderer import pixel_grid, project

NOTHING, MOUTH, RIGHT = (torch.tensor([row]) for row in ([0.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]))


def test_cover_motion_is_zero_on_the_cover_and_one_elsewhere(points: Tensor) -> None:
    assert (cover_motion(points, NOTHING) == 1).all()
    mouth, right = (cover_motion(points, covered)[0, :, 0] for covered in (MOUTH, RIGHT))
    assert (mouth[list(LIPS) + [CHIN]] == 0).all()
    assert (mouth[list(RIGHT_EYE) + list(LEFT_EYE) + [FOREHEAD_TOP]] > 0.8).all()
    assert (right[list(RIGHT_EYE)] == 0).all()
    assert (right[list(LIPS) + list(LEFT_EYE) + list(LEFT_BROW)] == 1).all()


def test_code_filter_removes_what_only_moves_the_cover(points: Tensor) -> None:
    basis = torch.zeros(3, 478, 3)
    basis[0, list(LIPS), 1] = 0.01
    basis[1, list(LEFT_EYE), 1] = 0.01
    basis[2, [CHIN, FOREHEAD_TOP], 1] = 0.01
    keep = make_code_filter(basis, cover_motion(points, MOUTH))[0]
    expected = torch.diag(torch.tensor([0, float(cover_motion(points, MOUTH)[0, list(LEFT_EYE)].mean()), 0.5]))
    torch.testing.assert_close(keep, expected, atol=0.02, rtol=0)
    torch.testing.assert_close(make_code_filter(basis, torch.ones(1, 478, 1))[0], torch.eye(3), atol=1e-3, rtol=0)


def test_covered_mouth_shows_the_photo_whatever_the_expression(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    assert tiny.flow is not None
    tiny.flow.basis.zero_()[0, list(LIPS), 1] = 0.02
    tiny.flow.basis[1, list(RIGHT_EYE + LEFT_EYE), 1] = 0.02
    photo, camera = torch.rand(1, 3, 64, 64), orbit(0.0)

    def results(covered: Tensor) -> Output:
        with torch.no_grad():
            source = tiny.encode_source(photo, torch.zeros(1, 64), camera, points, covered=covered)
            moved = source.lam + torch.eye(source.lam.shape[1])[:2].sum(0)
            lam = torch.cat([source.lam, moved])
            return tiny.drive(source.expand(2), lam, camera.expand(2, -1))

    uv, _ = project(points, camera)
    place = pixel_grid(64).view(64, 64, 2)

    def change(output: Output, part: tuple[int, ...]) -> float:
        low, high = uv[0, list(part)].amin(0), uv[0, list(part)].amax(0)
        inside = ((place >= low) & (place <= high)).all(-1)
        return float((output.image[1] - output.image[0]).abs().mean(0)[inside].mean())

    plain, masked = results(NOTHING), results(MOUTH)
    assert change(plain, LIPS) > 0.05
    assert change(masked, LIPS) < 0.01
    assert change(masked, RIGHT_EYE) > 0.02
