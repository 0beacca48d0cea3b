"""Super-resolution (sec. 3.3): plain convolution blocks, (B, C', H/4, W/4) -> (B, 3, H, W).

With a flow (beyond the paper), colours and features of the photo, sampled along it, are concatenated at each size. A
residual flow of a few pixels corrects it, and the last block blends the sampled colour with its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.model.cached_tensors import cached_tensor
from export3d_cli.core.model.generator import ResBlock, leaky_relu, lowpass, zero_init
from export3d_cli.core.model.masks import dilate, linear_step
from export3d_cli.core.model.source import Source
from export3d_cli.core.model.warp.flow_blending import LayeredFlow
from export3d_cli.core.model.warp.mesh_flow import MeshFlow, resize, warp

PHOTO_FEATURES = 16  # channels of the photo features sampled along the flow
MAX_RESIDUAL_FLOW = 4 / 256  # image sizes
# Three rows of the upsampled image around an even and an odd row, as sums of three rows of the small image.
PHASE_WEIGHTS = (((0.75, 0.25, 0.0), (0.25, 0.75, 0.75), (0.0, 0.0, 0.25)),
                 ((0.25, 0.0, 0.0), (0.75, 0.75, 0.25), (0.0, 0.25, 0.75)))  # fmt: skip
WINDOW_STEP_PX = 32  # sides of a `PatchWindow` are multiples of this, so that few shapes occur
SEAM_DIVISOR = 64  # masks are dilated by 1 / 64 of the image side ...
FRINGE_DIVISOR = 16  # ... and by 1 / 16 where stray hair may reach
# The rest is tuned on the compact weights.
# Added to the blend's logit where the photo is visible: blurring the photo with a guess costs expression.
PHOTO_LOGIT_BIAS = 7.5
BLEND_FADE = (0.15, 0.35)  # blend weights up to which the photo counts as rejected and from which it is trusted
LAYER_GAP = 1 / 8  # distance of both layers' flows, in image sizes, from which the photo's own outline is not reused
DISCONTINUITY_FADE = (1.7, 2.6)  # photo distance of neighbouring pixels, in photo pixels: all and no high-pass detail


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


def upsample_concat_conv_inference(conv: nn.Conv2d, x: Tensor, others: list[Tensor], window: PatchWindow) -> Tensor:
    """Compute `upsample_concat_conv` with the window, zero-padded, as the last of `others`; CPU without gradients."""
    channels = [x.shape[1], sum(part.shape[1] for part in others)]
    first, second, third = conv.weight.split([*channels, conv.in_channels - sum(channels)], dim=1)
    out = upsample_conv(first, x)
    dense = torch.cat([part.to(x.dtype) for part in others], dim=1).contiguous(memory_format=torch.channels_last)
    out += F.conv2d(dense, second, conv.bias, padding=1)
    if window.values.numel():
        height, width = window.values.shape[-2:]
        target = out[:, :, window.top : window.top + height, window.left : window.left + width]
        target += F.conv2d(window.values.to(x.dtype), third, padding=1)
    return out


def upsample_conv(weight: Tensor, x: Tensor) -> Tensor:
    """Apply a zero-padded 3x3 convolution to `upsample_2x(x)`, as one convolution of `x` per output phase.

    (K, C, 3, 3), (B, C, h, w) -> (B, K, 2h, 2w). As many multiplications, without the large intermediate.
    """
    (K, C), (B, _, h, w) = weight.shape[:2], x.shape
    if min(h, w) < 4:
        return F.conv2d(upsample_2x(x), weight, padding=1)
    taps = cached_tensor(PHASE_WEIGHTS, x.device)
    kernels = torch.einsum("pau,qbv,kcuv->pqkcab", taps, taps, weight.float()).reshape(4 * K, C, 3, 3)
    phases = F.conv2d(x, kernels.to(weight.dtype, memory_format=torch.channels_last), padding=1)  # (B, 4K, h, w)
    phases = phases.permute(0, 2, 3, 1).reshape(B, h, w, 2, 2, K).transpose(2, 3)
    out = phases.reshape(B, 2 * h, 2 * w, K).permute(0, 3, 1, 2)
    # at the borders the upsampled image is padded with zeros, the small one with its last row
    for outer, inner in ((slice(0, 2), slice(0, 3)), (slice(-2, None), slice(-3, None))):
        out[:, :, outer] = F.conv2d(upsample_2x(x[:, :, inner]), weight, padding=1)[:, :, outer]
        out[..., outer] = F.conv2d(upsample_2x(x[..., inner]), weight, padding=1)[..., outer]
    return out


class PatchWindow(NamedTuple):
    """A window of a map that is 0 elsewhere."""

    values: Tensor  # (B, C, h, w); empty if the map is 0
    top: int
    left: int


class PhotoDetail(NamedTuple):
    """What super-resolution reads from the photo, and where."""

    source: Source
    mesh: MeshFlow
    flow: LayeredFlow
    code: Tensor  # (B, d) beta': a smile shows teeth, a pout does not, with the same mouth opening


class SuperResolutionOutput(NamedTuple):
    """Result of super-resolution; without a flow only the image."""

    image: Tensor  # (B, 3, H, W)
    residual_flow: Tensor | None = None  # (B, 2, H/2, W/2), in image sizes
    warped_photo: Tensor | None = None  # (B, 3, H/2, W/2) photo colours sampled along the flow
    source_visibility: Tensor | None = None  # (B, 1, m, m) 1 where the photo shows the pixel
    sample_grid: Tensor | None = None  # (B, 4, H, W) see `LayerWarp`
    blend_weights: Tensor | None = None  # (B, 2, H, W) weights of the photo's detail, see `LayerWarp`


class HiddenTextures(nn.Module):
    """Learned textures of teeth and eyes, for photos with closed mouth or eyes; they move with skull, jaw and iris."""

    texture_size = (24, 48)  # rows and columns
    texture_channels = 8  # per texture
    out_channels = 2 * texture_channels + 1  # of `forward`

    def __init__(self) -> None:
        super().__init__()
        # upper teeth, lower teeth, eye
        self.textures = nn.Parameter(torch.randn(3, self.texture_channels, *self.texture_size) * 0.3)

    def forward(self, mesh: MeshFlow, size: int) -> Tensor:
        """Render (B, 17, size, size): upper teeth or eye, lower teeth, eye mask; 0 outside mouth and eyes."""
        mouth, eye, coordinates = self._texture_coordinates(mesh, size)
        upper_grid, lower_grid = (x.permute(0, 2, 3, 1) for x in coordinates.split(2, dim=1))  # (B, size, size, 2)

        def sample(texture: Tensor, grid: Tensor) -> Tensor:
            texture = texture.float().expand(len(grid), -1, -1, -1)
            return F.grid_sample(texture, grid, align_corners=False, padding_mode="border")

        upper_teeth, lower_teeth, iris = self.textures.split(1)
        upper = sample(upper_teeth, upper_grid) * mouth + sample(iris, upper_grid) * eye
        return torch.cat([upper, sample(lower_teeth, lower_grid) * mouth, eye], dim=1)

    def render_window(self, mesh: MeshFlow, size: int) -> PatchWindow:
        """Render only the window that is not 0, about a hundredth of the map, with a border of zeros."""
        mouth, eye, coordinates = self._texture_coordinates(mesh, size)
        b, row, column = ((mouth + eye)[:, 0] > 0).nonzero(as_tuple=True)
        if not len(b):
            return PatchWindow(mouth.new_zeros(len(mouth), self.out_channels, 0, 0), 0, 0)
        mouth_weight, eye_weight = mouth[b, 0, row, column][:, None], eye[b, 0, row, column][:, None]  # (M, 1)
        grid = coordinates[b, :, row, column].view(1, -1, 2, 2)  # (1, M, upper and lower, 2)
        upper_grid, lower_grid = grid[:, :, :1], grid[:, :, 1:]
        upper_teeth, lower_teeth, iris = self.textures.float().split(1)

        def sample(texture: Tensor, grid: Tensor) -> Tensor:
            return F.grid_sample(texture, grid, align_corners=False, padding_mode="border")[0, :, :, 0].T  # (M, 8)

        upper = sample(upper_teeth, upper_grid) * mouth_weight + sample(iris, upper_grid) * eye_weight
        lower = sample(lower_teeth, lower_grid) * mouth_weight
        top, height = _window_range(row, size)
        left, width = _window_range(column, size)
        out = mouth.new_zeros(len(mouth), height, width, self.out_channels)
        out[b, row - top, column - left] = torch.cat([upper, lower, eye_weight], dim=1)
        return PatchWindow(out.permute(0, 3, 1, 2), top, left)

    def _texture_coordinates(self, mesh: MeshFlow, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return mouth and eye masks (B, 1, s, s) and coordinates (B, 4, s, s) in the upper and lower texture."""
        mouth, eye, coordinates = (resize(x, size) for x in (mesh.mouth, mesh.eye, mesh.anchored_coords))
        # coordinates fade to 0 at the mask's border; dividing by the mask keeps the texture from sliding there
        return mouth, eye, coordinates / (mouth + eye).clamp_min(0.1)


