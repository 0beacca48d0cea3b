"""Hybrid tri-plane generator G(S, beta'): convolutions, EAdaLN-ViT, upsampling to planes (sec. 3.2, eq. 4 to 6, 12)."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.model.cached_tensors import cached_tensor


def leaky_relu(x: Tensor) -> Tensor:
    """Apply leaky ReLU of slope 0.2."""
    return F.leaky_relu(x, 0.2)


def zero_init(layer: nn.Module) -> None:
    """Set every parameter of `layer` to 0, so that a residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def lowpass(x: Tensor) -> Tensor:
    """Apply a 3x3 Gaussian filter (1 2 1) to (B, C, h, w); removes pixel shuffle's grid artefacts. Keeps the dtype."""
    tap = cached_tensor((0.25, 0.5, 0.25), x.device, x.dtype)
    kernel = (tap[:, None] * tap).expand(x.shape[1], 1, 3, 3)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute self-attention of (B, heads, N, d); written out for half precision on a CPU: twice as fast there."""
    if q.device.type != "cpu" or q.dtype == torch.float32 or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=q.dtype) @ v


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        return x + self.second(leaky_relu(self.first(leaky_relu(x))))


class Stem(nn.Module):
    """Convolution blocks that extract photo features at H/2, H/4 and H/8. Runs once per source."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = (3, *config.stem)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(ResBlock(b) for b in config.stem)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to [(B, c2, H/2, W/2), (B, c4, H/4, W/4), (B, c8, H/8, W/8)]."""
        features, x = [], image
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(down(x))
            features.append(x)
            x = leaky_relu(x)
        return features


class EAdaLN(nn.Module):
    """Expression-adaptive layer norm: sigma(beta') * LN(x) + mu(beta') (eq. 5); plain LN if `code_dim` is None."""

    def __init__(self, width: int, code_dim: int | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=code_dim is None)
        self.affine = nn.Linear(code_dim, 2 * width) if code_dim is not None else None
        if self.affine is not None:  # sigma = 1, mu = 0: training starts unconditioned
            zero_init(self.affine)

    def forward(self, x: Tensor, code: Tensor | None) -> Tensor:
        """Normalise tokens (B, N, h) with the expression code beta' (B, d)."""
        x = self.norm(x)
        if self.affine is None:
            return x
        sigma, mu = self.affine(code).chunk(2, dim=-1)  # each (B, h)
        return (1 + sigma)[:, None] * x + mu[:, None]


class MixFFN(nn.Module):
    """SegFormer's feed-forward: linear, 3x3 depthwise convolution, GELU, linear."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, ratio * width)
        self.depthwise = nn.Conv2d(ratio * width, ratio * width, 3, padding=1, groups=ratio * width)
        self.outer = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, h), a grid of s x s tokens, to the same shape."""
        B, N, _ = x.shape
        s = int(N**0.5)
        x = self.inner(x)
        x = self.depthwise(x.transpose(1, 2).reshape(B, -1, s, s)).flatten(2).transpose(1, 2)
        return self.outer(F.gelu(x))


