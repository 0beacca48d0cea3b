"""Super-resolution: hidden textures, photo visibility behind the head, high-pass detail and upscaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mesh_rendering import render_mesh
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.face.head_pose import CanonicalFace
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.generator import zero_init
from export3d_cli.core.model.masks import Window, dilate
from export3d_cli.core.model.super_resolution import PHOTO_LOGIT_BIAS, HiddenTextures, upsample_2x, upsample_concat_conv
from export3d_cli.core.model.warp.layer_warp import highpass
from export3d_cli.core.model.warp.mesh_flow import resize


def test_hair_vanishes_where_the_head_has_moved_away(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    """The hair colour does not stay behind when the head turns."""
    assert tiny.flow is not None and tiny.flow_blend is not None
    zero_init(tiny.flow_blend.leave)  # blending then depends on geometry only
    zero_init(tiny.superres.colour)
    size = tiny.config.image_size
    person = torch.ones(1, 1, size, size)
    photo = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        blank = tiny.encode_source(photo, torch.zeros(1, 64), orbit(0), points, person)
        assert blank.head_mask is not None
        hair = resize(blank.head_mask, size) > 0.98
        white_haired = replace(blank, image=torch.where(hair, 1.0, photo))
        output, marked = (tiny.drive(source, blank.lam, orbit(30)) for source in (blank, white_haired))
        flow = render_mesh(tiny.flow, points, orbit(0), points, orbit(30), size, blank.head_mask)
    assert output.flow_weights is not None
    changed = (output.image - marked.image).abs().amax(1, keepdim=True)
    uncovered = (F.max_pool2d(flow.weight, 5, 1, 2) == 0) & (resize(output.flow_weights[:, 1:2], size) < 0.05)
    assert (hair & uncovered).sum() > 20
    assert changed[hair & uncovered].max() < 0.1
    assert changed[(flow.weight == 1) & (flow.mouth == 0)].mean() > 0.5


def test_outline_of_a_far_moved_head_does_not_show_the_photo(
    tiny: Export3D, canonical: CanonicalFace, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    """The photo shows both sides of a head's outline, but not if the background there samples the head."""
    net = Export3D(replace(tiny.config, mesh_size=128)).eval()
    assert net.flow is not None and net.flow_blend is not None
    net.flow.triangles.copy_(torch.from_numpy(canonical.flow_triangles))
    person, photo = torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64)
    person[..., 10:54] = 1
    camera = orbit(0)
    camera[:, 3] += 0.25
    with torch.no_grad():
        source = net.encode_source(photo, torch.zeros(1, 64), orbit(0), points, person)
        out = net.drive(source, source.lam, camera)
        flow = render_mesh(net.flow, points, orbit(0), points, camera, 128, source.head_mask)
    assert out.source_visibility is not None and out.flow_weights is not None and source.head_mask is not None
    outline = (dilate(flow.weight, 2) - flow.weight > 0.1) & (source.head_mask > 0.9)
    background = out.source_visibility - out.flow_weights[:, :2].sum(1, keepdim=True)
    assert outline.sum() > 500
    assert background[outline].mean() < 0.02


