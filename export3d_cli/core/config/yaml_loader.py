"""YAML -> plain data -> frozen dataclasses, by their types. What comes in may be anything, and of any size."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import reprlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from export3d_cli.core.runtime.errors import ConfigError, InputError
from export3d_cli.core.runtime.files import check_file

MAX_YAML_BYTES = 2**20  # of a YAML file
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 80


def short_repr(value: Any) -> str:
    """A value in an error message: short, whatever it is (a few lines of YAML can make gigabytes of text)."""
    return _REPR.repr(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; raises `ConfigError`."""
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
    """The plain data in a YAML text; raises `ConfigError`."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, a number of 5000 digits
        raise ConfigError(f"cannot read {where}: {str(error)[:300]}") from error
    except RecursionError as error:
        raise ConfigError(f"cannot read {where}: it is nested too deep") from error


def build_dataclass(cls: type, data: dict[str, Any], where: str) -> Any:
    """Dataclass `cls` from plain data: nested, tuples restored, unknown keys and wrong types refused.

    Numbers have to be finite and not negative: no field of a configuration means anything else.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in fields:
            name = f"{where}.{key}" if where and isinstance(key, str) else key
            near = difflib.get_close_matches(key, fields, n=1) if isinstance(key, str) and len(key) < 80 else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown key {short_repr(name)} in the configuration{hint}")
        name = f"{where}.{key}" if where else key
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} must be a section, got {short_repr(value)}")
            values[key] = build_dataclass(hint, value, name)  # type: ignore[arg-type]
        elif get_origin(hint) is tuple:
            values[key] = _parse_tuple(value, get_args(hint), name)
        else:
            values[key] = _parse_value(value, hint, name)
    return cls(**values)


def _parse_tuple(value: Any, kinds: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    if kinds[-1] is not Ellipsis and len(items) != len(kinds):
        raise ConfigError(f"{name} must be {len(kinds)} values, got {short_repr(value)}")
    return tuple(_parse_value(item, kinds[0], name) for item in items)


def _parse_value(value: Any, kind: Any, name: str) -> Any:
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {short_repr(value)}")
        return value
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-4 as text
    if type(value) is not kind:
        raise ConfigError(f"{name} must be {kind.__name__}, got {short_repr(value)}")
    if kind in (int, float) and not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"{name} must be a number of 0 or more, got {short_repr(value)}")
    return value
