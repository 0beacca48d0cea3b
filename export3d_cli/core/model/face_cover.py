"""Covered parts of a face: what is before mouth or eyes moves with the head and shows nothing of the expression."""

from typing import NamedTuple

import torch
from torch import Tensor

from export3d_cli.core.face.landmarks import LEFT_MOUTH_CORNER, RIGHT_MOUTH_CORNER
from export3d_cli.core.model.inpaint.eyes import EYE_RIMS, INNER_CORNER, eye_width
from export3d_cli.core.model.masks import linear_step

# Height on the face, 0 at the eyes and 1 at the mouth: nothing is still above the first, all is from the second on.
MOUTH_COVER_FADE = (0.15, 0.4)
# Distance from the eye's middle in eye widths: all is still up to the first, nothing from the second on.
EYE_COVER_FADE = (0.9, 1.5)
MIN_BASIS_MOTION = 1e-4  # ridge of `FaceCover.code_filter`, over the basis's mean square


class FaceCover(NamedTuple):
    """How covers before parts of a face restrict its motion."""

    motion: Tensor  # (B, 478, 1) kept fraction of each landmark's motion by expression
    code_filter: Tensor  # (B, n, n) maps changes of lambda to those that move only uncovered parts
    mask: Tensor  # (B, 1, m, m) 1 on the covers in the photo
    skin: Tensor  # (B, 3, 1, 1) mean colour of the rest of the face


def cover_motion(points: Tensor, covered: Tensor) -> Tensor:
    """Return `FaceCover.motion` for landmarks (B, 478, 3), head frame; `covered` (B, 3): mouth, right and left eye."""
    eyes = torch.stack([points[:, [rim[0], rim[INNER_CORNER]]].mean(1) for _, rim in EYE_RIMS], dim=1)  # (B, 2, 3)
    down = points[:, [RIGHT_MOUTH_CORNER, LEFT_MOUTH_CORNER]].mean(1) - eyes.mean(1)  # (B, 3)
    height = ((points - eyes.mean(1, keepdim=True)) * down[:, None]).sum(-1) / down.square().sum(-1)[:, None]
    still = [linear_step(height, *MOUTH_COVER_FADE)]
    for side in (0, 1):
        distance = (points - eyes[:, side : side + 1]).norm(dim=-1) / eye_width(points, side)[:, None]
        still.append(1 - linear_step(distance, *EYE_COVER_FADE))
    return (1 - torch.stack(still, dim=-1) * covered[:, None]).prod(-1, keepdim=True)


def make_code_filter(basis: Tensor, motion: Tensor) -> Tensor:
    """Return `FaceCover.code_filter` for a basis flow (n, 478, 3): the least-squares fit to the restricted motion."""
    basis, keep = basis.cpu().double(), motion.cpu().double()  # not every device has doubles
    flat, restricted = basis.flatten(1), (basis * keep[:, None]).flatten(2)  # (n, 1434), (B, n, 1434)
    gram = flat @ flat.T
    ridge = MIN_BASIS_MOTION * gram.diagonal().mean() * torch.eye(len(flat), dtype=gram.dtype)
    return (restricted @ flat.T @ torch.linalg.inv(gram + ridge)).to(motion)
