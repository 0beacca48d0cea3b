"""Device, numerical precision and memory use of PyTorch computations."""

import contextlib
import copy
import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import cv2
import torch

from export3d_cli.core.runtime.errors import ConfigError

Model = TypeVar("Model", bound=torch.nn.Module)
_OUT_OF_MEMORY = "out of memory|can't allocate memory|could not create a primitive"  # messages of torch and oneDNN
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return the device; `auto`: CUDA if available, else the CPU. Raise `ConfigError` for an unusable device."""
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


@contextlib.contextmanager
def torch_state(*, threads: int = 0, seed: int | None = None, device: torch.device | None = None) -> Iterator[None]:
    """Set the threads of PyTorch and OpenCV (0: unchanged) and PyTorch's seed, for CPU and `device`, in the block."""
    cuda_devices = [device] if device is not None and device.type == "cuda" else []
    previous_threads = torch.get_num_threads(), cv2.getNumThreads()
    with torch.random.fork_rng(cuda_devices, enabled=seed is not None):
        try:
            if seed is not None:
                torch.manual_seed(seed)
            if threads:
                torch.set_num_threads(threads)
                cv2.setNumThreads(threads)
            yield
        finally:
            if threads:
                torch.set_num_threads(previous_threads[0])
                cv2.setNumThreads(previous_threads[1])


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 speeds up the device: CUDA, and CPUs with native bfloat16 multiplication."""
    if device.type != "cpu":
        return device.type == "cuda"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def pick_precision(name: str, device: torch.device) -> str:
    """Return the precision; `auto`: bf16 if the hardware multiplies it natively, else fp16 on CUDA, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if has_fast_bf16(device) else "fp32"


def precision_notes(name: str, device: torch.device) -> list[str]:
    """Return a warning if the CPU lacks native arithmetic of this precision, which makes it many times slower."""
    if name == "fp32" or device.type != "cpu" or (name == "bf16" and has_fast_bf16(device)):
        return []
    return [f"{name} is much slower than fp32 on this CPU: use --precision auto"]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return a context that computes in bf16 or fp16, or changes nothing for fp32."""
    dtype = HALF_DTYPES.get(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def tune_malloc() -> None:
    """Let glibc reuse freed memory for large arrays, by any thread: mapping it again takes a quarter of the time."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        tune = ctypes.CDLL(None).mallopt
        tune(-3, 32 << 20)  # M_MMAP_THRESHOLD, its largest value
        tune(-1, 256 << 20)  # M_TRIM_THRESHOLD
        tune(-8, 2)  # M_ARENA_MAX


def trim_heap() -> None:
    """Return free heap memory to the system (glibc only): over hours, fragmentation makes the heap grow."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int | None:
    """Return the peak memory of this process in bytes; None: unknown on this system."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def copy_for_inference(model: Model, device: torch.device) -> Model:
    """Return a copy of a model on `device`, in eval mode; tensors that are already there are shared, not copied."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers()) if x.device == device}
    return copy.deepcopy(model, shared).to(device).eval()


def cast_weights(module: torch.nn.Module, precision: str) -> None:
    """Cast convolutions and linear layers on a CPU to half precision once, by new tensors; fp32 does nothing."""
    dtype = HALF_DTYPES.get(precision)
    for part in module.modules():
        if dtype is None or not isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            continue
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.device.type == "cpu":
                layout = torch.channels_last if parameter.ndim == 4 else torch.preserve_format
                setattr(part, name, torch.nn.Parameter(parameter.detach().to(dtype, memory_format=layout), False))


class AdaptiveBatcher:
    """Computes in batches and halves the batch size, for good, each time memory runs out."""

    def __init__(self) -> None:
        self.max_batch = 2**30  # largest size that may fit

    def __call__(self, compute: Callable[[slice], Iterable[Any]], start: int, stop: int) -> Iterator[Any]:
        """Yield the rows of `compute(slice)` from start to stop; raise its error if a single row does not fit."""
        while start < stop:
            end = min(stop, start + self.max_batch)
            try:
                rows = compute(slice(start, end))
            except RuntimeError as error:
                if end - start == 1 or not re.search(_OUT_OF_MEMORY, str(error)):
                    raise
                self.max_batch = (end - start) // 2
                continue
            yield from rows
            start = end
