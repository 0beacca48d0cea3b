"""The discriminator against closed forms; the stage `adversarial`: exact resume and its log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.config.schema import AdversarialConfig, TrainConfig
from export3d_cli.core.model.checkpoint import load_state, load_weights
from export3d_cli.core.runtime.errors import ConfigError, TrainingError
from export3d_cli.core.train import discriminator as adversary
from export3d_cli.core.train.trainer import train

SMALL = AdversarialConfig(
    steps=3, channel_max=8, channel_base=256, mapping_layers=2, mbstd_group_size=2, r1_gamma=1.0, r1_interval=2
)


def test_blur_keeps_constants_and_halves_the_side() -> None:
    x = torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(adversary.blur(x, stride=2)[..., 1:-1, 1:-1], torch.ones(1, 2, 2, 2))
    conv = adversary.EqualizedConv2d(2, 3, 3, downsample=True)
    assert conv(x).shape == (1, 3, 4, 4)


def test_minibatch_stddev_uses_its_own_group() -> None:
    x = torch.zeros(4, 2, 3, 3)
    x[3] = 2  # the second group of two differs, the first does not
    channel = adversary.minibatch_stddev(x, 2)[:, 2, 0, 0]
    torch.testing.assert_close(channel, torch.tensor([0.0, 0.0, 1.0, 1.0]), atol=1e-3, rtol=0)
    assert adversary.minibatch_stddev(x[:3], 2).shape == (3, 3, 3, 3)


def test_logits_depend_on_image_and_camera() -> None:
    torch.manual_seed(0)
    d = adversary.Discriminator(64, SMALL)
    image, camera = torch.randn(2, 3, 64, 64), torch.randn(2, 25)
    logits = d(image, camera)
    assert logits.shape == (2,)
    assert not torch.allclose(logits, d(image, -camera))
    smooth = torch.nn.functional.interpolate(torch.randn(16, 3, 4, 4), size=(64, 64), mode="bilinear")
    assert 0.05 < d(smooth, torch.randn(16, 25)).std().item() < 20  # neither vanishes nor explodes


def test_r1_of_a_linear_discriminator_is_its_squared_slope() -> None:
    class Linear(torch.nn.Module):
        def forward(self, image: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
            return 3 * image.sum((1, 2, 3))

    assert adversary.r1_penalty(Linear(), torch.rand(2, 3, 4, 4), torch.zeros(2, 25)).detach().item() == pytest.approx(
        9 * 48
    )


def test_discriminator_adam_is_corrected_for_lazy_r1() -> None:
    d = adversary.Discriminator(16, SMALL)
    group = adversary.make_discriminator_optimizer(d, SMALL).param_groups[0]
    assert group["lr"] == pytest.approx(1e-5 * 2 / 3)
    assert group["betas"] == pytest.approx((0.0, 0.99 ** (2 / 3)))
    assert adversary.make_discriminator_optimizer(d, replace(SMALL, r1_gamma=0.0)).param_groups[0]["lr"] == 1e-5


def test_adversarial_stage_resumes_exactly(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, stages=("reconstruction", "adversarial"), steps=2, checkpoint_every=1, adversarial=SMALL)
    whole = train(config)
    assert (whole.finished, whole.stage, whole.step) == (True, "adversarial", 3)
    assert {"d_loss", "g_adv", "loss"} <= whole.values.keys()
    halves = replace(config, run=str(tmp_path / "halves"))
    train(replace(halves, stages=("reconstruction",)))
    first = train(replace(halves, adversarial=replace(SMALL, steps=1)))
    assert (first.stage, first.step) == ("adversarial", 1)
    train(halves)
    a, b = load_state(Path(config.run)), load_state(Path(halves.run))
    assert a is not None and b is not None
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    lines = [json.loads(s) for s in (Path(halves.run) / "stats.jsonl").read_text().splitlines()]
    assert [(x["stage"][0], x["step"]) for x in lines] == [("r", 1), ("r", 2), ("a", 1), ("a", 2), ("a", 3)]
    assert ["r1" in x for x in lines[2:]] == [True, False, True]
    assert sum(x["images_a_second"] > 0 for x in lines) == 5
    record = load_weights(whole.weights)[2]
    assert (record["steps"], record["adversarial_steps"]) == (2, 3)
    with pytest.raises(TrainingError, match="stage adversarial"):
        train(replace(halves, stages=("reconstruction",)))


def test_stages_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="order"):
        make_train_config({"stages": ["adversarial", "reconstruction"]})
