"""Rules between the fields of a configuration, checked before any data or device is touched.

Types, unknown keys and numbers below 0 or 1 are refused earlier, by `loading`.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

from export3d_cli.core.config.renamed_keys import check_key
from export3d_cli.core.config.schema import INPAINTERS, STAGES, ModelConfig, TrainConfig
from export3d_cli.core.runtime.errors import ConfigError

_DEFAULT_MAX = 65_536
_MAX_SIZES = {"image_size": 2048, "plane_size": 2048, "raw_size": 2048, "mesh_size": 2048, "flow_size": 2048}
_MAX_SIZES |= {"eadaln_blocks": 1000, "plain_blocks": 1000, "coarse_samples": 4096, "fine_samples": 4096}
_MAY_BE_ZERO = ("eadaln_blocks", "plain_blocks", "plain_width", "fine_samples", *INPAINTERS)
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 80, 80, 80


def short_repr(value: Any) -> str:
    """Return a short repr for an error message (a few lines of YAML can expand to gigabytes of text)."""
    return _REPR.repr(value)


def validate_model_config(model: ModelConfig) -> None:
    """Raise `ConfigError` for sizes that no network can have; the header of a weights file is not to be trusted."""
    for name, value in vars(model).items():
        minimum, maximum = 0 if name in _MAY_BE_ZERO else 1, _MAX_SIZES.get(name, _DEFAULT_MAX)
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and not minimum <= size <= maximum:
                raise ConfigError(f"model.{name} must be {minimum} to {maximum}, got {short_repr(value)}")
    if model.image_size % 16:
        raise ConfigError(f"model.image_size must be a multiple of 16, got {model.image_size}")
    if model.width % model.heads:
        raise ConfigError(f"model.width ({model.width}) must be divisible by model.heads ({model.heads})")
    plain_width = model.plain_width or model.width // 2
    if model.plain_blocks and plain_width % model.heads:
        raise ConfigError(
            f"model.plain_width ({plain_width}; 0: model.width / 2) must be divisible by model.heads ({model.heads})"
        )
    if model.basis > model.code_dim:
        raise ConfigError(f"model.basis ({model.basis}) cannot exceed model.code_dim ({model.code_dim})")
    if model.plane_ema >= 1:
        raise ConfigError(f"model.plane_ema must be below 1, got {model.plane_ema}")
    for name in ("expression_gain", "surface_density"):
        if not 0 < (value := getattr(model, name)) <= 1000:
            raise ConfigError(f"model.{name} must be above 0 and at most 1000, got {value}")


def validate_train_config(config: TrainConfig) -> None:
    """Raise `ConfigError` for the first broken rule, with the key and what to set."""
    validate_model_config(config.model)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", config.device):
        raise ConfigError(f"device {short_repr(config.device)} is unknown: use auto, cpu, cuda, cuda:N or mps")
    if config.ema >= 1:
        raise ConfigError(f"ema must be below 1, got {config.ema}")
    if config.batch % config.accumulate:
        raise ConfigError(f"batch ({config.batch}) must be a multiple of accumulate ({config.accumulate})")
    if config.raw_size_start > config.model.raw_size:
        raise ConfigError(
            f"raw_size_start ({config.raw_size_start}) must be 0 to model.raw_size ({config.model.raw_size})"
        )
    pixels = (config.raw_size_start or config.model.raw_size) ** 2
    if config.raw_rays and not (config.model.flow and 0 < config.raw_rays <= pixels):
        raise ConfigError(
            f"raw_rays ({config.raw_rays}) must be 0 to {pixels}, the raw render's pixels; needs model.flow"
        )
    if config.raw_rays and "adversarial" in config.stages:
        raise ConfigError("raw_rays trains the volume alone: set it to 0 for the stage adversarial, in a second run")
    _validate_stages(config)
    for section in ("data", "clebs", *INPAINTERS, "pose_debias"):
        weight = getattr(config, section).weight
        if weight and (len(weight) != len(config.data.path) or not any(weight)):
            raise ConfigError(f"{section}.weight needs one number per data.path, not all 0, got {weight}")
    clebs, basis = config.clebs, config.model.basis
    if clebs.temperature <= 0:
        raise ConfigError(f"clebs.temperature must be positive, got {clebs.temperature}")
    if clebs.antisymmetric_dims > basis:
        raise ConfigError(
            f"clebs.antisymmetric_dims must be 0 to {basis} (model.basis), got {clebs.antisymmetric_dims}"
        )
    _validate_loss(config)


def _validate_stages(config: TrainConfig) -> None:
    for stage in config.stages:
        if stage not in STAGES:
            check_key(stage)
            raise ConfigError(f"unknown stage {short_repr(stage)}: choose from {', '.join(STAGES)}")
    if list(config.stages) != [stage for stage in STAGES if stage in config.stages]:
        raise ConfigError(f"stages must be in the order {', '.join(STAGES)}, each at most once")
    for stage in INPAINTERS:
        width = getattr(config.model, stage)
        if stage in config.stages and not (width and config.model.flow):
            raise ConfigError(f"the stage {stage} needs model.{stage}, the width of its network, and model.flow")
        if width and stage not in config.stages and not config.init:
            raise ConfigError(
                f"model.{stage} is trained by the stage {stage}: add the stage, or set init to trained weights, "
                f"or model.{stage} to 0"
            )
    if "pose_debias" in config.stages and not config.model.flow:
        raise ConfigError("the stage pose_debias needs model.flow: it changes the basis flow")
    if config.stages == ("pose_debias",) and not config.init:
        raise ConfigError("the stage pose_debias needs trained weights: set init, or add stages")


def _validate_loss(config: TrainConfig) -> None:
    loss, model = config.loss, config.model
    if loss.lpips and not loss.backbone:
        raise ConfigError("loss.lpips needs loss.backbone: set it to the VGG16 file that the linear weights belong to")
    if loss.lpips and min(config.raw_size_start or model.raw_size, model.raw_size) < 16:
        raise ConfigError("loss.lpips needs a raw render of 16 pixels or more: set raw_size_start to 16, or 0")
    if model.image_size >> (loss.perceptual_scales - 1) < 16:
        raise ConfigError(
            f"loss.perceptual_scales ({loss.perceptual_scales}) must leave 16 pixels of {model.image_size}"
        )
