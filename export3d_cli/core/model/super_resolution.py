"""Super-resolution (sec. 3.3): plain convolution blocks, (B, C', H/4, W/4) -> (B, 3, H, W).

With a flow (beyond the paper) the photo's own colours and features, sampled along it, join at each size; a residual
offset of a few pixels corrects the flow, and the last block blends the sampled colour with its own.
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

PHOTO_FEATURES = 16  # channels of stem features taken along the flow
MAX_RESIDUAL_FLOW = 4 / 256  # largest residual offset, in image sizes
# Three rows of a picture of twice the size as sums of three of the picture's own: around an even row and an odd one.
PHASE_WEIGHTS = (((0.75, 0.25, 0.0), (0.25, 0.75, 0.75), (0.0, 0.0, 0.25)),
          ((0.25, 0.0, 0.0), (0.75, 0.75, 0.25), (0.0, 0.25, 0.75)))  # fmt: skip
WINDOW_STEP_PX = 32  # sides of a patch are multiples of this: few shapes come again and again
SEAM_DIVISOR, FRINGE_DIVISOR = (
    64,
    16,
)  # masks are widened to each side by a 64th of the picture; stray hair reaches a 16th
LAYER_GAP = 1 / 8  # distance of both layers' flows, in image sizes, at which nothing is left of the photo's own seam
DISCONTINUITY_FADE = (
    1.7,
    2.6,
)  # distances of neighbours' positions in the photo, in pixels, of all and of none of its finest detail
BLEND_FADE = (0.15, 0.35)  # blends that are taken for none of the photo, and from which on it is trusted
PHOTO_LOGIT_BIAS = (
    7.5  # how far the blend leans to the photo where it is known: blurring it by a guess costs expression
)


def upsample_2x(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, 2h, 2w), bilinear; with a pixel's channels side by side, six times as fast on a CPU."""
    if x.shape[1] > 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def upsample_concat_conv(conv: nn.Conv2d, x: Tensor, others: list[Tensor]) -> Tensor:
    """The 3x3 convolution of `upsample(x)` and `rest` side by side, (B, ., h, w) each, without laying them so."""
    first, second = conv.weight.split([x.shape[1], conv.in_channels - x.shape[1]], dim=1)
    beside = torch.cat([part.to(x.dtype) for part in others], dim=1).contiguous(memory_format=torch.channels_last)
    return F.conv2d(upsample_2x(x), first, conv.bias, padding=1) + F.conv2d(beside, second, padding=1)


def upsample_concat_conv_inference(conv: nn.Conv2d, x: Tensor, others: list[Tensor], window: PatchWindow) -> Tensor:
    """`join` with the values of a patch as the last of `rest`, 0 around it; without gradients, on a CPU."""
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
    """The 3x3 convolution of `upsample(x)`, padded with zeros, as one of `x` for each of four neighbouring pixels.

    (K, C, 3, 3), (B, C, h, w) -> (B, K, 2h, 2w). As many products, without the large picture between.
    """
    (K, C), (B, _, h, w) = weight.shape[:2], x.shape
    if min(h, w) < 4:
        return F.conv2d(upsample_2x(x), weight, padding=1)
    taps = cached_tensor(PHASE_WEIGHTS, x.device)
    both = torch.einsum("pau,qbv,kcuv->pqkcab", taps, taps, weight.float()).reshape(4 * K, C, 3, 3)
    four = F.conv2d(x, both.to(weight.dtype, memory_format=torch.channels_last), padding=1)
    four = four.permute(0, 2, 3, 1).reshape(B, h, w, 2, 2, K).transpose(2, 3)
    out = four.reshape(B, 2 * h, 2 * w, K).permute(0, 3, 1, 2)
    # at the rims the large picture goes on with zeros, but the small one with its last row
    for to, rim in ((slice(0, 2), slice(0, 3)), (slice(-2, None), slice(-3, None))):
        out[:, :, to] = F.conv2d(upsample_2x(x[:, :, rim]), weight, padding=1)[:, :, to]
        out[..., to] = F.conv2d(upsample_2x(x[..., rim]), weight, padding=1)[..., to]
    return out


