"""Loss terms against closed forms; perceptual backbones with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.face.landmarks import LEFT_EYE, OUTER_LIPS, RIGHT_EYE
from export3d_cli.core.model.export3d import Output
from export3d_cli.core.model.warp.mesh_flow import resize
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.train import losses
from export3d_cli.core.train.clebs_stage import identity_leakage_loss, mirror_loss
from export3d_cli.core.train.objective import reconstruction_loss
from export3d_cli.core.train.pair_sampler import Batch

from .conftest import motion_of


def mobilenet() -> dict[str, torch.Tensor]:
    """Random tensors with torchvision's names, first 11 blocks."""
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, out_channels: int, in_channels: int, size: int) -> None:
        state[f"{name}.weight"] = (
            torch.randn(out_channels, in_channels, size, size) * (in_channels * size * size) ** -0.5
        )

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(channels) + 0.5, torch.randn(channels)
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.randn(channels), torch.rand(channels) + 0.5

    conv("features.0.0", 32, 3, 3)
    norm("features.0.1", 32)
    widths = [32, 16, 24, 24, 32, 32, 32, 64, 64, 64, 64]
    for i in range(1, 11):
        name, inside = f"features.{i}.conv", widths[i - 1]
        wide = inside * (6 if i > 1 else 1)
        if i > 1:
            conv(f"{name}.0.0", wide, inside, 1)
            norm(f"{name}.0.1", wide)
        d = 1 if i > 1 else 0
        conv(f"{name}.{d}.0", wide, 1, 3)
        norm(f"{name}.{d}.1", wide)
        conv(f"{name}.{d + 1}", widths[i], wide, 1)
        norm(f"{name}.{d + 2}", widths[i])
    return state


def vgg(torchvision: bool) -> dict[str, torch.Tensor]:
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512]
    theirs = [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21)]
    caffe = [f"conv{b}_{k}" for b, count in ((1, 2), (2, 2), (3, 3), (4, 3)) for k in range(1, count + 1)]
    state = {}
    for name, inside, out in zip(theirs if torchvision else caffe, widths[:-1], widths[1:], strict=True):
        state[f"{name}.weight"] = torch.randn(out, inside, 3, 3) * (9 * inside) ** -0.5
        state[f"{name}.bias"] = torch.zeros(out)
    return state


@pytest.mark.parametrize("state", [mobilenet(), vgg(True), vgg(False)], ids=["mobilenet", "vgg16", "vgg16-caffe"])
def test_perceptual_distance_matches_its_formula(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "backbone.safetensors")
    distance = losses.load_perceptual(tmp_path / "backbone.safetensors")
    target = torch.rand(1, 3, 32, 32) * 2 - 1
    image = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    assert distance(target, target).item() == pytest.approx(0, abs=1e-6)
    near, far = distance(target + 0.02 * torch.randn_like(target), target), distance(image, target)
    assert 0 < near.item() < far.item()
    far.backward()
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()
    assert not any(p.requires_grad for p in distance.parameters())


