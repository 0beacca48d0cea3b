"""The head as a mesh with vertex colours (.ply, .glb): an isosurface of the tri-plane's density.

Coordinates are metres from the head's centre: x to the image's right for a frontal face, y up, z towards the viewer.
That is the head frame with y and z negated, one unit being half a metre; files open upright.
"""

import importlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.expression_controls import movable_coefficients
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, BetaStatistics
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.model.motion_beyond_lambda import apply_measures
from export3d_cli.core.model.triplane import sample_face_field
from export3d_cli.core.runtime.camera import project_points
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import write_atomic

MESH_SUFFIXES = (".ply", ".glb")
RESOLUTION = 192  # samples along each axis of the cube
METRES_PER_UNIT = 0.5  # one unit of the head frame
MORPH_GRID = 256  # cells a side of the height field that spreads the landmarks' displacements
MIN_MORPH_M = 1e-5  # metres: vertices that no morph moves farther are left out


@dataclass(frozen=True)
class HeadMesh:
    """A triangle mesh, counter-clockwise seen from outside, in the coordinates of this module."""

    vertices: np.ndarray  # (V, 3) float32, metres
    faces: np.ndarray  # (F, 3) int32
    colours: np.ndarray  # (V, 3) uint8, sRGB
    morphs: np.ndarray | None = None  # (52, V, 3) float32, metres: what ARKit's coefficients move at 1, in their order


def check_mesh_output(path: Path, *, morphs: bool = False) -> None:
    """Raise `InputError` if a mesh cannot be written to `path`, or the libraries for it are not installed."""
    if morphs and path.suffix.lower() != ".glb":
        raise InputError(f"morph targets need a .glb mesh, got {path.suffix!r}")
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise InputError(f"a mesh must be .ply or .glb, got {path.suffix!r}")
    for name in ("skimage.measure", "trimesh"):
        _import_library(name)


def extract_head_mesh(animator: Animator, portrait: Portrait, *, beta: np.ndarray | None = None,
                      base: np.ndarray | None = None, resolution: int = 0,
                      morphs: bool = False) -> HeadMesh:  # fmt: skip
    """Return the largest connected surface of the portrait's person, at density `ModelConfig.surface_density`.

    `beta` (1, 64) is the expression, None: the portrait's; `base` is as in `Animator.view`. `resolution` are samples
    along each axis, 0: `RESOLUTION`.
    With `morphs` the mesh has them. Raises `InputError` if there is no surface, or the weights have no flow for morphs.
    """
    from skimage import measure

    resolution, threshold = resolution or RESOLUTION, animator.model.config.surface_density
    centres = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution - 0.5  # of the cube's cells
    points = np.stack(np.meshgrid(centres, centres, centres, indexing="ij")[::-1], axis=-1).reshape(-1, 3)  # x fastest
    density = animator.query_field(portrait, points, beta=beta, base=base)[1] * _person_alpha(
        animator, portrait, points
    )
    volume = np.pad(density.reshape((resolution,) * 3), 1)  # closes the surface at the border of the cube
    parts = measure.label(volume > threshold, connectivity=1)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    if not sizes.any():
        raise InputError("these weights give no surface for this portrait: use other weights")
    volume = np.where((parts == sizes.argmax()) | (volume <= threshold), volume, 0)
    corners, faces, _, _ = measure.marching_cubes(volume, threshold)
    points = ((corners[:, ::-1] - 0.5) / resolution - 0.5).astype(np.float32)  # indices (z, y, x) -> head frame
    colours = animator.query_field(portrait, points, beta=beta, base=base)[0]
    vertex_colours = np.clip(colours * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
    to_metres = np.array([METRES_PER_UNIT, -METRES_PER_UNIT, -METRES_PER_UNIT], np.float32)
    moved = _arkit_displacements(animator, portrait, points, beta, base) * to_metres if morphs else None
    return HeadMesh(points * to_metres, faces.astype(np.int32), vertex_colours, moved)


def _arkit_displacements(animator: Animator, portrait: Portrait, points: np.ndarray,
                         beta: np.ndarray | None, base: np.ndarray | None) -> np.ndarray:  # fmt: skip
    """Return how far each of ARKit's coefficients moves points (V, 3) from 0 to 1: (52, V, 3), head frame.

    The measures of beta follow as they do on filmed people. Coefficients that the weights cannot move have no effect.
    """
    model, source, count = portrait.model, portrait.source, len(ARKIT_NAMES)
    if model.flow is None:
        raise InputError("these weights have no flow, which morphs need: use other weights")
    start = portrait.motion.beta[0] if beta is None else beta[0]
    slope = BetaStatistics.load().regression(range(count)).T  # (52, 64)
    slope[:, :count] = np.eye(count)
    low, high = (start + slope * (value - start[:count, None]) for value in (0, 1))
    n = model.config.num_coefficients
    with torch.inference_mode():
        low, high = (torch.from_numpy(np.float32(x)).to(animator.device) for x in (low, high))
        changes = model.change_expression(high, low) * movable_coefficients(animator)[:count, None]
        own = source.coefficients
        if beta is not None:
            own = own + torch.from_numpy(animator.expression_change(portrait, beta, base)).to(own)
        neutral = model.deform(source, own)  # (1, 478, 3)
        place, moved = torch.from_numpy(points).to(animator.device)[None], []
        for change in changes:
            shown = model.flow.deform_landmarks(neutral, change[None, :n])
            shown = apply_measures(shown, neutral, change[None, n:], torch.zeros_like(change[None, n:]))
            surface = model.flow.rasterize_surface(neutral, shown - neutral, MORPH_GRID)
            field = sample_face_field(place, surface)
            assert field is not None
            moved.append(field.displacement[0].float().cpu().numpy())
    return np.stack(moved)


def write_mesh(path: Path, mesh: HeadMesh) -> None:
    """Write `.ply` (binary, sRGB colours) or `.glb` (linear colours, as in glTF), marked as synthetic.

    Morphs become glTF's morph targets, with ARKit's names, as sparse accessors: most of the head does not move.
    """
    check_mesh_output(path, morphs=mesh.morphs is not None)
    trimesh = _import_library("trimesh")
    is_glb = path.suffix.lower() == ".glb"
    colours = mesh.colours
    if is_glb:
        srgb = mesh.colours / 255.0
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        colours = np.rint(255 * linear).astype(np.uint8)
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=colours, process=False)
    surface.metadata["comment"] = SYNTHETIC_COMMENT
    if is_glb:
        scene = trimesh.Scene(surface, metadata={"comment": SYNTHETIC_COMMENT})
        add_morphs = None if mesh.morphs is None else partial(_add_morphs, mesh.morphs)
        data = scene.export(file_type="glb", include_normals=True, tree_postprocessor=_set_matte_material,
                            buffer_postprocessor=add_morphs)  # fmt: skip
    else:
        first_line, body = surface.export(file_type="ply").split(b"\n", 1)
        data = first_line + b"\ncomment " + SYNTHETIC_COMMENT.encode() + b"\n" + body
    with write_atomic(path) as temporary:
        temporary.write_bytes(data)


