"""Measurement of time and peak memory for the benchmarks."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from export3d_cli.core.runtime.device import trim_heap

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has finished its work; does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure(run: Callable[[], object], device: torch.device, *, repeats: int = 1) -> tuple[float, int | None]:
    """Return the median seconds of `run` and the peak memory in bytes: the GPU's, else the process's, None if unknown.

    The peak of the process is known on Linux only. Its high-water mark is reset before, for the whole process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        trim_heap()
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")  # resets VmHWM, the high-water mark of the resident set
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)), _peak_memory(device)


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        match = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def process_peak_memory() -> int | None:
    """Return the peak memory of this process in bytes, without subprocesses such as ffmpeg; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
