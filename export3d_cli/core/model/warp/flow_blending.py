"""Flow of the whole image (beyond the paper): blends the face mesh's flow with flows of head, torso and background.

Candidates: the mesh's flow; the rigid flow of the rendered depth; no motion; shift and scale of the neck without its
rotation, which torsos follow. A small network blends the four into two layers, the head and what is behind it, and adds
a smooth learned shift to each. UV positions are fractions of the image size, (0, 0) is the top left corner.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.model.cached_tensors import cached_tensor
from export3d_cli.core.model.generator import ResBlock, leaky_relu, zero_init
from export3d_cli.core.model.masks import box_mean, dilate, linear_step
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp.mesh_flow import MeshFlow, identity_grid, resize, warp

NECK_PIVOT = (0.0, 0.12, 0.1)  # where the spine carries the skull, head frame
# Fraction of the neck's motion that a torso follows. Error on held-out people, in face heights: this 0.025, the head
# centre's motion 0.030, no motion 0.041.
TORSO_FOLLOW_RATIO = 0.75
MAX_LEARNED_SHIFT = 0.1  # fraction of the image size
PROB_EPS = 2e-3  # prior probabilities are clamped to [eps, 1 - eps] before the logit
PERSON_MARGIN_DIVISOR = 32  # the background moves only within 1/32 of the image size from the person
RING_FADE = (0.0, 0.2)  # weights of the face over which the mesh alone decides what belongs to the head
FLOW_INPUT_SCALE = 8.0  # scales the flow displacements that the network sees


def rigid_flow(depth: Tensor, directions: Tensor, origin: Tensor, source_camera: Tensor) -> Tensor:
    """Project the rays' end points into the photo: depth (B, 1, s, s), rays of the same size -> uv (B, 2, s, s)."""
    B, _, s, _ = depth.shape
    points = origin[:, None] + directions * depth.view(B, -1, 1)
    uv, _ = project(points, source_camera)
    return uv.transpose(1, 2).reshape(B, 2, s, s)


def neck_flow(source_camera: Tensor, camera: Tensor, size: int) -> Tensor:
    """Shift and scale the image with the neck, without rotation: cameras (B, 25) -> uv (B, 2, size, size)."""
    neck = cached_tensor(NECK_PIVOT, camera.device).expand(len(camera), 1, 3)
    (source_neck, source_depth), (neck_uv, neck_depth) = project(neck, source_camera), project(neck, camera)
    source_neck, neck_uv = source_neck.view(-1, 2, 1, 1), neck_uv.view(-1, 2, 1, 1)
    return source_neck + (identity_grid(size, camera) - neck_uv) * (neck_depth / source_depth).view(-1, 1, 1, 1)


def relative_rotation(source_camera: Tensor, camera: Tensor) -> Tensor:
    """Return the rotation between cameras (B, 25) as its axis times the sine of its angle, (B, 3)."""
    source_rotation, rotation = (c[:, :16].view(-1, 4, 4)[:, :3, :3] for c in (source_camera, camera))
    relative = rotation.transpose(1, 2) @ source_rotation
    skew = (relative - relative.transpose(1, 2)) / 2
    return torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], dim=1)


