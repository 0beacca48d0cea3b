"""The baseline `pwa`: the photo warped piecewise-affinely so that its landmarks lie where the truth has them.

It needs no network, and knows what no method may know: the true landmarks of each frame.
"""

import cv2
import numpy as np

from export3d_cli.core.face.landmarks import NUM_MESH_VERTICES

BORDER_POINTS = 9  # pinned points on each side of the picture


def warp_piecewise(photo: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Warp a photo, uint8 (H, W, 3), by the Delaunay triangles of its target points; the border stays.

    `source` (478, 2 or more) are its landmarks, `target` their places in the result, fractions of width and height.
    """
    height, width = photo.shape[:2]
    to_pixels = np.array([width, height])
    moved = (target[:NUM_MESH_VERTICES, :2] * to_pixels).astype(np.float32)
    inside = ((moved > 1) & (moved < to_pixels - 1)).all(1)
    side = np.linspace(0, 1, BORDER_POINTS)
    edge = np.concatenate([[(t, 0), (t, 1), (0, t), (1, t)] for t in side]) * to_pixels
    edge = np.unique(edge, axis=0).astype(np.float32)
    points = np.concatenate([moved[inside], edge])
    origins = np.concatenate([source[:NUM_MESH_VERTICES, :2][inside] * to_pixels, edge])
    triangles = _delaunay(points, width, height)
    # (T, 3, 3) @ (T, 3, 2): the affine map of each triangle from the result to the photo
    corners = np.concatenate([points[triangles], np.ones((len(triangles), 3, 1))], axis=2)
    solid = np.abs(np.linalg.det(corners)) > 1e-3  # twice the area, pixels
    maps = np.linalg.solve(corners[solid], origins[triangles[solid]])
    label = np.zeros((height, width), np.int32)
    for number, triangle in enumerate(points[triangles[solid]]):  # 4 fractional bits; pixel centres are at + 0.5
        cv2.fillConvexPoly(label, np.int32((triangle - 0.5) * 16), number, shift=4)  # type: ignore[call-overload]
    y, x = np.mgrid[:height, :width] + 0.5
    xy = np.einsum("hwk,hwkc->hwc", np.stack([x, y, np.ones_like(x)], axis=-1), maps[label]) - 0.5
    return cv2.remap(photo, xy[..., 0].astype(np.float32), xy[..., 1].astype(np.float32), cv2.INTER_CUBIC,
                     borderMode=cv2.BORDER_REPLICATE)  # fmt: skip


def _delaunay(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the Delaunay triangles (T, 3) of points (N, 2) float32 in pixels, as their indices."""
    subdivision = cv2.Subdiv2D((-1, -1, width + 2, height + 2))
    subdivision.insert(points)  # type: ignore[call-overload]
    index = {tuple(point): number for number, point in enumerate(points.tolist())}
    corners = np.asarray(subdivision.getTriangleList()).reshape(-1, 3, 2)
    rows = [[index.get(tuple(corner), -1) for corner in triangle] for triangle in corners.tolist()]
    return np.array([row for row in rows if min(row) >= 0])
