"""The head as a mesh: the surface of one density of the tri-plane's volume, coloured at its vertices (.ply, .glb).

Metres, x to the image's right for a frontal face, y up, z towards who looks at it, the origin at the head's centre:
the head frame with y and z negated, one unit of it being half a metre. So both kinds of file open upright.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import write_atomic

MESH_SUFFIXES = (".ply", ".glb")
RESOLUTION = 192  # samples along each side of the cube
METRES_PER_UNIT = 0.5  # a unit of the head frame


@dataclass(frozen=True)
class HeadMesh:
    """A surface of triangles, counter-clockwise seen from outside; see the module's docstring for the frame."""

    vertices: np.ndarray  # (V, 3) float32, metres
    faces: np.ndarray  # (F, 3) int32
    colours: np.ndarray  # (V, 3) uint8, sRGB


def check_mesh_output(path: Path) -> None:
    """Raise `InputError` unless a mesh can be written to `path`, and the libraries that make one are there."""
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise InputError(f"cannot write meshes of type {path.suffix!r}: use .ply or .glb")
    for name in ("skimage.measure", "trimesh"):
        _import_library(name)


def extract_head_mesh(
    animator: Animator, portrait: Portrait, *, beta: np.ndarray | None = None, resolution: int = 0
) -> HeadMesh:
    """The source's head, with its own expression or with beta (1, 64), `resolution` (0: 192) samples along an axis.

    What the photo shows beside the person is cut away, and of the rest the largest connected surface is kept. Raises
    `InputError` where there is none.
    """
    from skimage import measure

    resolution, threshold = resolution or RESOLUTION, animator.model.config.surface_density
    points = _grid(resolution)
    density = animator.query_field(portrait, points, beta=beta)[1] * _person_alpha(animator, portrait, points)
    level = np.pad(density.reshape((resolution,) * 3), 1)  # what reaches the border of the cube is closed there
    parts = measure.label(level > threshold, connectivity=1)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    if not sizes.any():
        raise InputError("these weights show no surface in this portrait: choose other weights")
    level = np.where((parts == sizes.argmax()) | (level <= threshold), level, 0)
    corners, faces, _, _ = measure.marching_cubes(level, threshold)
    points = ((corners[:, ::-1] - 0.5) / resolution - 0.5).astype(np.float32)  # index (z, y, x) -> head frame
    colours = animator.query_field(portrait, points, beta=beta)[0]
    shown = np.clip(colours * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
    return HeadMesh(
        points * np.array([METRES_PER_UNIT, -METRES_PER_UNIT, -METRES_PER_UNIT], np.float32),
        faces.astype(np.int32),
        shown,
    )


def write_mesh(path: Path, mesh: HeadMesh) -> None:
    """Write `.ply` (binary, sRGB colours) or `.glb` (linear colours, as glTF wants), marked as synthetic."""
    check_mesh_output(path)
    trimesh = _import_library("trimesh")
    glb = path.suffix.lower() == ".glb"
    colours = mesh.colours
    if glb:
        share = mesh.colours / 255.0
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        colours = np.rint(255 * linear).astype(np.uint8)
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=colours, process=False)
    surface.metadata["comment"] = SYNTHETIC_COMMENT
    if glb:
        scene = trimesh.Scene(surface, metadata={"comment": SYNTHETIC_COMMENT})
        data = scene.export(file_type="glb", include_normals=True, tree_postprocessor=_set_matte_material)
    else:
        head, rest = surface.export(file_type="ply").split(b"\n", 1)
        data = head + b"\ncomment " + SYNTHETIC_COMMENT.encode() + b"\n" + rest
    with write_atomic(path) as temporary:
        temporary.write_bytes(data)


def _grid(resolution: int) -> np.ndarray:
    """Centres of the cube's cells, (N, 3) float32 as x, y, z of the head frame; x changes fastest."""
    centres = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution - 0.5
    z, y, x = np.meshgrid(centres, centres, centres, indexing="ij")
    return np.stack([x, y, z], axis=-1).reshape(-1, 3)


def _person_alpha(animator: Animator, portrait: Portrait, points: np.ndarray) -> np.ndarray:
    """How much of the person, (N,) in [0, 1], is where the source's camera sees points (N, 3); 0 beside its picture."""
    alpha = animator.person_alpha(portrait.crop)
    at = np.floor(portrait.camera.project(points) * len(alpha)).astype(int)
    inside = ((at >= 0) & (at < len(alpha))).all(-1)
    column, row = at.clip(0, len(alpha) - 1).T
    return alpha[row, column] * inside


def _set_matte_material(tree: dict[str, Any]) -> None:
    """Give a glTF tree a matt material: without one, its surfaces are polished metal."""
    tree["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}]
    for mesh in tree["meshes"]:
        for part in mesh["primitives"]:
            part["material"] = 0


def _import_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        missing = "scikit-image" if name.startswith("skimage") else name
        raise InputError(f"a mesh needs {missing}, which is missing: run pip install 'export3d-cli[mesh]'") from None
