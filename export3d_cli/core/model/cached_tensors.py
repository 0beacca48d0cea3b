"""Constant tensors, created once per device."""

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def cached_tensor(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a read-only tensor of `values` (a number or nested tuples), created once per device and dtype.

    Creating it on every call would copy from the host and synchronise the GPU. CUDA graphs cannot do that and also need
    a fixed address.
    """
    with torch.inference_mode(False):  # may take part in a graph with gradients later
        return torch.tensor(values, device=device, dtype=dtype)


def index_tensor(indices: tuple[int, ...], like: Tensor) -> Tensor:
    """Return int64 `indices` on the device of the tensor that they index."""
    return cached_tensor(indices, like.device, torch.int64)
