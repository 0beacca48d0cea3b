"""The adversarial loss (sec. 6.3, 6.4): StyleGAN2-ADA's discriminator, conditioned on the camera."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import CAMERA_DIM, AdversarialConfig
from export3d_cli.core.model.generator import leaky_relu

LRELU_GAIN = math.sqrt(2)  # keeps the variance after a leaky ReLU
FINAL_SIZE_PX = 4  # side of the features after the last block
MAPPING_DIM = 128  # largest dimension of the mapped camera
MAPPING_LR_MULTIPLIER = 0.01  # the mapping network learns more slowly


class EqualizedLinear(nn.Module):
    """Linear layer with an equalised learning rate: weights of unit variance, scaled in the forward pass."""

    def __init__(self, in_features: int, out_features: int, *, lr_multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale, self.lr_multiplier = lr_multiplier / math.sqrt(in_features), lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_multiplier)


class EqualizedConv2d(nn.Module):
    """Convolution with an equalised learning rate; `downsample` low-pass filters and halves the side."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, downsample: bool = False,
                 bias: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale, self.downsample = 1 / math.sqrt(in_channels * kernel_size * kernel_size), downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w), or (B, C', h/2, w/2) with `downsample`."""
        side = self.weight.shape[-1]
        if not self.downsample:
            return F.conv2d(x, self.weight * self.scale, self.bias, padding=side // 2)
        if side == 1:  # filtering and subsampling first gives the same result
            return F.conv2d(blur(x, stride=2), self.weight * self.scale, self.bias)
        return F.conv2d(blur(x, pad=1), self.weight * self.scale, self.bias, stride=2)


def blur(x: Tensor, *, stride: int = 1, pad: int = 0) -> Tensor:
    """Low-pass filter (B, C, h, w) by 1 3 3 1 in both directions; new side (h + 2 * pad - (stride == 1)) / stride."""
    tap = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    C = x.shape[1]
    x = F.conv2d(x, tap.view(1, 1, 1, 4).expand(C, 1, 1, 4), padding=(0, 1 + pad), groups=C, stride=(1, stride))
    return F.conv2d(x, tap.view(1, 1, 4, 1).expand(C, 1, 4, 1), padding=(1 + pad, 0), groups=C, stride=(stride, 1))


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the side."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = EqualizedConv2d(in_channels, in_channels, 3)
        self.second = EqualizedConv2d(in_channels, out_channels, 3, downsample=True)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, downsample=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h/2, w/2)."""
        y = LRELU_GAIN * leaky_relu(self.first(x))
        y = LRELU_GAIN * leaky_relu(self.second(y))
        return (self.skip(x) + y) * math.sqrt(0.5)


def minibatch_stddev(x: Tensor, group_size: int) -> Tensor:
    """Append the standard deviation over groups of images as a channel: (B, C, h, w) -> (B, C + 1, h, w)."""
    B, _, h, w = x.shape
    G = math.gcd(min(group_size, B), B)
    y = x.view(B // G, G, *x.shape[1:])
    deviation = (y.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # (B/G,)
    return torch.cat([x, deviation.repeat_interleave(G).view(B, 1, 1, 1).expand(B, 1, h, w)], dim=1)


class CameraMapping(nn.Module):
    """Mapping network: the 25 numbers of the camera -> the direction that the last features are projected on."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.embed = EqualizedLinear(CAMERA_DIM, dim)
        self.layers = nn.ModuleList(
            EqualizedLinear(dim, dim, lr_multiplier=MAPPING_LR_MULTIPLIER) for _ in range(layers)
        )

    def forward(self, camera: Tensor) -> Tensor:
        """(B, 25) -> (B, dim)."""
        x = self.embed(camera)
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)
        for layer in self.layers:
            x = LRELU_GAIN * leaky_relu(layer(x))
        return x


class Discriminator(nn.Module):
    """Image and camera -> logit of the image being real. Always fp32."""

    def __init__(self, image_size: int, config: AdversarialConfig) -> None:
        super().__init__()

        def width(side: int) -> int:
            return max(min(config.channel_max, config.channel_base // side), 1)

        self.mbstd_group_size = config.mbstd_group_size
        self.colours = EqualizedConv2d(3, width(image_size), 1)
        blocks, side = [], image_size
        while side > FINAL_SIZE_PX and side % 2 == 0:
            blocks.append(DiscriminatorBlock(width(side), width(side // 2)))
            side //= 2
        self.blocks = nn.Sequential(*blocks)
        last, dim = width(side), min(config.channel_max, MAPPING_DIM)
        self.last = EqualizedConv2d(last + 1, last, 3)
        self.dense = EqualizedLinear(last * side * side, last)
        self.out = EqualizedLinear(last, dim)
        self.mapping = CameraMapping(dim, config.mapping_layers)

    def forward(self, image: Tensor, camera: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], (B, 25) -> logits (B,), positive for real."""
        with torch.autocast(image.device.type, enabled=False):
            x = LRELU_GAIN * leaky_relu(self.colours(image.float()))  # (B, C, H, W)
            x = self.blocks(x)  # (B, C, 4, 4)
            x = LRELU_GAIN * leaky_relu(self.last(minibatch_stddev(x, self.mbstd_group_size)))
            x = self.out(LRELU_GAIN * leaky_relu(self.dense(x.flatten(1))))  # (B, dim)
            return (x * self.mapping(camera.float())).sum(1) / math.sqrt(x.shape[1])


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the binary cross-entropy of the logits (B,) of real and generated images."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(discriminator: nn.Module, image: Tensor, camera: Tensor) -> Tensor:
    """Return R1 without its factor gamma / 2: the mean squared norm of the logit's gradient by a real image."""
    image = image.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(image, camera).sum(), image, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def make_discriminator_optimizer(discriminator: nn.Module, config: AdversarialConfig) -> torch.optim.Adam:
    """Return Adam, corrected for lazy R1 as described in `AdversarialConfig`."""
    c = config.r1_interval / (config.r1_interval + 1) if config.r1_gamma > 0 else 1.0
    betas = (config.betas[0] ** c, config.betas[1] ** c)
    return torch.optim.Adam(discriminator.parameters(), lr=config.lr * c, betas=betas, eps=1e-8)
