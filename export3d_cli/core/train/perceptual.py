"""The perceptual terms of eq. 13: features of a frozen VGG16 or MobileNetV2, or LPIPS (Zhang et al. 2018).

No network is part of this package. The term is called LPIPS only if VGG16 and the linear weights are the published
files, by their sha256; with other weights it is called perceptual.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from export3d_cli.core.config.schema import LossConfig
from export3d_cli.core.runtime.errors import ConfigError, InputError, WeightsError
from export3d_cli.core.runtime.weights import file_sha256, resolve_weights

OFFICIAL_VGG16 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"  # torchvision, IMAGENET1K_V1
OFFICIAL_LINEAR_WEIGHTS = (
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"  # lpips/weights/v0.1/vgg.pth
)
LINEAR_WEIGHT_NAME = "lin{}.model.1.weight"  # (1, C, 1, 1), one per stage
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LPIPS_MEAN, LPIPS_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1], LPIPS' own
VGG16_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's numbers of the convolutions
MOBILENET_STRIDES = {2: 2, 4: 2, 7: 2}  # of the blocks 1 to 10, else 1


class PerceptualDistance(nn.Module):
    """Squared differences of features of unit length, averaged over pixels and `scales` image sizes.

    With `heads`, the weights of every stage's channels, this is LPIPS. Without, the channels have equal weights and the
    stages are averaged: 0 for equal images, about 0.1 to 0.6 for different ones.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, stages: list[nn.Module], heads: list[Tensor], *, official: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)  # features are compared after each
        self.name = "lpips" if official else "perceptual"  # of the term in logs
        self.epsilon = 1e-20 if heads else 1e-6  # no gradient where all features are 0
        self.num_heads = len(heads)
        for number, head in enumerate(heads):
            self.register_buffer(f"head{number}", head.view(1, -1, 1, 1))
        mean = LPIPS_MEAN if heads else tuple(2 * m - 1 for m in IMAGENET_MEAN)
        std = LPIPS_STD if heads else tuple(2 * s for s in IMAGENET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([1 / s for s in std]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor, target: Tensor, *, scales: int = 2) -> Tensor:
        """Return the mean distance of images (B, 3, H, W) in [-1, 1]; gradients reach `image` only."""
        total = image.new_zeros((), dtype=torch.float32)
        enabled = torch.is_autocast_enabled(image.device.type) and not self.num_heads  # bf16 would not be LPIPS
        with torch.autocast(image.device.type, enabled=enabled):
            for level in range(scales):
                if level:
                    image, target = F.avg_pool2d(image, 2), F.avg_pool2d(target, 2)
                with torch.no_grad():
                    target_features = self.features(target)
                for number, (x, y) in enumerate(zip(self.features(image), target_features, strict=True)):
                    difference = (x - y).square()
                    if self.num_heads:
                        total = total + (difference * getattr(self, f"head{number}")).sum(1).mean() / scales
                    else:
                        total = total + difference.sum(1).mean() / (scales * len(self.stages))
        return total

    def features(self, image: Tensor) -> list[Tensor]:
        """Return unit-length features after each stage, float32."""
        x = ((image.float() - self.mean) * self.scale).contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            x = stage(x)
            y = x.float()
            features.append(y * torch.rsqrt(y.square().sum(1, keepdim=True) + self.epsilon))
        return features


def load_perceptual(loss: LossConfig, device: torch.device | str = "cpu") -> PerceptualDistance | None:
    """Return the perceptual term that `loss` configures (downloads hub files), or None without a backbone."""
    if not loss.backbone:
        return None
    backbone, backbone_sha256 = _resolve_file(loss.backbone)
    heads_path, heads_sha256 = _resolve_file(loss.lpips) if loss.lpips else (backbone, "")
    linear = _read_tensors(heads_path, "lin")
    state = _read_tensors(backbone, "features.")
    heads: list[Tensor] = []
    try:
        if "features.0.0.weight" in state and not loss.lpips:
            return PerceptualDistance(_build_mobilenet_stages(state), heads).to(device)
        is_weighted = bool(linear or loss.lpips)
        numbers = VGG16_STAGES if is_weighted else VGG16_STAGES[:4]
        stages = [_build_vgg_stage(state, stage, pool=bool(k)) for k, stage in enumerate(numbers)]
        if is_weighted:
            heads = [linear[LINEAR_WEIGHT_NAME.format(k)] for k in range(len(stages))]
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"loss.backbone {backbone} must hold VGG16 or MobileNetV2 features with torchvision's names, "
                         f"and loss.lpips LPIPS' linear weights: {error}") from error  # fmt: skip
    widths = [len(state[f"features.{stage[-1]}.bias"]) for stage in numbers]
    channels = [head.numel() for head in heads]
    if heads and channels != widths:
        raise InputError(f"{heads_path} has weights for {channels} channels, the backbone has {widths}")
    official = (backbone_sha256, heads_sha256) == (OFFICIAL_VGG16, OFFICIAL_LINEAR_WEIGHTS)
    return PerceptualDistance(stages, heads, official=official).to(device)


