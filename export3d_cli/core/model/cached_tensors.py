"""Numbers that the model knows, as tensors on its device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def cached_tensor(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of `values`, a number or (nested) tuples of them, made once for each device; not to be changed.

    Copied anew each time, numbers would have a GPU waited for. A CUDA graph cannot do that at all, and needs them to
    stay where they are.
    """
    with torch.inference_mode(False):  # it may be needed with gradients, too
        return torch.tensor(values, device=device, dtype=dtype)


def index_tensor(indices: tuple[int, ...], like: Tensor) -> Tensor:
    """Indices, int64, on the device of what they are to pick from."""
    return cached_tensor(indices, like.device, torch.int64)
