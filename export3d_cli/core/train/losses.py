"""Loss terms of the reconstruction stage (sec. 6.3) and beyond the paper. Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from export3d_cli.core.face.landmarks import LEFT_EYE, OUTER_LIPS, RIGHT_EYE
from export3d_cli.core.model.cached_tensors import index_tensor
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.mesh_flow import resize, warp
from export3d_cli.core.runtime.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CAFFE_BGR = (103.939, 116.779, 123.68)
VGG16_NAMES = [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]  # torchvision's


def l2(image: Tensor, target: Tensor) -> Tensor:
    """Return an L2 term of eq. 13: the mean squared difference."""
    return F.mse_loss(image.float(), target.float())


def l1(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference (beyond the paper): blurs less than L2."""
    return F.l1_loss(image.float(), target.float())


def downsample(image: Tensor, size: int) -> Tensor:
    """Return the target of the raw terms of eq. 13: D at the side of the raw render."""
    return F.interpolate(image, size=(size, size), mode="area") if image.shape[-1] != size else image


def face_mask(landmarks: Tensor, size: int, *, grow: float = 1.5) -> Tensor:
    """Return a soft mask of eyes and mouth: landmarks (B, 478, 2) in crop units -> (B, 1, size, size) in 0..1.

    Each region is the ellipse of its landmarks' covariance, scaled by `grow`, so that it rotates with the head.
    """
    pixels = pixel_grid(size, landmarks.device).view(size, size, 2)
    mask = torch.zeros(len(landmarks), size, size, device=landmarks.device)
    for region in (LEFT_EYE, RIGHT_EYE, OUTER_LIPS):
        points = landmarks[:, index_tensor(region, landmarks)].float()  # (B, R, 2)
        centre = points.mean(1)  # (B, 2)
        deviation = points - centre[:, None]
        covariance = deviation.transpose(1, 2) @ deviation / len(region)  # (B, 2, 2)
        # closed eyes and lips are lines: no region is thinner than 3 % of the crop
        covariance = covariance + (0.015**2) * torch.eye(2, device=landmarks.device)
        # closed form: torch.linalg.inv synchronises with the device
        a, b, d = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
        inverse = torch.stack([d, -b, -b, a], dim=-1).view(-1, 2, 2) / (a * d - b * b)[:, None, None]
        offset = pixels[None] - centre[:, None, None]  # (B, H, W, 2)
        # points on an ellipse lie at a squared Mahalanobis distance of 2 from its centre
        distance = ((offset @ inverse[:, None]) * offset).sum(-1) / (2 * grow**2)
        mask = torch.maximum(mask, torch.sigmoid(6 * (1 - distance)))
    return mask[:, None]


def crop_eyes_and_mouth(image: Tensor, landmarks: Tensor, side: int) -> Tensor:
    """Return square crops of eyes and mouth, 1.4 times as wide as each, (3 B, C, side, side).

    Args:
        image: (B, C, H, W). landmarks: (B, 478, 2) crop units.
    """
    offsets = pixel_grid(side, image.device).T.view(2, side, side) - 0.5
    crops = []
    for region in (LEFT_EYE, RIGHT_EYE, OUTER_LIPS):
        points = landmarks[:, index_tensor(region, landmarks)].float()  # (B, R, 2)
        low, high = points.amin(1), points.amax(1)
        width = 1.4 * (high - low).amax(1).clamp_min(0.01)
        crops.append(warp(image, (low + high)[:, :, None, None] / 2 + offsets * width[:, None, None, None]))
    return torch.cat(crops)


def flow_loss(sampled: Tensor, target: Tensor, source_visibility: Tensor) -> Tensor:
    """Return the photometric loss of the flow: the warped source against the target, where the source shows it.

    Differences are averaged over cells of 1, 4 and 8 pixels, so that a flow that is far off gets a gradient, too.

    Args:
        sampled: (B, 3, h, w). target: (B, 3, H, W). source_visibility: (B, 1, m, m) in 0..1; no gradient reaches it.
    """
    size = sampled.shape[-1]
    difference = (sampled.float() - downsample(target.float(), size)) * resize(source_visibility.detach().float(), size)
    cells = [difference, F.avg_pool2d(difference, 4), F.avg_pool2d(difference, 8)]
    return torch.stack([x.abs().mean() for x in cells]).mean()


