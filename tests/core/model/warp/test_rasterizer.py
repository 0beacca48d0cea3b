"""The rasteriser against a slow reference."""

from __future__ import annotations

import numpy as np
import torch

from export3d_cli.core.model.warp.rasterizer import RasterWindows, rasterize


def slow_rasterize(
    uv: np.ndarray, depth: np.ndarray, triangles: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest triangle (size, size), -1 for none, and barycentric coordinates, by loops."""
    index = np.full((size, size), -1)
    nearest = np.full((size, size), np.inf)
    corners = np.zeros((size, size, 3))
    for t, triangle in enumerate(triangles):
        a, b, c = uv[triangle]
        matrix = np.array([[a[0], b[0], c[0]], [a[1], b[1], c[1]], [1, 1, 1]])
        if np.linalg.det(matrix) <= 0:  # back-facing
            continue
        for row in range(size):
            for column in range(size):
                bary = np.linalg.solve(matrix, [(column + 0.5) / size, (row + 0.5) / size, 1])
                z = bary @ depth[triangle]
                if (bary >= 0).all() and z < nearest[row, column]:
                    index[row, column], nearest[row, column], corners[row, column] = t, z, bary
    return index, corners


def test_rasterize_equals_the_slow_reference() -> None:
    rng, size = np.random.default_rng(0), 16
    uv, depth = rng.uniform(-0.2, 1.2, (2, 30, 2)), rng.uniform(2, 3, (2, 30))
    triangles = np.arange(30).reshape(10, 3)
    windows = RasterWindows()
    inputs = [torch.from_numpy(a) for a in (uv, depth, triangles)]
    raster = rasterize(inputs[0], inputs[1], inputs[2], size, windows)
    windows.fixed = True
    recorded = rasterize(inputs[0], inputs[1], inputs[2], size, windows)  # the path of a CUDA graph
    torch.testing.assert_close(recorded, raster)
    for b in range(2):
        index, corners = slow_rasterize(uv[b], depth[b], triangles, size)
        assert 0.3 < (index >= 0).mean() < 1
        np.testing.assert_array_equal(raster.triangle[b].view(size, size).numpy(), index)
        covered = index >= 0
        got = raster.barycentric[b].view(size, size, 3).numpy()
        np.testing.assert_allclose(got[covered], corners[covered], atol=1e-3)


def test_pixels_on_a_shared_edge_are_covered_once() -> None:
    """Two triangles share an edge through pixel centres."""
    uv = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]])
    raster = rasterize(uv, torch.ones(1, 4), torch.tensor([[0, 1, 2], [0, 2, 3]]), 8)
    assert (raster.triangle >= 0).all()
    torch.testing.assert_close(raster.barycentric.sum(-1), torch.ones(1, 64))
