"""What mouth and eyes show inside: where it is in the photo, and where it is relative to skull, jaw and iris."""

from __future__ import annotations

import torch
from torch import Tensor

from export3d_cli.core.config.schema import NUM_LANDMARKS
from export3d_cli.core.model.cached_tensors import cached_tensor, index_tensor

# Inner lips from the right corner of the mouth to the left (the person's), for places inside an open mouth.
UPPER_INNER_LIP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
LOWER_INNER_LIP = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
# Rims of the eyes, each with its iris; and where teeth hang on: the upper ones on the skull, the lower ones on the jaw.
EYE_RIMS = ((468, (33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7)),
        (473, (263, 466, 388, 387, 386, 385, 384, 398, 362, 382, 381, 380, 374, 373, 390, 249)))  # fmt: skip
NOSE_BASE, CHIN = 2, 152
MAX_OPENING_RATIO = 20.0  # times as open as in the photo
# Centre and half size of what may be seen, in distances between the eyes: from below the nose, from the chin, the iris.
UPPER_TEETH_BOX, LOWER_TEETH_BOX, IRIS_BOX = (
    ((0.0, 0.42), (0.55, 0.25)),
    ((0.0, -0.85), (0.55, 0.35)),
    ((0.0, 0.0), (0.25, 0.15)),
)


def mouth_coords() -> Tensor:
    """Coordinates inside the mouth at every landmark, (478, 2): across -1..1, and 1 on the upper lip, -1 below."""
    places = torch.zeros(NUM_LANDMARKS, 2)
    across = torch.linspace(-1, 1, len(UPPER_INNER_LIP))
    for lip, height in ((UPPER_INNER_LIP, 1.0), (LOWER_INNER_LIP, -1.0)):
        places[list(lip)] = torch.stack([across, torch.full_like(across, height)], dim=-1)
    places[[UPPER_INNER_LIP[0], UPPER_INNER_LIP[-1]], 1] = 0
    return places


def anchored_coords(points: Tensor) -> Tensor:
    """Where the landmarks (B, 478, 3) lie relative to what moves with the teeth and with the irises, (B, 478, 4).

    -1..1 over what may be seen; both eyes alike, x towards the nose. An opening mouth uncovers teeth, it does not
    stretch them: a texture in these coordinates stays in place.
    """
    flat = points[..., :2]
    right, left = (flat[:, index_tensor((rim[0], rim[8]), flat)].mean(1) for _, rim in EYE_RIMS)
    size = (left - right).norm(dim=-1)[:, None, None].clamp_min(1e-6)

    def relative(part: Tensor, anchor: int, box: tuple[tuple[float, float], tuple[float, float]]) -> Tensor:
        place = (part - flat[:, anchor : anchor + 1]) / size
        centre, half = cached_tensor(box, place.device, place.dtype)
        return (place - centre) / half

    places = torch.cat([relative(flat, NOSE_BASE, UPPER_TEETH_BOX), relative(flat, CHIN, LOWER_TEETH_BOX)], dim=-1)
    for side, (iris, rim) in zip((1.0, -1.0), EYE_RIMS, strict=True):
        own = index_tensor((iris, *rim), flat)
        about = relative(flat[:, own], iris, IRIS_BOX) * cached_tensor((side, 1.0), flat.device, flat.dtype)
        places[:, own] = torch.cat([about, about], dim=-1)
    return places


def lip_edges(uv: Tensor, points: Tensor, deformed_points: Tensor) -> Tensor:
    """For `behind_lips`: where the photo has the edges of the lips, and how much wider they open in the result.

    Args:
        uv: (B, 478 or more, 2) in the photo. points, target: (B, 478, 3) landmarks of the photo and of the result.

    Returns:
        (B, 478, 5); 0 but at the inner lips.
    """
    upper, lower = index_tensor(UPPER_INNER_LIP, uv), index_tensor(LOWER_INNER_LIP, uv)
    before, after = ((p[:, upper] - p[:, lower]).norm(dim=-1) for p in (points, deformed_points))  # (B, 11)
    ratio = (after / before.clamp_min(1e-4)).clamp_max(MAX_OPENING_RATIO)
    ratio = torch.cat([ratio[:, 1:2], ratio[:, 1:-1], ratio[:, -2:-1]], dim=1)  # corners open with what is beside them
    edges = torch.cat([uv[:, upper], uv[:, lower], ratio[..., None]], dim=-1)
    out = uv.new_zeros(len(uv), NUM_LANDMARKS, 5)
    out[:, lower] = edges
    out[:, upper] = edges
    return out


def sample_behind_lips(height: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """What a mouth shows that opens: teeth hang on behind the upper lip as the photo has them, they do not stretch.

    Args:
        height: (B, P, 1) from the lower (-1) to the upper lip (1). edges: (B, P, 5) of `lip_edges`, interpolated.

    Returns:
        Where in the photo that is, (B, P, 2), and how surely the photo shows it, (B, P, 1): 0 below what it shows.
    """
    upper, lower, ratio = edges.split([2, 2, 1], dim=-1)
    deep = (1 - height) / 2 * ratio  # in openings of the photo
    return torch.lerp(upper, lower, deep.clamp(0, 1)), interior_visibility(height, ratio)


def interior_visibility(height: Tensor, ratio: Tensor) -> Tensor:
    """How surely a photo shows what is at `height` (-1..1) inside a mouth that is now `ratio` times as wide open."""
    return ((1.15 - (1 - height) / 2 * ratio) * 5).clamp(0, 1)
