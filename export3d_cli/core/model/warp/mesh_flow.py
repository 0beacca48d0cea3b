"""Basis flow: lambda -> moved face mesh -> dense backward flow (design beyond the paper; off in the `paper` preset).

Each basis vector v_i owns a displacement field b_i (478 landmarks, head frame). The source's landmarks move by
`sum_i (lambda_i(D) - lambda_i(S)) b_i`, the driver's camera projects them, and the rasterised mesh says, for each pixel
of the result, where in the photo it comes from. Three rings of points around the face, moving rigidly with the head,
carry ears, upper neck and hair as far as the photo shows any; `flow_blend` has the rest. Positions are in image sizes,
(0, 0) the top left corner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import NUM_LANDMARKS, ModelConfig
from export3d_cli.core.model.cached_tensors import cached_tensor, index_tensor
from export3d_cli.core.model.masks import dilate, linear_step
from export3d_cli.core.model.volume_renderer import pixel_grid, project
from export3d_cli.core.model.warp.mouth_eye_interior import (
    CHIN,
    EYE_RIMS,
    anchored_coords,
    lip_edges,
    mouth_coords,
    sample_behind_lips,
)
from export3d_cli.core.model.warp.rasterizer import (
    RasterWindows,
    cross_2d,
    gather_rows,
    interpolate_corners,
    interpolate_vertices,
    rasterize,
)

FACE_TRIANGLES = 902  # of the face; rows of (a, b, c, kind), kind 0 skin, 1 mouth's inside, 2 eye
# The face's outline, clockwise from the forehead (as in MediaPipe's mesh).
FACE_OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149,
        150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)  # fmt: skip
FOREHEAD_TOP = 10  # its top
# Widening of the outline, depth added, nearness to the face (there 1). The last one is there for hair on top.
HEAD_RINGS = ((1.3, 0.05, 0.5), (2.0, 0.12, 0.0), (2.8, 0.16, -0.5))
NECK_FADE_HEIGHT = 0.3  # heights of the face below the chin at which a neck no longer moves with the head
HAIR_TOP_FADE = (0.6, 0.9)  # and above it, from which on hair is the head's however high it is,
HAIR_TOP_WIDTH_FADE = (0.6, 0.75)  # where it is not farther aside than this,
HAIR_SIDE_WIDTH_FADE, HAIR_GROW_STEPS = (
    (0.9, 1.05),
    16,
)  # or than this where it hangs together with such, followed in so many steps
FAR_DEPTH = 100.0  # how far away nothing is
DEPTH_TOLERANCE = 0.02  # head-frame units: what is this much behind what the photo shows begins to be hidden,
STRETCH_FADE = (1.6, 2.0)  # and is not shown where log2 of its stretch is as large: of less an ear is made
STRETCHED_LID_PENALTY = 0.7  # how little the photo is trusted on a lid drawn out to twice its size and more
HAIR_EXTENSION = 0.05  # image sizes in which hair ends that the photo's border cuts
SURFACE_SIZE, SURFACE_HALF_EXTENT = (
    64,
    0.35,
)  # cells a side and half extent (head frame) of the field of `BasisFlow.surface`


class MeshFlow(NamedTuple):
    """The mesh as the driver's camera sees it; each (B, ., s, s)."""

    uv: Tensor  # (B, 2): where in the photo the pixel comes from; its own place outside the mesh
    weight: Tensor  # (B, 1): 1 where the head is, hair included; without a mask of it falling to 0 at the second ring
    valid: Tensor  # (B, 1): 1 where the photo shows this piece of the face, 0 where it is hidden or shut there
    stretch: Tensor  # (B, 1): log2 of how much larger the piece is in the result than in the photo
    mouth: Tensor  # (B, 1): 1 inside the mouth
    closed_in_photo: (
        Tensor  # (B, 1): 1 inside a mouth or an eye that the photo has shut, 0 once it shows half of the opening
    )
    mouth_coords: (
        Tensor  # (B, 2): where inside the mouth, across (-1..1) and from lower (-1) to upper lip (1); 0 elsewhere
    )
    eye: Tensor  # (B, 1): 1 inside an eye
    anchored_coords: (
        Tensor  # (B, 4): where on the upper and on the lower row of teeth, or about the iris (twice); 0 elsewhere
    )
    face: Tensor  # (B, 1): 1 in the face, falling to 0 at the inner ring


