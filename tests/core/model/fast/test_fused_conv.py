"""Fused convolutions against upsampling, concatenation and convolution."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from export3d_cli.core.model.fast.fused_conv import (
    PatchWindow,
    upsample_2x,
    upsample_concat_conv,
    upsample_concat_conv_inference,
    upsample_conv,
)


def test_upsample_concat_conv_equals_conv_of_concatenation() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(12, 5, 3, padding=1)
    x, a, b = torch.randn(2, 7, 8, 8), torch.randn(2, 2, 16, 16), torch.randn(2, 3, 16, 16)
    plain = conv(torch.cat([upsample_2x(x), a, b], 1))
    torch.testing.assert_close(upsample_concat_conv(conv, x, [a, b]), plain, atol=1e-5, rtol=0)
    sparse_map = b.new_zeros(b.shape)
    sparse_map[:, :, 3:10, 8:15] = b[:, :, 3:10, 8:15]
    plain = conv(torch.cat([upsample_2x(x), a, sparse_map], 1))
    with torch.no_grad():
        fused = upsample_concat_conv_inference(conv, x, [a], PatchWindow(sparse_map[:, :, 2:12, 7:16], 2, 7))
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)
        without = upsample_concat_conv_inference(conv, x, [a], PatchWindow(sparse_map[:, :, :0, :0], 0, 0))
        torch.testing.assert_close(without, conv(torch.cat([upsample_2x(x), a, 0 * b], 1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 9), (16, 7), (3, 8)])
def test_upsample_conv_equals_upsampling_then_conv(height: int, width: int) -> None:
    """Also at the borders, where the two paddings differ."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, height, width), torch.randn(5, 6, 3, 3)
    plain = F.conv2d(upsample_2x(x), weight, padding=1)
    torch.testing.assert_close(upsample_conv(weight, x), plain, atol=1e-5, rtol=0)
    half = upsample_conv(weight.bfloat16(), x.bfloat16()).float()
    error = (half - plain).square().mean().sqrt() / (plain.max() - plain.min())
    assert error < 10 ** (-45 / 20)  # 45 dB
