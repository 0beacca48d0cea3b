"""Several photos of one person (beyond the paper): which of them each pixel of the face comes from.

Every photo's mesh is deformed to the same head, so that their pixels correspond. Each pixel is taken from a photo that
shows it; photos with a view and an expression similar to the result's, and the main photo, get more weight.
"""

import torch
from torch import Tensor

from export3d_cli.core.model.masks import box_mean, linear_step
from export3d_cli.core.model.warp.flow_blending import LayeredFlow
from export3d_cli.core.model.warp.mesh_flow import MeshFlow

MIN_VALIDITY = 1e-3  # of a photo that does not show a pixel at all
# Differences between photos for which one counts exp(2) times as much as the other:
STRETCH_SCALE = 1.5  # of the magnification from photo to result, log2
ANGLE_SCALE = 0.6  # of the sine of the angle between the head in the photo and in the result
EXPRESSION_SCALE = 0.008  # of the landmarks around, moved by the difference in expression, head-frame units
FIRST_PHOTO_BONUS = 0.5  # added to the logit of the first photo
FACE_FADE = (0.4, 0.9)  # weights of the face, from the ring around it inwards, over which photos are selected
REGION_RADIUS = 0.04  # head-frame units: landmarks this near to each other come from the same photo
FRACTION_FADE = (0.1, 0.4)  # of an additional photo's weight that is not and fully used
DETAIL_DIVISOR = 21  # a face's detail is finer than 1/21 of the image side to each side
DETAIL_NOISE = 0.02  # contrast that does not count as detail, of 2
FEATHER_DIVISOR = 64  # weights are smoothed over 1/64 of the image side to each side


def similarity(pair: Tensor, skin: Tensor) -> float:
    """Return how alike two faces are, -1 to 1: the correlation of their luminance between two scales.

    `pair` (2, 3, s, s) are photos with the faces in the same place, `skin` (1, 1, s, s) is 1 where both show them.
    """
    radius = max(1, pair.shape[-1] // DETAIL_DIVISOR)
    grey = pair.mean(1, keepdim=True)
    detail = (grey - box_mean(grey * skin, radius) / box_mean(skin, radius).clamp_min(1e-3)) * skin
    power = box_mean(detail.square(), 2 * radius) / box_mean(skin, 2 * radius).clamp_min(1e-3)
    first, second = (detail / (power.sqrt() + DETAIL_NOISE)).flatten(1)
    return float(torch.cosine_similarity(first, second, dim=0))


def expression_distances(points: Tensor, deformed: list[Tensor], photos: list[Tensor]) -> Tensor:
    """Return how far J photos' expressions are from the result's around each landmark, (B, 478, J), head-frame units.

    `points` (B, 478, 3) are the result's landmarks, `photos` those of the photos, and `deformed` the same with the
    result's expression.
    """
    moved = [(a - b).norm(dim=-1) for a, b in zip(deformed, photos, strict=True)]
    with torch.autocast(points.device.type, enabled=False):
        near = torch.cdist(points, points).square() / (2 * REGION_RADIUS**2)  # (B, 478, 478)
        return torch.softmax(-near, dim=-1) @ torch.stack(moved, dim=-1)


def blend_landmarks(deformed: list[Tensor], distances: Tensor, angles: Tensor) -> Tensor:
    """Return the result's landmarks (B, 478, 3), as the photos with the nearest expressions have them.

    Those `deformed` also hold what the basis does not explain. `distances` (B, 478, J) of `expression_distances`,
    `angles` (B, J): sines of those between the photos' heads and the first one's.
    """
    logits = -2 / EXPRESSION_SCALE * distances - 2 / ANGLE_SCALE * angles[:, None]
    logits[..., 0] += FIRST_PHOTO_BONUS
    return (torch.stack(deformed, dim=-1) * torch.softmax(logits, dim=-1)[:, :, None]).sum(-1)


def select_photos(flow: LayeredFlow, meshes: list[MeshFlow], expression: Tensor, angles: Tensor,
                  shown: Tensor) -> tuple[LayeredFlow, MeshFlow]:  # fmt: skip
    """Blend the head from J photos, whose mesh flows `meshes` show the same head, the first photo's first.

    `expression` (B, J, m, m) are `expression_distances` in the image; `angles` (B, J): sines of the angles between the
    photos' heads and the result's; `shown` (B, J, m, m) is 0 where something hides the face. Returns the flow with
    additional photos, and the mesh flow with what all photos show.
    """
    valid, stretch, closed, weight = (
        torch.cat([getattr(mesh, name) for mesh in meshes], dim=1)
        for name in ("valid", "stretch", "closed_in_photo", "weight")
    )  # (B, J, m, m) each
    logits = (
        (valid * shown * weight).clamp_min(MIN_VALIDITY).log()
        - 2 / STRETCH_SCALE * stretch.clamp_min(0)
        - 2 / EXPRESSION_SCALE * expression
        - 2 / ANGLE_SCALE * angles[..., None, None]
    )
    logits[:, 0] += FIRST_PHOTO_BONUS
    fractions = torch.softmax(logits, dim=1)
    fractions = box_mean(fractions, max(1, fractions.shape[-1] // FEATHER_DIVISOR))
    mesh_weight = flow.weights[:, :1] / flow.head_weight.clamp_min(1e-3)  # the other photos have no rigid flow
    others = linear_step(fractions[:, 1:], *FRACTION_FADE) * mesh_weight * linear_step(meshes[0].face, *FACE_FADE)
    others = others / others.sum(1, keepdim=True).clamp_min(1)
    fractions = torch.cat([1 - others.sum(1, keepdim=True), others], dim=1)
    valid, stretch, closed = ((x * fractions).sum(1, keepdim=True) for x in (valid, stretch, closed))
    mesh = meshes[0]._replace(valid=valid, stretch=stretch, closed_in_photo=closed)
    return flow._replace(additional=tuple(mesh.uv for mesh in meshes[1:]), fractions=others), mesh