def widen_mask(mask: Tensor, divisor: int = SEAM_DIVISOR) -> Tensor:
    """Dilate a mask (B, 1, m, m) by 1 / `divisor` of its side, to include seams where a photo shows both sides."""
    return dilate(mask, mask.shape[-1] // divisor)


class LayerWarp(NamedTuple):
    """Where an image (B, ., s, s) samples the photo, for its two layers, and the weight of each."""

    sample_grid: Tensor  # (B, 4, s, s) photo positions (x, y) of the head layer and the background layer
    blend_weights: Tensor  # (B, 2, s, s) of head and background, sum <= 1

    def sample(self, photo: Tensor) -> Tensor:
        """Sample photo channels (B, C, ., .) along both layers: (B, C, s, s), 0 where neither has weight."""
        head, background = self.sample_grid.split(2, dim=1)
        head_weight, background_weight = self.blend_weights.split(1, dim=1)
        return torch.addcmul(warp(photo, head) * head_weight, warp(photo, background), background_weight)

    def sample_over(self, photo: Tensor, fill: Tensor) -> Tensor:
        """Composite the sampled photo over `fill` (B, C, s, s)."""
        return torch.addcmul(self.sample(photo), fill, 1 - self.blend_weights.sum(1, keepdim=True))


def make_layer_warp(
    flow: LayeredFlow, background_visibility: Tensor, size: int, residual_flow: Tensor | None = None
) -> LayerWarp:
    """Resize both layers of a flow to `size`.

    The background layer has weight where `background_visibility` (B, 1, m, m) says that the photo shows it. A
    `residual_flow` shifts both; with it the head's outline is smoothed, which otherwise shows the triangles' steps.
    """
    grid, head_weight = torch.cat([flow.head, flow.background], dim=1), flow.head_weight
    if residual_flow is not None:
        grid = resize(grid, residual_flow.shape[-1]) + residual_flow.repeat(1, 2, 1, 1)
        head_weight, background_visibility = lowpass(resize(head_weight, size)), resize(background_visibility, size)
    weights = torch.cat([head_weight, background_visibility * (1 - head_weight)], dim=1)
    return LayerWarp(resize(grid, size), resize(weights, size))


def warp_discontinuity(sample_grid: Tensor) -> Tensor:
    """Return the largest distance of neighbours in the photo: sample grid (B, 4, s, s) -> (B, 2, s, s), in pixels."""
    B, _, s, _ = sample_grid.shape
    pixels = sample_grid.view(B, 2, 2, s, s) * s  # layer, coordinate
    across, down = (pixels.diff(dim=dim).square().sum(2) for dim in (4, 3))  # (B, 2, s, s - 1), (B, 2, s - 1, s)
    across = torch.maximum(F.pad(across, (1, 0)), F.pad(across, (0, 1)))
    down = torch.maximum(F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1)))
    return torch.maximum(across, down).sqrt()


