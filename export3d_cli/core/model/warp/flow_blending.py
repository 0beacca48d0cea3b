"""The whole flow (design beyond the paper): the face mesh's, and what moves otherwise, in two layers.

Around the mesh the flow is rigid, from the rendered depth; or none (what stands still); or the shift and change of size
of the neck without the head's turning (how a torso follows). A small network blends the four, and adds a smooth shift
of its own, to two layers: the head, and what is behind it. Positions are in image sizes, (0, 0) the top left corner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.model.cached_tensors import cached_tensor
from export3d_cli.core.model.generator import ResBlock, leaky_relu, zero_init
from export3d_cli.core.model.masks import box_mean, dilate
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp.mesh_flow import MeshFlow, identity_grid, resize, warp

# Where the spine carries the skull, head frame, and the share of its way a torso goes along: on people not fitted to
# it misses torsos by 0.025 face heights, the head's centre by 0.030, standing still by 0.041.
NECK_PIVOT, TORSO_FOLLOW_RATIO = (0.0, 0.12, 0.1), 0.75
MAX_LEARNED_SHIFT = 0.1  # largest learned shift, in image sizes
PROB_EPS = 2e-3  # nearest to 0 or 1 that a share is at first
PERSON_MARGIN_DIVISOR = 32  # what is behind the head moves no farther from the person than such a share of the picture
FLOW_INPUT_SCALE = 8.0  # how much larger than in image sizes the network sees how far a flow leads


def rigid_flow(depth: Tensor, directions: Tensor, origin: Tensor, source_camera: Tensor) -> Tensor:
    """Where the photo shows what the rays meet: depth (B, 1, s, s), rays of the same size -> uv (B, 2, s, s)."""
    B, _, s, _ = depth.shape
    points = origin[:, None] + directions * depth.view(B, -1, 1)
    uv, _ = project(points, source_camera)
    return uv.transpose(1, 2).reshape(B, 2, s, s)


def neck_flow(source_camera: Tensor, camera: Tensor, size: int) -> Tensor:
    """Cameras (B, 25) -> uv (B, 2, size, size): the image shifts and scales with the neck, but does not turn."""
    neck = cached_tensor(NECK_PIVOT, camera.device).expand(len(camera), 1, 3)
    (there, z0), (here, z1) = project(neck, source_camera), project(neck, camera)
    there, here = there.view(-1, 2, 1, 1), here.view(-1, 2, 1, 1)
    return there + (identity_grid(size, camera) - here) * (z1 / z0).view(-1, 1, 1, 1)


def relative_rotation(source_camera: Tensor, camera: Tensor) -> Tensor:
    """Cameras (B, 25) -> axis of the rotation between them times the sine of its angle, (B, 3)."""
    first, second = (c[:, :16].view(-1, 4, 4)[:, :3, :3] for c in (source_camera, camera))
    between = second.transpose(1, 2) @ first
    skew = (between - between.transpose(1, 2)) / 2
    return torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], dim=1)


def soft_dilate(mask: Tensor) -> Tensor:
    """A mask (B, 1, m, m) widened by `NEAR`, and as soft."""
    reach = max(1, mask.shape[-1] // PERSON_MARGIN_DIVISOR)
    return box_mean(dilate(mask, reach), reach)


class LayeredFlow(NamedTuple):
    """Where in the photo a pixel comes from if it shows the head, and if it shows what is behind."""

    head: Tensor  # (B, 2, m, m)
    background: Tensor  # (B, 2, m, m)
    weights: Tensor  # (B, 4, m, m) shares of mesh, rigid, still and drift flow
    head_occlusion: Tensor  # (B, 1, m, m) 1 where the rendered head hides what is behind it, 0 where it hardly does

    @property
    def head_weight(self) -> Tensor:
        """How much of a pixel is the head's, (B, 1, m, m)."""
        return self.weights[:, :2].sum(1, keepdim=True)


class FlowBlend(nn.Module):
    """Blends mesh and rigid flow for the head, still and drift flow for the rest; starts at the masks' own weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        w = config.flow_width
        self.face_shift = config.face_residual_ratio
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

    def forward(
        self, photo: Tensor, mesh: MeshFlow, rigid: Tensor, neck: Tensor, opacity: Tensor, head_mask: Tensor, body_mask: Tensor,
        rotation: Tensor, lam_delta: Tensor,
    ) -> LayeredFlow:  # fmt: skip
        """Blend the candidates.

        Args:
            photo: (B, 3, H, W). mesh: its flow at (m, m). rigid, drift: (B, 2, s, s). opacity: (B, 1, s, s) of the
                rendered head. head, body: (B, 1, m, m), where the photo shows the head, and the rest of the person.
            turned: (B, 3), see `turn`. lam_change: (B, n), lambda(D) - lambda(S).
        """
        fine, s, m = mesh, rigid.shape[-1], mesh.uv.shape[-1]
        mesh = MeshFlow(*(resize(x, s) for x in fine))
        still = identity_grid(s, photo).expand_as(rigid)
        torso = warp(resize(body_mask, s), torch.lerp(still, neck, TORSO_FOLLOW_RATIO))
        flows = [mesh.uv, rigid.detach(), still, neck]
        seen = [warp(photo, uv) for uv in flows]
        facts = [mesh.weight, mesh.valid, mesh.stretch, mesh.mouth, resize(head_mask, s), opacity.detach(), torso]
        ways = [FLOW_INPUT_SCALE * (uv - still) for uv in (mesh.uv, rigid.detach(), neck)]
        rotation = rotation[:, :, None, None].expand(-1, -1, s, s)
        x = self.enter(torch.cat([*seen, *facts, *ways, rotation], dim=1))
        y = self.down(leaky_relu(x))
        if self.expression is not None:
            y = y + self.expression(lam_delta)[:, :, None, None]
        for block in self.deep:
            y = block(y)
        shift = resize(MAX_LEARNED_SHIFT * torch.tanh(self.shift(leaky_relu(y)).float()), m)
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        change = resize(self.leave(leaky_relu(self.join(torch.cat([leaky_relu(x), y], dim=1)))).float(), m)

        opacity = resize(opacity, m)
        solid = (2.5 * opacity - 1.25).clamp(0, 1)
        opacity = (1 - fine.weight) * 0.5 * opacity
        share = fine.weight + opacity
        # what was or is torso follows: standing still, the photo's torso would show beside the one that has moved
        follow = torch.maximum(resize(torso, m), resize(body_mask, m))
        prior = torch.cat([share, opacity / share.clamp_min(1e-3), TORSO_FOLLOW_RATIO * follow], 1)
        share, on_rigid, drifts = torch.sigmoid(torch.logit(prior, eps=PROB_EPS) + 2 * change).split(1, dim=1)
        on_rigid = on_rigid * solid  # where a ray meets hardly anything its depth is none
        of_head, of_rest = shift.split(2, dim=1)
        own = identity_grid(m, photo)
        moving = soft_dilate(
            torch.maximum(follow, resize(head_mask, m))
        )  # a background stays, whatever a network makes of it
        return LayeredFlow(
            torch.lerp(fine.uv, resize(rigid, m), on_rigid) + of_head * (1 - (1 - self.face_shift) * fine.face),
            own + moving * (drifts * (resize(neck, m) - own) + of_rest),
            torch.cat([share * (1 - on_rigid), share * on_rigid, (1 - share) * (1 - drifts), (1 - share) * drifts], 1),
            solid,
        )