class PatchWindow(NamedTuple):
    """A part of a picture; 0 around it."""

    values: Tensor  # (B, C, h, w), none where there is nothing
    top: int
    left: int


class PhotoDetail(NamedTuple):
    """What super-resolution takes from the photo."""

    image: Tensor  # (B, 3, H, W)
    image_half: Tensor  # (B, 3, H/2, W/2), the same
    features_half: Tensor  # (B, 16, H/2, W/2) stem features
    features_quarter: Tensor  # (B, 16, H/4, W/4)
    flow: LayeredFlow
    mesh: MeshFlow
    head_mask: Tensor  # (B, 1, m, m) where the photo shows the head
    body_mask: Tensor  # (B, 1, m, m) and where the rest of the person
    code: Tensor  # (B, d) beta': teeth show in a smile and not in a pout, whatever the shape of the opening
    highpass: Tensor | None  # (B, 1, H, W) without gradients: `finest` of the photo


class SuperResolutionOutput(NamedTuple):
    """What super-resolution makes; without a flow the image alone."""

    image: Tensor  # (B, 3, H, W)
    residual_flow: Tensor | None = None  # (B, 2, H/2, W/2), in image sizes
    warped_photo: Tensor | None = None  # (B, 3, H/2, W/2) the photo's colours along the flow
    source_visibility: Tensor | None = None  # (B, 1, m, m) how far the photo is to be trusted there
    sample_grid: Tensor | None = None  # (B, 4, H, W) where in the photo what is taken of it is, and
    blend_weights: Tensor | None = None  # (B, 2, H, W) how much of its detail, see `Layers`


class HiddenTextures(nn.Module):
    """What a photo with a shut mouth or eye hides: learned textures of teeth and eyes, held by skull, jaw and iris."""

    texture_size = (24, 48)  # rows and columns of a texture
    texture_channels = 8  # channels of each
    out_channels = 2 * texture_channels + 1  # of the result

    def __init__(self) -> None:
        super().__init__()
        self.textures = nn.Parameter(
            torch.randn(3, self.texture_channels, *self.texture_size) * 0.3
        )  # upper and lower teeth, eye

    def forward(self, mesh: MeshFlow, size: int) -> Tensor:
        """(B, 17, size, size): upper teeth or eye, lower teeth, and where an eye is; 0 outside mouth and eyes."""
        mouth, eye, place = self._texture_coordinates(mesh, size)
        above, below = (x.permute(0, 2, 3, 1) for x in place.split(2, dim=1))  # (B, size, size, 2)

        def look(texture: Tensor, grid: Tensor) -> Tensor:
            texture = texture.float().expand(len(grid), -1, -1, -1)
            return F.grid_sample(texture, grid, align_corners=False, padding_mode="border")

        upper, lower, iris = self.textures.split(1)
        return torch.cat([look(upper, above) * mouth + look(iris, above) * eye, look(lower, below) * mouth, eye], dim=1)

    def render_window(self, mesh: MeshFlow, size: int) -> PatchWindow:
        """The same where there is anything, a few of a hundred pixels, and a rim of zeros."""
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
        # what is looked at fades to 0 at the rims, where it must not slide instead
        return mouth, eye, place / (mouth + eye).clamp_min(0.1)


