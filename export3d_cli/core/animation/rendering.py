"""Rendering quality, and the network's output as uint8 frames."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from export3d_cli.core.animation.options import Quality
from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.model.export3d import Output

DEPTH_RANGE = 0.45  # head-frame units before and behind the head's centre that the depth colours span


# PSNR against `best` of three driven portraits, frame by frame: balanced 39 to 45 dB, fast 37 to 43 dB.
# Side of the volume rendering and samples of a ray, as fractions of those that the weights were trained at.
RENDER_SCALES: dict[Quality, tuple[float, float]] = {"fast": (0.5, 0.5), "balanced": (0.5, 0.75), "best": (1.0, 1.0)}


def sampling(config: ModelConfig, quality: Quality) -> tuple[int, tuple[int, int]]:
    """Return the side of the volume rendering and the numbers of coarse and fine samples of a ray."""
    image, samples = RENDER_SCALES[quality]
    counts = round(samples * config.coarse_samples), round(samples * config.fine_samples)
    return round(image * config.raw_size), counts


def triplane_tolerance(config: ModelConfig, quality: Quality, device: torch.device) -> float:
    """Return how far lambda may be from that of interpolated tri-planes; 0: none are interpolated.

    On a GPU, many frames at once make tri-planes cheap.
    """
    if device.type != "cpu" or quality == "best":
        return 0.0
    return config.triplane_tolerance[0 if quality == "fast" else 1]


def colour_depth(output: Output, cameras: np.ndarray, size: int) -> np.ndarray:
    """Return depth in colours, uint8 (B, size, size, 3): red in front of the head's centre, blue behind it."""
    centre = np.linalg.norm(cameras.reshape(-1, 25)[:, [3, 7, 11]], axis=1)  # distance to the head frame's origin
    maps = F.interpolate(torch.cat([output.depth, output.opacity], 1).float(), (size, size), mode="bilinear")
    depth, opacity = maps.cpu().numpy().transpose(1, 0, 2, 3)
    nearness = np.clip(0.5 - (depth - centre[:, None, None]) / (2 * DEPTH_RANGE), 0, 1)
    colours = [cv2.applyColorMap(np.uint8(255 * n), cv2.COLORMAP_TURBO)[..., ::-1] for n in nearness]  # type: ignore[call-overload]
    return np.uint8(np.stack(colours) * opacity[..., None].clip(0, 1))  # type: ignore[return-value]
