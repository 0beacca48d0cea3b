"""Landmarks that the user gives for a face that no detector finds: paintings, statues, drawings.

68 points (iBUG's order) or 478 (MediaPipe's), with or without depth, become the landmarker's 478 points: the canonical
face is fitted to them, and a thin-plate spline over its front moves its points so that those that were given are met.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from export3d_cli.core.face.head_pose import TRACKER_Z_SCALE, load_canonical_face
from export3d_cli.core.face.landmarks import EYE_RIMS, IBUG68, NUM_LANDMARKS
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import check_file

MAX_BYTES = 1 << 20  # of a file
MAX_DISTANCE = 100  # of a coordinate, in sides of the photo
MIN_DEVIATION = 2.0  # of points from a line, pixels
IRIS_RADIUS = 0.23  # eye widths
_STIFFNESS = 1e-6  # ridge of the spline


def read_landmarks(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read 68 or 478 landmarks, (N, 2) or (N, 3) float64, of a photo of `size` (width, height).

    The file is JSON, a list of points `[x, y]`, `[x, y, z]` or `{"x": , "y": }`, by itself or as the only value of an
    object, or CSV with such columns. Values are pixels of the photo, or fractions of its sides if none exceeds 1; z is
    on the scale of x. Raises `InputError` for any other content.
    """
    check_file(path, MAX_BYTES)
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix.lower() == ".json" else _read_rows(text)
        while isinstance(rows, dict) or (isinstance(rows, list) and len(rows) == 1):
            (rows,) = rows.values() if isinstance(rows, dict) else rows
        axes = "xyz" if "z" in rows[0] else "xy"
        points = np.array([[r[a] for a in axes] if isinstance(r, dict) else r for r in rows], np.float64)
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} holds no landmarks ({error}): give rows of x,y in pixels, as CSV or JSON") from error
    if points.ndim != 2 or points.shape[0] not in (len(IBUG68), NUM_LANDMARKS) or points.shape[1] not in (2, 3):
        raise InputError(f"{path} holds points of shape {points.shape}: expected (68, 2), (478, 2) or (478, 3)")
    if not np.isfinite(points).all():
        raise InputError(f"{path} holds values that are not finite: give pixels of the photo")
    if np.abs(points[:, :2]).max() <= 1:
        points *= np.array([*size, size[0]])[: points.shape[1]]
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    too_far = np.abs(points).max() > MAX_DISTANCE * max(size)
    across = np.linalg.svd(points[:, :2] - points[:, :2].mean(0), compute_uv=False)[1] / len(points) ** 0.5
    if across < MIN_DEVIATION:
        raise InputError(f"{path} holds points that lie on a line: give the landmarks of a face")
    if too_far or (high <= 0).any() or (low >= size).any():
        raise InputError(f"{path} holds points from {points.min(0).round()} to {points.max(0).round()}, and the photo "
                         f"has {size[0]}x{size[1]} pixels: give pixels of this photo")  # fmt: skip
    return points


def complete_landmarks(points: np.ndarray) -> np.ndarray:
    """Return the landmarker's points (478, 3) float32, in pixels, of 68 or 478 landmarks in pixels."""
    if points.shape == (NUM_LANDMARKS, 3):
        return points.astype(np.float32)
    face = load_canonical_face().points
    index = list(IBUG68) if len(points) == len(IBUG68) else list(range(NUM_LANDMARKS))
    centre = face[index].mean(0)
    view = np.linalg.lstsq(face[index] - centre, points[:, :2] - points[:, :2].mean(0), rcond=None)[0].T  # (2, 3)
    u, s, vt = np.linalg.svd(view, full_matrices=False)
    right, down = u @ vt  # the nearest rotation; depth is scaled alike
    z = (face - centre) @ np.cross(right, down) * s.mean() / TRACKER_Z_SCALE
    if len(points) == NUM_LANDMARKS:
        return np.column_stack([points[:, :2], z]).astype(np.float32)
    guess = (face - centre) @ view.T + points[:, :2].mean(0)
    xy = guess + _thin_plate(face[index, :2], points[:, :2] - guess[index], face[:, :2])
    for iris, rim in EYE_RIMS:
        across = xy[rim[8]] - xy[rim[0]]
        along = IRIS_RADIUS * across * (1 if across[0] > 0 else -1)  # to the image's right
        xy[iris] = xy[list(rim)].mean(0)
        xy[iris + 1 : iris + 5] = xy[iris] + [along, (along[1], -along[0]), -along, (-along[1], along[0])]
    return np.column_stack([xy, z]).astype(np.float32)


def _thin_plate(places: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Interpolate values (N, K) at places (N, 2) by a thin-plate spline: its values (M, K) at places (M, 2)."""

    def kernel(a: np.ndarray) -> np.ndarray:
        squared = ((a[:, None] - places) ** 2).sum(-1)
        return np.asarray(squared * np.log(np.maximum(squared, 1e-12)))

    plane, n = np.column_stack([np.ones(len(places)), places]), len(places)
    system = np.block([[kernel(places) + _STIFFNESS * np.eye(n), plane], [plane.T, np.zeros((3, 3))]])
    weights = np.linalg.solve(system, np.concatenate([values, np.zeros((3, values.shape[1]))]))
    return np.asarray(kernel(at) @ weights[:n] + np.column_stack([np.ones(len(at)), at]) @ weights[n:])


def _read_rows(text: str) -> list[Any]:
    rows = [row for row in csv.reader(text.splitlines()) if row]
    try:
        return [[float(v) for v in row] for row in rows]
    except ValueError:  # with a header
        names = [name.strip().lower() for name in rows[0]]
        return [{n: float(v) for n, v in zip(names, row, strict=True) if n in ("x", "y", "z")} for row in rows[1:]]
