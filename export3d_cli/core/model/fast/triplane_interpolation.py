"""Interpolation of tri-planes between key frames of an animation.

On a CPU a tri-plane takes more than a third of a frame's time, and it is nearly linear in lambda over a few frames.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

KEYFRAME_WINDOW = 4  # frames among which at least one is a key frame


class TriplaneInterpolator:
    """Tri-planes of consecutive frames of one source.

    Args:
        generate: lambda (1, n) -> tri-plane (1, 3, C, P, P).
        max_deviation: largest distance of lambda from the straight line between two key frames for which their planes
            are interpolated; in units of lambda (an expression has a norm of about 3).
    """

    def __init__(self, generate: Callable[[Tensor], Tensor], max_deviation: float) -> None:
        self._generate, self._max_deviation = generate, max_deviation
        self._last: tuple[Tensor, Tensor] | None = None  # lambda (1, n) and tri-plane of the previous frame

    @torch.inference_mode()
    def __call__(self, lam: Tensor) -> Tensor:
        """Return the tri-planes (T, 3, C, P, P) of the next T frames, best `KEYFRAME_WINDOW`, with lambda (T, n)."""
        known: dict[int, Tensor] = {}
        rows, first = lam, 0
        if self._last is not None:
            rows, first = torch.cat([self._last[0], lam]), 1
            known[0] = self._last[1]

        def make(k: int) -> None:
            if k not in known:
                same = next((j for j in known if torch.equal(rows[j], rows[k])), None)
                known[k] = self._generate(rows[k : k + 1]) if same is None else known[same]

        make(0)
        make(len(rows) - 1)
        spans = [(0, len(rows) - 1)]  # not recursive: a recursive closure is a cycle that keeps tri-planes alive
        while spans:
            low, high = spans.pop()
            if high - low < 2:
                continue
            way, inner = rows[high] - rows[low], rows[low + 1 : high] - rows[low]
            share = ((inner @ way) / way.square().sum().clamp_min(1e-9)).clamp(0, 1)  # (T',)
            if bool(((inner - share[:, None] * way).norm(dim=1) <= self._max_deviation).all()):
                for k, weight in enumerate(share.tolist(), low + 1):
                    known[k] = torch.lerp(known[low], known[high], weight)
                continue
            middle = (low + high) // 2
            make(middle)
            spans += [(middle, high), (low, middle)]
        self._last = rows[-1:], known[len(rows) - 1]
        return torch.cat([known[k] for k in range(first, len(rows))])
