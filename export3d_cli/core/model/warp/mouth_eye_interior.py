"""Coordinates inside mouth and eyes: relative to lips, skull, jaw and iris, and where the photo shows the interior."""

import torch
from torch import Tensor

from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.model.cached_tensors import cached_tensor, index_tensor

MAX_OPENING_RATIO = 20.0  # a mouth counts as at most this much wider open than in the photo
# Centre and half size of the texture boxes, in inter-ocular distances. Upper teeth are fixed to the skull (relative to
# the base of the nose), lower teeth to the jaw (relative to the chin), the iris box to the iris.
UPPER_TEETH_BOX = ((0.0, 0.42), (0.55, 0.25))
LOWER_TEETH_BOX = ((0.0, -0.85), (0.55, 0.35))
MAX_IRIS_REACH = 0.85  # of the way from the iris's centre to the lid: irises that the lids cut end there in the mesh
IRIS_BOX = ((0.0, 0.0), (0.25, 0.15))

_EYES = ((mesh.LEFT_IRIS, mesh.LEFT_EYE), (mesh.RIGHT_IRIS, mesh.RIGHT_EYE))  # in the order of the eyes' triangles
RIM = tuple(v for _, rim in _EYES for v in rim)  # (32,)
_CENTRE = tuple(iris[0] for iris, rim in _EYES for _ in rim)


def split_eye_triangles(first_vertex: int, first_triangle: int) -> tuple[Tensor, Tensor]:
    """Split the eyes' triangles, each from the iris's centre to the lids, at the edge of the iris: (96, 4), kind 2.

    The edge's vertices, of `iris_edge`, are numbered from `first_vertex`, the eyes' own triangles from
    `first_triangle`; also returns the number of the one that each new triangle is a part of, (96,).
    """
    rows, parents, count = list[list[int]](), list[int](), len(mesh.RIGHT_EYE)
    for k, (centre, rim) in enumerate(zip(_CENTRE, RIM, strict=True)):
        j = k - k % count + (k + 1) % count  # the next point of the same eye
        edge, next_edge = first_vertex + k, first_vertex + j
        rows += [[centre, edge, next_edge, 2], [edge, rim, RIM[j], 2], [edge, RIM[j], next_edge, 2]]
        parents += 3 * [first_triangle + k]
    return torch.tensor(rows), torch.tensor(parents)


def iris_edge(points: Tensor, source: Tensor) -> Tensor:
    """Return where the iris of `source` ends from its centre to `RIM` of points (B, 478, 3): (B, 32, 1) in 0..1."""
    flat = source[..., :2]
    irises = (flat[:, index_tensor(iris, flat)] for iris, _ in _EYES)  # each its centre and 4 points of its edge
    radii = [(iris[:, 1:] - iris[:, :1]).norm(dim=-1).mean(1, keepdim=True) for iris in irises]
    radius = torch.cat([r.expand(-1, len(mesh.RIGHT_EYE)) for r in radii], dim=1)  # (B, 32)
    rim, centre = (points[:, index_tensor(vertices, points), :2] for vertices in (RIM, _CENTRE))
    return (radius / (rim - centre).norm(dim=-1).clamp_min(1e-6)).clamp_max(MAX_IRIS_REACH)[..., None]


def interpolate_iris_edge(values: Tensor, edge: Tensor) -> Tensor:
    """Interpolate values (B, 478, K) of landmarks at `edge` of `iris_edge`: (B, 32, K)."""
    centre, rim = (values[:, index_tensor(vertices, values)] for vertices in (_CENTRE, RIM))
    return torch.lerp(centre, rim, edge)


def mouth_coords() -> Tensor:
    """Return mouth coordinates of the landmarks, (478, 2): x -1..1 across, y 1 on the upper and -1 on the lower lip."""
    coords = torch.zeros(mesh.NUM_LANDMARKS, 2)
    across = torch.linspace(-1, 1, len(mesh.UPPER_INNER_LIP))
    for lip, height in ((mesh.UPPER_INNER_LIP, 1.0), (mesh.LOWER_INNER_LIP, -1.0)):
        coords[list(lip)] = torch.stack([across, torch.full_like(across, height)], dim=-1)
    coords[[mesh.UPPER_INNER_LIP[0], mesh.UPPER_INNER_LIP[-1]], 1] = 0
    return coords


