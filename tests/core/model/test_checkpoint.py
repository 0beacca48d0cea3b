"""Weights files and training states: round trips, strict loading, damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.model.checkpoint import load_into, load_state, load_weights, save_state, save_weights
from export3d_cli.core.runtime.errors import TrainingError, WeightsError


def test_weights_round_trip(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4), "expression.w": torch.randn(4, 4)}
    save_weights(tmp_path / "w.safetensors", state, PRESETS["tiny"], {"steps": 3})
    back, config, record = load_weights(tmp_path / "w.safetensors")
    assert config == PRESETS["tiny"]
    assert record == {"steps": 3}
    assert all(v.dtype == torch.float32 for v in back.values())
    assert torch.equal(back["a.weight"], state["a.weight"].half().float())  # matrices are stored as float16 ...
    assert torch.equal(back["a.bias"], state["a.bias"])  # ... vectors and the expression code as float32
    assert torch.equal(back["expression.w"], state["expression.w"])
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_load_weights_with_unusable_file_raises_weights_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        load_weights(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a weights file")
    with pytest.raises(WeightsError, match="not a readable"):
        load_weights(tmp_path / "bad.safetensors")
    save_state(tmp_path, {"x": torch.zeros(1)}, {})
    with pytest.raises(WeightsError, match="no export3d weights"):
        load_weights(tmp_path / "state.safetensors")


def test_files_of_earlier_versions_load_with_current_names(tmp_path: Path) -> None:
    old = {"painters.mouth.enter.weight": torch.ones(1), "superres.inside.textures": torch.ones(2)}
    save_weights(tmp_path / "w.safetensors", old, PRESETS["tiny"], {})
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        header = file.metadata()
    config = json.loads(header["config"])
    config["face_shift"] = config.pop("face_residual_ratio") + 0.25
    del config["plain_width"]  # added later
    save_file(old, tmp_path / "w.safetensors", metadata={**header, "config": json.dumps(config)})
    state, loaded, _ = load_weights(tmp_path / "w.safetensors")
    assert set(state) == {"inpainters.mouth.enter.weight", "superres.hidden_textures.textures"}
    assert loaded == replace(PRESETS["tiny"], face_residual_ratio=0.25)

    save_state(tmp_path, {f"model.{key}": value for key, value in old.items()}, {"step": 1})
    resumed = load_state(tmp_path)
    assert resumed is not None
    assert set(resumed[0]) == {f"model.{key}" for key in state}


def test_load_into_with_mismatched_state_names_the_tensors() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(WeightsError, match=r"lack .*bias.*add .*other.*reshape .*weight"):
        load_into(model, {"weight": torch.zeros(1, 1), "other": torch.zeros(1)})


def test_save_state_keeps_the_newest_states(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    for step in (1, 2, 3):
        save_state(tmp_path, {"x": torch.full((2,), float(step))}, {"step": step}, keep=2)
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded[1] == {"step": 3}
    assert loaded[0]["x"].tolist() == [3.0, 3.0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.1.safetensors", "state.json", "state.safetensors"]
    (tmp_path / "state.safetensors").write_bytes(b"cut off")
    with pytest.raises(TrainingError, match="damaged"):
        load_state(tmp_path)
