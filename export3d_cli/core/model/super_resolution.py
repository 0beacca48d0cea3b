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
from export3d_cli.core.model.warp.flow_blending import LayeredFlow
from export3d_cli.core.model.warp.mesh_flow import MeshFlow, resize, warp

PHOTO_FEATURES = 16  # channels of the photo features sampled along the flow
MAX_RESIDUAL_FLOW = 4 / 256  # in image sizes
# Three rows of the upsampled image around an even and an odd row, as sums of three rows of the small image.
PHASE_WEIGHTS = (((0.75, 0.25, 0.0), (0.25, 0.75, 0.75), (0.0, 0.0, 0.25)),
          ((0.25, 0.0, 0.0), (0.75, 0.75, 0.25), (0.0, 0.25, 0.75)))  # fmt: skip
WINDOW_STEP_PX = 32  # sides of a window are multiples of this, so that few shapes occur
SEAM_DIVISOR, FRINGE_DIVISOR = (
    64,
    16,
)  # masks are dilated by 1/64 of the image side; stray hair reaches 1/16
LAYER_GAP = 1 / 8  # distance of both layers' flows, in image sizes, from which the photo's own outline is not reused
DISCONTINUITY_FADE = (
    1.7,
    2.6,
)  # photo distances of neighbouring pixels, in pixels, with all and with no high-pass detail
BLEND_FADE = (0.15, 0.35)  # blend weights up to which the photo counts as rejected and from which it is trusted
PHOTO_LOGIT_BIAS = (
    7.5  # added to the blend's logit where the photo is visible: blurring it with a guess costs expression
)


def upsample_2x(x: Tensor) -> Tensor:
    """Upsample (B, C, h, w) bilinearly to (B, C, 2h, 2w); channels_last is six times as fast on a CPU."""
    if x.shape[1] > 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def upsample_concat_conv(conv: nn.Conv2d, x: Tensor, others: list[Tensor]) -> Tensor:
    """Apply a 3x3 convolution to `upsample_2x(x)` and `others` (B, ., h, w), concatenated, without building that."""
    first, second = conv.weight.split([x.shape[1], conv.in_channels - x.shape[1]], dim=1)
    beside = torch.cat([part.to(x.dtype) for part in others], dim=1).contiguous(memory_format=torch.channels_last)
    return F.conv2d(upsample_2x(x), first, conv.bias, padding=1) + F.conv2d(beside, second, padding=1)


def upsample_concat_conv_inference(conv: nn.Conv2d, x: Tensor, others: list[Tensor], window: PatchWindow) -> Tensor:
    """Compute `upsample_concat_conv` with the window, zero-padded, as the last of `others`; CPU without gradients."""
    own, beside = x.shape[1], sum(part.shape[1] for part in others)
    first, second, third = conv.weight.split([own, beside, conv.in_channels - own - beside], dim=1)
    out = upsample_conv(first, x)
    dense = torch.cat([part.to(x.dtype) for part in others], dim=1).contiguous(memory_format=torch.channels_last)
    out += F.conv2d(dense, second, conv.bias, padding=1)
    if window.values.numel():
        height, width = window.values.shape[-2:]
        seen = out[:, :, window.top : window.top + height, window.left : window.left + width]
        seen += F.conv2d(window.values.to(x.dtype), third, padding=1)
    return out


def upsample_conv(weight: Tensor, x: Tensor) -> Tensor:
    """Apply a zero-padded 3x3 convolution to `upsample_2x(x)`, as one convolution of `x` per output phase.

    (K, C, 3, 3), (B, C, h, w) -> (B, K, 2h, 2w). As many multiplications, without the large intermediate.
    """
    (K, C), (B, _, h, w) = weight.shape[:2], x.shape
    if min(h, w) < 4:
        return F.conv2d(upsample_2x(x), weight, padding=1)
    taps = cached_tensor(PHASE_WEIGHTS, x.device)
    both = torch.einsum("pau,qbv,kcuv->pqkcab", taps, taps, weight.float()).reshape(4 * K, C, 3, 3)
    four = F.conv2d(x, both.to(weight.dtype, memory_format=torch.channels_last), padding=1)
    four = four.permute(0, 2, 3, 1).reshape(B, h, w, 2, 2, K).transpose(2, 3)
    out = four.reshape(B, 2 * h, 2 * w, K).permute(0, 3, 1, 2)
    # at the borders the upsampled image is padded with zeros, the small one with its last row
    for to, rim in ((slice(0, 2), slice(0, 3)), (slice(-2, None), slice(-3, None))):
        out[:, :, to] = F.conv2d(upsample_2x(x[:, :, rim]), weight, padding=1)[:, :, to]
        out[..., to] = F.conv2d(upsample_2x(x[..., rim]), weight, padding=1)[..., to]
    return out


