"""Weights files and training states: safetensors and JSON, never pickle; written to a temporary file, then renamed."""

import itertools
import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from export3d_cli.core.config.loading import model_config_from_dict, to_dict
from export3d_cli.core.config.schema import INPAINTERS, ModelConfig
from export3d_cli.core.runtime.errors import ConfigError, Export3DError, TrainingError, WeightsError
from export3d_cli.core.runtime.files import write_atomic, write_text

FORMAT = "export3d-1"
# Prefixes of state-dict keys in files of earlier versions, old: new.
RENAMED_KEYS = {"painters.": "inpainters.", "superres.inside.": "superres.hidden_textures."}
KEEP_FP32 = ("expression.", "flow.basis")  # small, and the geometry of every frame depends on them


def save_weights(path: Path | str, state: dict[str, Tensor], config: ModelConfig, record: dict[str, Any], *,
                 half: bool = True, licence: str = "") -> None:  # fmt: skip
    """Write a weights file atomically; its header holds the model's config, the training record and the licence.

    With `half`, matrices and kernels are stored as float16; vectors (biases, norms) and `KEEP_FP32` stay float32.
    """

    def to_stored(name: str, value: Tensor) -> Tensor:
        as_half = half and value.is_floating_point() and value.ndim > 1 and not name.startswith(KEEP_FP32)
        return value.detach().cpu().to(torch.float16 if as_half else value.dtype).contiguous().clone()

    header = {"format": FORMAT, "config": json.dumps(to_dict(config)), "record": json.dumps(record), "licence": licence}
    write_tensors(Path(path), {name: to_stored(name, value) for name, value in state.items()}, header)


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], ModelConfig, dict[str, Any]]:
    """Read a weights file: tensors (floating-point as float32, on the CPU), the model config, the training record."""
    path = Path(path)
    state, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise WeightsError(f"{path} holds no export3d weights: format is {header.get('format')!r}, not {FORMAT!r}")
    try:
        config = model_config_from_dict(json.loads(header["config"]))
        record = json.loads(header["record"])
    except (KeyError, ValueError, TypeError, RecursionError, ConfigError) as error:
        raise WeightsError(f"the header of {path} cannot be read: {error}; is it from a newer version?") from error
    state = {k: v.float() if v.is_floating_point() else v for k, v in _rename_old_keys(state).items()}
    if not all(bool(v.isfinite().all()) for v in state.values()):
        raise WeightsError(f"{path} contains values that are not finite: it is damaged, or its training diverged")
    return state, config, record


def _rename_old_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of earlier versions; `model.` and other prefixes of training states are kept."""

    def current(key: str) -> str:
        for old, new in RENAMED_KEYS.items():
            key = re.sub(rf"^(\w+\.)?{re.escape(old)}", rf"\g<1>{new}", key)
        return key

    return {current(key): value for key, value in tensors.items()}


def read_licence(path: Path | str) -> str:
    """Return the licence in the header of a weights file."""
    return str(read_tensors(Path(path))[1].get("licence", ""))


def check_header_size(config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Raise `WeightsError` if the header describes a far larger network than the file holds, before it is built."""
    stored = sum(value.numel() for value in state.values())
    blocks = config.eadaln_blocks + config.plain_blocks
    sides: tuple[int, ...] = (config.code_dim, config.code_hidden, config.plane_channels, config.plane_size)
    sides += (config.plain_width, config.plane_width, config.decoder_hidden, config.raw_channels, config.flow_width)
    sides += (*(getattr(config, name) for name in INPAINTERS), *config.stem, *config.superres)
    if max(blocks, 1) * config.width**2 > stored or max(sides) ** 2 > 4 * stored:
        raise WeightsError("the weights are damaged: their header describes a larger network than the file holds")


def load_into(model: nn.Module, state: dict[str, Tensor], origin: str = "the weights") -> None:
    """Load `state` into `model`; raise `WeightsError` unless every name and shape matches."""
    expected = model.state_dict()
    reshaped = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    mismatches = {"lack": expected.keys() - state.keys(), "add": state.keys() - expected.keys(), "reshape": reshaped}
    if any(mismatches.values()):
        parts = [f"{verb} {sorted(names)[:3]}" for verb, names in mismatches.items() if names]
        raise WeightsError(f"{origin} do not match this model, they {', '.join(parts)}: they may be from another "
                           "version. Train again or use the weights shipped with this version")  # fmt: skip
    model.load_state_dict(state, strict=True)


def save_state(folder: Path, tensors: dict[str, Tensor], info: dict[str, Any], *, keep: int = 1) -> None:
    """Write everything needed to resume: `state.safetensors`, with `info` in its header, and a readable `state.json`.

    The last `keep` states stay: the previous one is `state.1.safetensors`, and so on.
    """
    states = [folder / "state.safetensors", *(folder / f"state.{age}.safetensors" for age in range(1, keep))]
    for younger, older in reversed([*itertools.pairwise(states)]):
        if younger.exists():  # linked, not renamed: a newest state must exist at every moment
            older.unlink(missing_ok=True)
            try:
                os.link(younger, older)
            except OSError:
                shutil.copyfile(younger, older)
    cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_tensors(states[0], cpu, {"format": "export3d-state-1", "info": json.dumps(info)})
    write_text(folder / "state.json", json.dumps(info, indent=1) + "\n")


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the newest training state of a run folder, or None if there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    try:
        tensors, header = read_tensors(path)
        return _rename_old_keys(tensors), json.loads(header["info"])
    except (WeightsError, KeyError, ValueError) as error:
        raise TrainingError(f"training state {path} is damaged ({error}); "
                            "rename state.1.safetensors to it, or remove it to start again") from error  # fmt: skip


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments and counters of an optimizer as a flat dict of tensors, for `save_state`."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": torch.as_tensor(v) for i, values in state.items() for key, v in values.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `pack_optimizer` returned; the optimizer keeps its own learning rate."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            if value.shape == parameters[int(index)].shape:  # fused optimizers need the parameter's memory layout
                value = torch.empty_like(parameters[int(index)], device="cpu").copy_(value)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file atomically; equal contents give equal bytes."""
    with write_atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors writes a file that only its owner can read
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:
            raise Export3DError(f"cannot write {path} ({error}): free some space or choose another path") from error
        _sort_header(temporary)
        temporary.chmod(mode)


def _sort_header(path: Path) -> None:
    """Sort the header's entries: safetensors shuffles them, and the same training must give the same bytes."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the header of a safetensors file, on the CPU; raises `WeightsError`."""
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {str(error)[:200]}") from error
