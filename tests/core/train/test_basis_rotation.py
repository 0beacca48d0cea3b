"""Axes of lambda: mixed knobs come apart again, and what the basis moves stays the same."""

from __future__ import annotations

import pytest
import torch

from export3d_cli.core.train.basis_rotation import fit_lambda_axes, varimax


def mixed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three symmetric knobs and two one-sided ones, each with landmarks of its own, before and after a mixture."""
    torch.manual_seed(0)
    knobs = torch.stack([torch.rand(4000) ** 3 - 0.25 if k < 3 else torch.randn(4000) for k in range(5)], dim=1)
    moves = torch.zeros(5, 50)
    for k, strength in enumerate((3.0, 2.0, 1.0, 2.0, 1.0)):
        moves[k, 10 * k : 10 * k + 10] = strength * (1 + torch.rand(10))
    mixture = torch.block_diag(torch.randn(3, 3) + torch.eye(3), torch.randn(2, 2) + 2 * torch.eye(2))
    return knobs, moves, knobs @ mixture.T, torch.linalg.solve(mixture.T, moves)


def test_mixed_knobs_come_apart_strongest_first() -> None:
    knobs, moves, lam, basis = mixed()
    found = fit_lambda_axes(lam - lam.mean(0), basis, 2, 3.0)
    apart, moved = lam @ found.T, torch.linalg.solve(found.T, basis)
    torch.testing.assert_close(apart @ moved, knobs @ moves, rtol=1e-3, atol=1e-3)
    assert not found[:3, 3:].any()
    assert not found[3:, :3].any()
    agree = torch.corrcoef(torch.cat([apart, knobs], 1).T)[:5, 5:]
    assert agree.abs().diagonal().min() > 0.99
    assert agree.diagonal()[:3].min() > 0  # what is seen less often and farther out is +
    strength = (knobs.std(0) * moves.norm(dim=1))[:3]
    torch.testing.assert_close(apart.std(0)[:3], 3 * (strength / strength[0]).sqrt(), rtol=0.05, atol=0)


@pytest.mark.parametrize("one_sided", [0, 5])
def test_a_kind_may_be_empty(one_sided: int) -> None:
    _, _, lam, basis = mixed()
    assert torch.linalg.matrix_rank(fit_lambda_axes(lam, basis, one_sided, 3.0)) == 5


def test_varimax_turns_back() -> None:
    torch.manual_seed(1)
    simple = torch.zeros(40, 4)
    for k in range(4):
        simple[10 * k : 10 * k + 10, k] = 1 + torch.rand(10)
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    back = simple @ turn @ varimax(simple @ turn)
    torch.testing.assert_close(back.abs().sort(dim=1).values, simple.sort(dim=1).values, rtol=0, atol=1e-3)
