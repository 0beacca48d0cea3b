"""Winks: how they are measured, and what they do to the landmarks and to a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.landmarks import CHIN, EYELID_FOLDS, NUM_LANDMARKS
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.inpaint.eyes import eye_opening, eyelid_rims
from export3d_cli.core.model.one_sided import apply_wink, measure_wink


def expression(right: float, left: float) -> Tensor:
    """Return beta (1, 64) with these openings of the eyes."""
    beta = torch.zeros(1, 64)
    for side, opening in (("Right", right), ("Left", left)):
        beta[0, BETA_NAMES.index(f"eyeOpening{side}")] = opening
    return beta


def openings(points: Tensor) -> list[float]:
    """Return how far the right and the left eye are open, in eye widths."""
    return [float(eye_opening(points, side)) for side in (0, 1)]


@pytest.mark.parametrize(
    ("right", "left", "wink"),
    [(0.1, 0.04, 1), (0.04, 0.1, -1), (0.15, 0.15, 0), (0.16, 0.14, 0), (0.03, 0.0, 0), (0.15, 0.1, 0.6)],
)
def test_measure_wink_is_the_eye_shut_alone(right: float, left: float, wink: float) -> None:
    """The first is a wink as trackers see it; a blink and unequal eyes are none."""
    assert float(measure_wink(expression(right, left))) == pytest.approx(wink, abs=0.15)


@pytest.mark.parametrize("side", [0, 1])
def test_apply_wink_shuts_one_eye_and_keeps_the_other_one_open(points: Tensor, side: int) -> None:
    """Lambda narrows both eyes where one winks."""
    narrowed, sign = points.clone(), (-1.0, 1.0)[side]
    for eye in (0, 1):
        upper, lower = (list(rim[1:-1]) for rim in eyelid_rims(eye))
        narrowed[:, upper] = torch.lerp(narrowed[:, upper], narrowed[:, lower], 0.5)
    whole, half = openings(points), openings(narrowed)
    none, wink, own = torch.zeros(1, 1), torch.full((1, 1), sign), torch.full((1, 1), sign)
    shut = apply_wink(narrowed, points, wink, none)
    assert openings(shut)[side] < 0.01 and openings(shut)[1 - side] == pytest.approx(whole[1 - side], rel=1e-3)
    fold = EYELID_FOLDS[side][3]
    assert shut[0, fold, 1] > points[0, fold, 1]  # follows its lid
    assert torch.equal(shut[:, CHIN], points[:, CHIN])
    for unchanged in (none, -0.5 * none):
        assert openings(apply_wink(narrowed, points, unchanged, none)) == half
    assert openings(apply_wink(points, points, own, own)) == whole  # the photo winks, and so does the driver
    assert openings(apply_wink(points, points, none, own)) == whole  # a photo that winks gives no wink of the other eye


def test_drive_by_a_wink_moves_the_lids_alone(tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """With the wink left out, as training on lambda alone does, both eyes move alike."""
    assert tiny.flow is not None
    tiny.flow.basis.normal_(std=1e-3)
    with torch.no_grad():
        source = tiny.encode_source(torch.rand(1, 3, 64, 64) * 2 - 1, expression(0.15, 0.15), orbit(0), points)
        lam = tiny.coefficients(expression(0.1, 0.03))
        assert lam.shape == source.coefficients.shape == (1, 11)
        assert float(lam[0, -1]) == 1 and float(source.wink) == 0
        posed = [tiny.pose_head(source, x) for x in (lam, lam[:, :-1])]
        wink, plain = (x.mesh.points[:, :NUM_LANDMARKS] for x in posed if x.mesh is not None)
    moved = (wink - plain).norm(dim=-1)[0] > 1e-6
    lids = {v for side in (0, 1) for rim in (*eyelid_rims(side), EYELID_FOLDS[side]) for v in rim}
    assert int(moved.sum()) >= 7 and set(moved.nonzero()[:, 0].tolist()) <= lids
    assert openings(wink)[1] < 0.01 < openings(plain)[1]
    assert torch.equal(posed[0].planes, posed[1].planes)
