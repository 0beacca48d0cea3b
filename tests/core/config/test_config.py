"""Configuration: precedence of its layers, YAML round trips, and errors that name the key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from export3d_cli.core.config.loading import (
    load_train_config,
    make_train_config,
    model_config_from_dict,
    save_yaml,
    to_dict,
)
from export3d_cli.core.config.renamed import RENAMED_KEYS, RENAMED_MODEL_FIELDS
from export3d_cli.core.config.schema import PRESETS, TrainConfig
from export3d_cli.core.model.checkpoint import load_weights
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.runtime.weights import resolve_weights

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "configs"


def test_make_train_config_overrides_beat_file_beats_preset() -> None:
    config = make_train_config(
        {"preset": "tiny", "model": {"width": 64}, "lr": "1e-3"}, ("model.width=96", "clebs.steps=5")
    )
    assert config.model == dataclasses.replace(PRESETS["tiny"], width=96)
    assert (config.lr, config.clebs.steps) == (1e-3, 5)


def test_save_yaml_round_trip(tmp_path: Path) -> None:
    config = make_train_config({"preset": "paper", "data": {"path": ["a", "b"], "weight": [1, 2]}, "stages": ["clebs"]})
    save_yaml(config, tmp_path / "config.yaml")
    assert load_train_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", PRESETS)
def test_model_config_round_trip(name: str) -> None:
    assert model_config_from_dict(to_dict(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_example_configs_load(path: Path) -> None:
    load_train_config(path)


def test_finetune_example_has_the_model_of_its_initial_weights() -> None:
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
        ({"batch": 0}, "batch must be 1 or more, got 0"),
        ({"adversarial": {"r1_interval": 0}}, r"adversarial\.r1_interval must be 1 or more, got 0"),
        ({"model": {"heads": 5}}, "divisible by model.heads"),
        ({"model": {"basis": 1000}}, "cannot exceed model.code_dim"),
        ({"stages": ["finetune"]}, "unknown stage 'finetune'"),
        ({"data": {"path": ["a"], "weight": [1, 2]}}, r"one number per data\.path"),
        ({"data": {"path": ["a"]}, "clebs": {"weight": [1, 2]}}, r"clebs\.weight needs one number per data\.path"),
        ({"data": {"path": ["a"]}, "clebs": {"weight": [0]}}, r"clebs\.weight needs .* not all 0, got \(0"),
        ({"data": 3}, "data must be a section"),
        ({"stages": ["clebs", "steady"]}, "the stage steady is now pose_debias"),
        ({"steady": {"steps": 3}}, "the configuration key steady is now pose_debias"),
    ],
)
def test_make_train_config_names_the_wrong_key(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_train_config(data)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_renamed_key_is_refused_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=rf"^the configuration key {old} is now {new}: rename it$"):
        make_train_config({}, (f"{old}=1",))
    field: object = TrainConfig()
    for part in new.split("."):
        field = getattr(field, part)  # the new key exists


def test_removed_key_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"^the configuration key adversarial\.ada was removed, .*: delete it$"):
        make_train_config({"adversarial": {"ada": 0.6}})


def test_model_config_accepts_field_names_of_earlier_versions() -> None:
    header = to_dict(PRESETS["compact"])
    for old, new in RENAMED_MODEL_FIELDS.items():
        header[old] = header.pop(new)
    assert model_config_from_dict(header) == PRESETS["compact"]


def test_load_train_config_refuses_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_train_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_train_config(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="key=value"):
        make_train_config({}, ("steps",))