class DeformedMesh(NamedTuple):
    """A source's mesh moved to an expression, before any camera sees it; V vertices, T triangles."""

    points: Tensor  # (B, V, 3) of the head frame, moved
    corner_attributes: (
        Tensor  # (B, T, 45): what is blended over a triangle: of each corner uv in the photo, weight, places, lips
    )
    # and distance from its camera
    source_areas: Tensor  # (B, T) twice the signed area in the photo


def _double_areas(uv: Tensor, triangles: Tensor) -> Tensor:
    """Positions (B, V, 2), triangles (T, 3) -> twice the signed areas (B, T)."""
    a, b, c = uv[:, triangles].unbind(2)
    return cross_2d(b - a, c - a)


def add_head_rings(points: Tensor) -> Tensor:
    """Landmarks (B, 478, 3) in the head frame -> (B, 478 + 108, 3): the outline widened three times and set back."""
    oval = points[:, index_tensor(FACE_OVAL, points)]
    centre = oval.mean(1, keepdim=True)
    rings = [points]
    for widen, back, _ in HEAD_RINGS:
        ring = centre + (oval - centre) * widen
        rings.append(torch.cat([ring[..., :2], oval[..., 2:] + back], dim=-1))
    return torch.cat(rings, dim=1)


def ring_triangles() -> Tensor:
    """Triangles between outline and rings, (216, 4), wound as the face's."""
    n = len(FACE_OVAL)
    loops = [list(FACE_OVAL), *([NUM_LANDMARKS + r * n + k for k in range(n)] for r in range(len(HEAD_RINGS)))]
    rows = []
    for inner, outer in zip(loops[:-1], loops[1:], strict=True):
        for k in range(n):
            j = (k + 1) % n
            rows += [[inner[k], outer[k], outer[j], 0], [inner[k], outer[j], inner[j], 0]]
    return torch.tensor(rows)


def vertex_proximity(device: torch.device) -> Tensor:
    """How near every vertex is to the face, (478 + 108,): 1 on it, 0 at the second ring, less beyond."""
    n = len(FACE_OVAL)
    return cached_tensor((1.0,) * NUM_LANDMARKS + tuple(weight for *_, weight in HEAD_RINGS for _ in range(n)), device)


def face_and_head_weights(proximity: Tensor) -> tuple[Tensor, Tensor]:
    """What is so near to the face, see `ring_weights` -> how much of it is face, and head where that is not known."""
    return (2 * proximity - 1).clamp_min(0), (2 * proximity).clamp(0, 1)


