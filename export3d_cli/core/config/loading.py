"""Build validated configurations from YAML files, weights headers and `key=value` overrides, and write them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from export3d_cli.core.config.renamed_keys import rename_model_fields
from export3d_cli.core.config.schema import INPAINTERS, PRESETS, TRAINING_PRESETS, ModelConfig, TrainConfig
from export3d_cli.core.config.validation import validate_model_config, validate_train_config
from export3d_cli.core.config.yaml_loader import build_dataclass, parse_yaml, read_yaml, short_repr
from export3d_cli.core.runtime.errors import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain data that YAML and JSON can hold (tuples become lists)."""

    def to_plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: to_plain(v) for k, v in value.items()}
        return [to_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return to_plain(dataclasses.asdict(config))


def model_config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` of a weights header, the inverse of `to_dict`; accepts field names of earlier versions.

    Raises `ConfigError` on unknown keys, wrong types and impossible sizes: the header may come from anyone.
    """
    if not isinstance(data, dict):
        raise ConfigError("the model's configuration is not a mapping of keys to values")
    model: ModelConfig = build_dataclass(ModelConfig, rename_model_fields(data), "model")
    validate_model_config(model)
    return model


def make_train_config(data: dict[str, Any], overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Return the validated configuration: dataclass defaults < preset < `data` (YAML) < `key=value` overrides."""
    data = {k: dict(v) if isinstance(v, dict) else v for k, v in data.items()}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        *parents, leaf = key.split(".")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"override {key!r}: {parent!r} is not a section")
        section[leaf] = parse_yaml(value, f"override {override[:100]!r}")
    preset = data.get("preset", TrainConfig.preset)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"preset {short_repr(preset)} is unknown: choose one of {', '.join(PRESETS)}")
    for key, value in TRAINING_PRESETS.get(preset, {}).items():
        if key not in data:
            data[key] = value
        elif isinstance(value, dict) and isinstance(data[key], dict):
            data[key] = {**value, **data[key]}
    model = data.get("model") or {}
    if not isinstance(model, dict):
        raise ConfigError("model must be a section of the configuration")
    # an inpainter that is neither trained nor loaded would paint noise
    stages = data.get("stages", TrainConfig.stages)
    trained = INPAINTERS if data.get("init") or not isinstance(stages, (list, tuple)) else stages
    without_untrained = {name: 0 for name in INPAINTERS if name not in trained}
    data["model"] = {**to_dict(PRESETS[preset]), **without_untrained, **model}
    config: TrainConfig = build_dataclass(TrainConfig, data, "")
    validate_train_config(config)
    return config


def load_train_config(path: Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML file with `yaml.safe_load`; see `make_train_config`."""
    return make_train_config(read_yaml(path), overrides)


def save_yaml(config: Any, path: Path) -> None:
    """Write a resolved configuration that `load_train_config` reads back unchanged."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
