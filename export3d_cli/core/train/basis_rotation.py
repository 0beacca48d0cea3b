"""Choice of lambda's axes: each axis becomes an independent movement of one part of the face.

Any invertible mixture of the coefficients carries the same information, but users expect one movement per coefficient.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def fit_lambda_axes(lam_deviations: Tensor, basis: Tensor, antisymmetric_dims: int, max_std: float) -> Tensor:
    """Return the mixture A (n, n) that maps lambda to independent axes, lambda' = A lambda, strongest first.

    Within the symmetric and within the antisymmetric coefficients: whitened over the frames of a person, then rotated
    by varimax so that every axis moves few landmarks. Weak axes get a smaller deviation, by the square root of their
    strength, so that a unit step is visible on every axis. The positive direction is the rarer and farther one: for
    eyes, which rest open, closing.

    `lam_deviations` (N, n) is lambda minus its mean over the frames of the same person, `basis` (n, K) the weighted
    displacements of each coefficient, `max_std` the standard deviation of the strongest coefficient of either kind.
    """
    n = lam_deviations.shape[1]
    mixture = torch.zeros(n, n, dtype=torch.float64)
    lam_deviations, basis = lam_deviations.double().cpu(), basis.double().cpu()
    for block in (slice(0, n - antisymmetric_dims), slice(n - antisymmetric_dims, n)):
        x = lam_deviations[:, block]
        if not x.shape[1]:
            continue
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        root = values.clamp_min(values.max() * 1e-6).sqrt()
        whiten, restore = vectors / root @ vectors.T, vectors * root @ vectors.T
        rotation = varimax((restore @ basis[block]).T)  # (k, k)
        strength, order = (rotation.T @ restore @ basis[block]).norm(dim=1).sort(descending=True)
        axes = max_std * (strength / strength[0]).sqrt()[:, None] * (rotation.T @ whiten)[order]
        skewness = (x @ axes.T).pow(3).mean(0)
        mixture[block, block] = axes * torch.where(skewness < 0, -1.0, 1.0)[:, None]
    return mixture.float()


def varimax(loadings: Tensor) -> Tensor:
    """Return Kaiser's rotation (k, k), which maximises the variance of the squared columns of loadings (K, k)."""
    k = loadings.shape[1]
    rotation, last_sum = torch.eye(k, dtype=loadings.dtype), 0.0
    for _ in range(200):
        rotated = loadings @ rotation
        u, s, vt = torch.linalg.svd(loadings.T @ (rotated**3 - rotated * rotated.square().mean(0)))
        rotation, singular_sum = u @ vt, float(s.sum())
        if singular_sum <= last_sum * (1 + 1e-9):
            break
        last_sum = singular_sum
    return rotation