def _resolve_file(name: str) -> tuple[Path, str]:
    """Return the file of a path or hub name and its sha256, checked against torchvision's file names."""
    path = resolve_weights(name) if name.startswith("hf:") else Path(name)
    if not path.is_file():
        raise ConfigError("loss.backbone and loss.lpips must be a file or hf:owner/repo:file, "
                          f"got {name!r}, which does not exist")  # fmt: skip
    actual, expected = file_sha256(path), re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if expected and not actual.startswith(expected[1]):
        raise WeightsError(f"{name} has sha256 {actual[:12]}..., not {expected[1]}...: download it again")
    return path, actual


def _read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torchvision file whose names start with `prefix`, float32."""
    try:
        if path.suffix in (".pth", ".pt"):
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # loads no code
        else:
            tensors = load_file(path)
        return {k: v.float() for k, v in tensors.items() if k.startswith(prefix)}
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} cannot be read: {error}") from error


def _make_conv(weight: Tensor, bias: Tensor, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    out_channels, in_channels, size, _ = weight.shape
    conv = nn.Conv2d(in_channels * groups, out_channels, size, stride, size // 2, groups=groups)
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv


def _build_vgg_stage(state: dict[str, Tensor], numbers: tuple[int, ...], *, pool: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
    for number in numbers:
        layers += [_make_conv(state[f"features.{number}.weight"], state[f"features.{number}.bias"]), nn.ReLU()]
    return nn.Sequential(*layers)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _build_mobilenet_stages(state: dict[str, Tensor]) -> list[nn.Module]:
    """Return the first 11 blocks of MobileNetV2, batch norms folded, in stages at H/2, H/4, H/8 and H/16."""

    def fold_norm(conv: str, norm: str, stride: int = 1) -> nn.Conv2d:
        gain = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-5)
        weight = state[f"{conv}.weight"]
        groups = len(weight) if weight.shape[1] == 1 else 1
        bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain
        return _make_conv(weight * gain[:, None, None, None], bias, stride, groups)

    blocks: list[nn.Module] = [nn.Sequential(fold_norm("features.0.0", "features.0.1", 2), nn.ReLU6())]
    for i in range(1, 11):
        name, stride = f"features.{i}.conv", MOBILENET_STRIDES.get(i, 1)
        depthwise = 0 if i == 1 else 1  # the first block has no expansion layer
        layers: list[nn.Module] = []
        if depthwise:
            layers += [fold_norm(f"{name}.0.0", f"{name}.0.1"), nn.ReLU6()]
        layers += [fold_norm(f"{name}.{depthwise}.0", f"{name}.{depthwise}.1", stride), nn.ReLU6()]
        last = fold_norm(f"{name}.{depthwise + 1}", f"{name}.{depthwise + 2}")
        in_channels = state[f"{name}.0.0.weight"].shape[1 if depthwise else 0]
        block = _Residual if stride == 1 and in_channels == last.out_channels else nn.Sequential
        blocks.append(block(*layers, last))
    return [nn.Sequential(*blocks[a:b]) for a, b in ((0, 2), (2, 4), (4, 7), (7, 11))]
