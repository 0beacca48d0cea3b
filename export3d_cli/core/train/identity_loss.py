"""Identity loss (beyond the paper): distance of the embeddings of output and target by the user's face embedder."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export3d_cli.core.face.landmarks import ARCFACE_POINTS, LEFT_EYE, RIGHT_EYE
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.train.perceptual import IMAGENET_MEAN, IMAGENET_STD

FACE_SIZE_PX = 112
# ArcFace's template in pixels of that size, from left to right in the image: eyes, nose, mouth corners
ARCFACE_TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))


def arcface_points(landmarks: Tensor) -> Tensor:
    """Return eyes, nose and mouth corners (B, 5, 2), from left to right in the image, of landmarks (B, 478, 2)."""
    eyes = [landmarks[:, list(eye)].mean(1) for eye in (RIGHT_EYE, LEFT_EYE)]
    return torch.stack([*eyes, *(landmarks[:, k] for k in ARCFACE_POINTS)], dim=1)


def align_face(image: Tensor, points: Tensor, side: int = FACE_SIZE_PX) -> Tensor:
    """Align the faces of (B, 3, H, W), with five points (B, 5, 2) in crop units, with the template.

    Uses the least-squares similarity transform; gradients reach `image`. Returns (B, 3, side, side).
    """
    template = points.new_tensor(ARCFACE_TEMPLATE) + 0.5  # pixel centres
    points, target = points.float(), template * (side / FACE_SIZE_PX)
    centre, target_centre = points.mean(1, keepdim=True), target.mean(0)
    x, u = points - centre, target - target_centre  # (B, 5, 2), (5, 2)
    size = x.square().sum((1, 2)).clamp_min(1e-12)
    a = (x * u).sum((1, 2)) / size
    b = (x[..., 0] * u[:, 1] - x[..., 1] * u[:, 0]).sum(1) / size
    # inverse transform: position in the image of each template pixel
    axis = torch.arange(side, device=image.device, dtype=torch.float32) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1) - target_centre  # (side, side, 2)
    back = torch.stack([torch.stack([a, b], -1), torch.stack([-b, a], -1)], 1) / (a * a + b * b)[:, None, None]
    where = torch.einsum("bij,hwj->bhwi", back, grid) + centre[:, None]  # (B, side, side, 2), crop units
    return F.grid_sample(image.float(), where * 2 - 1, align_corners=False, padding_mode="border")


class IdentityLoss(nn.Module):
    """1 - cosine of the embeddings of two images of one face; the TorchScript embedder is frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor, target: Tensor, landmarks: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] that share landmarks (B, 478, 2) in crop units; gradients reach `image`."""
        with torch.autocast(image.device.type, enabled=False):
            points = arcface_points(landmarks)
            with torch.no_grad():
                target_embedding = self.embed(align_face(target, points))
            return (1 - F.cosine_similarity(self.embed(align_face(image, points)), target_embedding, dim=1)).mean()

    def embed(self, face: Tensor) -> Tensor:
        """Embed aligned faces (B, 3, 112, 112) in [-1, 1] -> (B, D)."""
        embedding: Tensor = self.network((face * 0.5 + 0.5 - self.mean) / self.std)
        return embedding


def load_identity_loss(path: str, device: torch.device) -> IdentityLoss:
    """Load a TorchScript embedder and check its output shape."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            identity = IdentityLoss(torch.jit.load(path, map_location=device)).to(device)
        with torch.no_grad():
            shape = identity.embed(torch.zeros(2, 3, FACE_SIZE_PX, FACE_SIZE_PX, device=device)).shape
        if len(shape) != 2 or shape[0] != 2:
            raise ValueError(f"its output for two faces has the shape {tuple(shape)}, not (2, D)")
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise InputError(f"loss.embedder {Path(path)} is not a TorchScript face embedder: {reason}") from error
    return identity
