"""Meaning of the expression basis: which blendshapes change lambda_i, and which face regions b_i moves."""

from dataclasses import dataclass

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.expression_controls import MIN_BETA_STD
from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.runtime.camera import FOCAL, RADIUS

JACOBIAN_SAMPLES = 256  # expressions around the mean over which the Jacobian is averaged
IMAGE_SIZE_PX = 256  # side of the image that motion in pixels refers to
REGIONS: dict[str, tuple[int, ...]] = {
    "lips": mesh.LIPS,
    "eyes": mesh.LEFT_EYE + mesh.RIGHT_EYE + mesh.LEFT_IRIS + mesh.RIGHT_IRIS,
    "brows": mesh.LEFT_BROW + mesh.RIGHT_BROW,
    "jaw": mesh.JAW,
}


@dataclass(frozen=True)
class BasisVector:
    """Meaning of v_i and b_i."""

    v: int  # from 1, as in `--v`
    moved_by: dict[str, float]  # entry of beta -> change of lambda_i for one standard deviation
    moves: dict[str, float]  # region -> mean motion in pixels of a 256 image for lambda_i + 1; {}: no flow


def describe_basis(animator: Animator, *, top: int = 4) -> list[BasisVector]:
    """Return the `top` entries of beta in the mean Jacobian of f_e for each lambda_i, and the regions b_i moves."""
    expression, flow = animator.model.expression, animator.model.flow
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(JACOBIAN_SAMPLES, len(BETA_NAMES), generator=generator).to(animator.device)
    with torch.enable_grad():
        beta = (expression.beta_mean + noise * expression.beta_std).detach().requires_grad_()
        lam = expression.coefficients(beta)  # (SAMPLES, n)
        slopes = [torch.autograd.grad(column.sum(), beta, retain_graph=True)[0] for column in lam.unbind(1)]
    varies = expression.beta_std > MIN_BETA_STD
    jacobian = (torch.stack(slopes).mean(1) * expression.beta_std * varies).detach().cpu().numpy()  # (n, 64)
    pixels_per_unit = FOCAL / RADIUS * IMAGE_SIZE_PX  # pixels per unit of the head frame at the default distance
    vectors = []
    for i, row in enumerate(jacobian):
        strongest = np.argsort(-np.abs(row))[:top]
        moves = {}
        if flow is not None:
            motion = flow.basis[i, :, :2].float().norm(dim=-1).cpu().numpy() * pixels_per_unit  # (478,)
            moves = {name: float(motion[list(points)].mean()) for name, points in REGIONS.items()}
        vectors.append(BasisVector(i + 1, {BETA_NAMES[k]: float(row[k]) for k in strongest}, moves))
    return vectors
