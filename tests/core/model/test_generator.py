"""Generator: EAdaLN and the tri-plane EMA against their equations, shapes, the `paper` preset."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.generator import EAdaLN, Generator, ResBlock, lowpass

TINY = PRESETS["tiny"]


def test_eadaln_matches_equation_5() -> None:
    torch.manual_seed(0)
    norm = EAdaLN(12, 5)
    assert norm.affine is not None
    nn.init.normal_(norm.affine.weight)
    nn.init.normal_(norm.affine.bias)
    x, code = torch.randn(3, 7, 12), torch.randn(3, 5)
    plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    scale, shift = (code @ norm.affine.weight.T + norm.affine.bias).split(12, dim=-1)
    expected = (1 + scale)[:, None] * plain + shift[:, None]
    torch.testing.assert_close(norm(x, code), expected)


def test_eadaln_is_layer_norm_at_initialisation() -> None:
    x, code = torch.randn(2, 7, 12), torch.randn(2, 5)
    torch.testing.assert_close(EAdaLN(12, 5)(x, code), F.layer_norm(x, (12,)))
    torch.testing.assert_close(EAdaLN(12, None)(x, None), F.layer_norm(x, (12,)))


def test_plane_ema_matches_equation_12() -> None:
    generator = Generator(replace(TINY, plane_ema=0.9))
    first, second = (torch.rand(b, *generator.plane_ema.shape, requires_grad=True) for b in (2, 3))
    out1, out2 = generator._add_plane_ema(first), generator._add_plane_ema(second)
    torch.testing.assert_close(out1, first)  # the EMA starts at 0 and is added from the next batch on
    torch.testing.assert_close(out2, second + 0.1 * first.mean(0))
    expected = 0.9 * 0.1 * first.mean(0) + 0.1 * second.mean(0)
    torch.testing.assert_close(generator.plane_ema, expected.detach())
    assert not generator.plane_ema.requires_grad
    generator.eval()
    torch.testing.assert_close(generator._add_plane_ema(first), first + expected)
    torch.testing.assert_close(generator.plane_ema, expected.detach())  # updated in training only


def test_plane_ema_of_zero_is_off() -> None:
    generator = Generator(replace(TINY, plane_ema=0.0))
    planes = torch.rand(2, *generator.plane_ema.shape)
    assert torch.equal(generator._add_plane_ema(planes), planes)
    assert not generator.plane_ema.any()


@pytest.mark.parametrize("preset", [TINY, replace(TINY, source_skip=False, lowpass=False, plane_size=64)])
def test_generator_output_shapes(preset) -> None:
    generator = Generator(preset)
    stem, tokens = generator.encode(torch.rand(2, 3, 64, 64))
    assert [tuple(f.shape) for f in stem] == [(2, 8, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8)]
    assert tokens.shape == (2, 16, 32)
    planes = generator(stem, tokens, torch.rand(2, 16))
    assert planes.shape == (2, 3, 8, preset.plane_size, preset.plane_size)
    assert planes.dtype == torch.float32


def test_planes_depend_on_the_code(tiny: Export3D) -> None:
    stem, tokens = tiny.generator.encode(torch.rand(1, 3, 64, 64))

    def planes(code: Tensor) -> Tensor:
        return tiny.generator(stem, tokens, code)

    assert not torch.allclose(planes(torch.zeros(1, 16)), planes(torch.ones(1, 16)), atol=1e-3)


def test_lowpass_keeps_constants_and_removes_checkerboard() -> None:
    flat = torch.full((1, 2, 6, 6), 3.0)
    torch.testing.assert_close(lowpass(flat), flat)
    board = (torch.arange(6)[:, None] + torch.arange(6)).remainder(2).float().mul(2).sub(1).expand(1, 1, 6, 6)
    torch.testing.assert_close(lowpass(board)[..., 1:-1, 1:-1], torch.zeros(1, 1, 4, 4))


def test_res_block_adds_a_constant_at_initialisation() -> None:
    x, block = torch.rand(1, 4, 5, 5), ResBlock(4)
    assert block.second.bias is not None
    torch.testing.assert_close(block(x), x + block.second.bias[:, None, None])


def test_paper_preset_vit_blocks_all_have_the_papers_width() -> None:
    """Sec. 6.2: 'In both EAdaLN-ViT and ViT, we employ four heads with 1024 hidden dimensions'."""
    with torch.device("meta"):
        generator = Generator(PRESETS["paper"])
    blocks = [*generator.blocks, *generator.plain]
    assert [block.qkv.in_features for block in blocks] == [1024] * 6
    assert {block.heads for block in blocks} == {4}


def test_plain_width_defaults_to_half_of_the_width() -> None:
    assert Generator(TINY).plain[0].qkv.in_features == 16
    config = replace(TINY, plain_width=32)
    generator, image = Generator(config), torch.rand(1, 3, 64, 64)
    assert generator.plain[0].qkv.in_features == 32
    planes = generator(*generator.encode(image), torch.zeros(1, config.code_dim))
    assert planes.shape == (1, 3, config.plane_channels, config.plane_size, config.plane_size)


def test_paper_preset_has_no_extensions() -> None:
    with torch.device("meta"):
        model = Export3D(PRESETS["paper"])
    count = sum(p.numel() for p in model.parameters())
    assert 50e6 < count < 500e6
    assert model.flow is model.flow_blend is model.source_view is None
    assert not model.decoder.has_head_prior
    assert not model.superres.uses_flow
    assert model.superres.colour.out_channels == 3
    assert model.generator.join_half.in_channels == 1024  # no stem features are concatenated
    assert model.decoder.hidden.in_features == 32
    assert model.generator.plane_ema.shape == (3, 32, 128, 128)
    assert all("flow" not in name and "source_view" not in name for name, _ in model.named_parameters())
