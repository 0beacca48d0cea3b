"""Configuration keys and stages of earlier versions, and the names that replace them."""

from export3d_cli.core.runtime.errors import ConfigError

RENAMED_KEYS = {
    "steady": "pose_debias",  # a stage, and its section
    "model.face_shift": "model.face_residual_ratio",
    "data.spread": "data.hard_pair_ratio",
    "data.turn": "data.wide_view_ratio",
    "data.stills": "data.still_image_ratio",
    "data.cross": "data.cross_identity_ratio",
    "clebs.groups": "clebs.clips_per_step",
    "clebs.person": "clebs.identity_leakage",
    "clebs.one_sided": "clebs.antisymmetric_dims",
    "clebs.warm": "clebs.geometry_warmup_steps",
    "clebs.pairs": "clebs.geometry_pairs",
    "mouth.open": "mouth.min_opening",
    "mouth.partly": "mouth.partial_hole_ratio",
    "eyes.open": "eyes.min_opening",
    "eyes.guess": "eyes.hidden_iris_ratio",
    "lids.shut": "lids.max_opening",
    "loss.scales": "loss.perceptual_scales",
    "loss.close": "loss.crop_perceptual",
    "loss.rough": "loss.density_tv",
    "loss.offset": "loss.residual_flow",
    "loss.adversarial": "adversarial.weight",
    "adversarial.r1": "adversarial.r1_gamma",
    "adversarial.r1_every": "adversarial.r1_interval",
    "adversarial.channels": "adversarial.channel_max",
    "adversarial.base": "adversarial.channel_base",
    "adversarial.mapping": "adversarial.mapping_layers",
    "adversarial.group": "adversarial.mbstd_group_size",
    "expression": "expression_from",
    "raw_start": "raw_size_start",
    "raw_grow": "raw_size_grow_step",
    "keep": "keep_checkpoints",
}
for _stage in ("mouth", "eyes", "lids"):
    RENAMED_KEYS |= {
        f"{_stage}.after": f"{_stage}.adversarial_start",
        f"{_stage}.critic_lr": f"{_stage}.discriminator_lr",
        f"{_stage}.critic_width": f"{_stage}.discriminator_width",
        f"{_stage}.r1": f"{_stage}.r1_gamma",
    }

REMOVED_KEYS = {
    "tensorboard": "stats.jsonl in the run folder holds all values",
    "loss.backbone_sha256": "torchvision's file names hold the sha256, and hf: names check it",
    "loss.l2_scales": "L2 is computed at full size",
    **dict.fromkeys(
        ("adversarial.ada", "adversarial.ada_every", "adversarial.ada_images", "adversarial.augment"),
        "the discriminator sees images without augmentation",
    ),
}


def check_key(name: str) -> None:
    """Raise `ConfigError` if the dotted key `name` was renamed or removed."""
    if name in RENAMED_KEYS:
        raise ConfigError(f"the configuration key {name} is now {RENAMED_KEYS[name]}: rename it")
    if name in REMOVED_KEYS:
        raise ConfigError(f"the configuration key {name} was removed, {REMOVED_KEYS[name]}: delete it")
