"""Which axes lambda has. Any invertible mixture of the coefficients tells the same; people who turn one knob do not
want a mixture. So each axis becomes a movement that faces make, of a part of the face, independent of the others."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def fit_lambda_axes(lam_deviations: Tensor, basis: Tensor, antisymmetric_dims: int, max_std: float) -> Tensor:
    """The mixture A that brings lambda to such axes, lambda' = A lambda (n, n), strongest first.

    Within the symmetric and within the one-sided coefficients: made uncorrelated over the frames of a person, then
    turned by varimax so that every axis moves few landmarks. What faces do little varies less, by the root of how
    little, so that a step shows on every axis. + is the side seen less often and farther out: eyes rest open.

    Args:
        away: (N, n) lambda less its mean over the frames of the same person.
        basis: (n, K) what each coefficient moves, as far as it counts.
        one_sided: how many coefficients, the last ones, change sign when a face is mirrored.
        size: deviation of the strongest coefficient of either kind.
    """
    n = lam_deviations.shape[1]
    out = torch.zeros(n, n, dtype=torch.float64)
    lam_deviations, basis = lam_deviations.double().cpu(), basis.double().cpu()
    for block in (slice(0, n - antisymmetric_dims), slice(n - antisymmetric_dims, n)):
        x = lam_deviations[:, block]
        if not x.shape[1]:
            continue
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        root = values.clamp_min(values.max() * 1e-6).sqrt()
        whiten, restore = vectors / root @ vectors.T, vectors * root @ vectors.T
        turn = varimax((restore @ basis[block]).T)  # (k, k)
        moved, order = (turn.T @ restore @ basis[block]).norm(dim=1).sort(descending=True)
        own = max_std * (moved / moved[0]).sqrt()[:, None] * (turn.T @ whiten)[order]
        seen = x @ own.T
        own = own * torch.where(seen.pow(3).mean(0) < 0, -1.0, 1.0)[:, None]
        out[block, block] = own
    return out.float()


def varimax(loadings: Tensor, *, iterations: int = 200) -> Tensor:
    """Kaiser's rotation (k, k): the columns of loadings (K, k) turned by it vary most in their squares."""
    k = loadings.shape[1]
    turn, before = torch.eye(k, dtype=loadings.dtype), 0.0
    for _ in range(iterations):
        turned = loadings @ turn
        u, s, vt = torch.linalg.svd(loadings.T @ (turned**3 - turned * turned.square().mean(0)))
        turn, now = u @ vt, float(s.sum())
        if now <= before * (1 + 1e-9):
            break
        before = now
    return turn
