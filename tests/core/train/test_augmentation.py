"""Augmentation of what the discriminator sees: known matrices, rows of a batch, and the probability that adapts."""

from __future__ import annotations

import pytest
import torch

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.config.schema import AdversarialConfig
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.train.augmentation import Adaptive, apply, augment, draw


def image() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_known_matrices() -> None:
    x, same = image(), (torch.eye(3).repeat(2, 1, 1), torch.eye(4).repeat(2, 1, 1))
    torch.testing.assert_close(apply(x, *same), x, atol=1e-5, rtol=0)
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0])).repeat(2, 1, 1)
    torch.testing.assert_close(apply(x, mirror, same[1]), x.flip(3), atol=1e-5, rtol=0)
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).repeat(2, 1, 1)
    torch.testing.assert_close(apply(x, quarter, same[1]), x.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    brighter = torch.eye(4).repeat(2, 1, 1)
    brighter[:, :3, 3] = 0.25
    torch.testing.assert_close(apply(x, same[0], brighter), x + 0.25, atol=1e-5, rtol=0)


def test_nothing_changes_at_probability_0_and_most_at_1() -> None:
    geometry, colour = draw(64, 0.0, 1)
    torch.testing.assert_close(geometry, torch.eye(3).repeat(64, 1, 1))
    torch.testing.assert_close(colour, torch.eye(4).repeat(64, 1, 1), atol=1e-6, rtol=0)
    geometry, colour = draw(4000, 0.3, 1)
    still = (geometry - torch.eye(3)).abs().amax((1, 2)) < 1e-6
    # seven changes, the two rotations counted as one; half of the mirrors and a quarter of the turns change nothing
    nothing = (1 - 0.3 / 2) * (1 - 0.3 * 3 / 4) * 0.7**5
    assert still.float().mean().item() == pytest.approx(nothing, abs=0.02)


def test_greys_keep_their_hue() -> None:
    _, colour = draw(200, 0.9, 2)
    grey = colour[:, :3, :3].sum(2)  # where (1, 1, 1) goes, shifts left out
    assert (grey - grey.mean(1, keepdim=True)).abs().max() < 1e-4
    assert torch.linalg.det(colour[:, :3, :3]).abs().min() > 1e-6  # nothing is lost for good


def test_rows_are_those_of_the_whole_batch() -> None:
    x = torch.cat([image(), image()])
    whole = augment(x, 0.8, 3, range(0, 4), 4)
    halves = [augment(x[a : a + 2], 0.8, 3, range(a, a + 2), 4) for a in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, augment(x, 0.8, 4, range(0, 4), 4))
    assert augment(x, 0.0, 3, range(0, 4), 4) is x


def test_gradient_reaches_the_image() -> None:
    x = image().requires_grad_()
    augment(x, 0.8, 3, range(0, 2), 2).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().amax((1, 2, 3)).min() > 0


def test_probability_follows_the_sign() -> None:
    adaptive = Adaptive(AdversarialConfig(ada=0.6, ada_every=2, ada_images=100))
    for sign in (1.0, 0.8, 0.9, 0.9):  # surer of real images than wanted
        adaptive.update(sign, 8)
    assert adaptive.p == pytest.approx(2 * 16 / 100)
    again = Adaptive(adaptive.config)
    adaptive.update(0.0, 8)
    again.state = adaptive.state
    for either in (adaptive, again):
        either.update(0.0, 8)
        assert either.p == pytest.approx(16 / 100)
    for _ in range(20):
        adaptive.update(-1.0, 8)
    assert adaptive.p == 0
    fixed = Adaptive(AdversarialConfig(augment=0.3))
    fixed.update(1.0, 8)
    assert fixed.p == 0.3
    with pytest.raises(ConfigError, match=r"augment and ada must be in 0\.\.1"):
        make_train_config({"adversarial": {"augment": 1.5}})
