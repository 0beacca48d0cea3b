"""Flow of the whole photo (beyond the paper): continues the network's flow outside its crop, for hair and torso.

The person is one layer that deforms smoothly, so that nothing tears: the face moves exactly as the network moves it;
hair and ears by the same flow, smoothed, and outside the crop as the rings of the face mesh do; the torso follows the
neck; next to the lower face both blend. The background does not move. Positions are in crop units: (0, 0) and (1, 1)
are corners of the crop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.face.landmarks import CHIN, FACE_OVAL, FOREHEAD_TOP, NUM_LANDMARKS, TORSO_ANCHOR
from export3d_cli.core.model.cached_tensors import cached_tensor, index_tensor
from export3d_cli.core.model.masks import WHOLE, Window, box_mean, dilate, linear_step, smooth_step
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.model.warp import rasterizer
from export3d_cli.core.model.warp.flow_blending import NECK_PIVOT, TORSO_FOLLOW_RATIO, relative_rotation
from export3d_cli.core.model.warp.mesh_flow import add_head_rings, identity_grid, resize, ring_triangles

WINDOW_MARGIN = 0.75  # crop sides around the crop within which the person moves
FLOW_SIZE = 192  # cells of a side of the window
CELL = (1 + 2 * WINDOW_MARGIN) / FLOW_SIZE  # side of a cell, crop sides
WINDOW_FADE = 0.25  # crop sides inside the window's border over which the motion fades out
EDGE_FADE = 0.06  # crop sides inside the border of the network's flow or image over which it takes over
HEAD_WEIGHT_FADE = (0.0, 0.5)  # weights of the network's head layer over which its flow takes over ...
SHOWS_HEAD_FADE = (0.5, 0.9)  # ... and over which its image counts as showing the head
MIN_HELD_WEIGHT = 0.1  # ... and above which it may hold the flow farther outside
SMOOTHING_CELLS = 3  # radius of the box, applied twice, that smooths the head's flow outside the face
RING_FLOW_SIZE = 96  # cells of a side of the window in which the rings' motion is drawn
RING_SMOOTHING_CELLS = 2  # radius of the box, applied twice, that smooths it
UNKNOWN_WEIGHT = 0.02  # weight of the rings' motion next to the network's flow, which decides where it is known
GRAZING_FADE = (1.5, 2.0)  # areas in the photo, in areas of the result, over which a surface counts as grazing
OUTLINE_FADE = (0.8, 1.0)  # distances from the middle of the face from which on its motion is continued outside it
FAR_SIDE_DEPTH = 0.4  # radii of the outline by which what appears next to a turned face lies behind it
PHOTO_FACE_DIVISOR = 40  # the radius of the box, applied twice, that widens the photo's face, in its mask's sizes ...
PHOTO_FACE_FADE = (0.0, 0.4)  # ... and the smoothed mask's values over which the network's image takes over
NECK_FADE = (-0.2, 0.5)  # face heights above the chin over which the torso's motion becomes the head's outside the face


class PhotoFlow(NamedTuple):
    """Backward flow over the window around the crop, (B, ., n, n)."""

    displacement: Tensor  # (B, 2) position in the photo minus own position, crop units
    face_weight: Tensor  # (B, 1) 1 where the network's image is shown: in the face, and where it would appear again


def extend_flow(landmarks: Tensor, source_landmarks: Tensor, source_camera: Tensor, camera: Tensor,
                head_uv: Tensor | None, head_weight: Tensor, face: Tensor, photo_face: Tensor,
                torso: float | Tensor | None = None, windows: Sequence[Window] = ()) -> PhotoFlow:  # fmt: skip
    """Extend the network's flow over the window of `WINDOW_MARGIN` around the crop.

    `landmarks` (B, 478, 3) have the target expression. `head_uv` (B, 2, H, W) and `head_weight`
    (B, 1, m, m) are positions and weight of the network's head layer, see `LayerWarp`; without positions the head moves
    as its rings do. `face` and `photo_face` (B, 1, m, m) are 1 in the face of the result and of the photo. `torso` is
    the fraction of the neck's motion that the torso follows, None: `TORSO_FOLLOW_RATIO`; or its own shift, roll and
    growth (B, 4), see `Control.target_torso`. The network's images cover these `windows` of the crop; empty: all of it.
    """
    grid = identity_grid(FLOW_SIZE, camera) * (1 + 2 * WINDOW_MARGIN) - WINDOW_MARGIN  # (1, 2, n, n) cells' centres
    result, _ = project(landmarks, camera)  # (B, 478, 2)
    vertices = add_head_rings(source_landmarks.float())
    photo, _ = project(vertices, source_camera)  # (B, V, 2)
    head = _ring_flow(*project(vertices.expand(len(camera), -1, -1), camera), photo, grid) - grid

    in_crop = _inside(WHOLE, grid)
    in_window = torch.cat([_inside(window, grid) for window in windows or [WHOLE]])
    inside = (2 * grid - 1).permute(0, 2, 3, 1).expand(len(camera), -1, -1, -1)
    face = box_mean(face, round(CELL * face.shape[-1] / 2))  # about a cell: without steps at the far side's outline
    weight, face = (F.grid_sample(x.float(), inside, align_corners=False) for x in (head_weight, face))
    shift, far_side, shows_head = head, torch.zeros_like(weight), linear_step(weight, *SHOWS_HEAD_FADE)
    if head_uv is not None:
        shift = (head_uv - identity_grid(head_uv.shape[-1], grid)).float()
        shift = F.grid_sample(shift, inside, align_corners=False, padding_mode="border")
        oval = photo[:, index_tensor(FACE_OVAL, photo)]
        skip = FAR_SIDE_DEPTH * relative_rotation(source_camera, camera).norm(dim=1)[:, None, None, None]
        moved, radius, turned_away = _push_outside_face(grid + shift, oval, 1 + skip)
        weight = linear_step(weight, *HEAD_WEIGHT_FADE) * in_crop
        middle = result[:, index_tensor(FACE_OVAL, result)].mean(1)[:, :1, None, None]
        moved = _hold_turning_points(moved, grid[:, :1] > middle, weight > MIN_HELD_WEIGHT)
        weight = weight * linear_step(radius, *OUTLINE_FADE)
        known = weight * torch.cat([moved - grid - head, turned_away, torch.ones_like(weight)], dim=1)
        known = box_mean(box_mean(known, SMOOTHING_CELLS), SMOOTHING_CELLS)
        continued = known[:, :3] / (known[:, 3:] + UNKNOWN_WEIGHT)
        head, far_side = head + continued[:, :2], continued[:, 2:]

    chin, top = result[:, CHIN, :, None, None], result[:, FOREHEAD_TOP, :, None, None]
    up = top - chin
    height = ((grid - chin) * up).sum(1, keepdim=True) / up.square().sum(1, keepdim=True).clamp_min(1e-6)
    pivots = cached_tensor((NECK_PIVOT, (0.0, 0.0, 0.0)), camera.device).expand(len(camera), -1, -1)
    # Up and down the torso follows the neck or the head's centre, whichever moves less: a nod leaves the neck in place,
    # and a misread nod the centre. Error on filmed shoulders in face heights: this 0.039, neck 0.041, no motion 0.093.
    neck, centre = (project(pivots, source_camera)[0] - project(pivots, camera)[0]).unbind(1)  # (B, 2) each
    common = torch.where(neck * centre > 0, neck.sign() * torch.minimum(neck.abs(), centre.abs()), 0.0)
    follow = TORSO_FOLLOW_RATIO if torso is None or isinstance(torso, Tensor) else torso
    body = follow * torch.stack([neck[:, 0], common[:, 1]], dim=1)[..., None, None]  # its size stays
    if isinstance(torso, Tensor):
        body = torch.where(torso.isnan().any(1)[:, None, None, None], body, _move_torso(torso, photo, grid))
    displacement = torch.lerp(body, head, smooth_step(height, *NECK_FADE))
    # the jump of the flow at the far side's outline lies inside the face, where the network's image hides it
    displacement = torch.lerp(displacement, shift, 1 - dilate(1 - face * in_crop, 1))
    # around a raised face, and at the near side of a turned one, the flow may lead into the photo's face
    margin = max(1, photo_face.shape[-1] // PHOTO_FACE_DIVISOR)
    again = linear_step(box_mean(box_mean(photo_face, margin), margin), *PHOTO_FACE_FADE)
    again = F.grid_sample(again, 2 * (grid + displacement).permute(0, 2, 3, 1) - 1, align_corners=False) * (
        1 - far_side
    )
    face = face * (1 - far_side * (1 - shows_head))  # there the network's image shows what is behind the head
    to_window = (0.5 + WINDOW_MARGIN - (grid - 0.5).abs()).amin(1, keepdim=True)
    return PhotoFlow(displacement * smooth_step(to_window, 0, WINDOW_FADE), torch.maximum(face, again) * in_window)


def _move_torso(torso: Tensor, photo: Tensor, grid: Tensor) -> Tensor:
    """Return the displacement (B, 2, n, n) of a torso's shift, roll and growth (B, 4); `photo` are landmarks (1, V, 2).

    The torso turns about the point that `TorsoTracker` follows.
    """
    face = photo[:, :NUM_LANDMARKS]
    low, high = face.amin(1), face.amax(1)
    size = (high - low).amax(1)
    anchor = torch.stack([face[..., 0].mean(1), high[:, 1] + TORSO_ANCHOR * size], dim=1)[..., None, None]
    angle, shrink = -torso[:, 2, None, None], torch.exp(-torso[:, 3, None, None, None])
    x, y = (grid - anchor - torso[:, :2, None, None]).unbind(1)
    turned = torch.stack([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y], dim=1)
    return anchor + shrink * turned - grid


def _inside(window: Window, grid: Tensor) -> Tensor:
    """Return a mask (1, 1, n, n) of positions (1, 2, n, n): 1 in a window, falling to 0 at its border."""
    low, high = (grid.new_tensor(corner)[:, None, None] / window.cells for corner in (window[:2], window[2:4]))
    return smooth_step(torch.minimum(grid - low, high - grid).amin(1, keepdim=True), 0, EDGE_FADE)


def _push_outside_face(uv: Tensor, oval: Tensor, outline: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move positions (B, 2, n, n) in the photo at which the face turns away outwards beyond its outline (B, N, 2).

    What a picture shows next to a turned face is not the hidden part of the face, nor the far ear, but what is next to
    them in the photo: what lies from `outline` (B, 1, 1, 1) radii of the outline on. Returns the positions, their
    distance from the middle of the face in radii, and where the face turns away, (B, 1, n, n) both.
    """
    across, down = torch.gradient(uv, spacing=CELL, dim=(3, 2))
    area = (across[:, :1] * down[:, 1:] - across[:, 1:] * down[:, :1]).abs()
    centre = oval.mean(1)[..., None, None]
    offset = oval - oval.mean(1, keepdim=True)
    precision = torch.linalg.inv(2 * offset.transpose(1, 2) @ offset / offset.shape[1])  # of the outline's ellipse
    from_centre = uv - centre
    radius = torch.einsum("bihw,bij,bjhw->bhw", from_centre, precision, from_centre)[:, None].clamp_min(1e-4).sqrt()
    turned_away = linear_step(area, *GRAZING_FADE)
    outwards = turned_away * (outline / radius - 1).clamp(0, 2)
    return uv + outwards * from_centre, radius * (1 + outwards), turned_away


