"""LPIPS (Zhang et al. 2018), the perceptual terms of eq. 13: VGG16 and learned weights of its channels.

Neither file is part of this package. The term is called LPIPS only if both files are the published ones, by their
sha256; with other weights it is called perceptual.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export3d_cli.core.config.schema import LossConfig
from export3d_cli.core.runtime.errors import ConfigError, InputError, WeightsError
from export3d_cli.core.runtime.hub import HubFile, fetch, file_sha256
from export3d_cli.core.train import losses

OFFICIAL_VGG16 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"  # torchvision, IMAGENET1K_V1
OFFICIAL_LINEAR_WEIGHTS = (
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"  # lpips/weights/v0.1/vgg.pth
)
LINEAR_WEIGHT_NAME = "lin{}.model.1.weight"  # (1, C, 1, 1), one per stage
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of RGB in [-1, 1], LPIPS' own
_CONVS_PER_STAGE = (2, 2, 3, 3, 3)  # convolutions of VGG16 before each pooling


class LPIPS(losses.PerceptualDistance):
    """Sum over VGG16's five stages of the weighted squared difference of unit-length features, averaged over pixels."""

    def __init__(self, stages: list[nn.Module], heads: list[Tensor], *, official: bool) -> None:
        r, g, b = (1 / s for s in _STD)
        super().__init__(stages, _MEAN, (r, g, b), bgr=False)
        self.name = "lpips" if official else "perceptual"
        self.title = (
            "LPIPS v0.1 on VGG16" if official else "VGG16 with linear weights, not the published files: not LPIPS"
        )
        for number, head in enumerate(heads):
            self.register_buffer(f"head{number}", head.view(1, -1, 1, 1))

    def forward(self, image: Tensor, target: Tensor, *, scales: int = 2) -> Tensor:
        """Return the mean distance of images (B, 3, H, W) in [-1, 1] over the batch and `scales` sizes."""
        total, image = image.new_zeros((), dtype=torch.float32), image.float()
        with torch.autocast(image.device.type, enabled=False):  # bf16 would not be the published distance
            for level in range(scales):
                if level:
                    image, target = F.avg_pool2d(image, 2), F.avg_pool2d(target, 2)
                with torch.no_grad():
                    target_features = self.features(target)
                for number, (x, y) in enumerate(zip(self.features(image), target_features, strict=True)):
                    head = getattr(self, f"head{number}")
                    total = total + ((x - y).square() * head).sum(1).mean() / scales
        return total

    def features(self, image: Tensor) -> list[Tensor]:
        """Return unit-length features after each stage, float32."""
        x = ((image.float() - self.mean) * self.scale).contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            x = stage(x)
            y = x.float()
            features.append(y * torch.rsqrt(y.square().sum(1, keepdim=True) + 1e-20))  # no gradient where all are 0
        return features


def load_perceptual_term(loss: LossConfig) -> losses.PerceptualDistance | None:
    """Return the perceptual term that `loss` configures (downloads hub files), or None without a backbone."""
    if not loss.backbone:
        return None
    backbone, backbone_sha256 = _resolve_file(loss.backbone, loss.backbone_sha256)
    heads_path, official_heads = backbone, False
    if loss.lpips:
        heads_path, heads_sha256 = _resolve_file(loss.lpips)
        official_heads = heads_sha256 == OFFICIAL_LINEAR_WEIGHTS
    heads = losses.read_tensors(heads_path, "loss.lpips", ("lin",))
    if not heads and not loss.lpips:
        return losses.load_perceptual(backbone)
    state = losses.read_tensors(backbone, "loss.backbone", ("features.",))
    try:
        stages = losses.build_vgg_stages(state, losses.VGG16_NAMES, _CONVS_PER_STAGE)
        weights = [heads[LINEAR_WEIGHT_NAME.format(number)] for number in range(len(_CONVS_PER_STAGE))]
        model = LPIPS(stages, weights, official=official_heads and backbone_sha256 == OFFICIAL_VGG16)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{backbone} and {heads_path} must hold VGG16 with torchvision's names and LPIPS' linear weights: {error}"
        ) from error
    widths = [
        int(state[f"{losses.VGG16_NAMES[sum(_CONVS_PER_STAGE[: k + 1]) - 1]}.bias"].numel())
        for k in range(len(_CONVS_PER_STAGE))
    ]
    if [w.numel() for w in weights] != widths:
        raise InputError(
            f"{heads_path} has weights for {[w.numel() for w in weights]} channels, the backbone has {widths}"
        )
    return model


def _resolve_file(name: str, sha256: str = "") -> tuple[Path, str]:
    """Return the local file of a path or hub name, and its sha256, checked if an expected one is known.

    It is known from the configuration, or from torchvision's file names, which end with its first eight digits.
    """
    path = fetch(HubFile.parse(name)) if name.startswith("hf:") else Path(name)
    if not path.is_file():
        raise ConfigError(
            f"loss.backbone and loss.lpips must be a file or hf:owner/repo:file, got {name!r}, which does not exist"
        )
    actual = file_sha256(path)
    in_name = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    expected = sha256.lower() or (in_name.group(1) if in_name else "")
    if not actual.startswith(expected):
        raise WeightsError(f"{name} has sha256 {actual[:12]}..., not {expected[:12]}...: download it again")
    return path, actual
