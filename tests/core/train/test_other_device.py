"""All training stages on a simulated accelerator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerator import FakeAccelerator

from export3d_cli.core.config.schema import INPAINTERS, TrainConfig
from export3d_cli.core.model.checkpoint import load_weights
from export3d_cli.core.train.trainer import train

LOSS_TERMS = (
    "l1", "mask", "crop_perceptual", "residual_flow", "landmarks", "flow", "density_tv", "silhouette",
)  # fmt: skip


def test_train_runs_all_stages_on_another_device(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    adversarial = replace(
        tiny.adversarial, steps=1, channel_max=8, channel_base=64, mapping_layers=1, r1_gamma=1.0, r1_interval=1
    )
    opening = {"mouth": {"min_opening": 0.0}, "eyes": {"min_opening": 0.0}, "lids": {"max_opening": 1.0}}
    short = {"steps": 1, "batch": 2, "adversarial_start": 0, "discriminator_width": 2}
    inpainting = {name: replace(getattr(tiny, name), **short, **opening[name]) for name in INPAINTERS}
    config = replace(
        tiny,
        device="cuda",
        stages=("clebs", *INPAINTERS, "reconstruction", "adversarial"),
        steps=1,
        clebs=replace(tiny.clebs, geometry_warmup_steps=0, steps=1),
        adversarial=adversarial,
        loss=replace(tiny.loss, **dict.fromkeys(LOSS_TERMS, 1.0)),
        model=replace(tiny.model, **dict.fromkeys(INPAINTERS, 4)),
        **inpainting,
    )
    with FakeAccelerator() as accelerator:
        summary = train(config)
    assert summary.finished and accelerator.calls > 3000
    _, _, record = load_weights(summary.weights)
    assert record["adversarial_steps"] == 1
