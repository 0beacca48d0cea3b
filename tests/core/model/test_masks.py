"""Mask filters against pooling."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from export3d_cli.core.model.masks import box_mean, dilate


@pytest.mark.parametrize("reach", [1, 2, 5, 16, 40])
def test_dilate_equals_max_pooling(reach: int) -> None:
    """The border is not padded with zeros: negative images stay negative."""
    mask = torch.randn(2, 3, 33, 41) - 5
    assert torch.equal(dilate(mask, reach), _reference_box_mean(mask, reach))
    assert torch.equal(dilate(mask, 0), mask)


def _reference_box_mean(mask: torch.Tensor, reach: int) -> torch.Tensor:
    around = F.pad(mask, (reach,) * 4, value=-torch.inf).unfold(2, 2 * reach + 1, 1).unfold(3, 2 * reach + 1, 1)
    return around.amax((-2, -1))


@pytest.mark.parametrize("reach", [1, 4, 8])
def test_box_mean_equals_average_pooling(reach: int) -> None:
    mask = torch.rand(2, 1, 33, 33)
    pooled = F.avg_pool2d(mask, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)
    torch.testing.assert_close(box_mean(mask, reach), pooled, rtol=0, atol=1e-5)


def test_box_mean_of_single_pixel_has_the_given_radius() -> None:
    mask = torch.zeros(1, 1, 21, 21)
    mask[..., 10, 10] = 25
    soft = box_mean(mask, 2)
    assert torch.allclose(soft[0, 0, 8:13, 8:13], torch.ones(5, 5)) and soft.sum() == pytest.approx(25, rel=1e-5)
