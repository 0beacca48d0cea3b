"""What beta measures directly and lambda shows only in part (beyond the paper): winks, gaze, slanted mouths, snarls.

Lambda hardly tells the eyes apart and closes both half way, as trackers read a wink; of the gaze's height and of the
slant of a mouth it shows about half, and of one side of the upper lip that rises nothing. Numbers next to lambda tell
the rest, and move landmarks of eyes and mouth.
Expressions that are edited by name go on where lambda ends, in modes of the landmarks' motion (`change_expression`).
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.face.expression_coefficients import BETA_NAMES, BetaStatistics
from export3d_cli.core.face.landmarks import (
    EYE_RIMS,
    EYELID_FOLDS,
    INNER_LIPS,
    LEFT_IRIS,
    MEASURE_POINTS,
    OUTER_LIPS,
    RIGHT_IRIS,
)
from export3d_cli.core.model.cached_tensors import cached_tensor, index_tensor
from export3d_cli.core.model.inpaint.eyes import eye_opening, eyelid_rims
from export3d_cli.core.model.masks import linear_step

INTEROCULAR = 0.109  # of the canonical face, head-frame units
NUM_MODES = 20  # of the landmarks' motion, see `BetaStatistics`
# wink, gaze to the image's right and down, slant of the mouth (the person's left corner is higher), snarl (the left
# side of the upper lip is higher), modes
NUM_MEASURES = 5 + NUM_MODES
MAX_CHANGE = 28.0  # length of the change of lambda; 99.5 % of filmed frames are this near to the median of their clip
# Difference of the eyes' openings, in inter-ocular distances, from which one winks and at which it is shut. Trackers
# see a winking eye half open and the other one narrowed by a quarter; eyes that do not wink differ by up to the first.
WINK_FADE = (0.03, 0.065)
LOWER_LID_RISE = 0.15  # where the lids of a shut eye meet, over its opening
FOLD_DROP = 0.25  # motion of the upper lid's fold over that of the middle of its rim
MAX_GAZE = (0.34, 0.35)  # how far an iris is moved from the middle of its eye, in widths and openings of the eye
SLANT_REACH = 0.2  # inter-ocular distances around the corners of the mouth that move with them
MIN_SLANT = 0.01  # inter-ocular distances: faces at rest differ by about as much
SNARL_LIFT = 0.1  # inter-ocular distances that the lip rises on one side, per difference of `mouthUpperUp`
MIN_SNARL = 0.15  # difference that trackers report of faces without one
SNARL_REACH = (0.14, 0.35)  # inter-ocular distances to the sides of the lip and up that rise: to the nose's wing
SNARL_END = (0.14, 0.35)  # and below the lip, over which nothing rises any more
_LIP_SIDES = (39, 269)  # middles of the upper lip's edge, the person's right and left side
_LOWER_LIP = (*INNER_LIPS[11:], *OUTER_LIPS[11:])  # which stays
# landmarks of both eyes that a wink moves
WINKING_POINTS = (*sum((rim[1:-1] for side in (0, 1) for rim in eyelid_rims(side)), ()), *sum(EYELID_FOLDS, ()))
_OPENINGS = tuple(BETA_NAMES.index(f"eyeOpening{side}") for side in ("Right", "Left"))
_IRISES = tuple(tuple(BETA_NAMES.index(f"iris{axis}{side}") for side in ("Left", "Right")) for axis in "XY")
_SIDES = tuple(BETA_NAMES.index(name + side) for name in ("mouthCornerHeight", "mouthUpperUp")
               for side in ("Left", "Right"))  # fmt: skip


def measure(beta: Tensor) -> Tensor:
    """Return the measures of expressions beta (B, 64), (B, m): the wink is -1 (right eye) to 1, modes are 0."""
    beta = beta.float()
    right, left = beta[:, index_tensor(_OPENINGS, beta)].unbind(1)
    wink = linear_step((right - left).abs(), *WINK_FADE) * (right - left).sign()
    gaze = (beta[:, index_tensor(axis, beta)].mean(1) for axis in _IRISES)
    sides = beta[:, index_tensor(_SIDES, beta)]  # left, right
    slant, snarl = (sides[:, ::2] - sides[:, 1::2]).unbind(1)
    return F.pad(torch.stack([wink, *gaze, slant, snarl], dim=1), (0, NUM_MODES))


def measure_basis(basis: Tensor) -> Tensor:
    """Return the same measures of displacement fields (n, 478, 3), of a frontal face: (n, m), only gaze and slant."""
    corners = index_tensor(sum(MEASURE_POINTS.eye_corners, ()), basis)
    irises = index_tensor((LEFT_IRIS[0], RIGHT_IRIS[0]), basis)
    gaze = (basis[:, irises].mean(1) - basis[:, corners].mean(1))[:, :2]
    left, right = MEASURE_POINTS.mouth_corners
    slant = (basis[:, right, 1] - basis[:, left, 1])[:, None]
    return F.pad(torch.cat([torch.zeros_like(slant), gaze, slant], dim=1) / INTEROCULAR, (0, 1 + NUM_MODES))


@cache
def _landmark_modes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the modes (K, 478, 3) of the landmarks' motion, inter-ocular distances, and slopes (64, K) over beta."""
    statistics = BetaStatistics.load()
    with torch.inference_mode(False):
        modes, slopes = (torch.from_numpy(np.float32(x)).to(device) for x in (statistics.modes, statistics.slopes))
    return modes, slopes


