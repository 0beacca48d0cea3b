"""Winks (beyond the paper): lambda hardly tells the eyes apart and closes both half way, as trackers read a wink.

A number next to lambda tells how far one eye is shut alone, and moves the landmarks of the lids of both eyes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.landmarks import EYELID_FOLDS
from export3d_cli.core.model.cached_tensors import index_tensor
from export3d_cli.core.model.inpaint.eyes import eye_opening, eyelid_rims
from export3d_cli.core.model.masks import linear_step

# Difference of the eyes' openings, in inter-ocular distances, from which one winks and at which it is shut. Trackers
# see a winking eye half open and the other one narrowed by a quarter; eyes that do not wink differ by up to the first.
WINK_FADE = (0.03, 0.065)
LOWER_LID_RISE = 0.15  # where the lids of a shut eye meet, over its opening
FOLD_DROP = 0.25  # motion of the upper lid's fold over that of the middle of its rim
_OPENINGS = tuple(BETA_NAMES.index(f"eyeOpening{side}") for side in ("Right", "Left"))


def measure_wink(beta: Tensor) -> Tensor:
    """Return how far one eye is shut alone in expressions beta (B, 64): (B, 1), -1 the person's right, 1 the left."""
    right, left = beta[:, index_tensor(_OPENINGS, beta)].float().unbind(1)
    difference = right - left
    return (linear_step(difference.abs(), *WINK_FADE) * difference.sign())[:, None]


def apply_wink(points: Tensor, source: Tensor, wink: Tensor, source_wink: Tensor) -> Tensor:
    """Shut the winking eye of landmarks (B, 478, 3), and open the other as in the photo's, `source`.

    `wink` and `source_wink` (B, 1) are of `measure_wink`. An eye that winks in the photo keeps its lids.
    """
    low, high = wink.clamp_max(0), wink.clamp_min(0)
    wink = torch.minimum(torch.maximum(wink - source_wink, low), high).clamp(-1, 1)
    points = points.clone()
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
    return points
