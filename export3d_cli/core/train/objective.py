"""The reconstruction objective and the schedules: pure functions of the configuration and the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.config.schema import TrainConfig
from export3d_cli.core.train import losses
from export3d_cli.core.train.landmark_loss import LandmarkLoss
from export3d_cli.core.train.pair_sampler import Batch
from export3d_cli.core.train.perceptual import PerceptualDistance

CROP_SIZE_PX = 64  # side of the crops of eyes and mouth
SOLID_HEAD = 0.9  # head mask from which the depth of the surface counts: the mask fades out on the neck


def learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """Return linear warm-up, then (with `decay`) a cosine to a tenth; `fraction` is the decay's progress, 0..1."""
    lr = config.lr * min(1.0, (step + 1) / config.warmup) if config.warmup else config.lr
    if config.decay or config.decay_by_time:
        lr *= 0.1 + 0.45 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
    return lr


def scheduled_raw_size(config: TrainConfig, step: int) -> int:
    """Return the side of the raw render at a step in pixels: `raw_size_start` first, if set."""
    is_small = config.raw_size_start > 0 and step < config.raw_size_grow_step
    return config.raw_size_start if is_small else config.model.raw_size


def draw_rays(config: TrainConfig, batch: Batch, size: int) -> Tensor:
    """Draw `raw_rays` pixels of raw renders of side `size`, more densely in eyes and mouth: indices (B, R)."""
    density = 1 + config.loss.mask * losses.face_mask(batch.target_landmarks, size)
    return torch.multinomial(density.flatten(1), config.raw_rays)


def depth_loss(expected: Tensor, truth: Tensor, head: Tensor) -> Tensor:
    """Return the mean error of the expected depth of solid parts of the head; 0 where `truth` is not known."""
    return ((expected - truth).abs() * (truth > 0) * (head > SOLID_HEAD)).mean()


def ray_loss(
    output: Any, rays: Tensor, size: int, batch: Batch, config: TrainConfig, head_mask: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a volume rendered at the pixels `rays` (B, R) of images of side `size`, and its terms.

    Colours are compared in front of a random colour for each pair: the head must be opaque, and end, where the target's
    is and does. In the expected depth transparency counts as the far end, so that its loss makes the head opaque, too.
    """

    def pick(image: Tensor, mode: str = "area") -> Tensor:
        image = F.interpolate(image, (size, size), mode=mode).flatten(2)
        return image.gather(2, rays[:, None].expand(-1, image.shape[1], -1))[..., None]  # (B, C, R, 1)

    assert head_mask is not None
    w, head = config.loss, pick(head_mask)
    background = 2 * torch.rand_like(batch.target[:, :, :1, :1]) - 1
    colour = output.image + (1 - output.opacity) * background
    target = torch.lerp(background, pick(batch.target), head)
    terms = {"l2_raw": w.l2 * losses.l2(colour, target), "l1_raw": w.l1 * losses.l1(colour, target)}
    terms["silhouette"] = w.silhouette * losses.l1(output.opacity, head)
    if w.depth > 0:
        depth = pick(batch.target_depth, "nearest")
        terms["depth"] = w.depth * depth_loss(output.depth, depth, head)
    if w.density_tv > 0:
        terms["density_tv"] = w.density_tv * output.density_tv.mean()
    loss = torch.stack([t.float() for t in terms.values()]).sum()
    return loss, {k: v.detach().float() for k, v in terms.items()}


def reconstruction_loss(
    output: Any, batch: Batch, config: TrainConfig, perceptual: PerceptualDistance | None,
    landmarks: LandmarkLoss | None = None, head_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return eq. 13, `L_rec = L2_raw + L2 + LPIPS_raw + LPIPS`, plus terms beyond the paper, and its weighted terms.

    `head_mask` (B, 1, ., .) in 0..1 is where the target shows the head: the desired opacity.
    """
    w = config.loss
    raw_target = losses.downsample(batch.target, output.raw.shape[-1])
    terms = {
        "l2": w.l2 * losses.l2(output.image, batch.target),
        "l2_raw": w.raw * w.l2 * losses.l2(output.raw, raw_target),
    }
    if w.l1 > 0:
        terms["l1"] = w.l1 * losses.l1(output.image, batch.target)
        terms["l1_raw"] = w.raw * w.l1 * losses.l1(output.raw, raw_target)
    if perceptual is not None and w.perceptual > 0:
        terms[perceptual.name] = w.perceptual * perceptual(output.image, batch.target, scales=w.perceptual_scales)
        if w.raw > 0:
            terms[f"{perceptual.name}_raw"] = w.raw * w.perceptual * perceptual(output.raw, raw_target, scales=1)
        if w.crop_perceptual > 0:
            crops = (
                losses.crop_eyes_and_mouth(x, batch.target_landmarks, CROP_SIZE_PX)
                for x in (output.image, batch.target)
            )
            terms["crop_perceptual"] = w.crop_perceptual * perceptual(*crops, scales=1)
    if w.mask > 0:
        mask = losses.face_mask(batch.target_landmarks, batch.target.shape[-1])
        terms["mask"] = w.mask * losses.mask_loss(output.image, batch.target, mask)
    if landmarks is not None and w.landmarks > 0:
        terms["landmarks"] = w.landmarks * landmarks(output.image, batch.target, batch.target_landmarks)
    if w.residual_flow > 0 and output.residual_flow is not None:
        terms["residual_flow"] = w.residual_flow * output.residual_flow.float().square().mean()
    if w.flow > 0 and output.warped_photo is not None:
        terms["flow"] = w.flow * losses.flow_loss(output.warped_photo, batch.target, output.source_visibility)
    if w.density_tv > 0 and output.density_tv is not None:
        terms["density_tv"] = w.density_tv * output.density_tv.mean()
    if head_mask is not None:
        head = losses.downsample(head_mask, output.opacity.shape[-1])
        terms["silhouette"] = w.silhouette * losses.l1(output.opacity, head)
        if w.depth > 0:
            depth = F.interpolate(batch.target_depth, output.depth.shape[2:])
            terms["depth"] = w.depth * depth_loss(output.depth, depth, head)
    loss = torch.stack([t.float() for t in terms.values()]).sum()
    return loss, {k: v.detach().float() for k, v in terms.items()}