class BasisFlow(nn.Module):
    """The fields b_i and the mesh they move."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size, self.windows = config.mesh_size, RasterWindows()
        self.register_buffer("basis", torch.zeros(config.num_coefficients, NUM_LANDMARKS, 3))  # b_i, head frame
        self.register_buffer("triangles", torch.zeros(FACE_TRIANGLES, 4, dtype=torch.int32))
        self.register_buffer("ring_triangles", ring_triangles(), persistent=False)
        self.register_buffer("eye_rims", torch.tensor([v for _, rim in EYE_RIMS for v in rim]), persistent=False)
        self.register_buffer(
            "mouth_coords", F.pad(mouth_coords(), (0, 0, 0, len(HEAD_RINGS) * len(FACE_OVAL))), persistent=False
        )
        self.basis: Tensor
        self.mouth_coords: Tensor
        self.eye_rims: Tensor
        self.triangles: Tensor
        self.ring_triangles: Tensor

    def deform_landmarks(self, points: Tensor, lam_delta: Tensor) -> Tensor:
        """Source landmarks (B, 478, 3), lambda(D) - lambda(S) (B, n) -> the landmarks with D's expression."""
        return points.float() + (lam_delta.float()[:, :, None, None] * self.basis.float()).sum(1)

    def forward(
        self, points: Tensor, source_camera: Tensor, deformed_points: Tensor, camera: Tensor, size: int | None = None,
        head_mask: Tensor | None = None, visibility: Tensor | None = None,
    ) -> MeshFlow:  # fmt: skip
        """Landmarks of the source and those moved, (B, 478, 3) each, and both cameras (B, 25) -> flow at `size`.

        `head` (B, 1, ., .) is where the photo shows the head, `front` what it shows of the mesh: see there.
        """
        return self.render_flow(
            self.deform_mesh(points, source_camera, deformed_points), camera, size, head_mask, visibility
        )

    def all_triangles(self) -> Tensor:
        """Those of the face and of the rings, (T, 4) int64: a, b, c, kind."""
        return torch.cat([self.triangles.long(), self.ring_triangles])

    def source_visibility(self, points: Tensor, camera: Tensor) -> Tensor:
        """What a photo shows of the mesh, (B, 2, m, m): see `ring_weights`, and how far from its camera it is.

        That is in head-frame units. Where the photo shows nothing of it: -1, and `NOTHING`.
        """
        triangles = self.all_triangles()[:, :3]
        uv, depth = project(add_head_rings(points.float()), camera)
        raster = rasterize(uv, depth, triangles, self.size, self.windows)
        near = vertex_proximity(points.device)[None, :, None].expand(len(points), -1, -1)
        shown = interpolate_vertices(raster, torch.cat([near, depth[..., None]], dim=-1), triangles)  # (B, P, 2)
        nothing = cached_tensor((-1.0, FAR_DEPTH), points.device)
        shown = torch.where(raster.triangle[..., None] < 0, nothing, shown)
        return shown.transpose(1, 2).reshape(-1, 2, self.size, self.size)

    def head_mask(
        self, points: Tensor, camera: Tensor, person: Tensor | None, visibility: Tensor | None = None
    ) -> Tensor:
        """Where a photo shows the head, (B, 1, m, m) in 0..1: what moves with it, down to the upper neck.

        Args:
            points: (B, 478, 3) its landmarks. camera: (B, 25).
            person: (B, 1, ., .) where it shows the person, hair and body; None, or a mask that misses the face: not
                known, the head ends softly all around.
            front: what `front` makes of the same points and camera, where that is known.
        """
        face, weight = face_and_head_weights(
            (self.source_visibility(points, camera) if visibility is None else visibility)[:, :1]
        )
        if person is None:
            return weight
        uv, _ = project(points.float()[:, index_tensor((CHIN, FOREHEAD_TOP), points)], camera)
        chin, up = uv[:, 0], uv[:, 1] - uv[:, 0]  # (B, 2)
        away = pixel_grid(self.size, camera.device) - chin[:, None]  # (B, P, 2)
        height = (away * up[:, None]).sum(-1) / up.square().sum(-1, keepdim=True).clamp_min(1e-6)
        above = (height / NECK_FADE_HEIGHT + 1).clamp(0, 1).view(-1, 1, self.size, self.size)
        aside = cross_2d(away, up[:, None]).abs() / up.square().sum(-1, keepdim=True).clamp_min(1e-6)
        # no farther than half of the second ring, but on top: others may be in the picture
        high = linear_step(height, *HAIR_TOP_FADE)
        top, wide = (high * (1 - linear_step(aside, *reach)) for reach in (HAIR_TOP_WIDTH_FADE, HAIR_SIDE_WIDTH_FADE))
        near = torch.maximum((2 * weight).clamp_max(1), top.view_as(above))
        person = resize(F.interpolate(person.float(), (self.size // 2, self.size // 2), mode="area"), self.size)
        hair = person * above * near
        wide, more = person * wide.view_as(above), hair * (hair > 0.5)
        for _ in range(HAIR_GROW_STEPS):
            more = torch.minimum(wide, dilate(more, max(1, self.size // 64)))
        hair = torch.maximum(hair, more)
        found = (person * face).sum((1, 2, 3), keepdim=True) > face.sum((1, 2, 3), keepdim=True) / 2
        return torch.where(found, torch.maximum(face, hair), weight)

    def deform_mesh(self, points: Tensor, source_camera: Tensor, deformed_points: Tensor) -> DeformedMesh:
        """What of `forward` does not depend on the driver's camera."""
        B, triangles = points.shape[0], self.all_triangles()[:, :3]
        source_points = add_head_rings(points.float())
        # the rings do not take part in the expression: a jaw that opens must not drag the neck
        rings = source_points[:, NUM_LANDMARKS:]
        target_points = torch.cat([deformed_points.float(), rings], dim=1)
        uv_source, depth = project(source_points, source_camera)  # (B, V, 2), (B, V)
        n, weight = len(FACE_OVAL), vertex_proximity(points.device)
        fixed = torch.cat([weight[:, None], self.mouth_coords], dim=-1)
        own = torch.cat(
            [anchored_coords(deformed_points.float()), lip_edges(uv_source, points.float(), deformed_points.float())],
            dim=-1,
        )
        own = F.pad(own, (0, 0, 0, len(HEAD_RINGS) * n))
        vertex = torch.cat([uv_source, fixed.expand(B, -1, -1), own, depth[..., None]], dim=-1)
        return DeformedMesh(target_points, vertex[:, triangles].flatten(2), _double_areas(uv_source, triangles))

    def render_flow(
        self, mesh: DeformedMesh, camera: Tensor, size: int | None = None, head_mask: Tensor | None = None,
        visibility: Tensor | None = None, margins: Tensor | None = None,
    ) -> MeshFlow:  # fmt: skip
        """The mesh (one, or one a camera) as cameras (B, 25) see it, at `size`; `head` and `front` as in `forward`.

        `room` (B, 3) is how far a head that the photo cuts is known to go on to the left, the top and the right.
        """
        B, s = camera.shape[0], size or self.size
        triangles = self.all_triangles()
        kind, triangles = triangles[:, 3], triangles[:, :3]
        uv_target, depth = project(mesh.points, camera)
        raster = rasterize(uv_target, depth, triangles, s, self.windows)
        value = interpolate_corners(raster, mesh.corner_attributes.expand(B, -1, -1))  # (B, P, 15)

        before, after = mesh.source_areas.expand(B, -1), _double_areas(uv_target, triangles)
        stretch = torch.log2(after.abs().clamp_min(1e-8) / before.abs().clamp_min(1e-8)).clamp(-2, 2)
        mouth, eye = ((kind == k).float().expand(B, -1) for k in (1, 2))
        # the inside of an eye is shown as far as it is as open in the photo as in the result
        ratio = (before / after.clamp_min(1e-8)).clamp(0, 1)
        hole = (kind > 0).float()
        shown = (before > 0).float() * (1 - hole * (1 - ratio.square()))
        # a lid that closes is drawn out of the few rows of skin above an open eye: lashes and iris must not smear
        lid = (triangles[..., None] == self.eye_rims).flatten(1).any(1) & (kind == 0)
        shown = shown * (1 - STRETCHED_LID_PENALTY * lid * (stretch - 0.5).clamp(0, 1))
        shut = hole * (1 - 2 * ratio).clamp_min(0)
        facts = gather_rows(torch.stack([shown, stretch, mouth, shut, eye], dim=-1), raster.triangle)  # (B, P, 5)
        covered = (raster.triangle >= 0).float()[..., None]
        shown, stretch, mouth, shut, eye = (f * covered for f in facts.split(1, dim=-1))  # each (B, P, 1)
        place, known = sample_behind_lips(value[..., 4:5], value[..., 9:14])
        shown, shut = torch.lerp(shown, known, mouth), torch.lerp(shut, 1 - known, mouth)
        uv = torch.where(covered > 0, torch.lerp(value[..., :2], place, mouth), pixel_grid(s, camera.device))

        def picture(x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(B, -1, s, s)

        shown, stretch, mouth, shut, eye = (picture(f) for f in (shown, stretch, mouth, shut, eye))
        near, inside = picture(torch.where(covered > 0, value[..., 2:3], -1.0)), picture(value[..., 3:5]) * mouth
        anchored = picture(value[..., 5:9].clamp(-2, 2)) * (mouth + eye)
        uv, (face, weight) = picture(uv), face_and_head_weights(near)
        if visibility is not None:  # a cheek turned away hides what is behind it: drawn out far, it would be seen twice
            hidden = linear_step(
                picture(value[..., 14:]) - warp(visibility[:, 1:], uv), DEPTH_TOLERANCE, 2 * DEPTH_TOLERANCE
            ) * (1 - mouth - eye)
            shown = shown * (1 - hidden * linear_step(stretch, *STRETCH_FADE))
        if head_mask is not None:  # around the face the mesh takes along what is head in the photo
            weight = torch.maximum(face, warp(head_mask, uv) * (near > HEAD_RINGS[-1][2]) * inside_photo(uv, margins))
            carried = (near >= 0) | (weight > 0.05)  # beyond the second ring nothing but hair
            uv = torch.where(carried, uv, identity_grid(s, camera))
            shown, stretch = shown * carried, stretch * carried
        return MeshFlow(uv, weight, shown, stretch, mouth, shut, inside, eye, anchored, face)

    def rasterize_surface(self, points: Tensor) -> Tensor:
        """The front of a head with landmarks `points` (B, 478, 3), as a field over x and y of the head frame.

        Returns (B, 3, s, s) over [-SURFACE_REACH, SURFACE_REACH]: z times what is covered, how sure it is (1 in the
        face, falling to 0 at the second ring), and what is covered, 0 or 1.
        """
        triangles = self.all_triangles()[:, :3]
        points = add_head_rings(points.float())
        front = points[..., :2] / (2 * SURFACE_HALF_EXTENT) + 0.5
        raster = rasterize(front, points[..., 2], triangles, SURFACE_SIZE, self.windows)
        weight = (2 * vertex_proximity(points.device)).clamp(0, 1)[None, :, None].expand(len(points), -1, -1)
        vertex = torch.cat([points[..., 2:], weight, torch.ones_like(weight)], dim=-1)  # (B, V, 3)
        value = interpolate_vertices(raster, vertex, triangles)  # (B, P, 3)
        return value.transpose(1, 2).reshape(-1, 3, SURFACE_SIZE, SURFACE_SIZE)


def inside_photo(uv: Tensor, margins: Tensor | None) -> Tensor:
    """Positions (B, 2, s, s) and how far there is something beyond the photo, see `BasisFlow.seen` -> (B, 1, s, s).

    1 where a head may be, falling to 0 at `BEYOND` farther out; below, bodies go on.
    """
    x, y = uv.split(1, dim=1)
    left, top, right = (0, 0, 0) if margins is None else margins[:, :, None, None, None].unbind(1)
    out = torch.maximum(torch.maximum(-x - left, x - 1 - right), -y - top)
    return (1 - out.clamp_min(0) / HAIR_EXTENSION).clamp_min(0)


def identity_grid(size: int, like: Tensor) -> Tensor:
    """Every pixel's own position, (1, 2, size, size)."""
    return pixel_grid(size, like.device).T.reshape(1, 2, size, size)


def resize(x: Tensor, size: int) -> Tensor:
    """Bilinear (B, C, h, w) -> (B, C, size, size)."""
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def warp(image: Tensor, uv: Tensor) -> Tensor:
    """Sample (B, C, H, W) at positions uv (B, 2, h, w) in image sizes, borders replicated -> (B, C, h, w)."""
    grid = uv.permute(0, 2, 3, 1).float() * 2 - 1
    return F.grid_sample(image.float(), grid, align_corners=False, padding_mode="border")
