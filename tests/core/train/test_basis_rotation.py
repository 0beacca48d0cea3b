"""Axes of lambda: mixed coefficients are separated again, and the displacements stay the same."""

from __future__ import annotations

import pytest
import torch

from export3d_cli.core.train.clebs_stage import fit_lambda_axes, varimax


def make_mixed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return three symmetric and two antisymmetric coefficients with their fields, before and after mixing."""
    torch.manual_seed(0)
    factors = torch.stack([torch.rand(4000) ** 3 - 0.25 if k < 3 else torch.randn(4000) for k in range(5)], dim=1)
    fields = torch.zeros(5, 50)
    for k, strength in enumerate((3.0, 2.0, 1.0, 2.0, 1.0)):
        fields[k, 10 * k : 10 * k + 10] = strength * (1 + torch.rand(10))
    mixture = torch.block_diag(torch.randn(3, 3) + torch.eye(3), torch.randn(2, 2) + 2 * torch.eye(2))
    return factors, fields, factors @ mixture.T, torch.linalg.solve(mixture.T, fields)


def test_fit_lambda_axes_separates_mixed_coefficients_strongest_first() -> None:
    factors, fields, lam, basis = make_mixed()
    axes = fit_lambda_axes(lam - lam.mean(0), basis, 2, 3.0)
    separated, axis_fields = lam @ axes.T, torch.linalg.solve(axes.T, basis)
    torch.testing.assert_close(separated @ axis_fields, factors @ fields, rtol=1e-3, atol=1e-3)
    assert not axes[:3, 3:].any()
    assert not axes[3:, :3].any()
    correlation = torch.corrcoef(torch.cat([separated, factors], 1).T)[:5, 5:]
    assert correlation.abs().diagonal().min() > 0.99
    assert correlation.diagonal()[:3].min() > 0  # the rarer and farther direction is positive
    strength = (factors.std(0) * fields.norm(dim=1))[:3]
    torch.testing.assert_close(separated.std(0)[:3], 3 * (strength / strength[0]).sqrt(), rtol=0.05, atol=0)


@pytest.mark.parametrize("one_sided", [0, 5])
def test_fit_lambda_axes_without_one_kind_has_full_rank(one_sided: int) -> None:
    _, _, lam, basis = make_mixed()
    assert torch.linalg.matrix_rank(fit_lambda_axes(lam, basis, one_sided, 3.0)) == 5


def test_varimax_undoes_a_rotation() -> None:
    torch.manual_seed(1)
    simple = torch.zeros(40, 4)
    for k in range(4):
        simple[10 * k : 10 * k + 10, k] = 1 + torch.rand(10)
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    restored = simple @ rotation @ varimax(simple @ rotation)
    torch.testing.assert_close(restored.abs().sort(dim=1).values, simple.sort(dim=1).values, rtol=0, atol=1e-3)