class PatchWindow(NamedTuple):
    """A window of a map that is 0 elsewhere."""

    values: Tensor  # (B, C, h, w); empty if the map is 0
    top: int
    left: int


class PhotoDetail(NamedTuple):
    """What super-resolution reads from the photo."""

    image: Tensor  # (B, 3, H, W)
    image_half: Tensor  # (B, 3, H/2, W/2)
    features_half: Tensor  # (B, 16, H/2, W/2) stem features
    features_quarter: Tensor  # (B, 16, H/4, W/4)
    flow: LayeredFlow
    mesh: MeshFlow
    head_mask: Tensor  # (B, 1, m, m) 1 on the photo's head
    body_mask: Tensor  # (B, 1, m, m) 1 on the rest of the person
    code: Tensor  # (B, d) beta': a smile shows teeth, a pout does not, with the same mouth opening
    highpass: Tensor | None  # (B, 1, H, W) `highpass` of the photo; None with gradients


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
        self.textures = nn.Parameter(
            torch.randn(3, self.texture_channels, *self.texture_size) * 0.3
        )  # upper and lower teeth, eye

    def forward(self, mesh: MeshFlow, size: int) -> Tensor:
        """Render (B, 17, size, size): upper teeth or eye, lower teeth, eye mask; 0 outside mouth and eyes."""
        mouth, eye, place = self._texture_coordinates(mesh, size)
        above, below = (x.permute(0, 2, 3, 1) for x in place.split(2, dim=1))  # (B, size, size, 2)

        def look(texture: Tensor, grid: Tensor) -> Tensor:
            texture = texture.float().expand(len(grid), -1, -1, -1)
            return F.grid_sample(texture, grid, align_corners=False, padding_mode="border")

        upper, lower, iris = self.textures.split(1)
        return torch.cat([look(upper, above) * mouth + look(iris, above) * eye, look(lower, below) * mouth, eye], dim=1)

    def render_window(self, mesh: MeshFlow, size: int) -> PatchWindow:
        """Render only the window that is not 0, about a hundredth of the map, with a border of zeros."""
        mouth, eye, place = self._texture_coordinates(mesh, size)
        b, row, column = ((mouth + eye)[:, 0] > 0).nonzero(as_tuple=True)
        if not len(b):
            return PatchWindow(mouth.new_zeros(len(mouth), self.out_channels, 0, 0), 0, 0)
        mouth_, eye_ = mouth[b, 0, row, column][:, None], eye[b, 0, row, column][:, None]  # (M, 1)
        grid = place[b, :, row, column].view(1, -1, 2, 2)  # above, below
        textures = self.textures.float()

        def look(texture: Tensor, at: Tensor) -> Tensor:
            return F.grid_sample(texture[None], at, align_corners=False, padding_mode="border")[0, :, :, 0].T  # (M, 8)

        above, below = grid[:, :, :1], grid[:, :, 1:]
        upper, iris, lower = look(textures[0], above), look(textures[2], above), look(textures[1], below)
        top, height = _window_range(row, size)
        left, width = _window_range(column, size)
        out = mouth.new_zeros(len(mouth), height, width, self.out_channels)
        out[b, row - top, column - left] = torch.cat([upper * mouth_ + iris * eye_, lower * mouth_, eye_], dim=1)
        return PatchWindow(out.permute(0, 3, 1, 2), top, left)

    def _texture_coordinates(self, mesh: MeshFlow, size: int) -> tuple[Tensor, Tensor, Tensor]:
        mouth, eye, place = (resize(x, size) for x in (mesh.mouth, mesh.eye, mesh.anchored_coords))
        # coordinates fade to 0 at the mask's border; dividing by the mask keeps the texture from sliding there
        return mouth, eye, place / (mouth + eye).clamp_min(0.1)


