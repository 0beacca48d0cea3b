"""Resizing and sampling by OpenCV against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from export3d_cli.core.model.fast.resampling import can_resample, resize_bilinear, sample_bicubic
from export3d_cli.core.model.warp.mesh_flow import resize, warp


@pytest.mark.parametrize("size", [3, 20, 32, 75])
def test_resize_as_interpolate(size: int) -> None:
    x = torch.rand(2, 5, 32, 32)[:, 1:4]
    expected = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_bilinear(x, size), expected, rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(resize(x, size), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bicubic_sampling_as_grid_sample_also_beyond_the_border(layout: torch.memory_format) -> None:
    image, uv = torch.rand(1, 3, 31, 43).to(memory_format=layout), torch.rand(2, 2, 17, 25) * 1.4 - 0.2
    expected = warp(image.expand(2, -1, -1, -1), uv, "bicubic")
    torch.testing.assert_close(sample_bicubic(image, uv), expected, rtol=0, atol=1e-4)


def test_gradients_and_half_precision_take_the_path_of_pytorch() -> None:
    x = torch.rand(1, 1, 4, 4, requires_grad=True)
    assert not can_resample(x) and resize(x, 8).requires_grad
    with torch.no_grad():
        assert can_resample(x) and not can_resample(x.bfloat16())
        assert resize(x.bfloat16(), 8).dtype == torch.bfloat16