def photo_residual(photo: Tensor, size: int, side: int) -> Tensor:
    """Return the detail of a larger photo copy, (1, 3, M, M), that its version of `side` pixels lacks, same shape.

    The photo is the central `size` pixels; the network sees its border replicated over the (M - size) / 2 pixels on
    each side of it.
    """
    margin = (photo.shape[-1] - size) // 2
    centre = photo[..., margin : margin + size, margin : margin + size]
    smoothed = resize(F.interpolate(centre, (side, side), mode="area"), size)
    return photo - F.pad(smoothed, (margin,) * 4, mode="replicate")


def upscale_with_detail(image: Tensor, layer_warp: LayerWarp, detail: Tensor, size: int) -> Tensor:
    """Upscale the result to `size` and add detail that no network sees: pixels of a larger photo copy, only moved.

    Args:
        image: (B, 3, H, W), the result.
        layer_warp: where the result samples the photo.
        detail: (B, 3, M, M) from `photo_residual`. It is fine detail only and therefore draws no lines where the layers
            meet or photo positions jump; the colours there are the result's.
        size: side of the upscaled image.
    """
    margin = (detail.shape[-1] - size) / 2 / size
    grid = (resize(layer_warp.sample_grid, size) + margin) / (1 + 2 * margin)
    return resize(image, size) + LayerWarp(grid, resize(layer_warp.blend_weights, size)).sample(detail)


