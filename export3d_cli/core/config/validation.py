"""Rules between the fields of a configuration; what breaks one is told by the name of its key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from export3d_cli.core.config.yaml_loader import short_repr
from export3d_cli.core.runtime.errors import ConfigError

if TYPE_CHECKING:
    from export3d_cli.core.config.schema import ModelConfig, TrainConfig

_MAX_SIZES = {"image_size": 2048, "plane_size": 2048, "raw_size": 2048, "mesh_size": 2048, "flow_size": 2048}
_MAY_BE_ZERO = ("eadaln_blocks", "plain_blocks", "plain_width", "fine_samples", "mouth", "eyes", "lids")
_MAX_SIZES |= {"eadaln_blocks": 1000, "plain_blocks": 1000, "coarse_samples": 4096, "fine_samples": 4096}


def validate_model_config(model: ModelConfig) -> None:
    """Sizes that a network can have, whoever asks for it: the header of a weights file is not to be trusted."""
    for name, value in vars(model).items():
        least = 0 if name in _MAY_BE_ZERO else 1
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and not least <= size <= _MAX_SIZES.get(name, 65_536):
                raise ConfigError(
                    f"model.{name} must be {least} to {_MAX_SIZES.get(name, 65_536)}, got {short_repr(value)}"
                )
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


def validate_train_config(config: TrainConfig, stages: tuple[str, ...]) -> None:
    """Cross-field rules, before any data or device is touched; `stages` are those there are, in their order."""
    validate_model_config(config.model)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", config.device):
        raise ConfigError(f"device {short_repr(config.device)} is unknown: use auto, cpu, cuda, cuda:N or mps")
    if config.ema >= 1:
        raise ConfigError(f"ema must be below 1, got {config.ema}")
    if config.batch < 1 or config.steps < 0:
        raise ConfigError(f"batch must be positive and steps not negative, got {config.batch} and {config.steps}")
    unknown = [stage for stage in config.stages if stage not in stages]
    if unknown:
        raise ConfigError(f"unknown stage {short_repr(unknown[0])}: choose from {', '.join(stages)}")
    if list(config.stages) != [stage for stage in stages if stage in config.stages]:
        raise ConfigError(f"stages must be each at most once and in the order {', '.join(stages)}")
    if config.accumulate < 1 or config.batch % config.accumulate:
        raise ConfigError(f"batch ({config.batch}) must be a multiple of accumulate ({config.accumulate})")
    if config.skip_nonfinite < 0 or config.keep_checkpoints < 1:
        raise ConfigError("skip_nonfinite must not be negative, and keep must be 1 or more")
    if config.loss.adversarial != type(config.loss).adversarial:
        raise ConfigError("loss.adversarial has moved: set adversarial.weight")
    adversarial = config.adversarial
    if (
        min(adversarial.r1_interval, adversarial.mbstd_group_size, adversarial.channel_max, adversarial.channel_base)
        < 1
        or adversarial.steps < 0
    ):
        raise ConfigError("adversarial.r1_every, group, channels and base must be positive, and steps not negative")
    if not (
        0 <= adversarial.augment < 1
        and 0 <= adversarial.ada < 1
        and min(adversarial.ada_every, adversarial.ada_images) > 0
    ):
        raise ConfigError("adversarial.augment and ada must be in 0..1, ada_every and ada_images positive")
    if (
        min(config.data.cache_stride, config.clebs.image_size, config.clebs.encoder_width, config.clebs.geometry_pairs)
        < 1
    ):
        raise ConfigError("data.cache_stride, clebs.image_size, encoder_width and pairs must be 1 or more")
    holes = {"mouth": config.mouth, "eyes": config.eyes, "lids": config.lids}
    weights = {"data": config.data.weight, "clebs": config.clebs.weight, **{k: v.weight for k, v in holes.items()}}
    weights["pose_debias"] = config.pose_debias.weight
    for name, weight in weights.items():
        if weight and (len(weight) != len(config.data.path) or not any(weight)):
            raise ConfigError(f"{name}.weight needs one number per data.path, not all 0, got {weight}")
    for name, hole in holes.items():
        if name in config.stages and not (getattr(config.model, name) and config.model.flow):
            raise ConfigError(f"the stage {name} needs model.{name}, the width of its network, and model.flow")
        if getattr(config.model, name) and name not in config.stages and not config.init:
            raise ConfigError(
                f"model.{name} is trained by the stage {name}: add it, or weights as init, or set it to 0"
            )
        if min(hole.batch, hole.discriminator_width) < 1 or hole.steps < 0:
            raise ConfigError(f"{name}.batch and critic_width must be 1 or more, and steps not negative")
    if min(config.pose_debias.batch, config.pose_debias.steps) < 1 or config.pose_debias.ridge < 0:
        raise ConfigError("pose_debias.batch and steps must be 1 or more, and ridge not negative")
    if "pose_debias" in config.stages and not config.model.flow:
        raise ConfigError("the stage steady needs model.flow: it changes the fields of the flow")
    if config.stages == ("pose_debias",) and not config.init:
        raise ConfigError("the stage steady looks at what trained weights make: name them in init, or add stages")
    _check_losses(config)


def _check_losses(config: TrainConfig) -> None:
    loss, clebs = config.loss, config.clebs
    if loss.identity > 0 and not loss.embedder:
        raise ConfigError("loss.identity needs loss.embedder: name a TorchScript face embedder, or set it to 0")
    if loss.lpips and not loss.backbone:
        raise ConfigError("loss.lpips needs loss.backbone: name the VGG16 file that its weights belong to")
    if loss.lpips and min(config.raw_size_start or config.model.raw_size, config.model.raw_size) < 16:
        raise ConfigError("loss.lpips needs a raw render of 16 pixels or more: set raw_start to 16, or 0")
    if min(loss.perceptual_scales, loss.l2_scales) < 1 or config.model.image_size >> (loss.perceptual_scales - 1) < 16:
        raise ConfigError(
            f"loss.scales ({loss.perceptual_scales}) must leave 16 pixels of {config.model.image_size}, and be 1 or more"
        )
    if min(clebs.clips_per_step, clebs.negatives) < 1 or clebs.temperature <= 0:
        raise ConfigError("clebs.groups and negatives must be 1 or more, and temperature positive")
    if not 0 <= config.clebs.antisymmetric_dims <= config.model.basis:
        raise ConfigError(
            f"clebs.one_sided must be 0 to model.basis ({config.model.basis}), got {config.clebs.antisymmetric_dims}"
        )
    if not 0 <= config.raw_size_start <= config.model.raw_size:
        raise ConfigError(f"raw_start ({config.raw_size_start}) must be 0 to model.raw_size ({config.model.raw_size})")
    if config.data.workers < 0 or min(config.checkpoint_every, config.log_every) < 1:
        raise ConfigError("data.workers must not be negative, checkpoint_every and log_every must be 1 or more")
