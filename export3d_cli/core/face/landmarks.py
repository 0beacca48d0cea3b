"""The canonical face: MediaPipe's mesh, read from the landmarker bundle, and what is known about its 478 points."""

from __future__ import annotations

import functools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS

_READ_ERRORS: tuple[type[Exception], ...] = (StopIteration, IndexError, *DAMAGED_ZIP_ERRORS)
UNITS_PER_CM = 1 / 58  # head-frame units: a face whose box is 1/2.1 of the crop is then seen from EG3D's radius 2.7
NUM_LANDMARKS, NUM_MESH_VERTICES = 478, 468  # all points; those of the mesh proper, without the irises

# Eyes, seen from the front: "left" is the person's left, at the image's right.
LEFT_EYE = (362, 398, 384, 385, 386, 387, 388, 466, 263, 249, 390, 373, 374, 380, 381, 382)
RIGHT_EYE = (33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7)
LEFT_IRIS, RIGHT_IRIS = (473, 474, 475, 476, 477), (468, 469, 470, 471, 472)
INNER_LIPS = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95)
OUTER_LIPS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)
LIPS = INNER_LIPS + OUTER_LIPS
LEFT_BROW = (276, 283, 282, 295, 285, 300, 293, 334, 296, 336)
RIGHT_BROW = (46, 53, 52, 65, 55, 70, 63, 105, 66, 107)
FACE_OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149,
        150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)  # fmt: skip
# Points that tell the head's pose whatever the face does, with their weights: those of MediaPipe's own pose solver.
RIGID_WEIGHTS = {
    4: 0.07091, 6: 0.0321, 10: 0.00845, 33: 0.05872, 54: 0.00767, 67: 0.00908, 117: 0.00979, 119: 0.01457, 121: 0.01859,
    127: 0.0052, 129: 0.12063, 132: 0.00556, 133: 0.05329, 136: 0.06689, 143: 0.01482, 147: 0.01426, 198: 0.02546,
    205: 0.04725, 263: 0.05872, 284: 0.00767, 297: 0.00908, 346: 0.00979, 348: 0.01457, 350: 0.01859, 356: 0.0052,
    358: 0.12063, 361: 0.00556, 362: 0.05329, 365: 0.06689, 372: 0.01482, 376: 0.01426, 420: 0.02546, 425: 0.04725,
}  # fmt: skip
RIGID_POINTS = tuple(RIGID_WEIGHTS)
# The 68 points of iBUG (jaw, brows, nose, eyes, outer and inner lips) among the 478, as commonly chosen.
IBUG68 = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389, 71, 63, 105, 66, 107, 336, 296,
    334, 293, 301, 168, 197, 5, 4, 75, 97, 2, 326, 305, 33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380, 61,
    39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,
)  # fmt: skip
IBUG68_MIRROR = (  # for each of them, the one on the other side
    16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 27, 28, 29, 30,
    35, 34, 33, 32, 31, 45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40, 54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55,
    64, 63, 62, 61, 60, 67, 66, 65,
)  # fmt: skip


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


# Iris points: centre, then one in each direction; the mirror image of "towards the image's right" points left.
_IRIS_MIRROR = np.array([473, 476, 475, 474, 477, 468, 471, 470, 469, 472])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


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