def _missing_detail(blend: Tensor, facts: Tensor) -> Tensor:
    """Return the fraction (B, 1, s, s) of the photo's high-pass detail that the blend drops but should keep, in [0, 1].

    On a moving head the blend takes about half from the photo, and nothing else has such detail. All of it may be shown
    where the photo is visible, unless the blend rejects the photo. `facts` (B, 2, s, s): source visibility, mouth mask.
    """
    visibility, mouth = facts.split(1, dim=1)
    return (visibility * (1 - mouth) - blend).clamp_min(0) * linear_step(blend, *BLEND_FADE)


def highpass(photo: Tensor) -> Tensor:
    """Return the luminance detail of images (B, 3, s, s) that `lowpass` removes: (B, 1, s, s).

    It is computed before warping, and so contains no edges from jumps of the photo positions.
    """
    x = photo.float().mean(1, keepdim=True)
    return x - lowpass(x)


def _window_range(indices: Tensor, size: int) -> tuple[int, int]:
    """Return start and length of the rows (or columns) of a window around `indices` with a border, within [0, size)."""
    first, last = (int(x) for x in indices.aminmax())
    length = min(size, -(-(last - first + 3) // WINDOW_STEP_PX) * WINDOW_STEP_PX)
    return max(0, min(first - 1, size - length)), length


def _background_visibility(detail: PhotoDetail) -> Tensor:
    """Return where the photo shows the background of the result, (B, 1, m, m) in [0, 1]."""
    source, mesh, flow = detail.source, detail.mesh, detail.flow
    assert source.head_mask is not None and source.body_mask is not None
    fringe = widen_mask(source.head_mask, FRINGE_DIVISOR) * (1 - source.body_mask)
    masks = torch.cat([widen_mask(source.head_mask), source.head_mask + source.body_mask, fringe], dim=1)
    head, person, fringe = warp(masks, flow.background).split(1, dim=1)
    # Where the head has moved away, the photo does not show the background. The old outline must vanish there too,
    # unless both layers moved alike and it still is the outline.
    gap = (flow.background - flow.head).detach().square().sum(1, keepdim=True).sqrt()
    same_motion = (1 - gap / LAYER_GAP).clamp_min(0)
    visible = 1 - (head - widen_mask(mesh.weight) * same_motion).clamp_min(0)
    # The same for hair that stands off the head, where there is no body.
    no_hair = 1 - (fringe - widen_mask(mesh.weight, FRINGE_DIVISOR) * same_motion).clamp_min(0)
    # A neck or an ear must not show the background behind the person.
    return torch.minimum(visible, no_hair) * (1 - flow.head_occlusion * (1 - person))


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

    def forward(self, features: Tensor, detail: PhotoDetail | None = None) -> SuperResolutionOutput:
        """Map features (B, C', H/4, W/4), RGB first, to the image and intermediate results."""
        rgb_half = upsample_2x(features[:, :3].float())  # (B, 3, H/2, W/2)
        rgb = upsample_2x(rgb_half)  # (B, 3, H, W)
        if detail is None:
            x = self.block4(self.enter(features))  # (B, c2, H/4, W/4)
            x = self.block2(self.to2(upsample_2x(leaky_relu(x))))  # (B, c2, H/2, W/2)
            x = self.block1(self.to1(upsample_2x(leaky_relu(x))))  # (B, c1, H, W)
            return SuperResolutionOutput(rgb + self.colour(leaky_relu(x)).float())

        source, mesh, flow, code = detail
        assert source.image_half is not None and source.features_half is not None
        assert source.features_quarter is not None
        quarter = features.shape[-1]
        half, full = 2 * quarter, 4 * quarter
        background_visibility = _background_visibility(detail)  # (B, 1, m, m)
        face, rigid, background = flow.weights[:, :1], flow.weights[:, 1:2], 1 - flow.head_weight
        visibility = face * mesh.valid + rigid + background * background_visibility  # (B, 1, m, m)

        facts = torch.cat([face, rigid, background, visibility, mesh.stretch, mesh.mouth, mesh.mouth_coords], dim=1)
        layers = make_layer_warp(flow, background_visibility, quarter)
        x = torch.cat([features, layers.sample(source.features_quarter), resize(facts, quarter)], dim=1)
        x = leaky_relu(self.block4(self.enter(x)))  # (B, c2, H/4, W/4)

        facts = resize(torch.cat([visibility, mesh.mouth, mesh.mouth_coords], dim=1), half)
        layers = make_layer_warp(flow, background_visibility, half)
        warped_half = layers.sample_over(source.image_half, rgb_half)  # (B, 3, H/2, W/2)
        x = self._upsample_concat_conv(self.to2, x, [warped_half, layers.sample(source.features_half), facts], mesh)
        x = leaky_relu(self.block2(x + self.expression(code)[:, :, None, None]))  # (B, c2, H/2, W/2)
        residual_flow = MAX_RESIDUAL_FLOW * torch.tanh(self.offset(x).float())  # (B, 2, H/2, W/2)

        facts = resize(facts, full)
        layers = make_layer_warp(flow, background_visibility, full, residual_flow)
        warped = layers.sample_over(source.image, rgb)  # (B, 3, H, W)
        x = self.block1(self._upsample_concat_conv(self.to1, x, [warped, facts], mesh))  # (B, c1, H, W)
        colour, logit = self.colour(leaky_relu(x)).float().split([3, 1], dim=1)
        blend = torch.sigmoid(4 * logit + PHOTO_LOGIT_BIAS * facts[:, :1] - 3)  # starts with the photo where visible
        blend = blend * (1 - resize(mesh.closed_in_photo, full))  # closed lips must not be copied into an open mouth
        image = blend * warped + (1 - blend) * (rgb + colour)
        weights = blend * layers.blend_weights  # (B, 2, H, W)
        if source.highpass is not None:
            missing = _missing_detail(blend, facts[:, :2]) * layers.blend_weights[:, :1]  # head layer only
            weights[:, :1] += missing
            # No detail where photo positions jump: at outlines and on faces seen from the side. Every second pixel
            # suffices, as the grid has no finer structure.
            jump = warp_discontinuity(layers.sample_grid[..., ::2, ::2])
            continuous = resize(1 - linear_step(jump, *DISCONTINUITY_FADE), full)
            weights = weights * continuous
            image = image + missing * continuous[:, :1] * warp(source.highpass, layers.sample_grid[:, :2])
        return SuperResolutionOutput(image, residual_flow, warped_half, visibility, layers.sample_grid, weights)

    def _upsample_concat_conv(self, conv: nn.Conv2d, x: Tensor, others: list[Tensor], mesh: MeshFlow) -> Tensor:
        """Upsample `x`, concatenate `others` and the hidden textures, and apply `conv`."""
        size = 2 * x.shape[-1]
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return upsample_concat_conv_inference(conv, x, others, self.hidden_textures.render_window(mesh, size))
        return upsample_concat_conv(conv, x, [*others, self.hidden_textures(mesh, size)])
