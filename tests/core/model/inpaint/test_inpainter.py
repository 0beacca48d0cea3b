"""The mouth: its crop, hole and inpainting, on the canonical face."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export3d_cli.core.face.landmarks import LEFT_EYE_OUTER, LOWER_INNER_LIP, RIGHT_EYE_OUTER, UPPER_INNER_LIP
from export3d_cli.core.model.export3d import Output
from export3d_cli.core.model.inpaint.inpainter import INPAINT_SIZE_PX, AlignedCrop, InpaintedPatch
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
from export3d_cli.core.model.warp.mouth_eye_interior import MAX_OPENING_RATIO

MIDDLE = len(UPPER_INNER_LIP) // 2
BLACK = torch.zeros(1, 3, 64, 64)


def opened(points: Tensor, by: float) -> Tensor:
    """Return landmarks with the lower inner lip moved down by `by`; the corners stay."""
    out = points.clone()
    across = torch.linspace(-1, 1, len(LOWER_INNER_LIP))
    out[:, list(LOWER_INNER_LIP), 1] += by * (1 - across.square())
    return out


def test_mouth_crop_frames_the_lips_level_with_the_eyes(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv, _ = project(points, orbit(0.0))
    rotation = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    crop, turned = mouth_crop(uv), mouth_crop((uv - 0.5) @ rotation.T + 0.5)
    torch.testing.assert_close(crop.side, turned.side)
    torch.testing.assert_close(turned.to_crop((uv - 0.5) @ rotation.T + 0.5), crop.to_crop(uv), atol=1e-5, rtol=0)
    lips = crop.to_crop(uv)[0, [61, 291, 0, 17]]
    assert lips.min() > 0 and lips.max() < 1
    assert lips[1, 0] - lips[0, 0] == pytest.approx(1 / 1.3, abs=0.02)  # the lips' width is the extent
    grid = crop.pixel_positions(4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(crop.to_crop(grid)[0], pixel_grid(4), atol=1e-5, rtol=0)


def test_mouth_hole_masks_what_the_photo_does_not_show(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    camera = orbit(0.0)
    wide = opened(points, 0.05)
    uv, _ = project(wide, camera)

    def masked(ratio: float) -> Tensor:
        return mouth_hole(wide, uv, torch.full((1, 478, 1), ratio))[1].mask

    crop, hole = mouth_hole(wide, uv, torch.full((1, 478, 1), MAX_OPENING_RATIO))
    inside = hole.condition[:, :1]
    x, y = crop.to_crop(uv)[0, [*UPPER_INNER_LIP, *LOWER_INNER_LIP[-2:0:-1]]].T  # around the opening
    area = (x * y.roll(-1) - y * x.roll(-1)).sum() / 2
    assert inside.mean().item() == pytest.approx(float(area), rel=0.05)
    assert (hole.mask * inside).sum() > 0.97 * inside.sum()  # all but a rim under the upper lip,
    assert hole.mask.sum() > 1.1 * inside.sum()  # and a margin
    assert masked(1.0).max() == 0  # as open as in the photo
    half = masked(2.0)
    rows = torch.arange(INPAINT_SIZE_PX).view(1, 1, -1, 1)
    assert 0.2 < half.sum() / hole.mask.sum() < 0.8
    assert (half * rows).sum() / half.sum() > (hole.mask * rows).sum() / hole.mask.sum()  # below the visible part


def test_touching_lips_are_not_inpainted(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    shut = points.clone()
    shut[:, list(LOWER_INNER_LIP)] = shut[:, list(UPPER_INNER_LIP)]
    assert mouth_opening(shut).item() == 0
    strengths = []
    for by in (
        0.0,
        MIN_MOUTH_OPENING * 0.9,
        MIN_MOUTH_OPENING * 1.5,
        MIN_MOUTH_OPENING * 3,
    ):  # the eyes are about 0.18 apart
        wide = shut.clone()
        wide[:, LOWER_INNER_LIP[MIDDLE], 1] += by * (points[:, LEFT_EYE_OUTER] - points[:, RIGHT_EYE_OUTER]).norm()
        uv, _ = project(wide, orbit(0.0))
        strengths.append(mouth_hole(wide, uv, torch.full((1, 478, 1), MAX_OPENING_RATIO))[1].mask.amax().item())
    assert strengths == pytest.approx([0, 0, 0.5, 1], abs=0.01)
    inpainter = MouthInpainter(4)
    assert inpainter.inpaint(BLACK, BLACK, shut, orbit(0.0), shut, orbit(5.0)) == []


def test_opening_slit_is_inpainted_more_than_an_opening_mouth(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """Two mouths open by half: the one that the photo hardly shows gets a larger mask."""
    inpainter, camera = MouthInpainter(4), orbit(0.0)
    eyes = (points[:, LEFT_EYE_OUTER] - points[:, RIGHT_EYE_OUTER]).norm()
    shut = points.clone()
    shut[:, list(LOWER_INNER_LIP)] = shut[:, list(UPPER_INNER_LIP)]

    def masked_ratio(gap: float, ratio: float) -> float:
        photo, result = opened(shut, gap * float(eyes)), opened(shut, ratio * gap * float(eyes))
        patches = inpainter.inpaint(BLACK, BLACK, photo, camera, result, camera)
        inside = mouth_hole(result, project(result, camera)[0], torch.full((1, 478, 1), MAX_OPENING_RATIO))[1].mask
        return float(patches[0].mask.sum() / inside.sum()) if patches else 0.0

    assert masked_ratio(0.05, 1.5) > masked_ratio(0.2, 1.5) + 0.2
    assert masked_ratio(0.05, 1.0) == masked_ratio(0.2, 1.0) == 0  # as open as in the photo


def test_paste_into_restores_what_the_crop_sampled(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv, _ = project(points, orbit(12.0))
    crop = mouth_crop(uv)
    for size in (64, 160):
        position = pixel_grid(size).view(1, size, size, 2).permute(0, 3, 1, 2)
        image = torch.cat([position, position[:, :1]], dim=1)  # colours hold positions
        sampled = crop.sample(image)
        opaque = torch.ones(1, 1, INPAINT_SIZE_PX, INPAINT_SIZE_PX)
        pasted = image + 1
        InpaintedPatch(crop, sampled, opaque).paste_into(pasted)
        at = (crop.to_crop(pixel_grid(size)[None]) - 0.5).abs().amax(-1).view(size, size)  # 0.5 at the crop's border
        inside, outside = at < 0.4, at > 0.6
        torch.testing.assert_close(pasted[..., inside], image[..., inside], atol=2e-3, rtol=0)
        torch.testing.assert_close(pasted[..., outside], image[..., outside] + 1)
        assert inside.any() and outside.any()
        far = AlignedCrop(crop.centre + 5, crop.axes, crop.side)
        for outside_patch in (InpaintedPatch(crop, sampled, 0 * opaque), InpaintedPatch(far, sampled, opaque)):
            pasted = image + 1
            outside_patch.paste_into(pasted)
            torch.testing.assert_close(pasted, image + 1)


def test_only_the_mouth_of_a_result_is_inpainted(
    points: Tensor, orbit: Callable[..., Tensor], inpainted_results: Callable[..., tuple[Output, Output, Output]],
    differ_only_near: Callable[..., bool],
) -> None:  # fmt: skip
    wide = opened(points, 0.05)
    plain, inpainted, unchanged = inpainted_results("mouth", points, wide)
    assert not unchanged.inpainted and len(inpainted.inpainted) == 1
    uv, _ = project(wide, orbit(0.0))
    assert differ_only_near(plain, inpainted, uv[0, list(UPPER_INNER_LIP + LOWER_INNER_LIP)])
    zero = torch.zeros(1, 3, 128, 128)
    pairs = (plain.image, inpainted.image), (plain.upscale(zero, 128), inpainted.upscale(zero, 128))
    small, large = (((a - b).abs().sum(1) > 1e-6).float().mean() for a, b in pairs)
    assert 0.7 < large / small < 1.3  # also in upscaled frames


def test_suppress_violet_limits_violet_relative_to_the_face() -> None:
    """In blue light a mouth may be bluer: the difference to the face counts."""
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
