"""The stages of training on a pretended accelerator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerator import FakeAccelerator

from export3d_cli.core.config.schema import INPAINTERS, TrainConfig
from export3d_cli.core.model.checkpoint import load_weights
from export3d_cli.core.train.trainer import train


def test_every_stage_trains_on_another_device(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stages = ("clebs", *INPAINTERS, "reconstruction", "adversarial")
    adversarial = replace(
        tiny.adversarial,
        steps=2,
        channel_max=8,
        channel_base=64,
        mapping_layers=1,
        r1_gamma=1.0,
        r1_interval=1,
        ada=0.6,
    )
    terms = dict.fromkeys(("l1", "mask", "close", "offset", "landmarks", "flow", "rough", "silhouette"), 1.0)
    loss = replace(tiny.loss, l2_scales=2, **terms)
    every = {
        "mouth": {"min_opening": 0.0},
        "eyes": {"min_opening": 0.0},
        "lids": {"max_opening": 1.0},
    }  # frames are looked at
    few = {"steps": 2, "batch": 2, "after": 0, "critic_width": 2}
    holes = {name: replace(getattr(tiny, name), **few, **every[name]) for name in INPAINTERS}
    model = replace(tiny.model, **dict.fromkeys(INPAINTERS, 4))
    config = replace(
        tiny, device="cuda", stages=stages, steps=2, adversarial=adversarial, loss=loss, model=model, **holes
    )
    with FakeAccelerator() as accelerator:
        found = train(replace(config, **holes))
    assert found.finished and accelerator.calls > 5000
    _, _, record = load_weights(found.weights)
    assert record["adversarial_steps"] == 2
