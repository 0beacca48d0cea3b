"""YAML to plain data to frozen dataclasses, checked against their types. The input may be anything, of any size."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import reprlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from export3d_cli.core.config.renamed_keys import check_key
from export3d_cli.core.runtime.errors import ConfigError, InputError
from export3d_cli.core.runtime.files import check_file

MAX_YAML_BYTES = 2**20
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 80


def short_repr(value: Any) -> str:
    """Return a short repr for an error message (a few lines of YAML can expand to gigabytes of text)."""
    return _REPR.repr(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raises `ConfigError`."""
    try:
        check_file(path, MAX_YAML_BYTES)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise ConfigError(f"cannot read configuration {path}: {error}") from error
    data = parse_yaml(text, f"configuration {path}") or {}
    if not isinstance(data, dict):
        raise ConfigError(f"configuration {path} is not a mapping of keys to values")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text to plain data; raises `ConfigError`."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, a number of 5000 digits
        raise ConfigError(f"cannot read {where}: {str(error)[:300]}") from error
    except RecursionError as error:
        raise ConfigError(f"cannot read {where}: it is nested too deeply") from error


def build_dataclass(cls: type, data: dict[str, Any], where: str) -> Any:
    """Build the dataclass `cls` from plain data; restores nested dataclasses and tuples.

    Raises `ConfigError` on unknown keys, wrong types, and numbers that are negative or not finite (no configuration
    field has a meaning for them).
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{where}.{key}" if where and isinstance(key, str) else key
        if key not in fields:
            if isinstance(name, str):
                check_key(name)
            matches = difflib.get_close_matches(key, fields, n=1) if isinstance(key, str) and len(key) < 80 else []
            hint = f"; did you mean {matches[0]!r}?" if matches else ""
            raise ConfigError(f"unknown key {short_repr(name)} in the configuration{hint}")
        type_hint = hints[key]
        if dataclasses.is_dataclass(type_hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} must be a section, got {short_repr(value)}")
            values[key] = build_dataclass(type_hint, value, name)  # type: ignore[arg-type]
        elif get_origin(type_hint) is tuple:
            values[key] = _parse_tuple(value, get_args(type_hint), name)
        else:
            values[key] = _parse_value(value, type_hint, name)
    return cls(**values)


def _parse_tuple(value: Any, types: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    if types[-1] is not Ellipsis and len(items) != len(types):
        raise ConfigError(f"{name} must be {len(types)} values, got {short_repr(value)}")
    return tuple(_parse_value(item, types[0], name) for item in items)


def _parse_value(value: Any, value_type: Any, name: str) -> Any:
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
