"""Push-pull filling behind the head."""

from __future__ import annotations

import torch

from export3d_cli.core.model.source_view import fill_push_pull


def test_fill_push_pull_continues_the_surroundings() -> None:
    """A ramp with a hole: the ramp continues in the hole, whose old colours vanish."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    known = torch.ones(1, 1, 32, 32)
    known[..., 10:22, 10:22] = 0
    hole = torch.nn.functional.interpolate(known, (64, 64)) == 0
    filled, other = (fill_push_pull(ramp.masked_fill(hole, colour), known, 16) for colour in (-9.0, 9.0))
    torch.testing.assert_close(filled, other)
    truth = torch.nn.functional.interpolate(ramp, (16, 16), mode="area")
    assert (filled - truth).abs().max() < 0.35
    assert (filled - truth)[..., :4, :].abs().max() < 1e-5  # known pixels stay


def test_fill_push_pull_of_unknown_image_is_grey() -> None:
    assert fill_push_pull(torch.ones(1, 3, 32, 32), torch.zeros(1, 1, 8, 8), 8).abs().max() == 0