def widen_mask(mask: Tensor, divisor: int = SEAM_DIVISOR) -> Tensor:
    """A mask (B, 1, m, m) with the seam around it, where a photo shows some of both sides; `share` of the picture."""
    return dilate(mask, mask.shape[-1] // divisor)


class LayerWarp(NamedTuple):
    """What a picture (B, ., s, s) takes of the photo: where its two layers find it, and how much of each is shown."""

    sample_grid: Tensor  # (B, 4, s, s) positions in the photo: of the head, and of what is behind it
    blend_weights: Tensor  # (B, 2, s, s)

    def sample(self, photo: Tensor) -> Tensor:
        """The photo's (B, C, ., .) along both layers -> (B, C, s, s), 0 where neither is shown."""
        (head, rest), (ahead, behind) = self.sample_grid.split(2, dim=1), self.blend_weights.split(1, dim=1)
        return torch.addcmul(warp(photo, head) * ahead, warp(photo, rest), behind)

    def composite_over(self, taken: Tensor, fill: Tensor) -> Tensor:
        """What `of` has taken before `fill`, (B, C, s, s) both."""
        return torch.addcmul(taken, fill, 1 - self.blend_weights.sum(1, keepdim=True))


def make_layer_warp(
    flow: LayeredFlow, background_visibility: Tensor, size: int, residual_flow: Tensor | None = None
) -> LayerWarp:
    """Both layers of a flow at `size`.

    What is behind the head is shown where `here` (B, 1, m, m) says that the photo knows it. `offset` moves both; where
    it is given, the head's outline is smooth, too, not in steps as the triangles are drawn.
    """
    ways, share = torch.cat([flow.head, flow.background], dim=1), flow.head_weight
    if residual_flow is not None:
        ways = resize(ways, residual_flow.shape[-1]) + residual_flow.repeat(1, 2, 1, 1)
        share, background_visibility = lowpass(resize(share, size)), resize(background_visibility, size)
    shares = torch.cat([share, background_visibility * (1 - share)], dim=1)
    return LayerWarp(resize(ways, size), resize(shares, size))


def warp_discontinuity(sample_grid: Tensor) -> Tensor:
    """How far apart neighbours are in the photo, at most: `Layers.ways` (B, 4, s, s) -> (B, 2, s, s), in pixels."""
    B, _, s, _ = sample_grid.shape
    by_layer = sample_grid.view(B, 2, 2, s, s) * s
    across, down = (by_layer.diff(dim=dim).square().sum(2) for dim in (4, 3))  # (B, 2, s, s - 1), (B, 2, s - 1, s)
    across = torch.maximum(F.pad(across, (1, 0)), F.pad(across, (0, 1)))
    down = torch.maximum(F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1)))
    return torch.maximum(across, down).sqrt()


def photo_residual(photo: Tensor, size: int, side: int) -> Tensor:
    """What a larger copy of the photo, (1, 3, M, M), has beyond the one of `side` that the network sees, as large.

    `size` pixels across it are the photo, (M - size) / 2 on each side are what is around it: the network sees its rim
    go on there.
    """
    rim = (photo.shape[-1] - size) // 2
    own = photo[..., rim : rim + size, rim : rim + size]
    seen = resize(F.interpolate(own, (side, side), mode="area"), size)
    return photo - F.pad(seen, (rim,) * 4, mode="replicate")


def upscale_with_detail(image: Tensor, layer_warp: LayerWarp, detail: Tensor, size: int) -> Tensor:
    """The result at `size`, with detail that no network sees: pixels of a larger copy of the photo are only moved.

    Args:
        image: (B, 3, H, W), the result. own: what it took of the photo.
        more: (B, 3, M, M) of `finer`. Being fine detail only, it draws no lines where both layers meet and positions
            in the photo jump; the colours there are those of the result.
    """
    rim = (detail.shape[-1] - size) / 2 / size
    ways = (resize(layer_warp.sample_grid, size) + rim) / (1 + 2 * rim)
    return resize(image, size) + LayerWarp(ways, resize(layer_warp.blend_weights, size)).sample(detail)


def _missing_detail(mask: Tensor, facts: Tensor) -> Tensor:
    """What a blend (B, 1, s, s) leaves out of the photo's finest detail and should not, 0 to 1, as large.

    Of a head that moves the blend takes about half from the photo, and nothing else has such detail: where the photo
    is known all of it may be seen, unless the blend leaves the photo out. `facts` (B, 2, s, s): known, and mouth.
    """
    known, mouth = facts.split(1, dim=1)
    return (known * (1 - mouth) - mask).clamp_min(0) * linear_step(mask, *BLEND_FADE)