def change_expression(lam: Tensor, measures: Tensor, beta: Tensor, basis: Tensor) -> Tensor:
    """Return the change of lambda and measures (B, n + m) that shows a change of beta (B, 64) in full.

    `lam` (B, n) and `measures` (B, m) are what the network makes of it, `basis` (n, 478, 3) is the flow's. Lambda
    changes by at most `MAX_CHANGE`; brows and mouth move as the modes tell, lambda's motion included.
    """
    limited = lam * (MAX_CHANGE / lam.norm(dim=1, keepdim=True).clamp_min(MAX_CHANGE))
    modes, slopes = _landmark_modes(lam.device)
    shown = limited @ basis.flatten(1) / INTEROCULAR  # (B, 478 * 3)
    weights = beta @ slopes - shown @ modes.flatten(1).T  # (B, K)
    rest = (lam - limited) @ measure_basis(basis) - weights @ measure_basis(modes * INTEROCULAR)
    return torch.cat([limited, measures + rest + F.pad(weights, (NUM_MEASURES - NUM_MODES, 0))], dim=1)


def apply_measures(points: Tensor, source: Tensor, measures: Tensor, source_measures: Tensor) -> Tensor:
    """Give landmarks (B, 478, 3), deformed by lambda, what the measures (B, m) tell beyond that.

    `source` and `source_measures` are the photo's.
    """
    change, points = measures - source_measures, points.clone()
    _wink(points, source, measures[:, :1], source_measures[:, :1])
    _look(points, change[:, 1:3])
    _slant(points, change[:, 3])
    _snarl(points, measures[:, 4], source_measures[:, 4])
    moved = change[:, -NUM_MODES:] @ _landmark_modes(points.device)[0].flatten(1)
    return points + interocular(source.float())[..., None] * moved.unflatten(1, (-1, 3))


