"""Several photos of one person: which photo each pixel of the face and each landmark comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from export3d_cli.core.face.landmarks import LOWER_INNER_LIP, RIGHT_EYE, UPPER_INNER_LIP
from export3d_cli.core.model.encoded_source import Source
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp.photo_selection import blend_landmarks, expression_distances

BLUE, RED = (torch.tensor(c).view(1, 3, 1, 1).expand(1, 3, 64, 64) for c in ((-1.0, -1.0, 1.0), (1.0, -1.0, -1.0)))


def encode(model: Export3D, image: Tensor, camera: Tensor, points: Tensor, lam: float = 0.0) -> Source:
    with torch.no_grad():
        source = model.encode_source(image, torch.zeros(1, 64), camera, points)
    return replace(source, lam=torch.full_like(source.lam, lam), colours=None)


def sampled(model: Export3D, source: Source, camera: Tensor, lam: Tensor) -> Tensor:
    """Return the photos' colours along the flow, (1, 3, 32, 32)."""
    with torch.no_grad():
        photo = model.drive(source, lam, camera).warped_photo
    assert photo is not None
    return photo


def test_face_comes_from_the_photo_that_is_turned_alike(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    first = encode(tiny, BLUE, orbit(-25), points)
    both = replace(first, others=(encode(tiny, RED, orbit(25), points),))
    nose = slice(14, 18)
    for yaw, red in ((-25, False), (25, True)):
        colours = sampled(tiny, both, orbit(yaw), first.lam)[0, :, nose, nose].mean((1, 2))
        assert (colours[0] > colours[2]) == red
        assert abs(float(colours[0] - colours[2])) > 0.5
    torch.testing.assert_close(
        sampled(tiny, both, orbit(25), first.lam)[..., :4, :], sampled(tiny, first, orbit(25), first.lam)[..., :4, :]
    )  # outside the face nothing changes


def test_landmarks_come_from_the_photo_with_the_nearest_expression(points: Tensor) -> None:
    """Region by region: the second photo has the result's mouth, the first one its eyes."""
    mouth, eye = list(UPPER_INNER_LIP + LOWER_INNER_LIP), list(RIGHT_EYE)
    smile, blink = points.clone(), points.clone()
    smile[:, mouth] += 0.05
    blink[:, eye] += 0.05
    result = points.clone()
    result[:, mouth] += 0.05
    deformed = [result, result + 0.01]  # the second photo sees the whole face elsewhere
    distances = expression_distances(result, deformed, [points, blink + 0.01 + (smile - points)])
    blended = blend_landmarks(deformed, distances, torch.zeros(1, 2))
    torch.testing.assert_close(blended[:, 13], deformed[1][:, 13], atol=2e-3, rtol=0)
    torch.testing.assert_close(blended[:, eye], result[:, eye], atol=2e-3, rtol=0)


def test_expression_that_a_photo_shows_has_no_distance(points: Tensor) -> None:
    distances = expression_distances(points, [points, points], [points, points + torch.tensor([0.03, 0.0, 0.0])])
    torch.testing.assert_close(distances[..., 0], torch.zeros(1, 478))
    torch.testing.assert_close(distances[..., 1], torch.full((1, 478), 0.03))


def test_colours_of_an_additional_photo_are_matched(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    """Another exposure is undone wherever the light is smooth, also around the face."""
    torch.manual_seed(0)
    photo = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), (64, 64), mode="bilinear") - 0.5
    first = encode(tiny, photo, orbit(0), points)
    darker = torch.nn.functional.pad((photo + 1) * torch.tensor([0.6, 0.7, 0.8]).view(1, 3, 1, 1) - 1, (16,) * 4)
    matched, similarity = tiny.match_colours(first, darker, 16, orbit(0), points)
    matched = matched[..., 16:-16, 16:-16]
    assert similarity > 0.9
    assert (matched - photo).abs().mean() < 0.05
    assert (darker[..., 16:-16, 16:-16] - photo).abs().mean() > 0.2


def test_open_mouth_comes_from_the_photo_that_shows_it(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    uv, _ = project(points, orbit(0))
    first = encode(tiny, BLUE, orbit(0), points)
    opened = points.clone()
    opened[:, list(LOWER_INNER_LIP)] += torch.tensor([0.0, 0.08, 0.0])
    assert tiny.flow is not None
    change = torch.zeros_like(tiny.flow.basis[0])
    change[list(LOWER_INNER_LIP)] = torch.tensor([0.0, 0.08, 0.0])
    tiny.flow.basis.zero_()
    tiny.flow.basis[0] = change
    lam = torch.zeros_like(first.lam)
    lam[:, 0] = 1
    second = replace(encode(tiny, RED, orbit(0), opened), lam=lam)
    one, two = (sampled(tiny, source, orbit(0), lam) for source in (first, replace(first, others=(second,))))
    column, row = (int(v * 32) for v in uv[0, 14].tolist())
    red, without = (float(x[0, 0, row + 1, column] - x[0, 2, row + 1, column]) for x in (two, one))
    assert red > without + 0.5
