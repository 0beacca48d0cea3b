"""Configurations: layers of precedence, YAML there and back, and mistakes named before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from export3d_cli.core.config.schema import (
    PRESETS,
    load_train_config,
    make_train_config,
    model_config_from_dict,
    save_yaml,
    to_dict,
)
from export3d_cli.core.model.checkpoint import load_weights
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.runtime.weights import resolve_weights

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "configs"


def test_overrides_beat_the_file_beats_the_preset() -> None:
    config = make_train_config(
        {"preset": "tiny", "model": {"width": 64}, "lr": "1e-3"}, ("model.width=96", "clebs.steps=5")
    )
    assert config.model == dataclasses.replace(PRESETS["tiny"], width=96)
    assert (config.lr, config.clebs.steps) == (1e-3, 5)


def test_yaml_there_and_back(tmp_path: Path) -> None:
    config = make_train_config({"preset": "paper", "data": {"path": ["a", "b"], "weight": [1, 2]}, "stages": ["clebs"]})
    save_yaml(config, tmp_path / "config.yaml")
    assert load_train_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", PRESETS)
def test_model_there_and_back(name: str) -> None:
    assert model_config_from_dict(to_dict(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_examples_load(path: Path) -> None:
    load_train_config(path)


def test_the_example_that_goes_on_from_weights_has_their_model() -> None:
    config = load_train_config(EXAMPLES / "finetune.yaml")
    _, model, _ = load_weights(resolve_weights(config.init))
    assert config.model == model


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"leraning_rate": 1}, "unknown key 'leraning_rate'"),
        ({"clebs": {"step": 1}}, r"unknown key 'clebs\.step'.*did you mean 'steps'"),
        ({"preset": "huge"}, "preset 'huge' is unknown: choose one of tiny"),
        ({"batch": "many"}, "batch must be int, got 'many'"),
        ({"batch": 0}, "batch must be positive"),
        ({"model": {"heads": 5}}, "divisible by model.heads"),
        ({"model": {"basis": 1000}}, "cannot exceed model.code_dim"),
        ({"stages": ["finetune"]}, "unknown stage 'finetune'"),
        ({"data": {"path": ["a"], "weight": [1, 2]}}, r"one number per data\.path"),
        ({"data": {"path": ["a"]}, "clebs": {"weight": [1, 2]}}, r"clebs\.weight needs one number per data\.path"),
        ({"data": {"path": ["a"]}, "clebs": {"weight": [0]}}, r"clebs\.weight needs .* not all 0, got \(0"),
        ({"data": 3}, "data must be a section"),
    ],
)
def test_mistakes_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_train_config(data)


def test_broken_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_train_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_train_config(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="key=value"):
        make_train_config({}, ("steps",))