def _wink(points: Tensor, source: Tensor, wink: Tensor, source_wink: Tensor) -> None:
    """Shut the winking eye in place, and open the other one as in the photo.

    An eye that winks in the photo keeps its lids, and is not turned into a wink of the other eye.
    """
    low, high = wink.clamp_max(0), wink.clamp_min(0)
    wink = torch.minimum(torch.maximum(wink - source_wink, low), high).clamp(-1, 1)
    for side, shut in enumerate((-wink, wink)):
        upper, lower = (index_tensor(rim[1:-1], points) for rim in eyelid_rims(side))
        fold = index_tensor(EYELID_FOLDS[side], points)
        lids = torch.cat([upper, lower, fold])
        narrowed = (eye_opening(points, side) < eye_opening(source, side)).float()[:, None]
        opened = (-shut).clamp_min(0) * narrowed
        points[:, lids] = torch.lerp(points[:, lids], source[:, lids].float(), opened[..., None])
        shut = shut.clamp_min(0)[..., None]
        meeting = torch.lerp(points[:, lower], points[:, upper], LOWER_LID_RISE)
        drop = shut * (meeting - points[:, upper])
        points[:, upper] += drop
        points[:, lower] = torch.lerp(points[:, lower], meeting, shut)
        points[:, fold] += FOLD_DROP * drop


def _look(points: Tensor, change: Tensor) -> None:
    """Move both irises in place by a change (B, 2) of the gaze, as far as their eyes have room."""
    change = change * interocular(points)
    for (centre, rim), iris in zip(EYE_RIMS, (RIGHT_IRIS, LEFT_IRIS), strict=True):
        corners, lids = (points[:, index_tensor((rim[k], rim[k + 8]), points), :2] for k in (0, 4))  # (B, 2, 2)
        middle = torch.stack([corners[..., 0].mean(1), lids[..., 1].mean(1)], dim=1)  # (B, 2)
        size = torch.stack([(ends[:, 0] - ends[:, 1]).norm(dim=-1) for ends in (corners, lids)], dim=1)
        room, offset = size * cached_tensor(MAX_GAZE, size.device), points[:, centre, :2] - middle
        low, high = (-room - offset).clamp_max(0), (room - offset).clamp_min(0)
        points[:, index_tensor(iris, points), :2] += torch.minimum(torch.maximum(change, low), high)[:, None]


def _slant(points: Tensor, change: Tensor) -> None:
    """Raise a corner of the mouth in place and lower the other one, each by half a change (B,) of the slant."""
    distance = interocular(points)  # (B, 1)
    shift = distance[:, 0] / 2 * change.sign() * (change.abs() - MIN_SLANT).clamp_min(0)  # (B,)
    scale = 2 * (SLANT_REACH * distance).square().clamp_min(1e-9)
    left, right = (
        torch.exp(-(points - points[:, corner : corner + 1]).square().sum(-1) / scale)
        for corner in MEASURE_POINTS.mouth_corners
    )  # (B, 478) each
    points[..., 1] += (right - left) * shift[:, None]


def _snarl(points: Tensor, snarl: Tensor, source_snarl: Tensor) -> None:
    """Raise one side of the upper lip and of the nose in place, the left for a positive `snarl` (B,), else the right.

    The side that is raised in the photo is lowered as far.
    """
    distance = interocular(points)  # (B, 1)
    lips = points[:, index_tensor(_LIP_SIDES, points)].unbind(1)  # (B, 3) each
    for lip, sign in zip(lips, (-1, 1), strict=True):
        raised, in_photo = ((sign * x - MIN_SNARL).clamp_min(0)[:, None] for x in (snarl, source_snarl))  # (B, 1)
        x, y = ((points - lip[:, None])[..., :2] / distance[..., None].clamp_min(1e-9)).unbind(-1)  # (B, 478)
        weight = torch.exp(-((x / SNARL_REACH[0]).square() + (y / SNARL_REACH[1]).square()) / 2)
        weight = weight * (1 - linear_step(y, *SNARL_END))
        weight = weight.index_fill(1, index_tensor(_LOWER_LIP, points), 0)
        points[..., 1] -= SNARL_LIFT * distance * (raised - in_photo) * weight


def interocular(points: Tensor) -> Tensor:
    """Return the distance between the middles of the eyes, (B, 1)."""
    left, right = (points[:, index_tensor(corners, points)].mean(1) for corners in MEASURE_POINTS.eye_corners)
    return (left - right).norm(dim=-1, keepdim=True)