def widen_mask(mask: Tensor, divisor: int = SEAM_DIVISOR) -> Tensor:
    """Dilate a mask (B, 1, m, m) by 1 / `divisor` of its side, to include seams where a photo shows both sides."""
    return dilate(mask, mask.shape[-1] // divisor)


class LayerWarp(NamedTuple):
    """Where an image (B, ., s, s) samples the photo, for its two layers, and the weight of each."""

    sample_grid: Tensor  # (B, 4, s, s) photo positions (x, y) of the head layer and the background layer
    blend_weights: Tensor  # (B, 2, s, s) of head and background, sum <= 1

    def sample(self, photo: Tensor) -> Tensor:
        """Sample photo channels (B, C, ., .) along both layers: (B, C, s, s), 0 where neither has weight."""
        (head, rest), (ahead, behind) = self.sample_grid.split(2, dim=1), self.blend_weights.split(1, dim=1)
        return torch.addcmul(warp(photo, head) * ahead, warp(photo, rest), behind)

    def composite_over(self, taken: Tensor, fill: Tensor) -> Tensor:
        """Composite `sample`'s result over `fill`, (B, C, s, s) both."""
        return torch.addcmul(taken, fill, 1 - self.blend_weights.sum(1, keepdim=True))


def make_layer_warp(
    flow: LayeredFlow, background_visibility: Tensor, size: int, residual_flow: Tensor | None = None
) -> LayerWarp:
    """Resize both layers of a flow to `size`.

    The background layer has weight where `background_visibility` (B, 1, m, m) says that the photo shows it. A
    `residual_flow` shifts both; with it the head's outline is smoothed, which otherwise shows the triangles' steps.
    """
    ways, share = torch.cat([flow.head, flow.background], dim=1), flow.head_weight
    if residual_flow is not None:
        ways = resize(ways, residual_flow.shape[-1]) + residual_flow.repeat(1, 2, 1, 1)
        share, background_visibility = lowpass(resize(share, size)), resize(background_visibility, size)
    shares = torch.cat([share, background_visibility * (1 - share)], dim=1)
    return LayerWarp(resize(ways, size), resize(shares, size))


def warp_discontinuity(sample_grid: Tensor) -> Tensor:
    """Return the largest distance of neighbours in the photo: sample grid (B, 4, s, s) -> (B, 2, s, s), in pixels."""
    B, _, s, _ = sample_grid.shape
    by_layer = sample_grid.view(B, 2, 2, s, s) * s
    across, down = (by_layer.diff(dim=dim).square().sum(2) for dim in (4, 3))  # (B, 2, s, s - 1), (B, 2, s - 1, s)
    across = torch.maximum(F.pad(across, (1, 0)), F.pad(across, (0, 1)))
    down = torch.maximum(F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1)))
    return torch.maximum(across, down).sqrt()


def photo_residual(photo: Tensor, size: int, side: int) -> Tensor:
    """Return the detail of a larger photo copy, (1, 3, M, M), that its version of `side` pixels lacks, same shape.

    The photo is the central `size` pixels; the network sees its border replicated over the (M - size) / 2 pixels on
    each side of it.
    """
    rim = (photo.shape[-1] - size) // 2
    own = photo[..., rim : rim + size, rim : rim + size]
    seen = resize(F.interpolate(own, (side, side), mode="area"), size)
    return photo - F.pad(seen, (rim,) * 4, mode="replicate")


def upscale_with_detail(image: Tensor, layer_warp: LayerWarp, detail: Tensor, size: int) -> Tensor:
    """Upscale the result to `size` and add detail that no network sees: pixels of a larger photo copy, only moved.

    Args:
        image: (B, 3, H, W), the result.
        layer_warp: where the result samples the photo.
        detail: (B, 3, M, M) from `photo_residual`. It is fine detail only and therefore draws no lines where the layers
            meet or photo positions jump; the colours there are the result's.
        size: side of the upscaled image.
    """
    rim = (detail.shape[-1] - size) / 2 / size
    ways = (resize(layer_warp.sample_grid, size) + rim) / (1 + 2 * rim)
    return resize(image, size) + LayerWarp(ways, resize(layer_warp.blend_weights, size)).sample(detail)


def _missing_detail(mask: Tensor, facts: Tensor) -> Tensor:
    """Return the fraction (B, 1, s, s) of the photo's high-pass detail that the blend drops but should keep, in [0, 1].

    On a moving head the blend takes about half from the photo, and nothing else has such detail. All of it may be shown
    where the photo is visible, unless the blend rejects the photo. `facts` (B, 2, s, s): source visibility, mouth mask.
    """
    known, mouth = facts.split(1, dim=1)
    return (known * (1 - mouth) - mask).clamp_min(0) * linear_step(mask, *BLEND_FADE)


def highpass(photo: Tensor) -> Tensor:
    """Return the luminance detail of images (B, 3, s, s) that `lowpass` removes: (B, 1, s, s).

    It is computed before warping, and so contains no edges from jumps of the photo positions.
    """
    x = photo.float().mean(1, keepdim=True)
    return x - lowpass(x)


