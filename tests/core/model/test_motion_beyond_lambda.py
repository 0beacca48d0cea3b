"""Winks, gaze, slanted mouths and snarls: how they are measured, and what they do to the landmarks and to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.expression_coefficients import (
    BETA_NAMES,
    MEASURE_NAMES,
    BetaStatistics,
    compute_measures,
)
from export3d_cli.core.face.landmarks import (
    CHIN,
    EYE_RIMS,
    EYELID_FOLDS,
    LEFT_IRIS,
    MEASURE_POINTS,
    NUM_LANDMARKS,
    RIGHT_IRIS,
)
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.inpaint.eyes import eye_opening, eyelid_rims
from export3d_cli.core.model.motion_beyond_lambda import (
    INTEROCULAR,
    MAX_CHANGE,
    MIN_SLANT,
    MIN_SNARL,
    NUM_MEASURES,
    NUM_MODES,
    SNARL_LIFT,
    WINKING_POINTS,
    apply_measures,
    change_expression,
    interocular,
    measure,
    measure_basis,
)


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
def test_measure_tells_the_eye_that_is_shut_alone(right: float, left: float, wink: float) -> None:
    """The first is a wink as trackers see it; a blink and unequal eyes are none."""
    assert float(measure(expression(right, left))[0, 0]) == pytest.approx(wink, abs=0.15)


@pytest.mark.parametrize("side", [0, 1])
def test_wink_shuts_one_eye_and_keeps_the_other_one_open(points: Tensor, side: int) -> None:
    """Lambda narrows both eyes where one winks."""
    narrowed, sign = points.clone(), (-1.0, 1.0)[side]
    for eye in (0, 1):
        upper, lower = (list(rim[1:-1]) for rim in eyelid_rims(eye))
        narrowed[:, upper] = torch.lerp(narrowed[:, upper], narrowed[:, lower], 0.5)
    whole, half = openings(points), openings(narrowed)
    none = torch.zeros(1, NUM_MEASURES)
    wink = own = none.clone()
    own[0, 0] = sign
    shut = apply_measures(narrowed, points, wink, none)
    assert openings(shut)[side] < 0.01 and openings(shut)[1 - side] == pytest.approx(whole[1 - side], rel=1e-3)
    fold = EYELID_FOLDS[side][3]
    assert shut[0, fold, 1] > points[0, fold, 1]  # follows its lid
    assert torch.equal(shut[:, CHIN], points[:, CHIN])
    for unchanged in (none, -0.5 * none):
        assert openings(apply_measures(narrowed, points, unchanged, none)) == half
    assert openings(apply_measures(points, points, own, own)) == whole  # the photo winks, and so does the driver
    assert (
        openings(apply_measures(points, points, none, own)) == whole
    )  # a photo that winks gives no wink of the other eye


def test_drive_by_a_wink_moves_the_lids_alone(tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """With the wink left out, as training on lambda alone does, both eyes move alike."""
    assert tiny.flow is not None
    tiny.flow.basis.normal_(std=1e-3)
    with torch.no_grad():
        source = tiny.encode_source(torch.rand(1, 3, 64, 64) * 2 - 1, expression(0.15, 0.15), orbit(0), points)
        lam = tiny.coefficients(expression(0.1, 0.03))
        assert lam.shape == source.coefficients.shape == (1, 10 + NUM_MEASURES)
        assert float(lam[0, 10]) == 1 and float(source.measures[0, 0]) == 0
        lam[:, 11:] = source.measures[:, 1:]  # no gaze, no slant
        posed = [tiny.pose_head(source, x) for x in (lam, lam[:, :10])]
        wink, plain = (x.mesh.points[:, :NUM_LANDMARKS] for x in posed if x.mesh is not None)
    moved = (wink - plain).norm(dim=-1)[0] > 1e-6
    lids = {v for side in (0, 1) for rim in (*eyelid_rims(side), EYELID_FOLDS[side]) for v in rim}
    assert int(moved.sum()) >= 7 and set(moved.nonzero()[:, 0].tolist()) <= lids
    assert openings(wink)[1] < 0.01 < openings(plain)[1]
    assert torch.equal(posed[0].planes, posed[1].planes)


def moved_points(points: Tensor, **changes: float) -> Tensor:
    """Return the landmarks with measures by these changes of entries of beta."""
    return apply_measures(points, points, changed_measures(**changes), measure(torch.zeros(1, 64)))


def changed_measures(**changes: float) -> Tensor:
    beta = torch.zeros(1, 64)
    for name, value in changes.items():
        beta[0, BETA_NAMES.index(name)] = value
    return measure(beta)


def read(points: Tensor) -> dict[str, float]:
    return dict(zip(MEASURE_NAMES, compute_measures(points.double().numpy())[0], strict=True))


def test_gaze_moves_both_irises_alone_and_stays_in_the_eyes(points: Tensor) -> None:
    moved = moved_points(points, irisXLeft=0.02, irisXRight=0.02, irisYLeft=-0.01, irisYRight=-0.01)
    irises = [*RIGHT_IRIS, *LEFT_IRIS]
    assert set((moved != points).any(-1)[0].nonzero()[:, 0].tolist()) == set(irises)
    before, after = read(points), read(moved)
    for side in ("Left", "Right"):
        assert after[f"irisX{side}"] - before[f"irisX{side}"] == pytest.approx(0.02, rel=0.02)
        assert after[f"irisY{side}"] - before[f"irisY{side}"] == pytest.approx(-0.01, rel=0.02)
    for far in (-1.0, 1.0):
        moved = moved_points(points, irisXLeft=far, irisXRight=far, irisYLeft=far, irisYRight=far)
        for centre, rim in EYE_RIMS:
            low, high = moved[0, list(rim), :2].amin(0), moved[0, list(rim), :2].amax(0)
            assert (moved[0, centre, :2] > low).all() and (moved[0, centre, :2] < high).all()


@pytest.mark.parametrize("slant", [0.06, -0.06])
def test_slant_raises_one_corner_of_the_mouth_and_lowers_the_other(points: Tensor, slant: float) -> None:
    moved = moved_points(points, mouthCornerHeightLeft=slant)
    before, after = read(points), read(moved)
    change = {name: after[name] - before[name] for name in MEASURE_NAMES}
    kept = abs(slant) - MIN_SLANT
    assert abs(change["mouthCornerHeightLeft"]) == pytest.approx(kept / 2, rel=0.1)
    assert np.sign(change["mouthCornerHeightLeft"]) == np.sign(slant) == -np.sign(change["mouthCornerHeightRight"])
    assert max(abs(change[name]) for name in change if "eye" in name or "iris" in name) < 1e-3
    assert torch.equal(moved_points(points, mouthCornerHeightLeft=MIN_SLANT / 2), points)


@pytest.mark.parametrize(("side", "raised", "still"), [("Left", 269, 39), ("Right", 39, 269)])
def test_snarl_raises_one_side_of_the_upper_lip_alone(points: Tensor, side: str, raised: int, still: int) -> None:
    moved = moved_points(points, **{f"mouthUpperUp{side}": MIN_SNARL + 0.6})
    rise = (points - moved)[0, :, 1] / interocular(points)[0, 0]
    assert float(rise[raised]) == pytest.approx(0.6 * SNARL_LIFT, rel=1e-4)
    assert 0 <= float(rise[still]) < 0.002
    assert rise[[CHIN, 14, 17, *EYE_RIMS[0][1], *EYE_RIMS[1][1]]].abs().max() < 2e-3
    assert torch.equal(moved_points(points, **{f"mouthUpperUp{side}": MIN_SNARL}), points)
    snarl = changed_measures(**{f"mouthUpperUp{side}": MIN_SNARL + 0.6})
    rise = (points - apply_measures(points, points, 0 * snarl, snarl))[0, :, 1] / interocular(points)[0, 0]
    assert float(rise[raised]) == pytest.approx(-0.6 * SNARL_LIFT, rel=1e-4)  # a snarl of the photo ends
    assert -0.002 < float(rise[still]) <= 0


def test_measures_tell_what_the_basis_does_not(tiny: Export3D, points: Tensor) -> None:
    """A basis that moves the irises by what beta says leaves nothing to add."""
    assert tiny.flow is not None
    tiny.flow.basis.zero_()
    irises = [*RIGHT_IRIS, *LEFT_IRIS]
    tiny.flow.basis[0, irises, 0] = 0.109
    tiny.flow.basis[1, MEASURE_POINTS.mouth_corners[0], 1] = -0.109
    expected = torch.zeros(10, NUM_MEASURES)
    expected[0, 1] = expected[1, 3] = 1
    torch.testing.assert_close(measure_basis(tiny.flow.basis), expected)
    with torch.no_grad():
        both = tiny.coefficients(expression(0.1, 0.1))
        torch.testing.assert_close(both[:, 10:], measure(expression(0.1, 0.1)) - both[:, :10] @ expected)


def test_an_edit_moves_brows_and_mouth_by_the_modes_and_lambda_only_so_far(points: Tensor) -> None:
    """Whatever the basis shows of it; landmarks of the eyes stay lambda's."""
    torch.manual_seed(0)
    statistics, change = BetaStatistics.load(), torch.zeros(2, 64)
    change[:, BETA_NAMES.index("mouthLeft")] = torch.tensor([0.3, 0.6])
    modes = torch.from_numpy(statistics.modes).float()
    asked = (change.double() @ torch.from_numpy(statistics.slopes)).float()
    basis, lam = 1e-4 * torch.randn(3, NUM_LANDMARKS, 3), torch.tensor([[10.0, 0, 0], [100, 0, 0]])
    result = change_expression(lam, torch.zeros(2, NUM_MEASURES), change, basis)
    assert result[:, 0].tolist() == pytest.approx([10, MAX_CHANGE])
    flow = torch.einsum("bn,nvc->bvc", result[:, :3], basis) / INTEROCULAR
    moved = flow + torch.einsum("bk,kvc->bvc", result[:, -NUM_MODES:], modes)
    torch.testing.assert_close(moved.flatten(1) @ modes.flatten(1).T, asked, atol=1e-3, rtol=1e-2)
    corner = apply_measures(points, points, result[1:, 3:], torch.zeros(1, NUM_MEASURES)) - points
    assert corner[0, MEASURE_POINTS.mouth_corners[0], 0] > 0.003  # to the person's left, the image's right
    assert float(modes[:, [*RIGHT_IRIS, *LEFT_IRIS, *WINKING_POINTS]].abs().max()) == 0


