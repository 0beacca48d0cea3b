"""Basis flow (beyond the paper; off in the `paper` preset): lambda -> deformed face mesh -> dense backward flow.

Each basis vector v_i owns a displacement field b_i (478 landmarks, head frame). The source's landmarks move by
`sum_i (lambda_i(D) - lambda_i(S)) b_i`, the driver's camera projects them, and the rasterised mesh gives, for each
output pixel, its position in the photo. Three rings of vertices around the face move rigidly with the head and carry
ears, upper neck and hair; `flow_blending` covers the rest. UV positions are fractions of the image size, (0, 0) is the
top left corner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import ModelConfig
from export3d_cli.core.face.landmarks import CHIN, FACE_OVAL, FOREHEAD_TOP, NUM_LANDMARKS
from export3d_cli.core.model.cached_tensors import cached_tensor, index_tensor
from export3d_cli.core.model.fast.resampling import can_resample, resize_bilinear
from export3d_cli.core.model.masks import linear_step
from export3d_cli.core.model.triplane import SURFACE_HALF_EXTENT
from export3d_cli.core.model.volume_renderer import pixel_grid, project
from export3d_cli.core.model.warp import mouth_eye_interior, rasterizer
from export3d_cli.core.model.warp.mouth_eye_interior import anchored_coords, lip_edges
from export3d_cli.core.model.warp.rasterizer import cross_2d, gather_rows, interpolate_vertices

FACE_TRIANGLES = 902  # rows of (a, b, c, kind): kind 0 skin, 1 inside of the mouth, 2 eye
EYE_TRIANGLES = 32  # the last ones of the face
# Rings around the face oval: (scale of the oval, fraction of the oval's depth, depth added, proximity to the face). The
# outer ones are flatter than the face, as hair is round; the last one is for hair on top.
HEAD_RINGS = ((1.3, 1.0, 0.05, 0.5), (2.0, 0.5, 0.09, 0.0), (2.8, 0.5, 0.12, -0.5))
# Next to jaws and ears the inner ring shrinks to the person's outline, so that a turned head shows no background there:
CUT_RING_DEPTH = 0.14  # depth added to it where it shrinks to the oval
OUTLINE_STEPS = 24  # scales between the oval and the usual ring at which the outline is looked for
ON_PERSON = 0.9  # value of the person mask inside the outline
# Head mask, in face heights (chin to forehead). Each pair is a fade: 0 at the first value, 1 at the second.
NECK_FADE_HEIGHT = 0.3  # the mask fades out over this distance below the chin
HAIR_TOP_FADE = (0.6, 0.9)  # above the chin: from here hair of any height belongs to the head,
HAIR_TOP_WIDTH_FADE = (0.6, 0.75)  # if it is no farther from the face's axis than this
SURFACE_SIZE = 64  # pixels a side of the height field of `BasisFlow.rasterize_surface`


INTERIOR_FIELDS = ("mouth", "closed_in_photo", "mouth_coords", "eye", "anchored_coords")  # 0 outside mouth and eyes


class MeshFlow(NamedTuple):
    """The mesh as the driver's camera sees it; each (B, ., s, s)."""

    uv: Tensor  # (B, 2) position in the photo; the pixel's own position outside the mesh
    weight: Tensor  # (B, 1) 1 in the head with hair; without a head mask it falls to 0 at the second ring
    valid: Tensor  # (B, 1) 1 where the photo shows this part of the face, 0 where it is hidden or closed in the photo
    stretch: Tensor  # (B, 1) log2 of the magnification from photo to result
    mouth: Tensor  # (B, 1) 1 inside the mouth
    closed_in_photo: Tensor  # (B, 1) 1 inside a mouth or eye that is closed in the photo, 0 if half as open or more
    mouth_coords: Tensor  # (B, 2) across the mouth (-1..1) and from lower (-1) to upper lip (1); 0 elsewhere
    eye: Tensor  # (B, 1) 1 inside an eye
    anchored_coords: Tensor  # (B, 4) in the boxes of upper and lower teeth, or twice in the iris's; 0 elsewhere
    face: Tensor  # (B, 1) 1 in the face, falling to 0 at the inner ring

    def without_interior(self, cover: Tensor) -> MeshFlow:
        """Treat mouth and eyes as skin where `cover` (B, 1, s, s) is 1."""
        interior = {k: getattr(self, k) * (1 - cover) for k in INTERIOR_FIELDS}
        return self._replace(**interior, valid=torch.maximum(self.valid, cover * self.face))


