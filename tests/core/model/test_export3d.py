"""The wired model: encode once and drive many, shapes at the door, gradients, determinism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.model.export3d import Export3D, Output
from export3d_cli.core.model.warp.flow_blending import TORSO_FOLLOW_RATIO, neck_flow
from export3d_cli.core.model.warp.mesh_flow import identity_grid

Inputs = dict[str, Tensor]


@pytest.fixture
def inputs(points: Tensor, orbit: Callable[..., Tensor]) -> Inputs:
    """One source."""
    torch.manual_seed(1)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    return {"image": image, "beta": torch.rand(1, 64), "camera": orbit(5), "points": points}


def same(a: Output, b: Output, atol: float = 0.0) -> None:
    for name, x, y in zip(Output._fields, a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_encode_once_and_drive_many_is_forward(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    beta, camera = torch.rand(3, 64), orbit(-20, 0, 20)
    with torch.no_grad():
        source = tiny.encode_source(**inputs)
        each = [tiny.drive(source, beta[k : k + 1], camera[k : k + 1]) for k in range(3)]
        at_once = tiny.drive(source.expand(3), beta, camera)
        for k in range(3):
            same(each[k], tiny(*inputs.values(), beta[k : k + 1], camera[k : k + 1]))
            part = Output(*(t if t is None else t[k : k + 1] for t in at_once))
            same(part, each[k], atol=1e-4)
    assert not torch.allclose(each[0].image, each[2].image, atol=1e-3)


def test_shapes_and_ranges(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    with torch.no_grad():
        out = tiny(*inputs.values(), torch.rand(1, 64), orbit(10), raw_size=8)
    assert {name: tuple(t.shape) for name, t in out._asdict().items() if isinstance(t, Tensor)} == {
        "image": (1, 3, 64, 64), "raw": (1, 3, 8, 8), "depth": (1, 1, 8, 8), "opacity": (1, 1, 8, 8),
        "offset": (1, 2, 32, 32), "weights": (1, 4, 32, 32), "sampled": (1, 3, 32, 32),
        "known": (1, 1, 32, 32), "bare": (1, 3, 64, 64), "ways": (1, 4, 64, 64), "shares": (1, 2, 64, 64),
    }  # fmt: skip
    assert out.opacity.min() >= 0
    assert out.opacity.max() <= 1
    assert out.depth.min() > 2
    assert out.depth.max() < 3.5
    torch.testing.assert_close(out.weights.sum(1), torch.ones(1, 32, 32))


def test_evaluation_repeats_and_training_does_not(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    drive = (*inputs.values(), torch.rand(1, 64), orbit(10))
    with torch.no_grad():
        same(tiny(*drive), tiny(*drive))
        tiny.train()
        assert not torch.equal(tiny(*drive).raw, tiny(*drive).raw)


def test_lambda_stands_in_for_beta(tiny: Export3D, inputs: Inputs) -> None:
    with torch.no_grad():
        source = tiny.encode_source(**inputs)
        by_beta = tiny.drive(source, inputs["beta"], inputs["camera"])
        same(tiny.drive(source, None, inputs["camera"], lam=source.lam), by_beta)
        posed = tiny.pose_head(source, source.lam)
        same(tiny.drive(source, None, inputs["camera"], lam=source.lam, posed=posed), by_beta)
        with pytest.raises(ValueError, match="beta or lam"):
            tiny.drive(source, None, inputs["camera"])


def test_a_pose_seen_by_many_cameras_is_seen_by_each(
    tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]
) -> None:
    cameras = orbit(-20, 0, 20)
    with torch.no_grad():
        source = tiny.encode_source(**inputs)
        lam = source.lam + torch.randn(1, 10)
        posed = tiny.pose_head(source, lam)
        at_once = tiny.drive(source.expand(3), None, cameras, lam=lam.expand(3, -1), posed=posed.expand(3))
        for k in range(3):
            alone = tiny.drive(source, None, cameras[k : k + 1], lam=lam)
            same(Output(*(t if t is None else t[k : k + 1] for t in at_once)), alone, atol=1e-4)


def test_the_basis_of_a_source_is_that_of_the_weights(tiny: Export3D, inputs: Inputs) -> None:
    with torch.no_grad():
        source = tiny.encode_source(**inputs)
        changed = {**tiny.state_dict(), "expression.weight": torch.randn_like(tiny.expression.weight)}
        tiny.load_state_dict(changed)
        anew = tiny.encode_source(**inputs)
        assert source.basis is not None and anew.basis is not None
        torch.testing.assert_close(anew.basis, tiny.expression.basis(), atol=0, rtol=0)
        assert (anew.basis - source.basis).abs().max() > 0.1
    assert tiny.encode_source(**inputs).basis is None  # gradients have to reach the weights
    tiny.drive(source, torch.rand(1, 64), inputs["camera"]).image.square().mean().backward()
    assert tiny.expression.weight.grad is not None


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("image", torch.zeros(1, 3, 32, 64), r"image must be \(1, 3, 64, 64\), got \(1, 3, 32, 64\)"),
        ("beta", torch.zeros(1, 50), r"beta must be \(1, 64\), got \(1, 50\)"),
        ("camera", torch.zeros(2, 25), r"camera must be \(1, 25\), got \(2, 25\)"),
        ("points", torch.zeros(1, 68, 3), r"points must be \(1, 478, 3\), got \(1, 68, 3\)"),
    ],
)
def test_wrong_shapes_are_named(tiny: Export3D, inputs: Inputs, name: str, wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.encode_source(**{**inputs, name: wrong})


def test_wrong_drivers_are_named(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    source = tiny.encode_source(**inputs)
    with pytest.raises(ValueError, match=r"got \(1, 50\)"):
        tiny.drive(source, torch.zeros(1, 50), orbit(0))
    with pytest.raises(ValueError, match=r"got \(1, 16\)"):
        tiny.drive(source, torch.zeros(1, 64), torch.zeros(1, 16))


def test_gradients_reach_every_parameter(tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    tiny.train()
    out = tiny(*inputs.values(), torch.rand(1, 64), orbit(15))
    (out.image.square().mean() + out.raw.square().mean()).backward()
    without = {name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()
    assert all(torch.isfinite(p.grad).all() for p in tiny.parameters())


def test_the_paper_wiring_runs_too(inputs: Inputs, orbit: Callable[..., Tensor]) -> None:
    """The paper's preset at a tiny size."""
    off = {"source_skip": False, "source_plane": False, "head_prior": False, "flow": False}
    model = Export3D(replace(PRESETS["tiny"], **off)).eval()
    with torch.no_grad():
        out = model(*inputs.values(), torch.rand(1, 64), orbit(10))
    assert out.image.shape == (1, 3, 64, 64)
    assert out.offset is None
    assert out.weights is None


