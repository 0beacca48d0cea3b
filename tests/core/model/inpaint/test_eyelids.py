"""Eyelids: their holes, what these hold of the photo, and when they are inpainted, on the canonical face."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.model.export3d import Output
from export3d_cli.core.model.inpaint.eyelids import (
    EYELID_HEIGHT_FADE,
    EyelidInpainter,
    eyelid_fold_and_rim,
    eyelid_height,
    eyelid_hole,
)
from export3d_cli.core.model.inpaint.eyes import eyelid_rims
from export3d_cli.core.model.volume_renderer import pixel_grid, project

GREY = torch.zeros(1, 3, 64, 64)


def with_lids_lowered(points: Tensor, ratio: float = 1.0) -> Tensor:
    """Return landmarks with upper lids lowered to the lower ones by `ratio`; folds stay."""
    out = points.clone()
    for side in (0, 1):
        upper, lower = (list(edge) for edge in eyelid_rims(side))
        out[:, upper] = torch.lerp(points[:, upper], points[:, lower], ratio)
    return out


def test_folds_lie_above_the_rims_on_both_sides(points: Tensor) -> None:
    mirror = load_canonical_face().mirror
    assert eyelid_fold_and_rim(1) == tuple(tuple(mirror[list(edge)].tolist()) for edge in eyelid_fold_and_rim(0))
    for side in (0, 1):
        fold, rim = (points[0, list(edge)] for edge in eyelid_fold_and_rim(side))
        assert len(fold) == len(rim) and torch.equal(fold[[0, -1]], rim[[0, -1]])
        assert (fold[1:-1, 1] < rim[1:-1, 1]).all()  # y down
        eye = (rim[0] - rim[-1]).norm()
        assert eyelid_height(points, side).item() == pytest.approx(float((fold - rim)[3:6].norm(dim=1).mean() / eye))
        assert (
            eyelid_height(with_lids_lowered(points), side)
            > eyelid_height(with_lids_lowered(points, 0.5), side)
            > eyelid_height(points, side)
        )


def test_eyelid_hole_covers_lid_and_lashes_and_holds_the_photos_lid(
    points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    (uv, _), (uv_photo, _) = project(with_lids_lowered(points), orbit(0.0)), project(points, orbit(20.0))
    photo = pixel_grid(256).T.reshape(1, 2, 256, 256)  # colours hold positions
    photo = torch.cat([photo, photo[:, :1] * 0 + 0.3], dim=1)
    for side in (0, 1):
        crop, hole = eyelid_hole(uv, side, photo, uv_photo, torch.ones(1))
        inside, (fold, rim) = hole.condition[:, :1], eyelid_fold_and_rim(side)
        at = crop.to_crop(uv)[0] * hole.condition.shape[-1]
        for k in range(2, 7):
            x, low, high = int(at[rim[k], 0]), at[rim[k], 1], at[fold[k], 1]
            column = inside[0, 0, :, x].nonzero()[:, 0]
            assert abs(column[0].item() - high.item()) < 2.5  # from the fold
            assert 1 < column[-1].item() - low.item() < 6  # to the lashes below the rim
            ends = hole.condition[0, 2:4, [column[0], column[-1]], x].T
            torch.testing.assert_close(ends, uv_photo[0, [fold[k], rim[k]]], atol=0.008, rtol=0)
        assert (hole.mask >= inside - 1e-6).all() and hole.mask.sum() < 2 * inside.sum()
        within = hole.condition[0][:, inside[0, 0] > 0]
        assert (within[1] == 1).all() and (within[4] - 0.3).abs().max() < 1e-5 and within[5:].abs().max() <= 1.01
        assert (hole.condition[0][:, inside[0, 0] == 0] == 0).all()
        unseen = eyelid_hole(uv, side, photo, uv_photo, torch.zeros(1))[1]
        assert (unseen.condition[:, 1:5] == 0).all() and torch.equal(unseen.mask, hole.mask)
        assert torch.equal(unseen.condition[:, 5:], hole.condition[:, 5:])


def test_only_lids_lower_than_in_the_photo_are_inpainted(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    inpainter, camera = EyelidInpainter(4), orbit(0.0)

    def strengths(before: float, after: float) -> list[float]:
        photo, result = with_lids_lowered(points, before), with_lids_lowered(points, after)
        return [patch.mask.amax().item() for patch in inpainter.inpaint(GREY, GREY, photo, camera, result, camera)]

    assert strengths(0.0, 0.0) == strengths(1.0, 1.0) == strengths(1.0, 0.0) == strengths(0.5, 0.3) == []
    assert strengths(0.0, 1.0) == pytest.approx([1.0, 1.0], abs=1e-5)
    height_ratios = [eyelid_height(with_lids_lowered(points), side) / eyelid_height(points, side) for side in (0, 1)]
    assert min(height_ratios) > EYELID_HEIGHT_FADE[1]
    halfway = [(sum(EYELID_HEIGHT_FADE) / 2 - 1) / (float(g) - 1) for g in height_ratios]
    assert strengths(0.0, sum(halfway) / 2) == pytest.approx([0.5, 0.5], abs=0.15)


def test_only_the_lids_of_a_result_are_inpainted(
    points: Tensor, orbit: Callable[..., Tensor], inpainted_results: Callable[..., tuple[Output, Output, Output]],
    differ_only_near: Callable[..., bool],
) -> None:  # fmt: skip
    plain, inpainted, unchanged = inpainted_results("lids", points, with_lids_lowered(points))
    assert not unchanged.inpainted and len(inpainted.inpainted) == 2
    uv, _ = project(with_lids_lowered(points), orbit(0.0))
    assert differ_only_near(
        plain, inpainted, *(uv[0, [*eyelid_fold_and_rim(side)[0], *eyelid_fold_and_rim(side)[1]]] for side in (0, 1))
    )


def test_lid_colour_scales_with_the_light(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    uv, _ = project(with_lids_lowered(points), orbit(0.0))
    torch.manual_seed(0)
    inpainter, face = EyelidInpainter(4), torch.rand(1, 3, 64, 64) * 0.5  # of 1
    with torch.no_grad():
        outputs, light = [], torch.ones(1, 3, 1, 1)
        for _ in range(2):
            crop, hole = eyelid_hole(uv, 0, face * light * 2 - 1, uv, torch.ones(1))
            context = crop.sample(face * light * 2 - 1) * (1 - hole.mask)
            outputs.append((inpainter(context, hole) + 1) / light)
            mean = (context + 1 - hole.mask).sum((2, 3), keepdim=True)
            light = torch.tensor([1.6, 0.7, 0.3]).view(1, 3, 1, 1)
            light = light * mean.mean() / (light * mean).mean()  # as bright as before
    assert outputs[0].std() > 0.01
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_eye_behind_the_nose_gives_no_reference_lid(points: Tensor, orbit: Callable[..., Tensor]) -> None:
    inpainter, visibility = EyelidInpainter(4), []
    inpainter.register_forward_pre_hook(
        lambda _, args: visibility.append(args[1].condition[:, 1].amax((1, 2)).tolist())
    )
    for yaw in (-60.0, 0.0, 60.0):
        inpainter.inpaint(GREY, GREY, points, orbit(yaw), with_lids_lowered(points), orbit(0.0))
    assert visibility[1] == [1, 1] and visibility[0] == visibility[2][::-1] and sorted(visibility[0]) == [0, 1]
