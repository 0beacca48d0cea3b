"""Super-resolution (sec. 3.3): plain convolution blocks, (B, C', H/4, W/4) -> (B, 3, H, W).

With a flow (beyond the paper), colours and features of the photos, sampled along it, are concatenated at each size. A
residual flow of a few pixels corrects it, and the last block blends the sampled colour with its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.model.encoded_source import Source
from export3d_cli.core.model.generator import ResBlock, leaky_relu, zero_init
from export3d_cli.core.model.masks import WHOLE, Window, dilate, linear_step
from export3d_cli.core.model.warp.flow_blending import LayeredFlow
from export3d_cli.core.model.warp.layer_warp import make_layer_warp, warp_discontinuity
from export3d_cli.core.model.warp.mesh_flow import MeshFlow, resize, warp

PHOTO_FEATURES = 16  # channels of the photo features sampled along the flow
MAX_RESIDUAL_FLOW = 4 / 256  # image sizes
SEAM_DIVISOR = 64  # the head's mask is dilated by 1 / 64 of its side, to include seams where a photo shows both sides
# The rest is tuned on the compact weights.
# Added to the blend's logit where the photo is visible: blurring the photo with a guess costs expression.
PHOTO_LOGIT_BIAS = 7.5
BLEND_FADE = (0.15, 0.35)  # blend weights up to which the photo counts as rejected and from which it is trusted
DISCONTINUITY_FADE = (1.7, 2.6)  # photo distance of neighbouring pixels, in photo pixels: all and no high-pass detail


class PhotoDetail(NamedTuple):
    """What super-resolution reads from the photo, and where."""

    source: Source
    mesh: MeshFlow
    flow: LayeredFlow
    code: Tensor  # (B, d) beta': a smile shows teeth, a pout does not, with the same mouth opening
    cover: Tensor | None = None  # (B, 1, m, m) 1 on what is before mouth or eyes


class SuperResolutionOutput(NamedTuple):
    """Result of super-resolution; without a flow only the image."""

    image: Tensor  # (B, 3, H, W)
    residual_flow: Tensor | None = None  # (B, 2, H/2, W/2), in image sizes
    warped_photo: Tensor | None = None  # (B, 3, H/2, W/2) photo colours sampled along the flow
    source_visibility: Tensor | None = None  # (B, 1, m, m) 1 where the photo shows the pixel
    sample_grid: Tensor | None = None  # (B, 2 L, H, W) see `LayerWarp`
    blend_weights: Tensor | None = None  # (B, L, H, W) weights of the photos' detail, see `LayerWarp`


def upsample_2x(x: Tensor) -> Tensor:
    """Upsample (B, C, h, w) bilinearly to (B, C, 2h, 2w); channels_last is six times as fast on a CPU."""
    if x.shape[1] > 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def upsample_concat_conv(conv: nn.Conv2d, x: Tensor, others: list[Tensor]) -> Tensor:
    """Apply a 3x3 convolution to `upsample_2x(x)` and `others` (B, ., h, w), concatenated, without building that."""
    first, second = conv.weight.split([x.shape[1], conv.in_channels - x.shape[1]], dim=1)
    dense = torch.cat([part.to(x.dtype) for part in others], dim=1).contiguous(memory_format=torch.channels_last)
    return F.conv2d(upsample_2x(x), first, conv.bias, padding=1) + F.conv2d(dense, second, padding=1)


class HiddenTextures(nn.Module):
    """Learned textures of teeth and eyes, for photos with closed mouth or eyes; they move with skull, jaw and iris."""

    texture_size = (24, 48)  # rows and columns
    texture_channels = 8  # per texture
    out_channels = 2 * texture_channels + 1  # of `forward`

    def __init__(self) -> None:
        super().__init__()
        # upper teeth, lower teeth, eye
        self.textures = nn.Parameter(torch.randn(3, self.texture_channels, *self.texture_size) * 0.3)

    def forward(self, mesh: MeshFlow, size: int, window: Window = WHOLE) -> Tensor:
        """Render (B, 17, size, size), or a window: upper teeth or eye, lower teeth, eye mask; 0 outside."""
        parts = (mesh.mouth, mesh.eye, mesh.anchored_coords)
        mouth, eye, coordinates = (window.crop(resize(x, size)) for x in parts)
        # coordinates fade to 0 at the mask's border; dividing by the mask keeps the texture from sliding there
        coordinates = (coordinates / (mouth + eye).clamp_min(0.1)).permute(0, 2, 3, 1)
        upper_grid, lower_grid = coordinates.split(2, dim=3)  # (B, h, w, 2)
        upper_teeth, lower_teeth, iris = self.textures.split(1)
        upper = _sample(upper_teeth, upper_grid) * mouth + _sample(iris, upper_grid) * eye
        return torch.cat([upper, _sample(lower_teeth, lower_grid) * mouth, eye], dim=1)


def _sample(texture: Tensor, grid: Tensor) -> Tensor:
    texture = texture.float().expand(len(grid), -1, -1, -1)
    return F.grid_sample(texture, grid, align_corners=False, padding_mode="border")


class SuperResolution(nn.Module):
    """Two upsampling stages; with `config.flow` the blocks also read `PhotoDetail`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c2, c1 = config.superres
        self.uses_flow = config.flow
        hidden = HiddenTextures.out_channels if config.flow else 0
        extra = (PHOTO_FEATURES + 8, 3 + PHOTO_FEATURES + 4 + hidden, 3 + 4 + hidden) if config.flow else (0, 0, 0)
        self.enter = nn.Conv2d(config.raw_channels + extra[0], c2, 3, padding=1)
        self.block4 = ResBlock(c2)
        self.to2 = nn.Conv2d(c2 + extra[1], c2, 3, padding=1)
        self.block2 = ResBlock(c2)
        self.to1 = nn.Conv2d(c2 + extra[2], c1, 3, padding=1)
        self.block1 = ResBlock(c1)
        self.colour = nn.Conv2d(c1, 4 if config.flow else 3, 3, padding=1)
        zero_init(self.colour)
        if config.flow:
            self.hidden_textures = HiddenTextures()
            self.detail2 = nn.Conv2d(config.stem[0], PHOTO_FEATURES, 1)
            self.detail4 = nn.Conv2d(config.stem[1], PHOTO_FEATURES, 1)
            self.offset = nn.Conv2d(c2, 2, 3, padding=1)
            zero_init(self.offset)
            self.expression = nn.Linear(config.code_dim, c2)
            zero_init(self.expression)

    def forward(self, features: Tensor, detail: PhotoDetail | None = None,
                window: Window = WHOLE) -> SuperResolutionOutput:  # fmt: skip
        """Map features (B, C', H/4, W/4), RGB first, to the image and intermediate results.

        With `detail`, image and blend weights are computed only in the `window`, whose borders are pixels of the
        features; they are 0 outside. Up to a tenth of the image inside its borders, values depend on the window.
        """
        quarter = features.shape[-1]
        half, full = 2 * quarter, 4 * quarter
        if detail is not None:
            features = window.crop(features)
        rgb_half = upsample_2x(features[:, :3].float())  # (B, 3, H/2, W/2)
        rgb = upsample_2x(rgb_half)  # (B, 3, H, W)
        if detail is None:
            x = self.block4(self.enter(features))  # (B, c2, H/4, W/4)
            x = self.block2(self.to2(upsample_2x(leaky_relu(x))))  # (B, c2, H/2, W/2)
            x = self.block1(self.to1(upsample_2x(leaky_relu(x))))  # (B, c1, H, W)
            return SuperResolutionOutput(rgb + self.colour(leaky_relu(x)).float())

        source, mesh, flow, code, cover = detail
        assert source.head_mask is not None
        head = dilate(source.head_mask, source.head_mask.shape[-1] // SEAM_DIVISOR)
        background_visibility = 1 - warp(head, flow.background)  # (B, 1, m, m)
        face, rigid, background = flow.weights[:, :1], flow.weights[:, 1:2], 1 - flow.head_weight
        visibility = face * mesh.valid + rigid + background * background_visibility  # (B, 1, m, m)

        facts = torch.cat([face, rigid, background, visibility, mesh.stretch, mesh.mouth, mesh.mouth_coords], dim=1)
        layers = make_layer_warp(flow, background_visibility, quarter).crop(window)
        facts = window.crop(resize(facts, quarter))
        x = torch.cat([features, layers.sample(source.collect("features_quarter")), facts], dim=1)
        x = leaky_relu(self.block4(self.enter(x)))  # (B, c2, H/4, W/4)

        facts = resize(torch.cat([visibility, mesh.mouth, mesh.mouth_coords], dim=1), half)
        layers = make_layer_warp(flow, background_visibility, half).crop(window)
        warped_half = layers.sample_over(source.collect("image_half"), rgb_half)  # (B, 3, H/2, W/2)
        photo_half = [warped_half, layers.sample(source.collect("features_half")), window.crop(facts)]
        x = upsample_concat_conv(self.to2, x, [*photo_half, self.hidden_textures(mesh, half, window)])
        x = leaky_relu(self.block2(x + self.expression(code)[:, :, None, None]))  # (B, c2, H/2, W/2)
        residual_flow = MAX_RESIDUAL_FLOW * torch.tanh(self.offset(x).float())  # (B, 2, H/2, W/2)

        residual_flow = window.pad(residual_flow, half)
        facts = window.crop(resize(facts, full))
        whole = make_layer_warp(flow, background_visibility, full, residual_flow)
        layers = whole.crop(window)
        warped = layers.sample_over(source.collect("image"), rgb)  # (B, 3, H, W)
        x = upsample_concat_conv(self.to1, x, [warped, facts, self.hidden_textures(mesh, full, window)])
        x = self.block1(x)  # (B, c1, H, W)
        colour, logit = self.colour(leaky_relu(x)).float().split([3, 1], dim=1)
        blend = torch.sigmoid(4 * logit + PHOTO_LOGIT_BIAS * facts[:, :1] - 3)  # starts with the photo where visible
        # closed lips must not be copied into an open mouth
        blend = blend * (1 - window.crop(resize(mesh.closed_in_photo, full)))
        if cover is not None:
            blend = torch.maximum(blend, window.crop(resize(cover, full)))
        synthesised = rgb + colour
        if source.colours is not None:
            synthesised = source.colours.range.limit(synthesised)
        image = blend * warped + (1 - blend) * synthesised
        weights = blend * layers.blend_weights  # (B, L, H, W)
        if source.highpass is not None:
            # On a moving head the blend takes about half from the photo, and nothing else has its high-pass detail. All
            # of it may be shown where the photo is visible, unless the blend rejects the photo.
            shown, mouth = facts[:, :2].split(1, dim=1)
            missing = (shown * (1 - mouth) - blend).clamp_min(0) * linear_step(blend, *BLEND_FADE)  # (B, 1, H, W)
            # No detail where photo positions jump: at outlines and on faces seen from the side. Every second pixel
            # suffices, as the grid has no finer structure.
            jump = warp_discontinuity(whole.sample_grid[..., ::2, ::2])
            continuous = window.crop(resize(1 - linear_step(jump, *DISCONTINUITY_FADE), full))
            for k, fine in zip((0, *range(2, weights.shape[1])), source.collect("highpass"), strict=True):  # the head's
                share = missing * layers.blend_weights[:, k : k + 1]
                weights[:, k : k + 1] += share
                grid = layers.sample_grid[:, 2 * k : 2 * k + 2]
                image = image + share * continuous[:, k : k + 1] * warp(fine, grid)
            weights = weights * continuous
        image, weights, warped_half = window.pad(image, full), window.pad(weights, full), window.pad(warped_half, half)
        return SuperResolutionOutput(image, residual_flow, warped_half, visibility, whole.sample_grid, weights)
