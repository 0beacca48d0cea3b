"""Interpolation of tri-planes between key frames of an animation.

On a CPU a tri-plane takes more than a third of a frame's time, and it is nearly linear in lambda over a few frames.
"""

from collections.abc import Callable

import torch
from torch import Tensor

KEYFRAME_INTERVAL = 4  # frames among which at least one is a key frame


class TriplaneInterpolator:
    """Tri-planes of consecutive frames of one source, by `generate`: lambda (1, n) -> tri-plane (1, 3, C, P, P).

    They are interpolated where lambda is at most `max_deviation` from the straight line between two key frames.
    """

    def __init__(self, generate: Callable[[Tensor], Tensor], max_deviation: float) -> None:
        self._generate, self._max_deviation = generate, max_deviation
        self._last: tuple[Tensor, Tensor] | None = None  # lambda (1, n) and tri-plane of the previous frame

    @torch.inference_mode()
    def __call__(self, lam: Tensor) -> Tensor:
        """Return the tri-planes (T, 3, C, P, P) of the next T frames, best `KEYFRAME_INTERVAL`, with lambda (T, n)."""
        planes: dict[int, Tensor] = {}  # by frame; frame 0 is the previous one, if there is one
        first = 0
        if self._last is not None:
            lam, first = torch.cat([self._last[0], lam]), 1
            planes[0] = self._last[1]

        def make_key_frame(k: int) -> None:
            if k not in planes:
                same = next((j for j in planes if torch.equal(lam[j], lam[k])), None)
                planes[k] = self._generate(lam[k : k + 1]) if same is None else planes[same]

        make_key_frame(0)
        make_key_frame(len(lam) - 1)
        spans = [(0, len(lam) - 1)]  # not recursive: a recursive closure is a cycle that keeps tri-planes alive
        while spans:
            low, high = spans.pop()
            if high - low < 2:
                continue
            line, inner = lam[high] - lam[low], lam[low + 1 : high] - lam[low]
            fraction = ((inner @ line) / line.square().sum().clamp_min(1e-9)).clamp(0, 1)  # (T',)
            if bool(((inner - fraction[:, None] * line).norm(dim=1) <= self._max_deviation).all()):
                for k, weight in enumerate(fraction.tolist(), low + 1):
                    planes[k] = torch.lerp(planes[low], planes[high], weight)
                continue
            middle = (low + high) // 2
            make_key_frame(middle)
            spans += [(middle, high), (low, middle)]
        self._last = lam[-1:], planes[len(lam) - 1]
        return torch.cat([planes[k] for k in range(first, len(lam))])