class DeformedMesh(NamedTuple):
    """A source's mesh with an expression, independent of the driver's camera; V vertices, T triangles."""

    points: Tensor  # (B, V, 3) deformed, head frame
    iris_edges: Tensor  # (B, 32, 3) likewise
    # (B, T, 3 * 14) per corner: uv in the photo 2, proximity 1, mouth coords 2, anchored coords 4, lip edges 5
    corner_attributes: Tensor
    source_areas: Tensor  # (B, T) twice the signed area in the photo


def _double_areas(uv: Tensor, triangles: Tensor) -> Tensor:
    """Return twice the signed areas (B, T) of triangles (T, 3) over positions (B, V, 2)."""
    a, b, c = uv[:, triangles].unbind(2)
    return cross_2d(b - a, c - a)


def add_head_rings(points: Tensor, outline: Tensor | None = None) -> Tensor:
    """Append the rings, the oval widened and set back, to landmarks (B, 478, 3), head frame -> (B, 478 + 108, 3).

    `outline` (B, 36) are scales of the inner ring, see `BasisFlow.find_outline`; None: its usual one.
    """
    oval = points[:, index_tensor(FACE_OVAL, points)]
    rings = [_make_ring(oval, cached_tensor(scale, oval.device, oval.dtype), *depth) for scale, *depth, _ in HEAD_RINGS]
    if outline is not None:
        rings[0] = _make_inner_ring(oval, outline)
    return torch.cat([points, *rings], dim=1)


def _make_ring(oval: Tensor, scale: Tensor, relief: float, depth: float | Tensor) -> Tensor:
    """Widen a face oval (..., 36, 3) by scales (..., 36) or one scale, scale its depth by `relief`, and set it back."""
    centre = oval.mean(-2, keepdim=True)
    widened = centre + (oval - centre) * scale[..., None]
    z = relief * oval[..., 2] + depth
    return torch.cat([widened[..., :2], z[..., None].expand_as(widened[..., :1])], dim=-1)


def _make_inner_ring(oval: Tensor, scale: Tensor) -> Tensor:
    """Return the inner ring with scales of its own, see `_make_ring`: deeper, the smaller they are."""
    usual, relief, depth, _ = HEAD_RINGS[0]
    return _make_ring(oval, scale, relief, depth + (CUT_RING_DEPTH - depth) * (usual - scale) / (usual - 1))


def ring_triangles(device: torch.device | None = None) -> Tensor:
    """Return the triangles between face oval and rings, (216, 4) int64, wound like the face's."""
    n = len(FACE_OVAL)
    loops = [FACE_OVAL, *(range(NUM_LANDMARKS + r * n, NUM_LANDMARKS + (r + 1) * n) for r in range(len(HEAD_RINGS)))]
    triangles = []
    for inner, outer in zip(loops[:-1], loops[1:], strict=True):
        for k in range(n):
            j = (k + 1) % n
            triangles += [(inner[k], outer[k], outer[j], 0), (inner[k], outer[j], inner[j], 0)]
    return cached_tensor(tuple(triangles), device or torch.device("cpu"), torch.int64)


def vertex_proximity(device: torch.device) -> Tensor:
    """Return the proximity of each vertex to the face, (478 + 108,): 1 in it, 0 at the second ring, less beyond."""
    n = len(FACE_OVAL)
    rings = tuple(proximity for *_, proximity in HEAD_RINGS for _ in range(n))
    return cached_tensor((1.0,) * NUM_LANDMARKS + rings, device)