def highpass(photo: Tensor) -> Tensor:
    """What `lowpass` takes of the brightness of pictures (B, 3, s, s), (B, 1, s, s).

    Taken before the photo is moved, it knows nothing of where positions jump.
    """
    x = photo.float().mean(1, keepdim=True)
    return x - lowpass(x)


def _window_range(where: Tensor, size: int) -> tuple[int, int]:
    """First and number of the rows (or columns) of a patch that holds `where` and a rim, within 0 to `size`."""
    first, last = (int(x) for x in where.aminmax())
    length = min(size, -(-(last - first + 3) // WINDOW_STEP_PX) * WINDOW_STEP_PX)
    return max(0, min(first - 1, size - length)), length


class SuperResolution(nn.Module):
    """Two doublings; with `config.flow` the blocks also see `PhotoDetail`."""

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
        """Features (B, C', H/4, W/4), their colours (B, 3, H/4, W/4) -> the image and what it was made of."""
        half = upsample_2x(rgb.float())
        base = upsample_2x(half)
        if detail is None:
            x = self.block4(self.enter(features))
            x = self.block2(self.to2(upsample_2x(leaky_relu(x))))
            x = self.block1(self.to1(upsample_2x(leaky_relu(x))))
            return SuperResolutionOutput(base + self.colour(leaky_relu(x)).float())

        mesh, flow, s4 = detail.mesh, detail.flow, features.shape[-1]
        # where the head was and is no more, the photo does not know what is behind: not even its outline is to be seen,
        # unless both layers moved alike and it is the outline still
        away = (flow.background - flow.head).detach().square().sum(1, keepdim=True).sqrt()
        alike = (1 - away / LAYER_GAP).clamp_min(0)
        stray = widen_mask(detail.head_mask, FRINGE_DIVISOR) * (
            1 - detail.body_mask
        )  # nor hair that stands off it, before no body
        masks = torch.cat([widen_mask(detail.head_mask), detail.head_mask + detail.body_mask, stray], dim=1)
        head, person, stray = warp(masks, flow.background).split(1, dim=1)
        here = 1 - (head - widen_mask(mesh.weight) * alike).clamp_min(0)
        here = torch.minimum(here, 1 - (stray - widen_mask(mesh.weight, FRINGE_DIVISOR) * alike).clamp_min(0))
        here = here * (1 - flow.head_occlusion * (1 - person))  # nor what is behind the person before a neck or an ear
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
        )  # the photo where it is known, at first
        mask = mask * (1 - resize(mesh.closed_in_photo, 4 * s4))  # closed lips must not be copied into an open mouth
        image = mask * sampled + (1 - mask) * (base + out[:, :3])
        shares = mask * at1.blend_weights
        if detail.highpass is not None:
            lacking = _missing_detail(mask, facts[:, :2]) * at1.blend_weights[:, :1]  # of the head
            shares[:, :1] += lacking
            # a face seen from the side is many of the photo's pixels in one, and at its outline positions jump
            near = resize(
                1 - linear_step(warp_discontinuity(at1.sample_grid[..., ::2, ::2]), *DISCONTINUITY_FADE), 4 * s4
            )  # they are not finer than that
            shares = shares * near
            image = image + lacking * near[:, :1] * warp(detail.highpass, at1.sample_grid[:, :2])
        return SuperResolutionOutput(image, offset, seen, known, at1.sample_grid, shares)

    def _upsample_concat_conv(
        self, conv: nn.Conv2d, x: Tensor, rest: list[Tensor], mesh: MeshFlow, size: int
    ) -> Tensor:
        """Twice as large, with `rest` and what mouth and eyes hide beside it."""
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return upsample_concat_conv_inference(conv, x, rest, self.hidden_textures.render_window(mesh, size))
        return upsample_concat_conv(conv, x, [*rest, self.hidden_textures(mesh, size)])
