"""LeBS and the contrastive loss against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from export3d_cli.core.config import PRESETS
from export3d_cli.core.model.expression import ImageEncoder, LeBS, contrastive_loss


@pytest.fixture
def lebs() -> LeBS:
    torch.manual_seed(0)
    return LeBS(PRESETS["tiny"])


def test_basis_is_orthonormal_and_spans_w(lebs: LeBS) -> None:
    v = lebs.basis()
    assert v.shape == (10, 16)
    torch.testing.assert_close(v @ v.T, torch.eye(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(lebs.weight @ torch.eye(10), v.T @ (v @ lebs.weight), atol=1e-4, rtol=1e-4)


def test_basis_does_not_flip_sign_under_small_changes(lebs: LeBS) -> None:
    before = lebs.basis().detach()
    with torch.no_grad():
        lebs.weight.add_(1e-4 * torch.randn_like(lebs.weight))
    assert (before * lebs.basis()).sum(1).min() > 0.99


def test_code_recovers_the_coefficients_and_scales_linearly(lebs: LeBS) -> None:
    beta = torch.rand(3, 64)
    lam = lebs.coefficients(beta)
    torch.testing.assert_close(lebs(beta) @ lebs.basis().T, lam, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lebs.code(2 * lam), 2 * lebs.code(lam))


def test_coefficients_are_not_rounded_under_autocast(lebs: LeBS) -> None:
    beta = torch.rand(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lebs(beta)
    assert torch.equal(inside, lebs(beta))


def test_wrong_shape_is_named(lebs: LeBS) -> None:
    with pytest.raises(ValueError, match=r"\(B, 64\), got \(64,\)"):
        lebs.coefficients(torch.rand(64))


@pytest.mark.parametrize(
    ("denominator", "expected"), [("infonce", math.log(1 + 2 / math.e)), ("printed", math.log(2) - 1)]
)
def test_contrastive_loss_closed_form(denominator: str, expected: float) -> None:
    codes = torch.eye(3)  # cosine 1 with itself, 0 with the two others
    loss, accuracy = contrastive_loss(5 * codes, 3 * codes, 1.0, denominator)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert accuracy.item() == 1.0


def test_encoder_shape_and_gradient() -> None:
    encoder = ImageEncoder(16, width=8)
    code = encoder(torch.rand(4, 3, 64, 64))
    assert code.shape == (4, 16)
    code.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