def face_and_head_weights(proximity: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of the face, and of the head where there is no mask of it, from the proximity to the face."""
    return (2 * proximity - 1).clamp_min(0), (2 * proximity).clamp(0, 1)


class BasisFlow(nn.Module):
    """The displacement fields b_i and the mesh that they deform."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size, self.windows = config.mesh_size, rasterizer.RasterWindows()
        self.register_buffer("basis", torch.zeros(config.num_coefficients, NUM_LANDMARKS, 3))  # b_i, head frame
        self.register_buffer("triangles", torch.zeros(FACE_TRIANGLES, 4, dtype=torch.int32))
        self.register_buffer("ring_triangles", ring_triangles(), persistent=False)
        first_edge = NUM_LANDMARKS + len(HEAD_RINGS) * len(FACE_OVAL)
        eyes, eye_parents = mouth_eye_interior.split_eye_triangles(first_edge, FACE_TRIANGLES - EYE_TRIANGLES)
        skin, rings = torch.arange(int(eye_parents[0])), FACE_TRIANGLES + torch.arange(len(self.ring_triangles))
        self.register_buffer("eye_triangles", eyes, persistent=False)
        self.register_buffer("parents", torch.cat([skin, eye_parents, rings]), persistent=False)
        self.register_buffer("mouth_coords", _pad_rings(mouth_eye_interior.mouth_coords()), persistent=False)
        self.basis: Tensor
        self.mouth_coords: Tensor
        self.triangles: Tensor
        self.ring_triangles: Tensor
        self.eye_triangles: Tensor
        self.parents: Tensor

    def deform_landmarks(self, points: Tensor, lam_delta: Tensor) -> Tensor:
        """Give landmarks (B, 478, 3) the expression change lambda(D) - lambda(S), (B, n)."""
        return points.float() + (lam_delta.float()[:, :, None, None] * self.basis.float()).sum(1)

    def all_triangles(self) -> Tensor:
        """Return the triangles of face and rings, (T, 4) int64: a, b, c, kind."""
        return torch.cat([self.triangles.long(), self.ring_triangles])

    def _flow_triangles(self) -> Tensor:
        """Return `all_triangles` with the eyes split at the iris, which then moves undistorted; see `parents`."""
        return torch.cat([self.triangles[:-EYE_TRIANGLES].long(), self.eye_triangles, self.ring_triangles])

    def source_proximity(self, points: Tensor, camera: Tensor) -> Tensor:
        """Return `vertex_proximity` in an image of landmarks (B, 478, 3): (B, 1, m, m), -1 where there is no mesh."""
        uv, depth = project(add_head_rings(points.float()), camera)
        proximity = vertex_proximity(points.device)[None, :, None].expand(len(points), -1, -1)
        return self._draw(uv, depth, self.all_triangles(), 1 + proximity, self.size) - 1

    def rasterize_landmark_values(self, points: Tensor, camera: Tensor, values: Tensor) -> Tensor:
        """Interpolate values (B, 478, C) of landmarks over the face in an image: (B, C, m, m), 0 outside the face."""
        return self._draw(*project(points.float(), camera), self.triangles.long(), values, self.size)

    def _draw(self, uv: Tensor, depth: Tensor, triangles: Tensor, values: Tensor, size: int) -> Tensor:
        """Rasterise values (B, V, C) of vertices: (B, C, size, size), 0 where there is no triangle."""
        raster = rasterizer.rasterize(uv, depth, triangles[:, :3], size, self.windows)
        return interpolate_vertices(raster, values, triangles[:, :3]).transpose(1, 2).reshape(len(uv), -1, size, size)

    def head_mask(self, points: Tensor, camera: Tensor, person: Tensor | None,
                  proximity: Tensor | None = None) -> Tensor:  # fmt: skip
        """Return where a photo shows the head, (B, 1, m, m) in 0..1: all that moves with it, down to the upper neck.

        Without the mask `person` (B, 1, ., .) of hair and body, or if it misses the face, the mask of the head fades
        out softly all around. `proximity`: `source_proximity` of the same points and camera, if known.
        """
        face, weight = face_and_head_weights(self.source_proximity(points, camera) if proximity is None else proximity)
        if person is None:
            return weight
        height, lateral = self.face_axes(points, camera)
        above_neck = (height / NECK_FADE_HEIGHT + 1).clamp(0, 1)
        # on the sides at most half of the second ring: there may be other people in the photo
        top = linear_step(height, *HAIR_TOP_FADE) * (1 - linear_step(lateral, *HAIR_TOP_WIDTH_FADE))
        near = torch.maximum((2 * weight).clamp_max(1), top)
        person = resize(F.interpolate(person.float(), (self.size // 2, self.size // 2), mode="area"), self.size)
        hair = person * above_neck * near
        covers_face = (person * face).sum((1, 2, 3), keepdim=True) > face.sum((1, 2, 3), keepdim=True) / 2
        return torch.where(covers_face, torch.maximum(face, hair), weight)

    def face_axes(self, points: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels' height above the chin and distance from the face's axis, face heights, (B, 1, m, m)."""
        uv, _ = project(points.float()[:, index_tensor((CHIN, FOREHEAD_TOP), points)], camera)
        chin, up = uv[:, 0], (uv[:, 1] - uv[:, 0])[:, None]  # (B, 2), (B, 1, 2)
        offset = pixel_grid(self.size, camera.device) - chin[:, None]  # (B, P, 2)
        length = up.square().sum(-1).clamp_min(1e-6)
        height, lateral = (offset * up).sum(-1) / length, cross_2d(offset, up).abs() / length
        return height.view(-1, 1, self.size, self.size), lateral.view(-1, 1, self.size, self.size)

    def find_outline(self, points: Tensor, camera: Tensor, person: Tensor) -> Tensor:
        """Return scales (B, 36) of the inner ring at which a photo's person mask (B, 1, ., .) covers it.

        If the mask does not reach the face, the ring keeps its usual scale.
        """
        usual = HEAD_RINGS[0][0]
        scales = torch.linspace(1, usual, OUTLINE_STEPS + 1, device=points.device)
        oval = points.float()[:, None, index_tensor(FACE_OVAL, points)]  # (B, 1, 36, 3)
        uv, _ = project(_make_inner_ring(oval, scales[:, None]).flatten(1, 2), camera)
        covered = F.grid_sample(person.float(), 2 * uv[:, None] - 1, align_corners=False, padding_mode="border")
        covered = (covered.view(len(uv), len(scales), -1) > ON_PERSON).long().cumprod(1).sum(1)  # (B, 36) steps
        fitted = scales[(covered - 1).clamp_min(0)]
        return torch.where((covered == 0).all(1, keepdim=True), usual, fitted)

    def deform_mesh(self, points: Tensor, source_camera: Tensor, deformed_points: Tensor,
                    outline: Tensor | None = None) -> DeformedMesh:  # fmt: skip
        """Deform the mesh of landmarks (B, 478, 3) of the source, which a camera (B, 25) sees, for `render_flow`.

        `outline` is the source's, see `find_outline`.
        """
        B, points, deformed_points = points.shape[0], points.float(), deformed_points.float()
        source_edge, edge = (mouth_eye_interior.iris_edge(x, points) for x in (points, deformed_points))  # (B, 32, 1)
        rings = add_head_rings(points, outline)
        source_vertices = torch.cat([rings, mouth_eye_interior.interpolate_iris_edge(points, source_edge)], dim=1)
        # the rings ignore the expression: an opening jaw must not drag the neck
        vertices = torch.cat([deformed_points, source_vertices[:, NUM_LANDMARKS:-EYE_TRIANGLES]], dim=1)
        uv, _ = project(source_vertices, source_camera)  # (B, V, 2)
        constant = torch.cat([vertex_proximity(points.device)[:, None], self.mouth_coords], dim=-1)  # (V - 32, 3)
        constant = torch.cat([constant, constant[index_tensor(mouth_eye_interior.RIM, uv)]])
        varying = torch.cat([anchored_coords(deformed_points), lip_edges(uv, points, deformed_points)], dim=-1)
        varying = torch.cat([_pad_rings(varying), mouth_eye_interior.interpolate_iris_edge(varying, edge)], dim=1)
        attributes = torch.cat([uv, constant.expand(B, -1, -1), varying], dim=-1)
        triangles = self._flow_triangles()[:, :3]
        areas = _double_areas(uv, self.all_triangles()[:, :3])
        iris_edges = mouth_eye_interior.interpolate_iris_edge(deformed_points, edge)
        return DeformedMesh(vertices, iris_edges, attributes[:, triangles].flatten(2), areas)

    def render_flow(self, mesh: DeformedMesh, camera: Tensor, size: int | None = None,
                    head_mask: Tensor | None = None) -> MeshFlow:  # fmt: skip
        """Rasterise one mesh, or one per camera (B, 25), at `size`; `head_mask`: the photo's, of the method."""
        B, s = camera.shape[0], size or self.size
        triangles = self.all_triangles()
        kind, triangles = triangles[:, 3], triangles[:, :3]
        uv_result, depth = project(torch.cat([mesh.points, mesh.iris_edges], dim=1), camera)
        raster = rasterizer.rasterize(uv_result, depth, self._flow_triangles()[:, :3], s, self.windows)
        attributes = rasterizer.interpolate_corners(raster, mesh.corner_attributes.expand(B, -1, -1))  # (B, P, 14)

        before, after = mesh.source_areas.expand(B, -1), _double_areas(uv_result, triangles)
        stretch = torch.log2(after.abs().clamp_min(1e-8) / before.abs().clamp_min(1e-8)).clamp(-2, 2)
        mouth, eye = ((kind == k).float().expand(B, -1) for k in (1, 2))
        # the inside of an eye is valid as far as the eye is as open in the photo as in the result
        ratio = (before / after.clamp_min(1e-8)).clamp(0, 1)
        interior = (kind > 0).float()
        valid = (before > 0).float() * (1 - interior * (1 - ratio.square()))
        closed = interior * (1 - 2 * ratio).clamp_min(0)
        per_triangle = torch.stack([valid, stretch, mouth, closed, eye], dim=-1)
        per_pixel = gather_rows(per_triangle, self.parents[raster.triangle])  # (B, P, 5)
        covered = (raster.triangle >= 0).float()[..., None]
        valid, stretch, mouth, closed, eye = (x * covered for x in per_pixel.split(1, dim=-1))  # each (B, P, 1)
        mouth_uv, mouth_visible = mouth_eye_interior.sample_behind_lips(attributes[..., 4:5], attributes[..., 9:14])
        valid, closed = torch.lerp(valid, mouth_visible, mouth), torch.lerp(closed, 1 - mouth_visible, mouth)
        uv = torch.where(covered > 0, torch.lerp(attributes[..., :2], mouth_uv, mouth), pixel_grid(s, camera.device))

        def to_image(x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(B, -1, s, s)

        valid, stretch, mouth, closed, eye = (to_image(x) for x in (valid, stretch, mouth, closed, eye))
        proximity = to_image(torch.where(covered > 0, attributes[..., 2:3], -1.0))
        in_mouth = to_image(attributes[..., 3:5]) * mouth
        anchored = to_image(attributes[..., 5:9].clamp(-2, 2)) * (mouth + eye)
        uv, (face, weight) = to_image(uv), face_and_head_weights(proximity)
        if head_mask is not None:  # around the face the mesh carries what belongs to the head in the photo
            carries = proximity > HEAD_RINGS[-1][-1]
            weight = torch.maximum(face, warp(head_mask, uv) * carries)
            moves = (proximity >= 0) | (weight > 0.05)  # beyond the second ring only hair
            uv = torch.where(moves, uv, identity_grid(s, camera))
            valid, stretch = valid * moves, stretch * moves
        return MeshFlow(uv, weight, valid, stretch, mouth, closed, in_mouth, eye, anchored, face)

    def rasterize_surface(self, points: Tensor, displacement: Tensor, size: int = SURFACE_SIZE) -> Tensor:
        """Rasterise the front of a head as a height field over x and y of the head frame.

        (B, 6, s, s) over [-SURFACE_HALF_EXTENT, SURFACE_HALF_EXTENT]: z times coverage, confidence (1 in the face,
        falling to 0 at the second ring), coverage (0 or 1), and the `displacement` (B, 478, 3) by the expression.
        """
        points = add_head_rings(points.float())
        xy = points[..., :2] / (2 * SURFACE_HALF_EXTENT) + 0.5
        _, confidence = face_and_head_weights(vertex_proximity(points.device)[None, :, None])
        confidence = confidence.expand(len(points), -1, -1)
        vertex = [points[..., 2:], confidence, torch.ones_like(confidence), _pad_rings(displacement.float())]
        return self._draw(xy, points[..., 2], self.all_triangles(), torch.cat(vertex, dim=-1), size)


def _pad_rings(landmark_values: Tensor) -> Tensor:
    """Append zeros for the ring vertices to values (..., 478, K)."""
    return F.pad(landmark_values, (0, 0, 0, len(HEAD_RINGS) * len(FACE_OVAL)))


def identity_grid(size: int, like: Tensor) -> Tensor:
    """Return each pixel's own position, (1, 2, size, size), on the device of `like`."""
    return pixel_grid(size, like.device).T.reshape(1, 2, size, size)


def resize(x: Tensor, size: int) -> Tensor:
    """Resize (B, C, h, w) to (B, C, size, size), bilinear."""
    if x.shape[-1] == size:
        return x
    if can_resample(x):
        return resize_bilinear(x, size)
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def warp(image: Tensor, uv: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample an image (B, C, H, W) at positions uv (B, 2, h, w), borders replicated -> (B, C, h, w)."""
    grid = uv.permute(0, 2, 3, 1).float() * 2 - 1
    return F.grid_sample(image.float(), grid, mode=mode, align_corners=False, padding_mode="border")
