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
from export3d_cli.core.config.schema import CALIBRATION, PRESETS, DataConfig
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
    calibration = {name: getattr(model, name) for name in CALIBRATION}  # training takes it from the initial weights
    assert dataclasses.replace(config.model, **calibration) == model


def test_paper_preset_has_the_numbers_of_the_paper_and_nothing_else() -> None:
    config = make_train_config({"preset": "paper"})
    assert config.stages == ("clebs", "reconstruction", "adversarial")
    clebs = config.clebs
    assert (clebs.steps, clebs.negatives, clebs.temperature, clebs.lr) == (60_000, 32, 0.07, 1e-4)
    assert (clebs.denominator, clebs.lr_decay, clebs.clip_grad) == ("printed", False, 0.0)
    assert (clebs.geometry, clebs.identity_leakage, clebs.mirror, clebs.geometry_warmup_steps) == (0.0, 0.0, 0.0, 0)
    assert (config.batch, config.steps, config.lr) == (8, 300_000, 1e-4)
    assert (config.warmup, config.decay, config.decay_by_time, config.ema, config.clip_grad) == (0, False, False, 0, 0)
    terms = {k: v for k, v in dataclasses.asdict(config.loss).items() if v and isinstance(v, float)}
    assert terms == {"l2": 1.0, "perceptual": 1.0, "raw": 1.0}  # eq. 13
    adversarial = config.adversarial
    assert (adversarial.steps, adversarial.weight, adversarial.lr, adversarial.r1_gamma) == (10_000, 0.01, 1e-5, 0.0)
    assert config.data == DataConfig(hard_pair_ratio=0.0, flip=False, jitter=0.0, still_image_ratio=0.0)
    model = config.model
    assert (model.width, model.plain_width, model.code_dim, model.basis, model.heads) == (1024, 1024, 256, 10, 4)
    assert (model.image_size, model.raw_size, model.plane_size, model.plane_channels) == (256, 64, 128, 32)
    assert (model.plane_ema, model.lowpass) == (0.998, True)
    assert not any((model.source_skip, model.source_plane, model.head_prior, model.flow))
    assert not any((model.mouth, model.eyes, model.lids))


def test_paper_example_adds_only_files_and_bookkeeping_to_the_preset() -> None:
    example = load_train_config(EXAMPLES / "paper.yaml")
    bookkeeping = {"run", "license", "checkpoint_every", "sample_every", "log_every"}
    changes = {key: getattr(example, key) for key in bookkeeping}
    files = {"backbone": example.loss.backbone, "lpips": example.loss.lpips}
    expected = {**changes, "preset": "paper", "data": {"path": list(example.data.path)}, "loss": files}
    assert example == make_train_config(expected)


def test_file_overrides_a_training_preset() -> None:
    config = make_train_config({"preset": "paper", "ema": 0.99, "data": {"flip": True}})
    assert (config.ema, config.data.flip, config.data.jitter) == (0.99, True, 0.0)


PLANEDICT = {"preset": "tiny", "init": "export3d-open", "model": {"motion": "planedict"}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"leraning_rate": 1}, "unknown key 'leraning_rate'"),
        ({"sampler": {"steps": 3}}, r"unknown key 'sampler\.steps'"),
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
        ({"model": {"stem": [8, 8]}}, r"model\.stem must be 3 values, got \[8, 8\]"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, got 'fp8'"),
        ({"stages": ["planedict", "reconstruction"], **PLANEDICT}, r"after planedict needs loss\.disentangle"),
        ({"raw_rays": 9, "loss": {"disentangle": 1}, **PLANEDICT}, r"no images for loss\.disentangle"),
        ({"batch": 4, "accumulate": 4, "loss": {"disentangle": 1}, **PLANEDICT}, "at least 2 times accumulate"),
        ({"model": {"motion": "planedict", "plane_size": 20}}, "16 or more, a multiple of 8, got 20"),
        ({"lr": -1}, "lr must be a number of 0 or more, got -1"),
    ],
)
def test_make_train_config_names_the_wrong_key(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_train_config(data)


def test_load_train_config_refuses_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_train_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_train_config(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="key=value"):
        make_train_config({}, ("steps",))
