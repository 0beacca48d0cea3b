"""A device that is not there: `Pretended` plays an accelerator.

Tensors moved to "cuda" stay where they are, but say that they are there, and what mixes them with others fails as it
would on a real one. So the code that a GPU runs is run, numbers and all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
MIXED = ("copy_", "__set__", "__setitem__", "_has_compatible_shallow_copy_type")  # take what is on another device
ANYWHERE = ("__getitem__", "index_put_")  # take indices of the CPU


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in arguments or a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)


def is_there(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "pretended", False))


class Pretended(TorchFunctionMode):
    """An accelerator, as long as the context lasts, in one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        attribute = getattr(func, "__self__", None)
        if attribute is Tensor.device:
            return CUDA if is_there(first) else func(*args)
        if attribute is Tensor.data and name == "__set__":
            func(*args)
            first.pretended = is_there(args[1])
            return None
        given = list(tensors_of([args, kwargs]))
        there = any(map(is_there, given))
        if name in ("numpy", "__array__") and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in ("to", "cpu", "type_as"):
            args, kwargs, there = self.moved(name, first, args, kwargs)
        elif kwargs.get("device") is not None:
            there = torch.device(kwargs.pop("device")).type == "cuda"
            if there and kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        elif there and name not in MIXED:
            others = [t for t in given if not is_there(t) and t.ndim]
            if others and not (name in ANYWHERE and all(t.dtype == torch.int64 for t in others)):
                raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        out = func(*args, **kwargs)
        self.calls += there
        for made in tensors_of(out):
            if not any(made is one for one in given):  # what is changed in place stays where it is
                made.pretended = there
        return out

    @staticmethod
    def moved(name: str, first: Tensor, args: Any, kwargs: Any) -> tuple[Any, Any, bool]:
        """Arguments of a move without the device, a copy instead of the tensor itself; and where it ends."""
        there, rest = is_there(first), []
        for value in args[1:]:
            if isinstance(value, str | torch.device):
                there = torch.device(value).type == "cuda"
            elif isinstance(value, torch.dtype | Tensor):
                there = is_there(value) if isinstance(value, Tensor) else there
                rest.append(value)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs.pop("device")).type == "cuda"
        return (first.view_as(first), *rest), kwargs, False if name == "cpu" else there
