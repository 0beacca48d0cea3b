"""Build validated configurations from YAML files, weights headers and `key=value` overrides, and write them.

All rules are checked before any data or device is touched.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from export3d_cli.core.config import schema
from export3d_cli.core.config.schema import INPAINTERS, PRESETS, STAGES, Count, ModelConfig, TrainConfig
from export3d_cli.core.runtime.errors import ConfigError, InputError
from export3d_cli.core.runtime.files import check_file

MAX_YAML_BYTES = 2**20
_DEFAULT_MAX = 65_536
_MAX_SIZES = {"image_size": 2048, "plane_size": 2048, "raw_size": 2048, "mesh_size": 2048, "flow_size": 2048}
_MAX_SIZES |= {"eadaln_blocks": 1000, "plain_blocks": 1000, "coarse_samples": 4096, "fine_samples": 4096}
_MAY_BE_ZERO = ("eadaln_blocks", "plain_blocks", "plain_width", "fine_samples", *INPAINTERS)
_REPR = reprlib.Repr()  # a few lines of YAML can expand to gigabytes of text
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 80


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain data that YAML and JSON can hold (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def model_config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` of a weights header, the inverse of `to_dict`; accepts field names of earlier versions.

    Raises `ConfigError` on unknown keys, wrong types and impossible sizes: the header may come from anyone.
    """
    if not isinstance(data, dict):
        raise ConfigError("the model's configuration is not a mapping of keys to values")
    current = {"face_residual_ratio" if key == "face_shift" else key: value for key, value in data.items()}
    model: ModelConfig = _build_dataclass(ModelConfig, current, "model")
    _check_model(model)
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
        raise ConfigError(f"preset {_REPR.repr(preset)} is unknown: choose one of {', '.join(PRESETS)}")
    for key, value in schema.TRAINING_PRESETS.get(preset, {}).items():
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
    _check_training(config)
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
    """Build the dataclass `cls`, with nested dataclasses and tuples, from plain data.

    Raises `ConfigError` for unknown keys, wrong types, and numbers that are negative or not finite.
    """
    hints = get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{where}.{key}" if where and isinstance(key, str) else key
        if key not in hints:
            matches = difflib.get_close_matches(key, hints, n=1) if isinstance(key, str) and len(key) < 80 else []
            suggestion = f"; did you mean {matches[0]!r}?" if matches else ""
            raise ConfigError(f"unknown key {_REPR.repr(name)} in the configuration{suggestion}")
        values[key] = _parse_value(value, hints[key], name)
    return cls(**values)


def _parse_value(value: Any, value_type: Any, name: str) -> Any:
    if value_type == Count:
        if (number := _parse_value(value, int, name)) < 1:
            raise ConfigError(f"{name} must be 1 or more, got {number}")
        return number
    if dataclasses.is_dataclass(value_type):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a section, got {_REPR.repr(value)}")
        return _build_dataclass(value_type, value, name)  # type: ignore[arg-type]
    if get_origin(value_type) is tuple:
        types, items = get_args(value_type), value if isinstance(value, (list, tuple)) else [value]
        if types[-1] is not Ellipsis and len(items) != len(types):
            raise ConfigError(f"{name} must be {len(types)} values, got {_REPR.repr(value)}")
        return tuple(_parse_value(item, types[0], name) for item in items)
    if get_origin(value_type) is Literal:
        choices = get_args(value_type)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {_REPR.repr(value)}")
        return value
    if value_type is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-4 as text
    if type(value) is not value_type:
        raise ConfigError(f"{name} must be {value_type.__name__}, got {_REPR.repr(value)}")
    if value_type in (int, float) and not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"{name} must be a number of 0 or more, got {_REPR.repr(value)}")
    return value


def _check_model(model: ModelConfig) -> None:
    """Raise `ConfigError` for sizes that no network can have; the header of a weights file is not to be trusted."""
    for name, value in vars(model).items():
        minimum, maximum = 0 if name in _MAY_BE_ZERO else 1, _MAX_SIZES.get(name, _DEFAULT_MAX)
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and not minimum <= size <= maximum:
                raise ConfigError(f"model.{name} must be {minimum} to {maximum}, got {_REPR.repr(value)}")
    plain_width = model.plain_width or model.width // 2
    _check_rules(
        (model.image_size % 16 == 0, f"model.image_size must be a multiple of 16, got {model.image_size}"),
        (model.width % model.heads == 0,
         f"model.width ({model.width}) must be divisible by model.heads ({model.heads})"),
        (not model.plain_blocks or plain_width % model.heads == 0,
         f"model.plain_width ({plain_width}; 0: model.width / 2) must be divisible by model.heads ({model.heads})"),
        (model.basis <= model.code_dim,
         f"model.basis ({model.basis}) cannot exceed model.code_dim ({model.code_dim})"),
        (model.motion == "landmarks" or (model.plane_size >= 16 and model.plane_size % 8 == 0),
         f"model.motion planedict needs model.plane_size 16 or more, a multiple of 8, got {model.plane_size}"),
        (model.plane_ema < 1, f"model.plane_ema must be below 1, got {model.plane_ema}"),
        *((0 < (value := getattr(model, name)) <= 1000, f"model.{name} must be above 0 and at most 1000, got {value}")
          for name in ("expression_gain", "surface_density")),
    )  # fmt: skip


