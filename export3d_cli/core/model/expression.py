"""CLeBS, contrastive learned basis scaling (sec. 3.1): an expression code without the face's appearance."""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export3d_cli.core.config.schema import BETA_DIM, ModelConfig


def orthonormal_columns(matrix: Tensor) -> Tensor:
    """Return Q of the QR decompositions of matrices (..., d, n)."""
    q, r = torch.linalg.qr(matrix)  # (..., d, n), (..., n, n)
    # QR does not fix the sign of a column; a positive diagonal of R makes Q a continuous function of the matrix
    return q * torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]


class ExpressionCode(nn.Module):
    """Base of f_e: beta, standardised by the training data's `beta_mean` and `beta_std`, to lambda; lambda to beta'."""

    beta_mean: Tensor
    beta_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("beta_mean", torch.zeros(BETA_DIM))
        self.register_buffer("beta_std", torch.ones(BETA_DIM))

    def coefficients(self, beta: Tensor) -> Tensor:
        """Map expressions `beta` (B, 64) to coefficients lambda (B, n); here the standardised `beta`, n = 64."""
        if beta.ndim != 2 or beta.shape[1] != BETA_DIM:
            raise ValueError(f"beta must have shape (B, {BETA_DIM}), got {tuple(beta.shape)}")
        return (beta.float() - self.beta_mean) / self.beta_std

    def basis(self) -> Tensor:
        """Return the rows that the coefficients scale: (n, d), float32."""
        raise NotImplementedError

    def code(self, lam: Tensor, basis: Tensor | None = None) -> Tensor:
        """Map coefficients lambda (B, n) to beta' (B, d), eq. 2; `basis`: from `basis()` of the same weights."""
        with torch.autocast(lam.device.type, enabled=False):
            return lam.float() @ (self._current_basis() if basis is None else basis)

    def _current_basis(self) -> Tensor:
        return self.basis()

    def forward(self, beta: Tensor) -> Tensor:
        """Map expressions `beta` (B, 64) to beta' (B, d)."""
        return self.code(self.coefficients(beta))


class LeBS(ExpressionCode):
    """Learned basis scaling f_e (eq. 2, 3): `beta' = f_e(beta) = sum_i lambda_i(beta) v_i`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(BETA_DIM, config.code_hidden)
        self.fc2 = nn.Linear(config.code_hidden, config.basis)
        self.weight = nn.Parameter(torch.randn(config.code_dim, config.basis))  # W (d, n) of eq. 3
        self._frozen_basis: tuple[tuple[int, int], Tensor] | None = None  # (identity of W, basis) while W is frozen

    def coefficients(self, beta: Tensor) -> Tensor:
        """Map expressions `beta` (B, 64) to basis coefficients lambda (B, n), unbounded and possibly negative."""
        with torch.autocast(beta.device.type, enabled=False):
            x = super().coefficients(beta)  # (B, 64)
            x = F.leaky_relu(self.fc1(x), 0.2)  # (B, hidden)
            return self.fc2(x)  # (B, n)

    def basis(self) -> Tensor:
        """Return V = QR(W) as n orthonormal rows v_i: (n, d), float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return orthonormal_columns(self.weight.float()).T

    def _current_basis(self) -> Tensor:
        """Return `basis()`, cached while W is frozen and other parameters train."""
        if self.weight.requires_grad or not torch.is_grad_enabled():
            return self.basis()
        identity = (self.weight.data_ptr(), self.weight._version)
        if self._frozen_basis is None or self._frozen_basis[0] != identity:
            with torch.no_grad():
                self._frozen_basis = (identity, self.basis())
        return self._frozen_basis[1]


class DirectCode(ExpressionCode):
    """Ablation without learned coefficients: lambda is the standardised beta (n = 64), beta' a linear layer of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(BETA_DIM, config.code_dim, bias=False)

    def basis(self) -> Tensor:
        """Return the rows that the coefficients scale: (64, d), not orthonormal."""
        return self.linear.weight.float().T


class _SEBlock(nn.Module):
    """Basic residual block of ResNet-18 with squeeze-and-excitation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = _batch_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = _batch_norm(out_channels)
        squeezed = max(out_channels // 16, 4)
        self.squeeze, self.excite = nn.Linear(out_channels, squeezed), nn.Linear(squeezed, out_channels)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.short = nn.Sequential(projection, _batch_norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))  # (B, C)
        return F.relu(self.short(x) + y * scale[:, :, None, None])


def _batch_norm(channels: int) -> nn.Module:
    # Batch statistics, no running averages: a batch holds frames of ONE clip, so normalising over it removes what they
    # share (identity, background, light) and keeps what differs. f_I is never evaluated on single images.
    return nn.BatchNorm2d(channels, track_running_stats=False)


class ImageEncoder(nn.Module):
    """f_I of eq. 1: ResNet-SE-18 and one linear layer. Trains f_e and is dropped afterwards."""

    def __init__(self, code_dim: int, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm = _batch_norm(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = list[nn.Module]()
        for i, (before, after) in enumerate(pairwise(widths)):
            blocks += [_SEBlock(before, after, 2 if i else 1), _SEBlock(after, after, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], code_dim)

    def forward(self, image: Tensor) -> Tensor:
        """Map frames of one clip (N, 3, H, W) in [-1, 1] to codes (N, d)."""
        x = F.relu(self.norm(self.conv(image)))  # (N, C, H/2, W/2)
        x = F.max_pool2d(x, 3, 2, 1)  # (N, C, H/4, W/4)
        x = self.blocks(x)  # (N, 8C, H/32, W/32)
        return self.head(x.mean((2, 3)))


def contrastive_loss(image_code: Tensor, code: Tensor, temperature: float,
                     denominator: Literal["printed", "infonce"] = "infonce") -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute eq. 1 over frames of one clip, f_I(X_j) and f_e(beta_k), each (N, d); each frame in turn is the positive.

    The denominator "printed" sums over the negatives only, as eq. 1 prints it; "infonce" adds the positive. Also
    returns the fraction of frames k whose own image is the most similar one.
    """
    if image_code.shape != code.shape or code.ndim != 2 or len(code) < 2:
        raise ValueError(f"codes must be two (N >= 2, d) tensors, got {tuple(image_code.shape)}, {tuple(code.shape)}")
    images, codes = F.normalize(image_code.float(), dim=1), F.normalize(code.float(), dim=1)
    logits = codes @ images.T / temperature  # (N, N): expression k, image j
    positive = logits.diagonal()
    if denominator == "printed":
        diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        total = logits.masked_fill(diagonal, -torch.inf).logsumexp(1)
    else:
        total = logits.logsumexp(1)
    correct = logits.argmax(1) == torch.arange(len(logits), device=logits.device)
    return (total - positive).mean(), correct.float().mean()
