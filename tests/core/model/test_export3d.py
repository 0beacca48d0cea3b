"""The whole model: encode once and drive many, shape checks, gradients, determinism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.head_pose import CanonicalFace
from export3d_cli.core.model.export3d import Export3D, Output
from export3d_cli.core.model.source_view import sample_view_plane
from export3d_cli.core.model.triplane import sample_face_field
from export3d_cli.core.model.warp.flow_blending import TORSO_FOLLOW_RATIO, neck_flow
from export3d_cli.core.model.warp.mesh_flow import identity_grid

Inputs = dict[str, Tensor]


@pytest.fixture
def inputs(points: Tensor, orbit: Callable[..., Tensor]) -> Inputs:
    """Arguments of `encode_source` for one source."""
    torch.manual_seed(1)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    return {"image": image, "beta": torch.rand(1, 64), "camera": orbit(5), "landmarks": points}


def assert_same(a: Output, b: Output, atol: float = 0.0) -> None:
    for name, x, y in zip(Output._fields, a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_drive_of_encoded_source_equals_forward(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    beta, camera = torch.rand(3, 64), orbit(-20, 0, 20)
    with torch.no_grad():
        source = tiny.encode_source(**inputs)
        lam = torch.cat([tiny.coefficients(row) for row in beta.split(1)])  # a batch rounds differently
        single = [tiny.drive(source, lam[k : k + 1], camera[k : k + 1]) for k in range(3)]
        batched = tiny.drive(source.expand(3), lam, camera)
        for k in range(3):
            assert_same(single[k], tiny(*inputs.values(), beta[k : k + 1], camera[k : k + 1]))
            part = Output(*(t[k : k + 1] if isinstance(t, Tensor) else t for t in batched))
            assert_same(part, single[k], atol=1e-4)
    assert not torch.allclose(single[0].image, single[2].image, atol=1e-3)


def test_face_only_computes_the_face_as_in_the_whole_image(
    tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]
) -> None:
    with torch.no_grad():
        source, beta, camera = tiny.encode_source(**inputs), torch.rand(1, 64), orbit(-10)
        whole, face = (tiny.drive(source, tiny.coefficients(beta), camera, face_only=value) for value in (False, True))
        rows, columns = face.windows[0].slices(64)
        assert 24 < rows.stop - rows.start < 64
        assert whole.face is not None
        outline = (F.interpolate(whole.face, (64, 64)) > 0.5).expand(-1, 3, -1, -1)
        assert outline[..., rows, columns].sum() == outline.sum() > 500
        torch.testing.assert_close(face.image[outline], whole.image[outline], atol=0.02, rtol=0)
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[rows, columns] = False
        assert face.image[..., outside].abs().max() == 0
        photo = F.interpolate(inputs["image"], (128, 128), mode="bicubic")
        large, expected = face.upscale(photo, 128), whole.upscale(photo, 128)
        outline = F.interpolate(outline.float(), (128, 128)) > 0.5
        torch.testing.assert_close(large[outline], expected[outline], atol=0.05, rtol=0)


@pytest.mark.parametrize(("image_size", "plane_size"), [(96, 24), (192, 24), (320, 40)])
def test_face_only_works_at_every_image_size(
    image_size: int, plane_size: int, points: Tensor, orbit: Callable[..., Tensor], canonical: CanonicalFace
) -> None:
    model = Export3D(replace(PRESETS["tiny"], image_size=image_size, plane_size=plane_size)).eval()
    assert model.flow is not None
    model.flow.triangles.copy_(torch.from_numpy(canonical.flow_triangles))
    with torch.no_grad():
        photo = torch.rand(1, 3, image_size, image_size)
        source = model.encode_source(photo, torch.zeros(1, 64), orbit(5), points)
        output = model.drive(source.expand(2), model.coefficients(torch.zeros(2, 64)), orbit(-20, 20), face_only=True)
    assert output.image.shape == (2, 3, image_size, image_size)


def test_forward_output_shapes_and_ranges(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        out = tiny(*inputs.values(), torch.rand(1, 64), orbit(10), raw_size=8)
    assert {name: tuple(t.shape) for name, t in out._asdict().items() if isinstance(t, Tensor)} == {
        "image": (1, 3, 64, 64), "raw": (1, 3, 8, 8), "depth": (1, 1, 8, 8), "opacity": (1, 1, 8, 8),
        "residual_flow": (1, 2, 32, 32), "flow_weights": (1, 4, 32, 32), "face": (1, 1, 32, 32),
        "warped_photo": (1, 3, 32, 32),
        "source_visibility": (1, 1, 32, 32), "before_inpainting": (1, 3, 64, 64), "sample_grid": (1, 4, 64, 64),
        "blend_weights": (1, 2, 64, 64),
    }  # fmt: skip
    assert out.opacity.min() >= 0
    assert out.opacity.max() <= 1
    assert out.depth.min() > 2
    assert out.depth.max() < 3.5
    torch.testing.assert_close(out.flow_weights.sum(1), torch.ones(1, 32, 32))


def test_forward_is_deterministic_except_in_training(
    tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]
) -> None:
    drive = (*inputs.values(), torch.rand(1, 64), orbit(10))
    with torch.no_grad():
        assert_same(tiny(*drive), tiny(*drive))
        tiny.train()
        assert not torch.equal(tiny(*drive).raw, tiny(*drive).raw)


def test_drive_of_a_posed_head_or_without_a_wink_equals_drive(tiny: Export3D, inputs: Inputs) -> None:
    with torch.no_grad():
        source = tiny.encode_source(**inputs)
        expected = tiny.drive(source, tiny.coefficients(inputs["beta"]), inputs["camera"])
        assert_same(tiny.drive(source, source.lam, inputs["camera"]), expected)
        posed = tiny.pose_head(source, source.lam)
        assert_same(tiny.drive(source, source.lam, inputs["camera"], posed=posed), expected)


def test_drive_of_posed_head_with_many_cameras_equals_single_cameras(
    tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]
) -> None:
    cameras = orbit(-20, 0, 20)
    with torch.no_grad():
        source = tiny.encode_source(**inputs)
        lam = source.lam + torch.randn(1, 10)
        posed = tiny.pose_head(source, lam)
        batched = tiny.drive(source.expand(3), lam.expand(3, -1), cameras, posed=posed.expand(3))
        for k in range(3):
            single = tiny.drive(source, lam, cameras[k : k + 1])
            assert_same(Output(*(t[k : k + 1] if isinstance(t, Tensor) else t for t in batched)), single, atol=1e-4)


def test_source_basis_follows_the_weights(tiny: Export3D, inputs: Inputs) -> None:
    with torch.no_grad():
        source = tiny.encode_source(**inputs)
        changed = {**tiny.state_dict(), "expression.weight": torch.randn_like(tiny.expression.weight)}
        tiny.load_state_dict(changed)
        reencoded = tiny.encode_source(**inputs)
        assert source.basis is not None and reencoded.basis is not None
        torch.testing.assert_close(reencoded.basis, tiny.expression.basis(), atol=0, rtol=0)
        assert (reencoded.basis - source.basis).abs().max() > 0.1
    assert tiny.encode_source(**inputs).basis is None  # gradients must reach the weights
    tiny.drive(source, tiny.coefficients(torch.rand(1, 64)), inputs["camera"]).image.square().mean().backward()
    assert tiny.expression.weight.grad is not None


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("image", torch.zeros(1, 3, 32, 64), r"image must be \(1, 3, 64, 64\), got \(1, 3, 32, 64\)"),
        ("beta", torch.zeros(1, 50), r"beta must be \(1, 64\), got \(1, 50\)"),
        ("camera", torch.zeros(2, 25), r"camera must be \(1, 25\), got \(2, 25\)"),
        ("landmarks", torch.zeros(1, 68, 3), r"landmarks must be \(1, 478, 3\), got \(1, 68, 3\)"),
    ],
)
def test_encode_source_with_wrong_shape_raises(
    tiny: Export3D, inputs: Inputs, name: str, wrong: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode_source(**{**inputs, name: wrong})


def test_drive_with_wrong_shape_raises(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    source = tiny.encode_source(**inputs)
    with pytest.raises(ValueError, match=r"got \(1, 50\)"):
        tiny.coefficients(torch.zeros(1, 50))
    with pytest.raises(ValueError, match=r"got \(1, 16\)"):
        tiny.drive(source, source.lam, torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"lam must be \(B, 10\) or \(B, 35\), got \(1, 11\)"):
        tiny.drive(source, torch.zeros(1, 11), orbit(0))


def test_backward_reaches_every_parameter(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    tiny.train()
    out = tiny(*inputs.values(), torch.rand(1, 64), orbit(15))
    (out.image.square().mean() + out.raw.square().mean()).backward()
    without = {name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()
    assert all(torch.isfinite(p.grad).all() for p in tiny.parameters())


def test_forward_without_extensions(inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    """The switches of the `paper` preset at the tiny size."""
    off = {"source_skip": False, "source_plane": False, "head_prior": False, "flow": False}
    model = Export3D(replace(PRESETS["tiny"], **off)).eval()
    with torch.no_grad():
        out = model(*inputs.values(), torch.rand(1, 64), orbit(10))
    assert out.image.shape == (1, 3, 64, 64)
    assert out.residual_flow is None
    assert out.flow_weights is None


def test_density_tv_is_computed_in_training_only(tiny: Export3D, inputs: Inputs) -> None:
    drive = (inputs["image"], inputs["beta"], inputs["camera"], inputs["landmarks"], inputs["beta"], inputs["camera"])
    with torch.no_grad():
        assert tiny(*drive).density_tv is None
        tiny.train()
        assert tiny(*drive).density_tv > 0
        tiny.decoder.density.weight.zero_()  # constant density
        assert tiny(*drive).density_tv == 0


def test_background_torso_follows_the_neck_and_wall_stays(
    tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]
) -> None:
    """The background is rendered where the flow moves it; otherwise the old shoulders show through filled areas."""
    here, moved = inputs["camera"], inputs["camera"].clone()
    moved[:, 3] += 0.06
    person = torch.zeros(1, 1, 64, 64)
    person[..., 44:, :] = 1
    grid = identity_grid(16, here)
    with torch.no_grad():
        source = tiny.encode_source(**inputs, person_mask=person)
        lit = replace(source, background=torch.cat([grid] * 4, dim=1))  # colours are the original positions
        dark, white = (
            tiny.drive(replace(source, background=torch.full_like(lit.background, k)), source.lam, moved)
            for k in (0, 1)
        )
        out = tiny.drive(lit, lit.lam, moved)
    displacement = ((out.raw - dark.raw) / (white.raw - dark.raw))[:, :1] - grid[:, :1]
    torso = TORSO_FOLLOW_RATIO * (neck_flow(here, moved, 16) - grid)[0, 0, 0, 0]
    assert torso.abs() > 0.02
    torch.testing.assert_close(displacement[0, 0, -1, [4, -5]], torso.expand(2), atol=1e-2, rtol=0)
    torch.testing.assert_close(displacement[0, 0, 1, [4, -5]], torch.zeros(2), atol=1e-2, rtol=0)


def test_composite_background_fades_low_opacity(tiny: Export3D, inputs: Inputs) -> None:
    with torch.no_grad():
        source = tiny.encode_source(*inputs.values())
        assert source.background is not None
        opacity = torch.tensor([0.08, 0.3, 0.5, 1.0]).repeat(1, 1, 4, 1)
        features = opacity * torch.ones(1, source.background.shape[1], 4, 4)
        background = tiny._composite_background(source, torch.zeros_like(features), torch.zeros_like(opacity), None)
        composite = tiny._composite_background(source, features, opacity, None)
    torch.testing.assert_close(composite[..., 0], background[..., 0])
    torch.testing.assert_close(composite[..., 1], 0.15 + 0.85 * background[..., 1])
    torch.testing.assert_close(composite[..., 2:], (features + (1 - opacity) * background)[..., 2:])


def test_expression_moves_the_look_up_of_the_photo_s_features(tiny: Export3D, inputs: Inputs) -> None:
    """At a moved landmark the volume has the photo's features of the landmark where it was."""
    assert tiny.flow is not None
    tiny.flow.basis[0] = torch.tensor([0.03, 0.0, 0.0])
    with torch.no_grad():
        source = tiny.encode_source(**inputs)
        lam = source.lam + torch.eye(1, 10)
        nose = source.landmarks[:, 1:2]
        moved = nose + tiny.flow.basis[0, 1]
        assert source.view_plane is not None
        channels = source.view_plane.shape[1]
        with_motion, without = (
            tiny._sample_features(source, posed, moved, sample_face_field(moved, posed.surface))[..., -channels:]
            for posed in (tiny.pose_head(source, lam), tiny.pose_head(source, source.lam))
        )
        expected = sample_view_plane(source.view_plane, nose, source.camera)
        assert (with_motion - expected).norm() < 0.02 * (without - expected).norm()


def test_forward_with_rays_renders_these_pixels(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    beta, camera, rays = torch.rand(1, 64), orbit(10), torch.tensor([[3, 40, 36, 255]])
    source = tiny.encode_source(**inputs)
    whole = tiny.render(source, tiny.pose_head(source, tiny.expression.coefficients(beta)), camera, 16)
    out = tiny(*inputs.values(), beta, camera, raw_size=16, rays=rays)
    for part, full in ((out.image, whole[0][:, :3]), (out.depth, whole[1]), (out.opacity, whole[2])):
        torch.testing.assert_close(part[..., 0], full.flatten(2)[..., rays[0]], atol=1e-5, rtol=0)
