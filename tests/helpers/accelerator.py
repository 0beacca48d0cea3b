"""`FakeAccelerator`: a pretended CUDA device on machines without one.

Tensors moved to "cuda" stay in CPU memory but report the device cuda:0, and operations that mix devices fail as on a
real GPU. Code paths for GPUs therefore run on any machine, with their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
# Operations that accept tensors of another device, and operations that accept CPU indices.
CROSS_DEVICE_OPS = ("copy_", "__set__", "__setitem__", "_has_compatible_shallow_copy_type")
CPU_INDEX_OPS = ("__getitem__", "index_put_")


def iterate_tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors nested in arguments or a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from iterate_tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from iterate_tensors(item)


def is_fake_cuda(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "fake_cuda", False))


class FakeAccelerator(TorchFunctionMode):
    """Context in which "cuda" is available, for one thread; `calls` counts operations on it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        attribute = getattr(func, "__self__", None)
        if attribute is Tensor.device:
            return CUDA if is_fake_cuda(first) else func(*args)
        if attribute is Tensor.data and name == "__set__":
            func(*args)
            first.fake_cuda = is_fake_cuda(args[1])
            return None
        inputs = list(iterate_tensors([args, kwargs]))
        on_cuda = any(map(is_fake_cuda, inputs))
        if name in ("numpy", "__array__") and on_cuda:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in ("to", "cpu", "type_as"):
            args, kwargs, on_cuda = self.convert_move(name, first, args, kwargs)
        elif kwargs.get("device") is not None:
            on_cuda = torch.device(kwargs.pop("device")).type == "cuda"
            if on_cuda and kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        elif on_cuda and name not in CROSS_DEVICE_OPS:
            cpu_inputs = [t for t in inputs if not is_fake_cuda(t) and t.ndim]
            if cpu_inputs and not (name in CPU_INDEX_OPS and all(t.dtype == torch.int64 for t in cpu_inputs)):
                raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        result = func(*args, **kwargs)
        self.calls += on_cuda
        for output in iterate_tensors(result):
            if not any(output is tensor for tensor in inputs):  # in-place results keep their device
                output.fake_cuda = on_cuda
        return result

    @staticmethod
    def convert_move(name: str, first: Tensor, args: Any, kwargs: Any) -> tuple[Any, Any, bool]:
        """Return the arguments of a move without its device, with a copy as tensor, and whether it ends on CUDA."""
        on_cuda, other_args = is_fake_cuda(first), []
        for value in args[1:]:
            if isinstance(value, str | torch.device):
                on_cuda = torch.device(value).type == "cuda"
            elif isinstance(value, torch.dtype | Tensor):
                on_cuda = is_fake_cuda(value) if isinstance(value, Tensor) else on_cuda
                other_args.append(value)
        if kwargs.get("device") is not None:
            on_cuda = torch.device(kwargs.pop("device")).type == "cuda"
        return (first.view_as(first), *other_args), kwargs, False if name == "cpu" else on_cuda