def test_landmark_offsets_are_what_a_driver_does_beyond_lambda(points: Tensor) -> None:
    """None in the reference frame or along the basis; in the source's size; lids of a wink stay shut."""
    torch.manual_seed(0)
    model = Export3D(replace(PRESETS["tiny"], basis=3))
    assert model.flow is not None
    model.flow.basis.copy_(0.01 * torch.randn(3, NUM_LANDMARKS, 3))
    source = SimpleNamespace(landmarks=points * 1.1)
    base, lam = torch.zeros(1, 3 + NUM_MEASURES), torch.zeros(2, 3 + NUM_MEASURES)
    lam[:, 1] = 0.5
    driven = model.flow.deform_landmarks(points.expand(2, -1, -1), lam[:, :3])
    offsets = partial(model.landmark_offsets, source)  # type: ignore[arg-type]
    assert float(offsets(base, points, base, points).abs().max()) < 1e-6
    driven[:, CHIN, 0] += 0.02
    found = offsets(lam, driven, base, points)
    assert found[:, CHIN, 0].tolist() == pytest.approx([0.022] * 2, rel=1e-3)
    found[:, CHIN] = 0
    assert float(found.abs().max()) < 1e-6
    lam[:, 3] = 1  # the tracker sees the eyes as open as before
    rest = torch.full_like(points, 0.01)
    assert float(offsets(lam, driven, base, points, rest)[:, WINKING_POINTS].abs().max()) < 1e-6
    lam[:, 3] = 0
    assert torch.allclose(offsets(lam, driven, base, points) - offsets(lam, driven, base, points, rest), rest)