def anchored_coords(points: Tensor) -> Tensor:
    """Return coordinates (B, 478, 4) of landmarks (B, 478, 3) in two boxes of teeth, or twice in the iris's: -1..1.

    In both eyes x points to the nose. A texture in these coordinates stays in place while an opening mouth uncovers it.
    """
    flat = points[..., :2]
    right, left = (flat[:, index_tensor((rim[0], rim[8]), flat)].mean(1) for _, rim in mesh.EYE_RIMS)
    eye_distance = (left - right).norm(dim=-1)[:, None, None].clamp_min(1e-6)

    def box_coords(part: Tensor, anchor: int, box: tuple[tuple[float, float], tuple[float, float]]) -> Tensor:
        offset = (part - flat[:, anchor : anchor + 1]) / eye_distance
        centre, half_size = cached_tensor(box, offset.device, offset.dtype)
        return (offset - centre) / half_size

    coords = torch.cat(
        [box_coords(flat, mesh.NOSE_BASE, UPPER_TEETH_BOX), box_coords(flat, mesh.CHIN, LOWER_TEETH_BOX)], dim=-1
    )
    for sign, (iris, rim) in zip((1.0, -1.0), mesh.EYE_RIMS, strict=True):
        eye = index_tensor((iris, *rim), flat)
        eye_coords = box_coords(flat[:, eye], iris, IRIS_BOX) * cached_tensor((sign, 1.0), flat.device, flat.dtype)
        coords[:, eye] = torch.cat([eye_coords, eye_coords], dim=-1)
    return coords


def lip_edges(uv: Tensor, points: Tensor, deformed_points: Tensor) -> Tensor:
    """Return the inputs of `sample_behind_lips` at each landmark: the photo's lip edges and the opening ratio.

    (B, 478, 5): uv of the upper edge, uv of the lower edge, ratio of openings; 0 except at the inner lips.
    """
    upper, lower = index_tensor(mesh.UPPER_INNER_LIP, uv), index_tensor(mesh.LOWER_INNER_LIP, uv)
    before, after = ((p[:, upper] - p[:, lower]).norm(dim=-1) for p in (points, deformed_points))  # (B, 11)
    ratio = (after / before.clamp_min(1e-4)).clamp_max(MAX_OPENING_RATIO)
    ratio = torch.cat([ratio[:, 1:2], ratio[:, 1:-1], ratio[:, -2:-1]], dim=1)  # corners take their neighbours' ratio
    edges = torch.cat([uv[:, upper], uv[:, lower], ratio[..., None]], dim=-1)
    out = uv.new_zeros(len(uv), mesh.NUM_LANDMARKS, 5)
    out[:, lower] = edges
    out[:, upper] = edges
    return out


def sample_behind_lips(height: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return uv (B, P, 2) where the photo has the interior of an opening mouth, and how well it shows it, (B, P, 1).

    Teeth stay behind the upper lip, unstretched. `height` (B, P, 1) goes from the lower (-1) to the upper lip (1),
    `edges` (B, P, 5) are interpolated from `lip_edges`.
    """
    upper, lower, ratio = edges.split([2, 2, 1], dim=-1)
    depth = (1 - height) / 2 * ratio  # below the upper lip, in openings of the photo
    return torch.lerp(upper, lower, depth.clamp(0, 1)), interior_visibility(height, ratio)


def interior_visibility(height: Tensor, ratio: Tensor) -> Tensor:
    """Return how well the photo shows `height` (-1..1) in a mouth opened to `ratio` times the photo's opening."""
    return ((1.15 - (1 - height) / 2 * ratio) * 5).clamp(0, 1)
