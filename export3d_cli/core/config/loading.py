"""Build validated configurations from YAML files, weights headers and `key=value` overrides, and write them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from export3d_cli.core.config.renamed_keys import check_key
from export3d_cli.core.config.schema import INPAINTERS, PRESETS, TRAINING_PRESETS, Count, ModelConfig, TrainConfig
from export3d_cli.core.config.validation import short_repr, validate_model_config, validate_train_config
from export3d_cli.core.runtime.errors import ConfigError, InputError
from export3d_cli.core.runtime.files import check_file

MAX_YAML_BYTES = 2**20


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
    current = {"face_residual_ratio" if key == "face_shift" else key: value for key, value in data.items()}
    model: ModelConfig = _build_dataclass(ModelConfig, current, "model")
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
        section[leaf] = _parse_yaml(value, f"override {override[:100]!r}")
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
    config: TrainConfig = _build_dataclass(TrainConfig, data, "")
    validate_train_config(config)
    return config


def load_train_config(path: Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML file with `yaml.safe_load`; see `make_train_config`."""
    return make_train_config(read_yaml(path), overrides)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raises `ConfigError`."""
    try:
        check_file(path, MAX_YAML_BYTES)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise ConfigError(f"cannot read configuration {path}: {error}") from error
    data = _parse_yaml(text, f"configuration {path}") or {}
    if not isinstance(data, dict):
        raise ConfigError(f"configuration {path} is not a mapping of keys to values")
    return data


def save_yaml(config: Any, path: Path) -> None:
    """Write a resolved configuration that `load_train_config` reads back unchanged."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def _parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text, of any content, to plain data; raises `ConfigError`."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, a number of 5000 digits
        raise ConfigError(f"cannot read {where}: {str(error)[:300]}") from error
    except RecursionError as error:
        raise ConfigError(f"cannot read {where}: it is nested too deeply") from error


def _build_dataclass(cls: type, data: dict[str, Any], where: str) -> Any:
    """Build the dataclass `cls` from plain data; restores nested dataclasses and tuples.

    Raises `ConfigError` on unknown keys, wrong types, and numbers that are negative or not finite (no configuration
    field has a meaning for them).
    """
    hints = get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{where}.{key}" if where and isinstance(key, str) else key
        if key not in hints:
            check_key(str(name))
            matches = difflib.get_close_matches(key, hints, n=1) if isinstance(key, str) and len(key) < 80 else []
            suggestion = f"; did you mean {matches[0]!r}?" if matches else ""
            raise ConfigError(f"unknown key {short_repr(name)} in the configuration{suggestion}")
        values[key] = _parse_value(value, hints[key], name)
    return cls(**values)


def _parse_value(value: Any, value_type: Any, name: str) -> Any:
    if value_type == Count:
        if (number := _parse_value(value, int, name)) < 1:
            raise ConfigError(f"{name} must be 1 or more, got {number}")
        return number
    if dataclasses.is_dataclass(value_type):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a section, got {short_repr(value)}")
        return _build_dataclass(value_type, value, name)  # type: ignore[arg-type]
    if get_origin(value_type) is tuple:
        types, items = get_args(value_type), value if isinstance(value, (list, tuple)) else [value]
        if types[-1] is not Ellipsis and len(items) != len(types):
            raise ConfigError(f"{name} must be {len(types)} values, got {short_repr(value)}")
        return tuple(_parse_value(item, types[0], name) for item in items)
    if get_origin(value_type) is Literal:
        choices = get_args(value_type)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {short_repr(value)}")
        return value
    if value_type is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-4 as text
    if type(value) is not value_type:
        raise ConfigError(f"{name} must be {value_type.__name__}, got {short_repr(value)}")
    if value_type in (int, float) and not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"{name} must be a number of 0 or more, got {short_repr(value)}")
    return value