def _check_training(config: TrainConfig) -> None:
    """Raise `ConfigError` for the first broken rule between fields, with the key and what to set."""
    model, loss, clebs, stages, rays = config.model, config.loss, config.clebs, config.stages, config.raw_rays
    _check_model(model)
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"unknown stage {_REPR.repr(stage)}: choose from {', '.join(STAGES)}")
    raw_size = config.raw_size_start or model.raw_size
    weights = {
        name: getattr(config, name).weight for name in ("data", "clebs", *INPAINTERS, "planedict", "pose_debias")
    }
    _check_rules(
        (re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", config.device),
         f"device {_REPR.repr(config.device)} is unknown: use auto, cpu, cuda, cuda:N or mps"),
        (config.ema < 1, f"ema must be below 1, got {config.ema}"),
        (config.batch % config.accumulate == 0,
         f"batch ({config.batch}) must be a multiple of accumulate ({config.accumulate})"),
        (config.raw_size_start <= model.raw_size,
         f"raw_size_start ({config.raw_size_start}) must be 0 to model.raw_size ({model.raw_size})"),
        (not rays or (model.flow and rays <= raw_size**2),
         f"raw_rays ({rays}) must be 0 to {raw_size**2}, the raw render's pixels; needs model.flow"),
        (not rays or "adversarial" not in stages,
         "raw_rays trains the volume alone: set it to 0 for the stage adversarial, in a second run"),
        (list(stages) == [stage for stage in STAGES if stage in stages],
         f"stages must be in the order {', '.join(STAGES)}, each at most once"),
        *((stage not in stages or (getattr(model, stage) and model.flow),
           f"the stage {stage} needs model.{stage}, the width of its network, and model.flow") for stage in INPAINTERS),
        *((not getattr(model, stage) or stage in stages or config.init,
           f"model.{stage} is trained by the stage {stage}: add the stage, or set init to trained weights, or "
           f"model.{stage} to 0") for stage in INPAINTERS),
        (("planedict" not in stages and not loss.disentangle) or model.motion == "planedict",
         "the stage planedict and loss.disentangle need model.motion planedict"),
        (model.motion == "landmarks" or "planedict" in stages or config.init,
         "model.motion planedict is trained by the stage planedict: add the stage, or set init to trained weights"),
        (not {"planedict", "reconstruction"} <= {*stages} or loss.disentangle,
         "the stage reconstruction after planedict needs loss.disentangle: without it the planes are not trained"),
        (not rays or not loss.disentangle, "raw_rays gives no images for loss.disentangle: set one of them to 0"),
        (not loss.disentangle or config.batch // config.accumulate >= 2,
         "loss.disentangle swaps drivers within a batch: set batch to at least 2 times accumulate"),
        ("sampler" not in stages or len(stages) == 1, "the stage sampler must be the only one of its run"),
        ("pose_debias" not in stages or model.flow,
         "the stage pose_debias needs model.flow: it changes the basis flow"),
        (stages != ("pose_debias",) or config.init,
         "the stage pose_debias needs trained weights: set init, or add stages"),
        *((not weight or (len(weight) == len(config.data.path) and any(weight)),
           f"{name}.weight needs one number per data.path, not all 0, got {weight}")
          for name, weight in weights.items()),
        (clebs.temperature > 0, f"clebs.temperature must be positive, got {clebs.temperature}"),
        (clebs.antisymmetric_dims <= model.basis,
         f"clebs.antisymmetric_dims must be 0 to {model.basis} (model.basis), got {clebs.antisymmetric_dims}"),
        (not loss.depth or model.flow, f"loss.depth ({loss.depth}) needs model.flow, which finds the head"),
        (not loss.lpips or loss.backbone,
         "loss.lpips needs loss.backbone: set it to the VGG16 file that the linear weights belong to"),
        (not loss.lpips or raw_size >= 16,
         "loss.lpips needs a raw render of 16 pixels or more: set raw_size_start to 16, or 0"),
        (model.image_size >> (loss.perceptual_scales - 1) >= 16,
         f"loss.perceptual_scales ({loss.perceptual_scales}) must leave 16 pixels of {model.image_size}"),
    )  # fmt: skip


def _check_rules(*rules: tuple[object, str]) -> None:
    """Raise `ConfigError` with the message of the first rule, (whether it holds, message), that does not hold."""
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)
