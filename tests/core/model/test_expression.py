"""LeBS and the contrastive loss against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from export3d_cli.core.config.schema import PRESETS
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


def test_coefficients_with_wrong_shape_raises_value_error(lebs: LeBS) -> None:
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


def gram_schmidt(weight: np.ndarray) -> np.ndarray:
    """Return orthonormal rows with the signs of the columns of W, without QR."""
    rows: list[np.ndarray] = []
    for column in weight.astype(np.float64).T:
        for _ in range(2):  # twice, against rounding errors
            column = column - sum((row * (row @ column) for row in rows), np.zeros_like(column))
        rows.append(column / np.linalg.norm(column))
    return np.stack(rows)


@pytest.mark.parametrize("seed", range(4))
def test_basis_equals_gram_schmidt_for_any_qr_signs(seed: int) -> None:
    torch.manual_seed(seed)
    lebs = LeBS(PRESETS["compact"])
    weight = lebs.weight.detach().numpy()
    basis = lebs.basis().detach().numpy()
    np.testing.assert_allclose(basis, gram_schmidt(weight), atol=2e-6)
    q, r = np.linalg.qr(weight.astype(np.float64))  # another library and precision may choose other signs
    np.testing.assert_allclose(basis, (q * np.where(np.diag(r) < 0, -1, 1)).T, atol=2e-6)
    np.testing.assert_allclose(basis, lebs.double().basis().detach().numpy(), atol=2e-6)


def test_basis_does_not_depend_on_threads_or_device(lebs: LeBS) -> None:
    basis, threads = lebs.basis().detach(), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.testing.assert_close(lebs.basis(), basis, atol=2e-6, rtol=0)
    finally:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.testing.assert_close(lebs.to("cuda").basis().cpu(), basis, atol=2e-6, rtol=0)


def test_basis_follows_a_flipped_column(lebs: LeBS) -> None:
    before = lebs.basis().detach()
    with torch.no_grad():
        lebs.weight[:, 3].neg_()  # plain QR would hide the flip behind its own choice of sign
    flipped = before.clone()
    flipped[3].neg_()
    torch.testing.assert_close(lebs.basis().detach(), flipped, atol=2e-6, rtol=0)


def test_image_encoder_is_a_resnet_18_with_squeeze_and_excitation() -> None:
    encoder = ImageEncoder(256)
    convs = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    deep = [m for m in convs if m.kernel_size != (1, 1)]
    assert len(deep) + 1 == 18  # plus the linear layer; projection shortcuts are not counted
    assert [m.out_channels for m in deep] == [64] + [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
    assert sum(p.numel() for p in convs for p in p.parameters()) == 11_166_912  # the convolutions of ResNet-18