def test_folded_batch_norm_is_batch_norm() -> None:
    state = mobilenet()
    x = torch.randn(1, 3, 16, 16)
    slow = torch.nn.functional.conv2d(x, state["features.0.0.weight"], stride=2, padding=1)
    slow = torch.nn.functional.batch_norm(
        slow, *(state[f"features.0.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    ).clamp(0, 6)
    torch.testing.assert_close(losses._build_mobilenet_stages(state)[0][0](x), slow, atol=1e-4, rtol=1e-4)


def test_unknown_backbone_is_an_input_error(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="must hold VGG16 or MobileNetV2 features"):
        losses.load_perceptual(tmp_path / "x.safetensors")


def test_mask_covers_eyes_and_mouth_only() -> None:
    landmarks = motion_of(0, 1).landmarks[..., :2]
    mask = losses.face_mask(torch.from_numpy(landmarks), 64)
    assert mask.shape == (1, 1, 64, 64)

    def mask_at(point: np.ndarray) -> float:
        x, y = (point * 64).astype(int)
        return float(mask[0, 0, y, x])

    eye = landmarks[0, [33, 133]].mean(0)
    mouth = landmarks[0, [13, 14]].mean(0)
    assert mask_at(eye) > 0.9
    assert mask_at(mouth) > 0.9
    assert mask_at(landmarks[0, 10]) < 0.05
    assert mask_at(landmarks[0, 152]) < 0.2
    assert mask.mean() < 0.15


def test_mask_loss_is_limited_to_the_mask() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    a, b = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    assert losses.mask_loss(a, b, mask).item() == 0.5
    assert losses.l2(a, b).item() == losses.l1(a, b).item() == 1.0


def test_identity_leakage_loss_is_fishers_criterion() -> None:
    torch.manual_seed(0)
    lam = torch.randn(30, 400, 5)
    lam = lam - lam.mean(1, keepdim=True)
    assert identity_leakage_loss(lam) < 1e-8
    means = torch.randn(30, 1, 5)
    apart = (means - means.mean(0)).square().mean((0, 1))  # in variances of 1 within a person
    assert identity_leakage_loss(lam + means) == pytest.approx(apart.mean().item(), rel=0.05)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    assert identity_leakage_loss(3 * (lam + means) @ turn) == pytest.approx(
        identity_leakage_loss(lam + means).item(), rel=1e-2
    )


def test_mirror_loss_flips_the_antisymmetric_dims() -> None:
    lam = torch.randn(50, 4)
    mirrored = lam * torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert mirror_loss(lam, mirrored, 1) == 0
    assert mirror_loss(lam, mirrored, 0) == pytest.approx((4 * lam[:, 3] ** 2).mean().item() / 4 / lam.var(0).mean())


def test_crop_eyes_and_mouth_centres_and_sizes() -> None:
    """The image holds its own coordinates, which tell where the crops are."""
    axis = (torch.arange(64) + 0.5) / 64
    image = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None].expand(2, -1, -1, -1)
    marks = torch.rand(2, 478, 2) * 0.01
    for centre, wide, region in ((0.3, 0.1, LEFT_EYE), (0.6, 0.1, RIGHT_EYE), (0.5, 0.2, OUTER_LIPS)):
        marks[:, list(region)] = centre
        marks[:, region[0], 0], marks[:, region[1], 0] = centre - wide / 2, centre + wide / 2
    seen = losses.crop_eyes_and_mouth(image, marks, 8)
    assert seen.shape == (6, 2, 8, 8)
    for k, (centre, wide) in enumerate(((0.3, 0.1), (0.6, 0.1), (0.5, 0.2))):
        part = seen[2 * k : 2 * k + 2]
        torch.testing.assert_close(part.mean((2, 3)), torch.full((2, 2), centre), atol=1e-3, rtol=0)
        width = part[:, 0, :, -1] - part[:, 0, :, 0]
        torch.testing.assert_close(width, torch.full((2, 8), 1.4 * wide * 7 / 8), atol=1e-3, rtol=0)


def test_flow_loss_covers_visible_parts_at_several_scales() -> None:
    target, known = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 8, 8)
    known[..., :4] = 1
    config = make_train_config({"loss": {"l2": 0, "raw": 0, "perceptual": 0, "flow": 2}})
    alternating = torch.ones(1, 3, 16, 16)
    alternating[..., 1::2] = -1  # differences of single pixels cancel out in cells
    marks = torch.zeros(1, 478, 2)
    batch = Batch(target, marks, marks, marks, known, target, marks, marks, marks, marks, known)
    for sampled, wanted in ((torch.ones(1, 3, 16, 16), 2 * 0.5), (alternating, 2 * 0.5 / 3)):
        shown = resize(known, 16).mean().item() / 0.5  # the mask has a soft border
        output = Output(
            target, target, known, known, None, None, warped_photo=sampled.requires_grad_(), source_visibility=known
        )
        total, terms = reconstruction_loss(output, batch, config, None)
        assert terms["flow"] == pytest.approx(wanted * shown, rel=0.15)
        total.backward()
        assert sampled.grad is not None and sampled.grad[..., :6].abs().max() > 0
        assert not sampled.grad[..., 10:].any()


def test_silhouette_and_density_tv_terms() -> None:
    config = make_train_config({"loss": {"l2": 0, "raw": 0, "perceptual": 0, "silhouette": 2, "density_tv": 3}})
    image, head = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    head[..., :4] = 1
    opacity = torch.full((1, 1, 4, 4), 0.25)
    output = Output(image, image, opacity, opacity, None, None, torch.tensor([0.5]))
    camera, beta = torch.zeros(1, 25), torch.zeros(1, 64)
    marks = torch.zeros(1, 478, 2)
    batch = Batch(image, beta, camera, beta, head, image, beta, camera, marks, marks, head)
    total, terms = reconstruction_loss(output, batch, config, None, head_mask=head)
    assert terms["silhouette"] == pytest.approx(2 * 0.5) and terms["density_tv"] == pytest.approx(3 * 0.5)
    assert float(total) == pytest.approx(2.5)