def _hold_turning_points(uv: Tensor, is_right: Tensor, known: Tensor) -> Tensor:
    """Let positions (B, 2, n, n) in the photo not turn back on the way outwards, to the right if `is_right`, else left.

    The near side of a turned head would show again what the photo shows farther inside. Only positions where the flow
    is `known` hold those farther outside.
    """
    outwards = torch.where(is_right, uv[:, :1], -uv[:, :1])
    right, right_index = outwards.masked_fill(~(known & is_right), -torch.inf).cummax(3)
    left, left_index = outwards.masked_fill(~known | is_right, -torch.inf).flip(3).cummax(3)
    index = torch.where(is_right, right_index, uv.shape[3] - 1 - left_index.flip(3))
    turns_back = torch.where(is_right, right, left.flip(3)) > outwards
    return torch.where(turns_back, uv.gather(3, index.expand_as(uv)), uv)


def _ring_flow(result: Tensor, depth: Tensor, photo: Tensor, grid: Tensor) -> Tensor:
    """Map a grid (1, 2, n, n) as the mesh's rings map it, from result to photo, (B, V, 2) both, and smoothly beyond.

    Beyond the rings the affine transform that fits them best maps it. `depth` (B, V) is the result's.
    """
    corners = F.pad(result, (0, 1), value=1.0)  # (B, V, 3)
    basis, target = corners[:, NUM_LANDMARKS:], photo[:, NUM_LANDMARKS:]
    transform = torch.linalg.solve(basis.transpose(1, 2) @ basis, basis.transpose(1, 2) @ target)  # (B, 3, 2)
    rest = F.pad(photo - corners @ transform, (0, 1), value=1.0)  # (B, V, 3)
    triangles = ring_triangles(grid.device)[:, :3]
    in_window = (result + WINDOW_MARGIN) / (1 + 2 * WINDOW_MARGIN)
    raster = rasterizer.rasterize(in_window, depth, triangles, RING_FLOW_SIZE)
    drawn = rasterizer.interpolate_vertices(raster, rest, triangles).transpose(1, 2).unflatten(2, (RING_FLOW_SIZE, -1))
    drawn = box_mean(box_mean(drawn, RING_SMOOTHING_CELLS), RING_SMOOTHING_CELLS)
    points = F.pad(grid.flatten(2).transpose(1, 2), (0, 1), value=1.0)  # (1, P, 3)
    affine = (points @ transform).transpose(1, 2).unflatten(2, grid.shape[2:])
    return affine + resize(drawn[:, :2] / (drawn[:, 2:] + UNKNOWN_WEIGHT), grid.shape[-1])
