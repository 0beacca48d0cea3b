"""Make `canonical_face.npz`: MediaPipe's canonical face mesh in the head frame, from the landmarker bundle.

python weights/make_canonical_face.py weights/face_landmarker.task weights/canonical_face.npz
"""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Iterator
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

UNITS_PER_CM = 1 / 58  # head-frame units: EG3D's radius 2.7 then sees a face whose box is 1/2.1 of the crop
# Mirror points of the irises: the centres swap, and so do the points towards the image's left and right.
IRIS_MIRROR = np.array([473, 476, 475, 474, 477, 468, 471, 470, 469, 472])


def main(bundle: Path, output: Path) -> None:
    """Read the mesh, and write points, mirror points and the triangles of the basis flow."""
    with zipfile.ZipFile(bundle) as archive:
        data = archive.read("geometry_pipeline_metadata_landmarks.binarypb")
    mesh = next(v for f, v in protobuf_fields(data) if f == 1 and isinstance(v, bytes))
    vertices = [struct.unpack("<f", v)[0] for f, v in protobuf_fields(mesh) if f == 3 and isinstance(v, bytes)]
    indices = [v for f, v in protobuf_fields(mesh) if f == 4 and isinstance(v, int)]
    surface = np.array(vertices, dtype=np.float64).reshape(NUM_MESH_VERTICES, 5)[:, :3]
    points = surface * [1, -1, -1] * UNITS_PER_CM  # MediaPipe: centimetres, y up, z towards the camera
    irises = [points[list(RIGHT_EYE)].mean(0)] * 5 + [points[list(LEFT_EYE)].mean(0)] * 5
    distance = np.linalg.norm(points[:, None] * [-1, 1, 1] - points[None], axis=-1)
    mirror = np.concatenate([distance.argmin(axis=1), IRIS_MIRROR])
    points = np.concatenate([points, irises])
    triangles = make_flow_triangles(points, np.array(indices, dtype=np.int64).reshape(-1, 3))
    np.savez_compressed(output, points=points, mirror=mirror, flow_triangles=triangles)


def make_flow_triangles(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the triangles of the basis flow, (902, 4) int32: three points, then the kind (0 skin, 1 mouth, 2 eye).

    All triangles have the same winding (positive area with y down, seen from the front). The eyes are triangle fans
    around the iris, so that the gaze can move; kind 1 covers the inside of the mouth.
    """
    rows, lips = [], set(INNER_LIPS)
    for triangle in faces:
        corners = set(map(int, triangle))
        if corners <= set(LEFT_EYE) or corners <= set(RIGHT_EYE):
            continue
        rows.append([*triangle, 1 if corners <= lips else 0])
    for iris, rim in ((LEFT_IRIS[0], LEFT_EYE), (RIGHT_IRIS[0], RIGHT_EYE)):
        rows += [[iris, a, b, 2] for a, b in zip(rim, rim[1:] + rim[:1], strict=True)]
    triangles = np.array(rows, dtype=np.int32)
    for group in (triangles[:, 3] != 2, triangles[:, 3] == 2):
        a, b, c = (points[triangles[group, k], :2] for k in range(3))
        if np.median(cross(b - a, c - a)) < 0:
            triangles[group] = triangles[group][:, [0, 2, 1, 3]]
    return triangles


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cross product of plane vectors (..., 2)."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the (number, value) pairs of a protocol buffer message: varints as int, everything else as bytes."""
    position = 0
    while position < len(data):
        key, position = read_varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            number, position = read_varint(data, position)
            yield key >> 3, number
            continue
        if wire_type == 2:
            size, position = read_varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"protocol buffer wire type {wire_type}")
        yield key >> 3, data[position : position + size]
        position += size


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the varint at `position` and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
