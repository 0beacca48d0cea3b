"""Frames, uint8: how finely they are rendered, how large they are; the model's picture, or its depth in colours."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.animation.options import Quality
from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.media.image import to_uint8
from export3d_cli.core.model.export3d import Output
from export3d_cli.core.runtime.errors import InputError

LARGEST = 2048  # side of a frame, pixels
RIM = 0.25  # of a crop's side: how much around it is kept of a photo, for heads and shoulders that move into view
ENOUGH = 1.5  # sides of the model's picture that the photo must show for frames of twice its size

# Side of the volume's picture and samples of a ray, as shares of what the weights were trained with, and on a CPU how
# far lambda may be from that of blended tri-planes (`keys`). PSNR against best of three driven portraits, frame by
# frame: balanced 39 to 45 dB, fast 37 to 43.
QUALITIES: dict[Quality, tuple[float, float, float]] = {
    "fast": (0.5, 0.5, 6.0), "balanced": (0.5, 0.75, 3.5), "best": (1.0, 1.0, 0.0)
}  # fmt: skip


def sampling(config: ModelConfig, quality: Quality) -> tuple[int, tuple[int, int]]:
    """Side of the volume's picture; coarse and fine samples of a ray."""
    side, share, _ = QUALITIES[quality]
    return round(side * config.raw_size), (round(share * config.coarse_samples), round(share * config.fine_samples))


def frame_size(own: int, shown: float, asked: int = 0) -> int:
    """Side of the frames in pixels.

    Args:
        own: that of the model's picture. shown: that of the part of the photo which is animated.
        asked: 0 takes twice `own` where the photo shows nearly as much, else `own`.

    Raises:
        InputError: the model makes no frames so small, or frames are never so large.
    """
    if asked and not own <= asked <= LARGEST:
        raise InputError(f"size {asked} is out of range: with these weights frames have sides of {own} to {LARGEST}")
    return asked or (2 * own if shown >= ENOUGH * own else own)


def with_rim(square: tuple[float, float, float], size: int) -> tuple[tuple[float, float, float], int]:
    """A crop x0, y0, side of `size` pixels with `RIM` on all sides, and its own size: the rim is whole pixels."""
    (x0, y0, side), rim = square, round(RIM * size)
    more = rim * side / size
    return (x0 - more, y0 - more, side + 2 * more), size + 2 * rim


def room_around(square: tuple[float, float, float], size: tuple[int, int]) -> np.ndarray:
    """How far a photo of `size` (width, height) goes on to the left, the top and the right of a crop, (3,) float32.

    In sides of the crop, `RIM` at most.
    """
    x0, y0, side = square
    return np.array([x0, y0, size[0] - x0 - side], np.float32).clip(0, RIM * side) / side


def shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    """A square picture, uint8 (K, K, 3), of `side` at most."""
    return cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA) if len(picture) > side else picture


def mesh_size(config: ModelConfig, size: int) -> int:
    """Side at which the face mesh is rasterised for frames of that size: larger ones show its steps at an outline."""
    return config.mesh_size * min(size, 2 * config.image_size) // config.image_size


def pictures(out: Output, more: Tensor | None, size: int) -> np.ndarray:
    """The model's pictures, uint8 (B, H, W, 3), or (B, size, size, 3) with what a photo has `more`, (1, 3, M, M)."""
    return to_uint8(out.image if more is None else out.upscale(more.expand(len(out.image), -1, -1, -1), size))


def depth_picture(out: Output, camera: np.ndarray, size: int) -> np.ndarray:
    """Depth in colours, uint8 (B, size, size, 3): red 0.45 before the head's centre, blue as far behind it."""
    centre = np.linalg.norm(camera.reshape(-1, 25)[:, [3, 7, 11]], axis=1)  # distance to the head frame's origin
    large = F.interpolate(torch.cat([out.depth, out.opacity], 1).float(), (size, size), mode="bilinear")
    depth, opacity = large.cpu().numpy().transpose(1, 0, 2, 3)
    near = np.clip(0.5 - (depth - centre[:, None, None]) / 0.9, 0, 1)
    colours = [cv2.applyColorMap(np.uint8(255 * n), cv2.COLORMAP_TURBO)[..., ::-1] for n in near]  # type: ignore[call-overload]
    return np.uint8(np.stack(colours) * opacity[..., None].clip(0, 1))  # type: ignore[return-value]
