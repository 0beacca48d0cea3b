"""What a machine can do, measured: matrix products, copies, peak memory; and what code asks of it, counted."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from export3d_cli.core.runtime.device import trim_heap

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX_SIDE = {"cuda": 8192, "cpu": 1536}  # large enough that the rate grows no more
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}  # larger than any cache
REPEATS = 6  # the fastest counts: whatever else the machine does only slows it
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Machine:
    """Rates reached by one large operation at a time, with the threads that are set."""

    matrix: dict[str, float]  # GFLOP/s of a matrix product, two a multiply-add, by precision
    bandwidth: float  # GB/s of a copy, read and write counted


@dataclass
class OpCounts:
    """What some code asks of the machine."""

    flops: dict[str, float] = field(default_factory=dict)  # of products, convolutions and attention, by precision
    bytes: float = 0.0  # read and written by every operation on its own: what fusing them would save is included


def measure_machine(device: torch.device, precision: str) -> Machine:
    """Rates in fp32 and in `precision`."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    side, rates = MATRIX_SIDE[kind], {}
    for name in dict.fromkeys(("fp32", precision)):
        a, b = (torch.randn(side, side, device=device).to(PRECISIONS[name]) for _ in range(2))
        rates[name] = 2 * side**3 / _fastest(lambda a=a, b=b: a @ b, device) / 1e9  # type: ignore[misc]
    source = torch.zeros(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    return Machine(rates, 2 * COPY_BYTES[kind] / _fastest(lambda: target.copy_(source), device) / 1e9)


def synchronize(device: torch.device) -> None:
    """Until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + REPEATS):  # the first warms up
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


class OpCounter(TorchDispatchMode):
    """Within it, operations are added to `work`; those that only look at memory differently cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.work = OpCounts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = _flop_counts().get(func._overloadpacket)
        if count is None and func is not torch.ops.prim.device.default:
            with self:  # composites such as a linear layer are counted by their parts
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(out))
        places = {t.untyped_storage().data_ptr() for t in inputs}
        looks = outputs and not func._schema.is_mutable
        if not (looks and all(t.untyped_storage().data_ptr() in places for t in outputs)):
            self.work.bytes += sum(map(_bytes, inputs + outputs))
        if count is not None:
            name = next((n for n, kind in PRECISIONS.items() if kind == inputs[0].dtype), "fp32")
            self.work.flops[name] = self.work.flops.get(name, 0.0) + float(count(*args, **kwargs, out_val=out))
        return out


def _flop_counts() -> dict[Any, Callable[..., Any]]:
    """torch's own counts, and one for the CPU's attention, which it leaves out."""
    attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return {**flop_registry, attention: _attention}


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _bytes(tensor: Tensor) -> int:
    """Of what is there: an expanded tensor is as large as what it repeats."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class PeakMemory:
    """The most memory, in bytes, since `start`: of the GPU where there is one, else of the process (Linux alone)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Forget what was; free memory goes back to the system first."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        trim_heap()
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # resets the high-water mark of the resident set

    def bytes(self) -> int | None:
        """None where it cannot be told."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
        except OSError:
            return None
        return int(found[1]) * 1024 if found else None


def process_peak_memory() -> int | None:
    """Most memory the process ever held, bytes; a subprocess such as ffmpeg is not part of it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