def test_roughness_is_that_of_the_volume_and_only_learnt_from(tiny: Export3D, inputs: Inputs) -> None:
    drive = (inputs["image"], inputs["beta"], inputs["camera"], inputs["points"], inputs["beta"], inputs["camera"])
    with torch.no_grad():
        assert tiny(*drive).rough is None
        tiny.train()
        assert tiny(*drive).rough > 0
        tiny.decoder.density.weight.zero_()  # the same everywhere
        assert tiny(*drive).rough == 0


def test_a_torso_behind_the_volume_follows_the_neck_and_a_wall_stays(
    tiny: Export3D, inputs: Inputs, orbit: Callable[..., Tensor]
) -> None:
    """What is behind the head is rendered where the flow moves it, else old shoulders shine through what is filled."""
    here, moved = inputs["camera"], inputs["camera"].clone()
    moved[:, 3] += 0.06
    person = torch.zeros(1, 1, 64, 64)
    person[..., 44:, :] = 1
    own = identity_grid(16, here)
    with torch.no_grad():
        source = tiny.encode_source(**inputs, person_mask=person)
        lit = replace(source, still=torch.cat([own, own, own, own], dim=1))  # each pixel tells where it was
        dark, white = (
            tiny.drive(replace(source, still=torch.full_like(lit.background, k)), inputs["beta"], moved) for k in (0, 1)
        )
        out = tiny.drive(lit, inputs["beta"], moved)
    went = ((out.raw - dark.raw) / (white.raw - dark.raw))[:, :1] - own[:, :1]
    torso = TORSO_FOLLOW_RATIO * (neck_flow(here, moved, 16) - own)[0, 0, 0, 0]
    assert torso.abs() > 0.02
    torch.testing.assert_close(went[0, 0, -1, [4, -5]], torso.expand(2), atol=1e-2, rtol=0)
    torch.testing.assert_close(went[0, 0, 1, [4, -5]], torch.zeros(2), atol=1e-2, rtol=0)


def test_scraps_in_the_air_are_left_out_and_what_is_solid_stays(tiny: Export3D, inputs: Inputs) -> None:
    with torch.no_grad():
        source = tiny.encode_source(*inputs.values())
        assert source.background is not None
        opacity = torch.tensor([0.08, 0.3, 0.5, 1.0]).repeat(1, 1, 4, 1)
        features = opacity * torch.ones(1, source.background.shape[1], 4, 4)
        behind = tiny._composite_background(source, torch.zeros_like(features), torch.zeros_like(opacity), None)
        seen = tiny._composite_background(source, features, opacity, None)
    torch.testing.assert_close(seen[..., 0], behind[..., 0])
    torch.testing.assert_close(seen[..., 1], 0.15 + 0.85 * behind[..., 1])
    torch.testing.assert_close(seen[..., 2:], (features + (1 - opacity) * behind)[..., 2:])
