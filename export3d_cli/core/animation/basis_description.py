"""What each basis vector of an expression means: which blendshapes move lambda_i, and what b_i moves in the face."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.face.beta import BETA_NAMES
from export3d_cli.core.runtime.camera import FOCAL, RADIUS

MIN_BETA_STD = 0.0201  # entries of beta at the least deviation, 0.02, hardly moved in training and mean nothing
JACOBIAN_SAMPLES = 256  # expressions around the mean over which the Jacobian is averaged
IMAGE_SIZE_PX = 256  # side of the picture in which motion is told
REGIONS: dict[str, tuple[int, ...]] = {
    "lips": mesh.LIPS,
    "eyes": mesh.LEFT_EYE + mesh.RIGHT_EYE + mesh.LEFT_IRIS + mesh.RIGHT_IRIS,
    "brows": mesh.LEFT_BROW + mesh.RIGHT_BROW,
    "jaw": mesh.JAW,
}


@dataclass(frozen=True)
class BasisVector:
    """v_i and b_i in words and numbers."""

    v: int  # from 1, as in `--v`
    moved_by: dict[str, float]  # entry of beta -> change of lambda_i when it grows by its standard deviation
    moves: dict[str, float]  # region -> mean pixels of a 256 image when lambda_i grows by 1; {}: no flow


@dataclass(frozen=True)
class BasisDescription:
    """Every basis vector of some weights."""

    vectors: tuple[BasisVector, ...]


def describe_basis(animator: Animator, *, top: int = 4) -> BasisDescription:
    """The `most` entries of beta that move each lambda_i most, by the mean Jacobian of f_e; the regions b_i moves."""
    expression, flow = animator.model.expression, animator.model.flow
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(JACOBIAN_SAMPLES, len(BETA_NAMES), generator=generator).to(animator.device)
    with torch.enable_grad():
        beta = (expression.beta_mean + spread * expression.beta_std).detach().requires_grad_()
        lam = expression.coefficients(beta)  # (SAMPLES, n)
        slopes = [torch.autograd.grad(column.sum(), beta, retain_graph=True)[0] for column in lam.unbind(1)]
    moving = expression.beta_std > MIN_BETA_STD
    jacobian = (torch.stack(slopes).mean(1) * expression.beta_std * moving).detach().cpu().numpy()  # (n, 64)
    per_unit = FOCAL / RADIUS * IMAGE_SIZE_PX  # pixels a unit of the head frame, seen from the usual distance
    vectors = []
    for i, row in enumerate(jacobian):
        strongest = np.argsort(-np.abs(row))[:top]
        moves = {}
        if flow is not None:
            motion = flow.basis[i, :, :2].float().norm(dim=-1).cpu().numpy() * per_unit  # (478,)
            moves = {name: float(motion[list(points)].mean()) for name, points in REGIONS.items()}
        vectors.append(BasisVector(i + 1, {BETA_NAMES[k]: float(row[k]) for k in strongest}, moves))
    return BasisDescription(tuple(vectors))
