"""Fill the background behind a person: smooth colours from the surroundings, and the texture next to the hole."""

from __future__ import annotations

import cv2
import numpy as np

TEXTURE_SD = 0.02  # fraction of the image's longer side: standard deviation that separates texture from colour


def fill_hole(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fill a hole, bool (H, W), of an image, uint8 (H, W, 3).

    The colours are interpolated from the hole's border (push-pull). The texture is that of the surroundings, mirrored
    at the nearest point of the border.
    """
    if not hole.any() or hole.all():
        return image.copy()
    filled = _push_pull(image, hole)
    filled = filled + _mirrored_texture(image, filled, hole)
    return np.where(hole[..., None], np.rint(filled.clip(0, 255)), image).astype(np.uint8)


def _push_pull(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Interpolate the hole over an image pyramid; float32 (H, W, 3)."""
    weight = (~hole).astype(np.float32)
    levels: list[tuple[np.ndarray, np.ndarray]] = [(image.astype(np.float32) * weight[..., None], weight)]
    while min(levels[-1][1].shape) > 2:
        colours, weight = levels[-1]
        levels.append((cv2.pyrDown(colours), cv2.pyrDown(weight)))
    colours, weight = levels.pop()
    filled: np.ndarray = colours / np.maximum(weight, 1e-6)[..., None]
    for colours, weight in reversed(levels):
        coarse = cv2.resize(filled, weight.shape[::-1], interpolation=cv2.INTER_LINEAR)
        share = np.clip(weight, 0, 1)[..., None]
        filled = np.where(
            share > 1e-3, colours / np.maximum(weight, 1e-6)[..., None] * share + coarse * (1 - share), coarse
        )
    return filled


def _mirrored_texture(image: np.ndarray, filled: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Return the fine texture for a hole, float32 (H, W, 3): 0 where its mirror image lies in the hole or outside."""
    H, W = hole.shape
    _, labels = cv2.distanceTransformWithLabels(hole.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    rows, columns = np.nonzero(~hole)
    nearest = np.zeros((labels.max() + 1, 2), np.int32)
    nearest[labels[rows, columns]] = np.stack([rows, columns], axis=1)
    y, x = np.nonzero(hole)
    border = nearest[labels[y, x]]
    mirror_y, mirror_x = 2 * border[:, 0] - y, 2 * border[:, 1] - x
    inside = (mirror_y >= 0) & (mirror_y < H) & (mirror_x >= 0) & (mirror_x < W)
    mirror_y, mirror_x = mirror_y.clip(0, H - 1), mirror_x.clip(0, W - 1)
    valid = inside & ~hole[mirror_y, mirror_x]
    mirrored = filled.copy()
    mirrored[y[valid], x[valid]] = image[mirror_y[valid], mirror_x[valid]]
    sd = max(1.5, TEXTURE_SD * max(H, W))
    texture = mirrored - cv2.GaussianBlur(mirrored, (0, 0), sd)
    usable = np.zeros((H, W), np.float32)
    usable[y[valid], x[valid]] = 1
    return texture * cv2.GaussianBlur(usable, (0, 0), 1.5)[..., None]
