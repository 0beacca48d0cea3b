"""Where and how precisely to compute: devices by name, and whether bfloat16 is fast there."""

from __future__ import annotations

import torch

from export3d_cli.core.errors import ConfigError


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


def fast_bf16(device: torch.device) -> bool:
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
    return "bf16" if fast_bf16(device) else "fp32"
