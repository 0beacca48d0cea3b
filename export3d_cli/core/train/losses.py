"""Loss terms of the reconstruction stage (sec. 6.3) and beyond the paper. Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from export3d_cli.core.face.landmarks import LEFT_EYE, OUTER_LIPS, RIGHT_EYE
from export3d_cli.core.model.cached_tensors import index_tensor
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.mesh_flow import resize, warp


def l2(image: Tensor, target: Tensor) -> Tensor:
    """Return an L2 term of eq. 13: the mean squared difference."""
    return F.mse_loss(image.float(), target.float())


def l1(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference (beyond the paper): blurs less than L2."""
    return F.l1_loss(image.float(), target.float())


def downsample(image: Tensor, size: int) -> Tensor:
    """Return the target of the raw terms of eq. 13: D at the side of the raw render."""
    return F.interpolate(image, size=(size, size), mode="area") if image.shape[-1] != size else image


def face_mask(landmarks: Tensor, size: int) -> Tensor:
    """Return a soft mask of eyes and mouth: landmarks (B, 478, 2) in crop units -> (B, 1, size, size) in 0..1.

    Each region is the ellipse of its landmarks' covariance, scaled by 1.5, so that it rotates with the head.
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
        distance = ((offset @ inverse[:, None]) * offset).sum(-1) / (2 * 1.5**2)
        mask = torch.maximum(mask, torch.sigmoid(6 * (1 - distance)))
    return mask[:, None]


def crop_eyes_and_mouth(image: Tensor, landmarks: Tensor, side: int) -> Tensor:
    """Crop eyes and mouth, 1.4 times as wide, by landmarks (B, 478, 2): (B, C, H, W) -> (3 B, C, side, side)."""
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

    Differences are averaged over cells of 1, 4 and 8 pixels, so that a flow that is far off gets a gradient, too. No
    gradient reaches `source_visibility` (B, 1, m, m).
    """
    size = sampled.shape[-1]
    difference = (sampled.float() - downsample(target.float(), size)) * resize(source_visibility.detach().float(), size)
    cells = [difference, F.avg_pool2d(difference, 4), F.avg_pool2d(difference, 8)]
    return torch.stack([x.abs().mean() for x in cells]).mean()


def mask_loss(image: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the absolute difference inside eyes and mouth, averaged over the whole image (PlaneDict's mask loss)."""
    return (mask * (image.float() - target.float()).abs()).mean()