def test_upscale_without_detail_is_the_result(tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    photo = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        source = tiny.encode_source(photo, torch.zeros(1, 64), orbit(0), points)
        out = tiny.drive(source, source.lam, orbit(15))
        torch.testing.assert_close(out.upscale(torch.full((1, 3, 96, 96), 0.3), 64), out.image, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            out._replace(before_inpainting=None).upscale(photo, 128),
            F.interpolate(out.image, (128, 128), mode="bicubic"),
        )


def test_upscale_shows_detail_of_the_larger_photo(tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    """One-pixel stripes are grey at the model's size. A closed mouth that opens must not show them."""
    assert tiny.flow is not None and tiny.flow_blend is not None
    for layer in (tiny.flow_blend.leave, tiny.flow_blend.shift, tiny.superres.offset, tiny.superres.colour):
        zero_init(layer)
    stripes = torch.tensor([0.5, -0.5]).repeat(64).expand(1, 3, 128, 128)
    opened, lower = points.clone(), torch.tensor([14, 17, 87, 317, 178, 402, 88, 318, 95, 324])
    opened[:, lower, 1] += 0.2
    detail, flows = [], []
    with torch.no_grad():
        source = tiny.encode_source(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64), orbit(0), points)
        for target in (points, opened):
            posed = replace(tiny.pose_head(source, source.lam), mesh=tiny.flow.deform_mesh(points, orbit(0), target))
            out = tiny.drive(source, source.lam, orbit(0), posed=posed)
            detail.append(out.upscale(stripes, 128) - out.upscale(torch.zeros_like(stripes), 128))
            flows.append(render_mesh(tiny.flow, points, orbit(0), target, orbit(0), 128))
    face = (flows[0].face == 1).expand_as(stripes)
    closed = (-F.max_pool2d(-flows[1].closed_in_photo, 5, 1, 2) > 0.9).expand_as(stripes)
    assert face.sum() > 3000 and closed.sum() > 50
    assert (detail[0] * stripes)[face].mean() > 0.9 * 0.25
    assert detail[1][closed].abs().max() < 0.05


@pytest.mark.parametrize(("blend", "expected"), [(0.95, 1.0), (0.5, 1.0), (0.05, 0.05)])
def test_blended_face_keeps_the_full_highpass_detail(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor], blend: float, expected: float
) -> None:
    """Except where the blend rejects the photo; the background keeps the blended fraction."""
    assert tiny.flow is not None and tiny.flow_blend is not None and tiny.superres.colour.bias is not None
    for layer in (tiny.flow_blend.leave, tiny.flow_blend.shift, tiny.superres.offset, tiny.superres.colour):
        zero_init(layer)
    stripes = torch.tensor([0.5, -0.5]).repeat(64)
    with torch.no_grad():
        tiny.superres.colour.bias[3] = (math.log(blend / (1 - blend)) + 3 - PHOTO_LOGIT_BIAS) / 4
        for size in (64, 128):  # the network's input size, and detail of a larger photo only
            photo = stripes[:size].expand(1, 3, size, size)
            source = tiny.encode_source(F.avg_pool2d(photo, size // 64), torch.zeros(1, 64), orbit(0), points)
            out = tiny.drive(source, source.lam, orbit(0))
            face = render_mesh(tiny.flow, points, orbit(0), points, orbit(0), size).face == 1
            fraction = highpass(out.upscale(photo, size)) / highpass(photo)  # (1, 1, size, size)
            assert fraction[face.expand_as(fraction)].median() == pytest.approx(expected, abs=0.03)
            assert fraction[..., 2 : size // 16].median() == pytest.approx(blend, rel=0.1)


def test_highpass_detail_is_not_added_at_discontinuities(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    """A linear ramp has no detail, although its warped colours jump next to a turned head."""
    assert tiny.superres.colour.bias is not None
    for layer in (tiny.superres.offset, tiny.superres.colour):
        zero_init(layer)
    slope = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    with torch.no_grad():
        tiny.superres.colour.bias[3] = (3 - PHOTO_LOGIT_BIAS) / 4  # blend of 0.5, where all missing detail is added
        source = tiny.encode_source(slope, torch.zeros(1, 64), orbit(0), points, torch.ones(1, 1, 64, 64))
        out, plain = (
            tiny.drive(encoded, encoded.lam, orbit(35)).image for encoded in (source, replace(source, highpass=None))
        )
    assert highpass(plain)[..., 2:-2, 2:-2].abs().max() > 0.04
    torch.testing.assert_close(out[..., 2:-2, 2:-2], plain[..., 2:-2, 2:-2], atol=0.01, rtol=0)


def test_detail_is_not_added_where_the_photo_is_minified(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    for layer in (tiny.superres.offset, tiny.superres.colour):
        zero_init(layer)
    noise, deviations = torch.rand(1, 3, 128, 128), []
    with torch.no_grad():
        source = tiny.encode_source(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64), orbit(0), points)
        for zoom in (1.0, 1 / 3):
            camera = orbit(0).clone()
            camera[:, [16, 20]] *= zoom
            out = tiny.drive(source, source.lam, camera)
            deviations.append((out.upscale(noise, 128) - out.upscale(noise * 0, 128))[..., 56:72, 56:72].std())
    assert deviations[0] > 0.2 and deviations[1] < 0.01


def test_upsample_concat_conv_equals_conv_of_concatenation() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(12, 5, 3, padding=1)
    x, a, b = torch.randn(2, 7, 8, 8), torch.randn(2, 2, 16, 16), torch.randn(2, 3, 16, 16)
    plain = conv(torch.cat([upsample_2x(x), a, b], 1))
    torch.testing.assert_close(upsample_concat_conv(conv, x, [a, b]), plain, atol=1e-5, rtol=0)


def test_hidden_textures_are_zero_outside_mouth_and_eyes(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    assert tiny.flow is not None
    opened = points.clone()
    opened[:, [14, 87, 317, 178, 402], 1] += 0.08
    mesh = render_mesh(tiny.flow, points, orbit(0), opened, orbit(0), 128)
    hidden_textures = HiddenTextures()
    textures = hidden_textures(mesh, 128)
    assert textures.shape == (1, hidden_textures.out_channels, 128, 128)
    assert textures[:, :, (mesh.mouth + mesh.eye)[0, 0] == 0].abs().max() == 0
    lower = textures[:, 8:16]
    assert lower[:, :, mesh.mouth[0, 0] > 0].abs().mean() > 0.05
    assert lower[:, :, mesh.eye[0, 0] > 0].abs().max() == 0  # only the mouth has a lower texture


def test_hidden_textures_get_gradients(tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]) -> None:
    assert tiny.flow is not None
    opened = points.clone()
    opened[:, [14, 87, 317, 178, 402], 1] += 0.08
    mesh = render_mesh(tiny.flow, points, orbit(0), opened, orbit(0), 64)
    hidden_textures = HiddenTextures()
    hidden_textures(mesh, 64).square().sum().backward()
    assert hidden_textures.textures.grad is not None
    assert all(float(grad.abs().sum()) > 0 for grad in hidden_textures.textures.grad)


def test_hidden_textures_of_a_window_are_that_part_of_the_map(
    tiny: Export3D, points: Tensor, orbit: Callable[..., Tensor]
) -> None:
    assert tiny.flow is not None
    opened = points.clone()
    opened[:, [14, 87, 317, 178, 402], 1] += 0.08
    mesh, window = render_mesh(tiny.flow, points, orbit(0), opened, orbit(0), 64), Window(2, 2, 5, 6, 8)
    hidden_textures = HiddenTextures()
    with torch.no_grad():
        part, whole = hidden_textures(mesh, 96, window), hidden_textures(mesh, 96)
    assert part.shape == (1, hidden_textures.out_channels, 48, 36) and part.abs().sum() > 1
    torch.testing.assert_close(part, window.crop(whole))