def _window_range(where: Tensor, size: int) -> tuple[int, int]:
    """Return start and length of the rows (or columns) of a window around `where` with a border, within [0, size)."""
    first, last = (int(x) for x in where.aminmax())
    length = min(size, -(-(last - first + 3) // WINDOW_STEP_PX) * WINDOW_STEP_PX)
    return max(0, min(first - 1, size - length)), length


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

    def forward(self, features: Tensor, rgb: Tensor, detail: PhotoDetail | None) -> SuperResolutionOutput:
        """Map features (B, C', H/4, W/4) and their colours (B, 3, H/4, W/4) to the image and intermediate results."""
        half = upsample_2x(rgb.float())
        base = upsample_2x(half)
        if detail is None:
            x = self.block4(self.enter(features))
            x = self.block2(self.to2(upsample_2x(leaky_relu(x))))
            x = self.block1(self.to1(upsample_2x(leaky_relu(x))))
            return SuperResolutionOutput(base + self.colour(leaky_relu(x)).float())

        mesh, flow, s4 = detail.mesh, detail.flow, features.shape[-1]
        # Where the head has moved away, the photo does not show the background. The old outline must vanish there
        # too, unless both layers moved alike and it still is the outline.
        away = (flow.background - flow.head).detach().square().sum(1, keepdim=True).sqrt()
        alike = (1 - away / LAYER_GAP).clamp_min(0)
        stray = widen_mask(detail.head_mask, FRINGE_DIVISOR) * (
            1 - detail.body_mask
        )  # the same for hair that stands off the head, where there is no body
        masks = torch.cat([widen_mask(detail.head_mask), detail.head_mask + detail.body_mask, stray], dim=1)
        head, person, stray = warp(masks, flow.background).split(1, dim=1)
        here = 1 - (head - widen_mask(mesh.weight) * alike).clamp_min(0)
        here = torch.minimum(here, 1 - (stray - widen_mask(mesh.weight, FRINGE_DIVISOR) * alike).clamp_min(0))
        here = here * (1 - flow.head_occlusion * (1 - person))  # nor may a neck or an ear show background
        face, rigid = flow.weights[:, :1], flow.weights[:, 1:2]
        rest = 1 - flow.head_weight
        known = face * mesh.valid + rigid + rest * here
        facts = resize(torch.cat([face, rigid, rest, known, mesh.stretch, mesh.mouth, mesh.mouth_coords], dim=1), s4)
        x = self.enter(
            torch.cat([features, make_layer_warp(flow, here, s4).sample(detail.features_quarter), facts], dim=1)
        )
        x = leaky_relu(self.block4(x))  # (B, c2, H/4, W/4)

        facts = resize(torch.cat([known, mesh.mouth, mesh.mouth_coords], dim=1), 2 * s4)
        at2 = make_layer_warp(flow, here, 2 * s4)
        seen = at2.composite_over(at2.sample(detail.image_half), half)
        x = self._upsample_concat_conv(self.to2, x, [seen, at2.sample(detail.features_half), facts], mesh, 2 * s4)
        x = self.block2(x + self.expression(detail.code)[:, :, None, None])
        offset = MAX_RESIDUAL_FLOW * torch.tanh(self.offset(leaky_relu(x)).float())
        x = leaky_relu(x)  # (B, c2, H/2, W/2)

        facts = resize(facts, 4 * s4)
        at1 = make_layer_warp(flow, here, 4 * s4, offset)
        sampled = at1.composite_over(at1.sample(detail.image), base)  # (B, 3, H, W)
        x = self.block1(self._upsample_concat_conv(self.to1, x, [sampled, facts], mesh, 4 * s4))
        out = self.colour(leaky_relu(x)).float()
        mask = torch.sigmoid(
            4 * out[:, 3:] + PHOTO_LOGIT_BIAS * facts[:, :1] - 3
        )  # starts with the photo where it is visible
        mask = mask * (1 - resize(mesh.closed_in_photo, 4 * s4))  # closed lips must not be copied into an open mouth
        image = mask * sampled + (1 - mask) * (base + out[:, :3])
        shares = mask * at1.blend_weights
        if detail.highpass is not None:
            lacking = _missing_detail(mask, facts[:, :2]) * at1.blend_weights[:, :1]  # head layer only
            shares[:, :1] += lacking
            # No detail where photo positions jump: at outlines and on faces seen from the side
            near = resize(
                1 - linear_step(warp_discontinuity(at1.sample_grid[..., ::2, ::2]), *DISCONTINUITY_FADE), 4 * s4
            )  # the grid has no finer structure
            shares = shares * near
            image = image + lacking * near[:, :1] * warp(detail.highpass, at1.sample_grid[:, :2])
        return SuperResolutionOutput(image, offset, seen, known, at1.sample_grid, shares)

    def _upsample_concat_conv(
        self, conv: nn.Conv2d, x: Tensor, rest: list[Tensor], mesh: MeshFlow, size: int
    ) -> Tensor:
        """Upsample `x`, concatenate `others` and the hidden textures, and apply `conv`."""
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return upsample_concat_conv_inference(conv, x, rest, self.hidden_textures.render_window(mesh, size))
        return upsample_concat_conv(conv, x, [*rest, self.hidden_textures(mesh, size)])