class CrossAttention(nn.Module):
    """Ablation: image tokens attend to a few tokens computed from beta', instead of EAdaLN."""

    CODE_TOKENS = 8

    def __init__(self, width: int, heads: int, code_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tokens = nn.Linear(code_dim, self.CODE_TOKENS * code_dim)
        self.attention = nn.MultiheadAttention(width, heads, kdim=code_dim, vdim=code_dim, batch_first=True)
        zero_init(self.attention.out_proj)  # training starts unconditioned, as with EAdaLN

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Return the residual (B, N, h) for tokens (B, N, h) and beta' (B, d)."""
        tokens = self.tokens(code).unflatten(1, (self.CODE_TOKENS, -1))  # (B, 8, d)
        return self.attention(self.norm(x), tokens, tokens, need_weights=False)[0]


class ViTBlock(nn.Module):
    """ViT block: multi-head self-attention and Mix-FFN, each after (EAda)LN."""

    def __init__(self, width: int, heads: int, ratio: int, code_dim: int | None, conditioning: str = "eadaln") -> None:
        super().__init__()
        self.heads = heads
        self.cross = None
        if code_dim is not None and conditioning == "cross_attention":
            self.cross = CrossAttention(width, heads, code_dim)
            code_dim = None
        self.norm1 = EAdaLN(width, code_dim)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = EAdaLN(width, code_dim)
        self.ffn = MixFFN(width, ratio)

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, h) with beta' (B, d) to the same shape."""
        B, N, h = x.shape
        qkv = self.qkv(self.norm1(x, code)).view(B, N, 3, self.heads, h // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, h/heads)
        x = x + self.out(attention(q, k, v).transpose(1, 2).reshape(B, N, h))
        if self.cross is not None and code is not None:
            x = x + self.cross(x, code)
        return x + self.ffn(self.norm2(x, code))


class Generator(nn.Module):
    """Tri-plane generator: source features and beta' to a tri-plane."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        h, c8, heads, ratio = config.width, config.stem[2], config.heads, config.ffn_ratio
        self.stem = Stem(config)
        self.merge = nn.Conv2d(c8, h, 3, stride=2, padding=1)  # overlap patch merge (SegFormer)
        self.merge_norm = nn.LayerNorm(h)
        self.blocks = nn.ModuleList(
            ViTBlock(h, heads, ratio, config.code_dim, config.conditioning) for _ in range(config.eadaln_blocks)
        )
        # pixel shuffle to H/8, ViT blocks without EAdaLN, then pixel shuffles and convolutions up to P
        w = config.plain_width or h // 2
        self.to_half = nn.Conv2d(h, 4 * w, 1)
        self.join_half = nn.Conv2d(w + (c8 if config.source_skip else 0), w, 1)
        self.plain = nn.ModuleList(ViTBlock(w, heads, ratio, None) for _ in range(config.plain_blocks))
        ups, joins, blocks = [], [], []
        size, channels = config.image_size // 8, w
        skips = [config.stem[1], config.stem[0]]
        while size < config.plane_size:
            size *= 2
            ups.append(nn.Conv2d(channels, 4 * config.plane_width, 1))
            extra = skips.pop(0) if config.source_skip and skips else 0
            joins.append(nn.Conv2d(config.plane_width + extra, config.plane_width, 1))
            blocks.append(ResBlock(config.plane_width))
            channels = config.plane_width
        self.ups, self.joins, self.convs = nn.ModuleList(ups), nn.ModuleList(joins), nn.ModuleList(blocks)
        self.to_planes = nn.Conv2d(channels, 3 * config.plane_channels, 3, padding=1)
        P = config.plane_size
        self.register_buffer("plane_ema", torch.zeros(3, config.plane_channels, P, P))
        self.plane_ema: Tensor
        # a list collects the means for `update_plane_ema`: a step may split its batch into parts or over devices
        self.plane_means: list[Tensor] | None = None

    def encode(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute what depends on the photo alone: stem features and tokens (B, N, h)."""
        stem = self.stem(image)
        tokens = self.merge(leaky_relu(stem[2])).flatten(2).transpose(1, 2)  # (B, H*W/256, h)
        return stem, self.merge_norm(tokens)

    def forward(self, stem: list[Tensor], tokens: Tensor, code: Tensor) -> Tensor:
        """Generate the tri-plane (B, 3, C, P, P) from stem features, tokens (B, N, h) and beta' (B, d)."""
        cfg = self.config
        x = tokens
        for block in self.blocks:
            x = block(x, code)  # (B, N, h)
        B, N, _ = x.shape
        s = int(N**0.5)
        x = x.transpose(1, 2).reshape(B, -1, s, s)  # (B, h, H/16, W/16)
        x = self._pixel_shuffle(self.to_half(x))  # (B, w, H/8, W/8), w = plain_width
        x = self.join_half(torch.cat([x, stem[2]], 1) if cfg.source_skip else x)
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.plain:
            tokens = block(tokens)
        x = tokens.transpose(1, 2).reshape(x.shape)
        for up, join, conv, skip in zip(self.ups, self.joins, self.convs, [stem[1], stem[0], None], strict=False):
            x = self._pixel_shuffle(up(x))  # (B, plane_width, 2s, 2s)
            x = conv(join(torch.cat([x, skip], 1) if cfg.source_skip and skip is not None else x))
        planes = self.to_planes(leaky_relu(x)).float().view(B, 3, cfg.plane_channels, cfg.plane_size, cfg.plane_size)
        return self._add_plane_ema(planes)

    def _pixel_shuffle(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(x, 2)
        return lowpass(x) if self.config.lowpass else x

    def _add_plane_ema(self, planes: Tensor) -> Tensor:
        """Add the online EMA of the tri-planes of earlier batches (eq. 12)."""
        delta = self.config.plane_ema
        if not delta:
            return planes
        out = planes + self.plane_ema
        if self.training:
            with torch.no_grad():
                if self.plane_means is None:
                    self.update_plane_ema(planes.detach().mean(0))
                else:
                    self.plane_means.append(planes.detach().mean(0))
        return out

    def update_plane_ema(self, mean: Tensor) -> None:
        """Update the EMA of eq. 12 with the mean tri-plane (3, C, P, P) of one step's batch."""
        self.plane_ema.mul_(self.config.plane_ema).add_(mean, alpha=1 - self.config.plane_ema)