def _person_alpha(animator: Animator, portrait: Portrait, points: np.ndarray) -> np.ndarray:
    """Return the person's alpha (N,) in [0, 1] where the photo's camera sees points (N, 3); 0 outside the crop."""
    alpha = animator.matting.alpha(portrait.crop)
    pixel = np.floor(project_points(portrait.camera, points) * len(alpha)).astype(int)
    inside = ((pixel >= 0) & (pixel < len(alpha))).all(-1)
    column, row = pixel.clip(0, len(alpha) - 1).T
    return alpha[row, column] * inside


def _add_morphs(morphs: np.ndarray, buffers: dict[Any, bytes], tree: dict[str, Any]) -> None:
    """Add morph targets (52, V, 3) to the only mesh of a glTF tree; each buffer becomes a view, in order."""
    moving = np.flatnonzero(np.abs(morphs).max((0, 2)) > MIN_MORPH_M).astype(np.uint32)
    buffers["morph indices"] = moving.tobytes()
    indices = {"bufferView": len(buffers) - 1, "componentType": 5125}  # uint32
    (mesh,) = tree["meshes"]
    (part,) = mesh["primitives"]
    part["targets"] = []
    for name, values in zip(ARKIT_NAMES, morphs[:, moving].astype(np.float32), strict=True):
        buffers[f"morph {name}"] = values.tobytes()
        low, high = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
        part["targets"].append({"POSITION": len(tree["accessors"])})
        tree["accessors"][f"morph {name}"] = {
            "componentType": 5126, "type": "VEC3", "count": morphs.shape[1], "min": low.tolist(), "max": high.tolist(),
            "sparse": {"count": len(moving), "indices": indices, "values": {"bufferView": len(buffers) - 1}},
        }  # fmt: skip
    mesh["weights"] = [0.0] * len(morphs)
    mesh["extras"] = {**mesh.get("extras", {}), "targetNames": list(ARKIT_NAMES)}


def _set_matte_material(tree: dict[str, Any]) -> None:
    """Give a glTF tree a matte material: the default material is polished metal."""
    tree["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}]
    for mesh in tree["meshes"]:
        for part in mesh["primitives"]:
            part["material"] = 0


def _import_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        missing = "scikit-image" if name.startswith("skimage") else name
        raise InputError(f"a mesh needs {missing}, which is not installed: "
                         "run pip install 'export3d-cli[mesh]'") from None  # fmt: skip
