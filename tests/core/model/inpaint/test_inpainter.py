"""The close-up of a mouth, the hole in it, and what is painted there, on the canonical face."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export3d_cli.core.face.landmarks import LOWER_INNER_LIP, UPPER_INNER_LIP
from export3d_cli.core.model.export3d import Output
from export3d_cli.core.model.inpaint.inpainter import CROP_SIZE_PX, AlignedCrop, InpaintedPatch
from export3d_cli.core.model.inpaint.mouth import (
    MAX_VIOLET,
    MIN_MOUTH_OPENING,
    VIOLET_KEEP_RATIO,
    MouthInpainter,
    mouth_crop,
    mouth_hole,
    mouth_opening,
    suppress_violet,
)
from export3d_cli.core.model.volume_renderer import pixel_grid, project
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.model.warp.mouth_eye_interior import MAX_OPENING_RATIO

MIDDLE = len(UPPER_INNER_LIP) // 2
BLACK = torch.zeros(1, 3, 64, 64)


def opened(points: Tensor, by: float) -> Tensor:
    """Landmarks whose lower inner lip, and what is below it, hangs lower; corners stay."""
    out = points.clone()
    across = torch.linspace(-1, 1, len(LOWER_INNER_LIP))
    out[:, list(LOWER_INNER_LIP), 1] += by * (1 - across.square())
    return out


def test_a_close_up_frames_the_lips_level_with_the_eyes(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv, _ = project(points, orbit(0.0))
    turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    view, turned = mouth_crop(uv), mouth_crop((uv - 0.5) @ turn.T + 0.5)
    torch.testing.assert_close(view.side, turned.side)
    torch.testing.assert_close(turned.to_crop((uv - 0.5) @ turn.T + 0.5), view.to_crop(uv), atol=1e-5, rtol=0)
    lips = view.to_crop(uv)[0, [61, 291, 0, 17]]
    assert lips.min() > 0 and lips.max() < 1
    assert lips[1, 0] - lips[0, 0] == pytest.approx(1 / 1.3, abs=0.02)  # the lips are wider than high
    grid = view.pixel_positions(4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(view.to_crop(grid)[0], pixel_grid(4), atol=1e-5, rtol=0)


def test_a_hole_is_what_no_photo_shows(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    camera = orbit(0.0)
    wide = opened(points, 0.05)
    uv, _ = project(wide, camera)

    def hidden(wider: float) -> Tensor:
        return mouth_hole(wide, uv, torch.full((1, 478, 1), wider))[1].mask

    view, hole = mouth_hole(wide, uv, torch.full((1, 478, 1), MAX_OPENING_RATIO))
    inside = hole.condition[:, :1]
    x, y = view.to_crop(uv)[0, [*UPPER_INNER_LIP, *LOWER_INNER_LIP[-2:0:-1]]].T  # around the opening
    area = (x * y.roll(-1) - y * x.roll(-1)).sum() / 2
    assert inside.mean().item() == pytest.approx(float(area), rel=0.05)
    assert (hole.mask * inside).sum() > 0.97 * inside.sum()  # all of it but for a rim under the upper lip,
    assert hole.mask.sum() > 1.1 * inside.sum()  # and a little more
    assert hidden(1.0).max() == 0  # as open as in the photo
    half = hidden(2.0)
    rows = torch.arange(CROP_SIZE_PX).view(1, 1, -1, 1)
    assert 0.2 < half.sum() / hole.mask.sum() < 0.8
    assert (half * rows).sum() / half.sum() > (hole.mask * rows).sum() / hole.mask.sum()  # below what is shown


def test_nothing_is_painted_into_lips_that_touch(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    shut = points.clone()
    shut[:, list(LOWER_INNER_LIP)] = shut[:, list(UPPER_INNER_LIP)]
    assert mouth_opening(shut).item() == 0
    sums = []
    for by in (
        0.0,
        MIN_MOUTH_OPENING * 0.9,
        MIN_MOUTH_OPENING * 1.5,
        MIN_MOUTH_OPENING * 3,
    ):  # a face of this size has eyes about .18 apart
        wide = shut.clone()
        wide[:, LOWER_INNER_LIP[MIDDLE], 1] += by * (points[:, 263] - points[:, 33]).norm()
        uv, _ = project(wide, orbit(0.0))
        sums.append(mouth_hole(wide, uv, torch.full((1, 478, 1), MAX_OPENING_RATIO))[1].mask.amax().item())
    assert sums == pytest.approx([0, 0, 0.5, 1], abs=0.01)
    painter = MouthInpainter(4)
    assert painter.inpaint(BLACK, BLACK, shut, orbit(0.0), shut, orbit(5.0)) == []


def test_a_slit_is_soon_given_up(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """Of two mouths that open to half as wide again, the one that the photo hardly shows is painted more of."""
    painter, camera = MouthInpainter(4), orbit(0.0)
    eyes = (points[:, 263] - points[:, 33]).norm()
    shut = points.clone()
    shut[:, list(LOWER_INNER_LIP)] = shut[:, list(UPPER_INNER_LIP)]

    def hidden(gap: float, wider: float) -> float:
        photo, result = opened(shut, gap * float(eyes)), opened(shut, wider * gap * float(eyes))
        found = painter.inpaint(BLACK, BLACK, photo, camera, result, camera)
        inside = mouth_hole(result, project(result, camera)[0], torch.full((1, 478, 1), MAX_OPENING_RATIO))[1].mask
        return float(found[0].mask.sum() / inside.sum()) if found else 0.0

    assert hidden(0.05, 1.5) > hidden(0.2, 1.5) + 0.2
    assert hidden(0.05, 1.0) == hidden(0.2, 1.0) == 0  # what is as open as in the photo stays the photo's


def test_what_is_painted_lies_where_it_was_seen(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv, _ = project(points, orbit(12.0))
    view = mouth_crop(uv)
    for size in (64, 160):
        place = pixel_grid(size).view(1, size, size, 2).permute(0, 3, 1, 2)
        picture = torch.cat([place, place[:, :1]], dim=1)  # its colours say where
        seen = warp(picture, view.pixel_positions(CROP_SIZE_PX))
        solid = torch.ones(1, 1, CROP_SIZE_PX, CROP_SIZE_PX)
        written = picture + 1
        InpaintedPatch(view, seen, solid).paste_into(written)
        at = (view.to_crop(pixel_grid(size)[None]) - 0.5).abs().amax(-1).view(size, size)  # 0.5 at its rim
        inside, outside = at < 0.4, at > 0.6
        torch.testing.assert_close(written[..., inside], picture[..., inside], atol=2e-3, rtol=0)
        torch.testing.assert_close(written[..., outside], picture[..., outside] + 1)
        assert inside.any() and outside.any()
        far = AlignedCrop(view.centre + 5, view.axes, view.side)
        for nothing in (InpaintedPatch(view, seen, 0 * solid), InpaintedPatch(far, seen, solid)):
            written = picture + 1
            nothing.paste_into(written)
            torch.testing.assert_close(written, picture + 1)


def test_only_the_mouth_of_a_result_is_painted(
    points: Tensor, orbit: Callable[..., Tensor], painted_results: Callable[..., tuple[Output, Output, Output]],
    differ_only_near: Callable[..., bool],
) -> None:  # fmt: skip
    wide = opened(points, 0.05)
    plain, painted, same = painted_results("mouth", points, wide)
    assert not same.inpainted and len(painted.inpainted) == 1
    uv, _ = project(wide, orbit(0.0))
    assert differ_only_near(plain, painted, uv[0, list(UPPER_INNER_LIP + LOWER_INNER_LIP)])
    zero = torch.zeros(1, 3, 128, 128)
    pairs = (plain.image, painted.image), (plain.upscale(zero, 128), painted.upscale(zero, 128))
    small, large = (((a - b).abs().sum(1) > 1e-6).float().mean() for a, b in pairs)
    assert 0.7 < large / small < 1.3  # in larger frames, too


def test_a_mouth_is_no_more_violet_than_the_face_allows() -> None:
    """In blue light it may be bluer: what counts is the difference."""
    hidden = torch.zeros(1, 1, 8, 8)
    hidden[..., 2:6, 2:6] = 1
    tongue = torch.tensor([[0.3, -0.3, -0.2], [0.3, -0.3, 0.3]]).view(2, 3, 1, 1).expand(-1, -1, 8, 8)
    for light in (0.0, 0.4):
        face = torch.tensor([0.4, 0.1, 0.1 + light]).view(1, 3, 1, 1) * (1 - hidden)
        natural, violet = (
            suppress_violet(colours[None], face, hidden)[0, :, 3, 3]
            for colours in tongue + light * tongue.new_tensor([0, 0, 1]).view(3, 1, 1)
        )
        assert natural.tolist() == pytest.approx([0.3, -0.3, -0.2 + light])
        assert violet.tolist() == pytest.approx(
            [0.3, -0.3, -0.3 + light + MAX_VIOLET + VIOLET_KEEP_RATIO * (0.6 - MAX_VIOLET)]
        )
