"""Perceptual distances with random weights against their formula, and when a term is called LPIPS."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.config.schema import LossConfig, TrainConfig
from export3d_cli.core.runtime.errors import ConfigError, InputError, WeightsError
from export3d_cli.core.train import perceptual
from export3d_cli.core.train.trainer import train

CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's layer numbers
WIDTHS = (4, 4, 6, 6, 8, 8, 8, 10, 10, 10, 10, 10, 10)
STAGES = {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}  # after which convolution a stage ends


def vgg16() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    state, inside = {}, 3
    for number, width in zip(CONVS, WIDTHS, strict=True):
        state[f"features.{number}.weight"] = torch.randn(width, inside, 3, 3, generator=rng) * (9 * inside) ** -0.5
        state[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=rng)
        inside = width
    return {**state, "classifier.0.weight": torch.zeros(1)}  # torchvision's file holds more than features


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


def heads() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=rng) for i, c in enumerate((4, 6, 8, 10, 10))}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """The two files in their published format: pickles of tensors."""
    torch.save(vgg16(), tmp_path / "vgg16.pth")
    torch.save(heads(), tmp_path / "vgg.pth")
    return str(tmp_path / "vgg16.pth"), str(tmp_path / "vgg.pth")


def by_hand(image: torch.Tensor, target: torch.Tensor) -> float:
    """Zhang et al. 2018, eq. 1, in float64, layer by layer."""
    state = {k: v.double() for k, v in vgg16().items()}
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((i.double() - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for i in (image, target))
    total = 0.0
    for number in CONVS:
        if number in (5, 10, 17, 24):
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
        x, y = F.conv2d(x, weight, bias, padding=1).relu(), F.conv2d(y, weight, bias, padding=1).relu()
        stage = STAGES.get(number)
        if stage is not None:
            u, v = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
            total += float(((u - v).square() * heads()[f"lin{stage}.model.1.weight"].double()).sum(1).mean())
    return total


def images() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    target = torch.rand(2, 3, 32, 32, generator=rng) * 2 - 1
    return target + 0.3 * torch.randn(2, 3, 32, 32, generator=rng), target


def test_lpips_matches_the_published_formula(files: tuple[str, str]) -> None:
    model = perceptual.load_perceptual(LossConfig(backbone=files[0], lpips=files[1]))
    assert model is not None and model.num_heads == 5
    image, target = images()
    assert model(image, target, scales=1).item() == pytest.approx(by_hand(image, target), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(image, target, scales=1).item() == pytest.approx(by_hand(image, target), rel=1e-5)
    half = [F.avg_pool2d(x, 2) for x in (image, target)]
    both = (by_hand(image, target) + by_hand(half[0], half[1])) / 2
    assert model(image, target).item() == pytest.approx(both, rel=1e-5)
    assert model(target, target).item() == 0


@pytest.mark.parametrize("state", [mobilenet(), vgg16()], ids=["mobilenet", "vgg16"])
def test_distance_without_linear_weights(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "backbone.safetensors")
    distance = perceptual.load_perceptual(LossConfig(backbone=str(tmp_path / "backbone.safetensors")))
    assert distance is not None
    image, target = images()
    image.requires_grad_()
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
    torch.testing.assert_close(perceptual._build_mobilenet_stages(state)[0][0](x), slow, atol=1e-4, rtol=1e-4)


def test_gradient_is_finite_where_all_features_are_zero(files: tuple[str, str]) -> None:
    model = perceptual.load_perceptual(LossConfig(backbone=files[0], lpips=files[1]))
    assert model is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_() if parameter.ndim == 1 else parameter.abs_().neg_()
    image = torch.full((1, 3, 32, 32), 2.0, requires_grad=True)
    model(image, torch.full((1, 3, 32, 32), 1.0)).backward()
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()


def test_only_the_published_files_are_called_lpips(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LossConfig(backbone=files[0], lpips=files[1])

    def name() -> str:
        model = perceptual.load_perceptual(loss)
        assert model is not None
        return model.name

    assert name() == "perceptual"
    known = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files]
    monkeypatch.setattr(perceptual, "OFFICIAL_LINEAR_WEIGHTS", known[1])
    assert name() == "perceptual"
    monkeypatch.setattr(perceptual, "OFFICIAL_VGG16", known[0])
    assert name() == "lpips"


def test_one_file_can_hold_backbone_and_linear_weights(tmp_path: Path, files: tuple[str, str]) -> None:
    save_file({**vgg16(), **heads()}, tmp_path / "both.safetensors")
    both = perceptual.load_perceptual(LossConfig(backbone=str(tmp_path / "both.safetensors")))
    two = perceptual.load_perceptual(LossConfig(backbone=files[0], lpips=files[1]))
    assert both is not None
    assert two is not None
    assert torch.equal(both(*images()), two(*images()))
    assert both.name == "perceptual"


def test_wrong_files_are_refused(files: tuple[str, str], tmp_path: Path) -> None:
    loss = LossConfig(backbone=files[0], lpips=files[1])
    wrong = tmp_path / "vgg16-397923af.pth"  # torchvision's name holds the first digits of the sha256
    wrong.write_bytes(Path(files[0]).read_bytes())
    with pytest.raises(WeightsError, match=r"not 397923af"):
        perceptual.load_perceptual(replace(loss, backbone=str(wrong)))
    with pytest.raises(ConfigError, match="which does not exist"):
        perceptual.load_perceptual(replace(loss, lpips=str(tmp_path / "none.pth")))
    save_file({"features.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "short.safetensors")
    with pytest.raises(InputError, match="must hold VGG16"):
        perceptual.load_perceptual(replace(loss, backbone=str(tmp_path / "short.safetensors")))
    save_file({**heads(), "lin2.model.1.weight": torch.ones(1, 5, 1, 1)}, tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"has weights for \[4, 6, 5, 10, 10\] channels"):
        perceptual.load_perceptual(replace(loss, lpips=str(tmp_path / "wide.safetensors")))
    with pytest.raises(ConfigError, match=r"needs loss\.backbone"):
        make_train_config({"loss": {"lpips": "vgg.pth"}})


def test_hub_files_are_downloaded(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str) -> Path:
        asked.append(name)
        return Path(files[0] if name.endswith("vgg16.pth") else files[1])

    monkeypatch.setattr(perceptual, "resolve_weights", fetch)
    model = perceptual.load_perceptual(
        LossConfig(backbone="hf:someone/vgg:vgg16.pth", lpips="hf:someone/vgg@v1:vgg.pth")
    )
    assert model is not None and model.num_heads == 5
    assert asked == ["hf:someone/vgg:vgg16.pth", "hf:someone/vgg@v1:vgg.pth"]


def test_run_logs_lpips_only_with_the_published_files(
    files: tuple[str, str], tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = LossConfig(backbone=files[0], lpips=files[1])
    config = replace(tiny, stages=("reconstruction",), steps=1, loss=loss)
    train(config)
    log = (Path(config.run) / "stats.jsonl").read_text()
    assert {"perceptual", "perceptual_raw"} <= json.loads(log).keys()
    assert "lpips" not in log.lower()
    monkeypatch.setattr(perceptual, "OFFICIAL_VGG16", hashlib.sha256(Path(files[0]).read_bytes()).hexdigest())
    monkeypatch.setattr(perceptual, "OFFICIAL_LINEAR_WEIGHTS", hashlib.sha256(Path(files[1]).read_bytes()).hexdigest())
    official = replace(config, run=config.run + "-official")
    train(official)
    assert {"lpips", "lpips_raw"} <= json.loads((Path(official.run) / "stats.jsonl").read_text()).keys()