class LayeredFlow(NamedTuple):
    """Backward flow of two layers, the head and what is behind it; the head may come from additional photos, too."""

    head: Tensor  # (B, 2, m, m) uv in the photo
    background: Tensor  # (B, 2, m, m) uv in the photo, torso included
    weights: Tensor  # (B, 4, m, m) of mesh, rigid, static and neck flow; they sum to 1
    additional: tuple[Tensor, ...] = ()  # (B, 2, m, m) uv of the head in each additional photo
    fractions: Tensor | None = None  # (B, N, m, m) of the head that each additional photo supplies

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head layer, (B, 1, m, m)."""
        return self.weights[:, :2].sum(1, keepdim=True)


class FlowBlend(nn.Module):
    """Blends mesh and rigid flow for the head, static and neck flow for the background; starts at the masks' priors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        w = config.flow_width
        self.face_residual_ratio = config.face_residual_ratio
        self.enter = nn.Conv2d(4 * 3 + 16, w, 3, padding=1)
        self.down = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.deep = nn.ModuleList([ResBlock(2 * w), ResBlock(2 * w)])
        self.join = nn.Conv2d(3 * w, w, 3, padding=1)
        self.leave = nn.Conv2d(w, 3, 3, padding=1)
        self.shift = nn.Conv2d(2 * w, 4, 3, padding=1)
        zero_init(self.leave)
        zero_init(self.shift)
        self.expression = None
        if config.face_residual_ratio:
            self.expression = nn.Linear(config.num_coefficients, 2 * w)
            zero_init(self.expression)

    def forward(self, photo: Tensor, mesh: MeshFlow, rigid: Tensor, neck: Tensor, opacity: Tensor, head_mask: Tensor,
                body_mask: Tensor, rotation: Tensor, lam_delta: Tensor) -> LayeredFlow:  # fmt: skip
        """Blend the flows `mesh` at (m, m), `rigid` and `neck` (B, 2, s, s) for a photo (B, 3, H, W).

        `opacity` (B, 1, s, s) is the rendered head's; `head_mask` and `body_mask` (B, 1, m, m) tell where the photo
        shows the head and the rest of the person; `lam_delta` (B, n) is lambda(D) - lambda(S).
        """
        mesh_full, s, m = mesh, rigid.shape[-1], mesh.uv.shape[-1]
        mesh = MeshFlow(*(resize(x, s) for x in mesh_full))
        static = identity_grid(s, photo).expand_as(rigid)
        torso = warp(resize(body_mask, s), torch.lerp(static, neck, TORSO_FOLLOW_RATIO))
        flows = [mesh.uv, rigid.detach(), static, neck]
        warped = [warp(photo, uv) for uv in flows]
        masks = [mesh.weight, mesh.valid, mesh.stretch, mesh.mouth, resize(head_mask, s), opacity.detach(), torso]
        displacements = [FLOW_INPUT_SCALE * (uv - static) for uv in (mesh.uv, rigid.detach(), neck)]
        rotation = rotation[:, :, None, None].expand(-1, -1, s, s)
        x = self.enter(torch.cat([*warped, *masks, *displacements, rotation], dim=1))  # (B, w, s, s)
        y = self.down(leaky_relu(x))  # (B, 2w, s/2, s/2)
        if self.expression is not None:
            y = y + self.expression(lam_delta)[:, :, None, None]
        for block in self.deep:
            y = block(y)
        shift = resize(MAX_LEARNED_SHIFT * torch.tanh(self.shift(leaky_relu(y)).float()), m)  # (B, 4, m, m)
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        logits = resize(self.leave(leaky_relu(self.join(torch.cat([leaky_relu(x), y], dim=1)))).float(), m)

        opacity = resize(opacity, m)
        head_occlusion = (2.5 * opacity - 1.25).clamp(0, 1)
        opacity = (1 - mesh_full.weight) * 0.5 * opacity
        head_weight = mesh_full.weight + opacity
        # the torso's place in the photo moves as well as its place in the result; else the torso would appear twice
        torso_mask = torch.maximum(resize(torso, m), resize(body_mask, m))
        prior = torch.cat([head_weight, opacity / head_weight.clamp_min(1e-3), TORSO_FOLLOW_RATIO * torso_mask], 1)
        probabilities = torch.sigmoid(torch.logit(prior, eps=PROB_EPS) + 2 * logits)
        head_weight, rigid_weight, neck_weight = probabilities.split(1, dim=1)
        head_weight = torch.maximum(head_weight, mesh_full.weight * linear_step(mesh_full.face, *RING_FADE))
        rigid_weight = rigid_weight * head_occlusion  # a nearly transparent ray has no valid depth
        head_shift, background_shift = shift.split(2, dim=1)
        grid = identity_grid(m, photo)
        margin = max(1, m // PERSON_MARGIN_DIVISOR)
        movable = box_mean(dilate(torch.maximum(torso_mask, resize(head_mask, m)), margin), margin)
        head = torch.lerp(mesh_full.uv, resize(rigid, m), rigid_weight)
        head = head + head_shift * (1 - (1 - self.face_residual_ratio) * mesh_full.face)
        background = grid + movable * (neck_weight * (resize(neck, m) - grid) + background_shift)
        head_weights = head_weight * torch.cat([1 - rigid_weight, rigid_weight], dim=1)  # mesh, rigid
        background_weights = (1 - head_weight) * torch.cat([1 - neck_weight, neck_weight], dim=1)  # static, neck
        return LayeredFlow(head, background, torch.cat([head_weights, background_weights], dim=1))
