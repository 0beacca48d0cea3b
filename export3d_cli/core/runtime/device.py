"""Where, how precisely and how much at once to compute: devices by name, bfloat16 where it is fast, what fits."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.runtime.errors import ConfigError

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA when usable, else the CPU; raises `ConfigError` for a device that is unknown or not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown: use auto, cpu, cuda, cuda:N or mps") from error
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(device.type, False):
        raise ConfigError(f"device {name!r} is not usable on this machine: use auto or cpu")
    return device


def tracking_thread_count(device: torch.device) -> int:
    """How many threads look for the face in a frame: beside a GPU the processor has little else to do."""
    return 1 if device.type == "cpu" else min(4, max(1, torch.get_num_threads() // 2))


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 makes the device faster: CUDA, and CPUs that multiply it natively."""
    if device.type != "cpu":
        return device.type == "cuda"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it, else fp16 on CUDA and fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if has_fast_bf16(device) else "fp32"


def precision_notes(name: str, device: torch.device) -> list[str]:
    """What to tell whoever asks a CPU for half precision that it cannot multiply: there it is many times slower."""
    if name == "fp32" or device.type != "cpu" or (name == "bf16" and has_fast_bf16(device)):
        return []
    return [f"{name} is much slower than fp32 on this CPU: auto takes what is fast"]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Compute in bf16 or fp16; fp32: as it is, and not in TF32 on CUDA."""
    kind = HALF_DTYPES.get(precision)
    if kind is None and device.type == "cuda":
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return contextlib.nullcontext() if kind is None else torch.autocast(device.type, dtype=kind)


def tune_malloc() -> None:
    """Have the process keep freed memory for its next large array, where its C library is glibc.

    Without it every array of a frame is mapped, zeroed and given back: a quarter of the time on a CPU.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        tune = ctypes.CDLL(None).mallopt
        tune(-3, 32 << 20)  # M_MMAP_THRESHOLD, its largest value
        tune(-1, 256 << 20)  # M_TRIM_THRESHOLD


def trim_heap() -> None:
    """Return what is free to the system, where the C library is glibc: over hours its heap frays, and grows."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cast_weights(module: torch.nn.Module, precision: str) -> dict[str, Tensor]:
    """Keep weights of convolutions and linear layers as a CPU multiplies them, instead of casting them each time.

    Returns those in fp32, for `widen`.
    """
    kept: dict[str, Tensor] = {}
    kind = HALF_DTYPES.get(precision)
    for name, part in module.named_modules():
        if kind is None or not isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            continue
        for own, parameter in part.named_parameters(recurse=False):
            if parameter.device.type == "cpu":
                kept[f"{name}.{own}"] = full = parameter.data
                layout = torch.channels_last if full.ndim == 4 else torch.preserve_format
                parameter.data = full.to(kind, memory_format=layout)
    return kept


def restore_fp32(module: torch.nn.Module, fp32_weights: dict[str, Tensor]) -> None:
    """Undo `narrow`."""
    for name, full in fp32_weights.items():
        module.get_parameter(name).data = full


class AdaptiveBatcher:
    """Makes pictures as many at once as memory allows: where it runs out, half as many from then on."""

    def __init__(self) -> None:
        self.max_batch = 2**30  # at once, as far as is known

    def __call__(self, compute: Callable[[slice], np.ndarray], start: int, stop: int) -> Iterator[np.ndarray]:
        """`make(slice)` for all of start to stop, in order; raises what it raises where one alone does not fit."""
        made = None
        if stop - start <= self.max_batch:
            try:
                made = compute(slice(start, stop))
            except RuntimeError as error:
                if stop - start == 1 or not _is_out_of_memory(error):
                    raise
                self.max_batch = (stop - start) // 2
        if made is not None:
            yield from made
            return
        middle = start + max(1, min(self.max_batch, (stop - start) // 2))
        yield from self(compute, start, middle)
        yield from self(compute, middle, stop)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of the GPU, or of the machine."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
