"""MediaPipe's canonical face mesh, read from the landmarker bundle, and the triangles of the basis flow."""

from __future__ import annotations

import functools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export3d_cli.core.face.landmarks import INNER_LIPS, LEFT_EYE, LEFT_IRIS, NUM_MESH_VERTICES, RIGHT_EYE, RIGHT_IRIS
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS

_READ_ERRORS: tuple[type[Exception], ...] = (StopIteration, IndexError, *DAMAGED_ZIP_ERRORS)
UNITS_PER_CM = 1 / 58  # head-frame units: a face whose box is 1/2.1 of the crop is then seen from EG3D's radius 2.7
# Iris points: centre, then one in each direction; the mirror image of "towards the image's right" points left.
_IRIS_MIRROR = np.array([473, 476, 475, 474, 477, 468, 471, 470, 469, 472])


@dataclass(frozen=True)
class CanonicalFace:
    """Mean face in the head frame."""

    points: np.ndarray  # (478, 3) float64, head frame; irises at the eyes' middles
    triangles: np.ndarray  # (898, 3) int64, over the first 468 points
    mirror: np.ndarray  # (478,) int64: the point on the other side


@functools.lru_cache(maxsize=4)
def load_canonical_face(bundle: Path) -> CanonicalFace:
    """Read the mesh inside a face landmarker bundle; raises `WeightsError` when it is not there."""
    try:
        with zipfile.ZipFile(bundle) as archive:
            data = archive.read("geometry_pipeline_metadata_landmarks.binarypb")
        mesh = next(v for f, v in _protobuf_fields(data) if f == 1 and isinstance(v, bytes))
        vertices = [struct.unpack("<f", v)[0] for f, v in _protobuf_fields(mesh) if f == 3 and isinstance(v, bytes)]
        indices = [v for f, v in _protobuf_fields(mesh) if f == 4 and isinstance(v, int)]
        surface = np.array(vertices, dtype=np.float64).reshape(NUM_MESH_VERTICES, 5)[:, :3]
        triangles = np.array(indices, dtype=np.int64).reshape(-1, 3)
    except _READ_ERRORS as error:
        raise WeightsError(f"{bundle} holds no canonical face ({error}): install export3d-cli again") from error
    points = surface * [1, -1, -1] * UNITS_PER_CM  # MediaPipe: centimetres, y up, z towards the camera
    irises = [points[list(RIGHT_EYE)].mean(0)] * 5 + [points[list(LEFT_EYE)].mean(0)] * 5
    distance = np.linalg.norm(points[:, None] * [-1, 1, 1] - points[None], axis=-1)
    mirror = np.concatenate([distance.argmin(1), _IRIS_MIRROR])
    return CanonicalFace(np.concatenate([points, irises]), triangles, mirror)


def make_flow_triangles(canonical: CanonicalFace) -> np.ndarray:
    """Triangles of the basis flow, (902, 4) int32: three points, then the kind: 0 skin, 1 mouth's inside, 2 eye.

    The canonical mesh, all seen from the front with the same winding (positive area with y down); the eyes are fanned
    around the iris, so that the gaze can move.
    """
    kept, inner = [], set(INNER_LIPS)
    for triangle in canonical.triangles:
        points = set(map(int, triangle))
        if points <= set(LEFT_EYE) or points <= set(RIGHT_EYE):
            continue
        kept.append([*triangle, 1 if points <= inner else 0])
    for iris, ring in ((LEFT_IRIS[0], LEFT_EYE), (RIGHT_IRIS[0], RIGHT_EYE)):
        kept += [[iris, a, b, 2] for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    out = np.array(kept, dtype=np.int32)
    for group in (out[:, 3] != 2, out[:, 3] == 2):
        a, b, c = (canonical.points[out[group, k], :2] for k in range(3))
        if np.median(_cross(b - a, c - a)) < 0:
            out[group] = out[group][:, [0, 2, 1, 3]]
    return out


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (number, value) pairs of a protocol buffer message: integers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == 0:
            number, at = _read_varint(data, at)
            yield key >> 3, number
            continue
        if kind == 2:
            size, at = _read_varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"protocol buffer wire type {kind}")
        yield key >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