def mask_loss(image: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the absolute difference inside eyes and mouth, averaged over the whole image (PlaneDict's mask loss)."""
    return (mask * (image.float() - target.float()).abs()).mean()


class PerceptualDistance(nn.Module):
    """Multi-scale perceptual distance, the LPIPS terms of eq. 13, on a frozen VGG16 or MobileNetV2.

    Features are normalised to unit length at every pixel; squared differences are summed over channels and averaged
    over pixels, layers and scales: 0 for equal images, about 0.1 to 0.6 for different ones. Has no learned weights.
    """

    name = "perceptual"  # of the term in logs; "lpips" only with the official weights
    title = "features of a frozen backbone, compared without learned weights"
    mean: Tensor
    scale: Tensor

    def __init__(
        self, stages: list[nn.Module], mean: tuple[float, ...], scale: tuple[float, ...], *, bgr: bool
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)  # features are compared after each
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor, target: Tensor, *, scales: int = 2) -> Tensor:
        """Return the distance of two batches of images; gradients reach `image` only."""
        total = image.new_zeros((), dtype=torch.float32)
        for level in range(scales):
            if level:
                image, target = F.avg_pool2d(image, 2), F.avg_pool2d(target, 2)
            with torch.no_grad():
                target_features = self.features(target)
            for x, y in zip(self.features(image), target_features, strict=True):
                total = total + (x - y).square().sum(1).mean() / (scales * len(target_features))
        return total

    def features(self, image: Tensor) -> list[Tensor]:
        """Return unit-length features after each stage, float32."""
        x = image.flip(1) if self.bgr else image
        x = (x.float() - self.mean) * self.scale
        x = x.contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            x = stage(x)
            y = x.float()
            features.append(y * torch.rsqrt(y.square().sum(1, keepdim=True) + 1e-6))
        return features


def read_tensors(path: Path, label: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of a file whose names start with one of `prefixes`, float32; `label` names it in errors."""
    try:
        if path.suffix in (".pth", ".pt"):  # torchvision's file, e.g. vgg16-397923af.pth; loads no code
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(path)
        return {k: v.float() for k, v in tensors.items() if k.startswith(prefixes)}
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{label} {path} cannot be read: {error}") from error


def load_perceptual(path: Path | str) -> PerceptualDistance:
    """Load a frozen VGG16 or MobileNetV2, recognised by its tensors' names, from safetensors or torchvision's .pth."""
    path = Path(path)
    state = read_tensors(path, "loss.backbone", ("conv", "features."))
    try:
        if "conv1_1.weight" in state:
            names = [f"conv{b}_{k}" for b, count in enumerate((2, 2, 3, 3, 3), 1) for k in range(1, count + 1)]
            mean = tuple(2 * m / 255 - 1 for m in _CAFFE_BGR)
            return PerceptualDistance(build_vgg_stages(state, names), mean, (127.5,) * 3, bgr=True)
        mean = tuple(2 * m - 1 for m in IMAGENET_MEAN)
        scale = tuple(0.5 / s for s in IMAGENET_STD)
        if "features.0.0.weight" in state:
            return PerceptualDistance(_build_mobilenet_stages(state), mean, scale, bgr=False)
        if "features.0.weight" in state:
            return PerceptualDistance(build_vgg_stages(state, VGG16_NAMES), mean, scale, bgr=False)
    except KeyError as error:
        raise InputError(f"loss.backbone {path} lacks the tensor {error}") from error
    raise InputError(f"loss.backbone {path} must hold VGG16 or MobileNetV2 features, got tensors {sorted(state)[:3]}")


def _make_conv(weight: Tensor, bias: Tensor, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    out_channels, in_channels, size, _ = weight.shape
    conv = nn.Conv2d(in_channels * groups, out_channels, size, stride, size // 2, groups=groups)
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv


def build_vgg_stages(
    state: dict[str, Tensor], names: list[str], counts: tuple[int, ...] = (2, 2, 3, 3)
) -> list[nn.Module]:
    """Return VGG16's convolutions in stages that end before each pooling, `counts` convolutions each."""
    stages: list[nn.Module] = []
    first = 0
    for block, count in enumerate(counts):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if block else []
        for name in names[first : first + count]:
            layers += [_make_conv(state[f"{name}.weight"], state[f"{name}.bias"]), nn.ReLU()]
        first += count
        stages.append(nn.Sequential(*layers))
    return stages


class _InvertedResidual(nn.Module):
    """MobileNetV2's inverted residual block, with batch norms folded into the convolutions."""

    def __init__(self, layers: nn.Sequential, *, residual: bool) -> None:
        super().__init__()
        self.layers, self.residual = layers, residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


def _build_mobilenet_stages(state: dict[str, Tensor]) -> list[nn.Module]:
    """Return the first 11 blocks in stages at H/2, H/4, H/8 and H/16."""

    def fold_norm(conv: str, norm: str, stride: int = 1) -> nn.Conv2d:
        gain = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-5)
        weight = state[f"{conv}.weight"]
        groups = len(weight) if weight.shape[1] == 1 else 1
        bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain
        return _make_conv(weight * gain[:, None, None, None], bias, stride, groups)

    blocks: list[nn.Module] = [nn.Sequential(fold_norm("features.0.0", "features.0.1", 2), nn.ReLU6())]
    strides = {2: 2, 4: 2, 7: 2}
    for i in range(1, 11):
        name, stride = f"features.{i}.conv", strides.get(i, 1)
        depthwise = 0 if i == 1 else 1  # the first block has no expansion layer
        layers: list[nn.Module] = []
        if depthwise:
            layers += [fold_norm(f"{name}.0.0", f"{name}.0.1"), nn.ReLU6()]
        layers += [fold_norm(f"{name}.{depthwise}.0", f"{name}.{depthwise}.1", stride), nn.ReLU6()]
        last = fold_norm(f"{name}.{depthwise + 1}", f"{name}.{depthwise + 2}")
        in_channels = state[f"{name}.0.0.weight"].shape[1 if depthwise else 0]
        residual = stride == 1 and in_channels == last.out_channels
        blocks.append(_InvertedResidual(nn.Sequential(*layers, last), residual=residual))
    return [nn.Sequential(*blocks[a:b]) for a, b in ((0, 2), (2, 4), (4, 7), (7, 11))]
