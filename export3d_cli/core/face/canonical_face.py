"""MediaPipe's canonical face mesh, read from the landmarker bundle, and the triangles of the basis flow."""

from __future__ import annotations

import functools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export3d_cli.core.face.landmarks import (
    INNER_LIPS,
    LEFT_EYE,
    LEFT_IRIS,
    NUM_MESH_VERTICES,
    RIGHT_EYE,
    RIGHT_IRIS,
)
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS

_READ_ERRORS: tuple[type[Exception], ...] = (StopIteration, IndexError, *DAMAGED_ZIP_ERRORS)
UNITS_PER_CM = 1 / 58  # head-frame units: EG3D's radius 2.7 then sees a face whose box is 1/2.1 of the crop
# Mirror points of the irises: the centres swap, and so do the points towards the image's left and right.
_IRIS_MIRROR = np.array([473, 476, 475, 474, 477, 468, 471, 470, 469, 472])


@dataclass(frozen=True)
class CanonicalFace:
    """Mean face in the head frame."""

    points: np.ndarray  # (478, 3) float64, head frame; all points of an iris lie at the centre of the eye
    triangles: np.ndarray  # (898, 3) int64, over the first 468 points
    mirror: np.ndarray  # (478,) int64: index of each point's mirror point


@functools.lru_cache(maxsize=4)
def load_canonical_face(bundle: Path) -> CanonicalFace:
    """Read the canonical mesh from a face landmarker bundle; raises `WeightsError` if it holds none."""
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
    """Return the triangles of the basis flow, (902, 4) int32: three points, then the kind (0 skin, 1 mouth, 2 eye).

    All triangles have the same winding (positive area with y down, seen from the front). The eyes are triangle fans
    around the iris, so that the gaze can move; kind 1 covers the inside of the mouth.
    """
    rows, lips = [], set(INNER_LIPS)
    for triangle in canonical.triangles:
        points = set(map(int, triangle))
        if points <= set(LEFT_EYE) or points <= set(RIGHT_EYE):
            continue
        rows.append([*triangle, 1 if points <= lips else 0])
    for iris, rim in ((LEFT_IRIS[0], LEFT_EYE), (RIGHT_IRIS[0], RIGHT_EYE)):
        rows += [[iris, a, b, 2] for a, b in zip(rim, rim[1:] + rim[:1], strict=True)]
    triangles = np.array(rows, dtype=np.int32)
    for group in (triangles[:, 3] != 2, triangles[:, 3] == 2):
        a, b, c = (canonical.points[triangles[group, k], :2] for k in range(3))
        if np.median(_cross(b - a, c - a)) < 0:
            triangles[group] = triangles[group][:, [0, 2, 1, 3]]
    return triangles


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the (number, value) pairs of a protocol buffer message: varints as int, everything else as bytes."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            number, position = _read_varint(data, position)
            yield key >> 3, number
            continue
        if wire_type == 2:
            size, position = _read_varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"protocol buffer wire type {wire_type}")
        yield key >> 3, data[position : position + size]
        position += size


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the varint at `position` and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
