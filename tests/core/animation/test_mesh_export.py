"""Mesh export of a volume with a known surface, and of the tiny model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import trimesh

from export3d_cli.core.animation import mesh_export
from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.mesh_export import extract_head_mesh, write_mesh
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.runtime.camera import project_points
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

CENTRE = np.array([0.1, -0.05, 0.08])  # in the head frame: right, up and behind
RADIUS = 0.2


def glb_colours(path: Path) -> np.ndarray:
    """Return COLOR_0 of the only primitive of a .glb with a matte material, (V, 4) uint8."""
    data = path.read_bytes()
    length = int.from_bytes(data[12:16], "little")
    tree = json.loads(data[20 : 20 + length])
    assert tree["materials"][0]["pbrMetallicRoughness"]["metallicFactor"] == 0
    (part,) = tree["meshes"][0]["primitives"]
    assert {"POSITION", "NORMAL", "COLOR_0"} <= set(part["attributes"])
    accessor = tree["accessors"][part["attributes"]["COLOR_0"]]
    start = 28 + length + tree["bufferViews"][accessor["bufferView"]]["byteOffset"]
    return np.frombuffer(data, np.uint8, accessor["count"] * 4, start).reshape(-1, 4)


@pytest.fixture
def ball(animator: Animator, monkeypatch: pytest.MonkeyPatch) -> Animator:
    """An animator whose volume is a ball, red on the image's right, and a small separate ball."""

    density = animator.model.config.surface_density

    def query_field(
        portrait: Portrait, points: np.ndarray, *, beta: np.ndarray | None = None, base: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        assert beta is None and base is None
        distance = np.linalg.norm(points - CENTRE, axis=1)
        small_ball = np.linalg.norm(points + 0.3, axis=1) < 0.04
        colours = np.stack([np.sign(points[:, 0] - CENTRE[0]), 0 * distance, 0 * distance - 2], axis=1)
        return colours, np.where(small_ball, 2 * density, density * (1 + (RADIUS - distance) / 0.1)).clip(0)

    monkeypatch.setattr(animator, "query_field", query_field)
    monkeypatch.setattr(mesh_export, "_person_alpha", lambda animator, portrait, points: np.ones(len(points)))
    return animator


def test_mesh_follows_the_density_in_metres_and_upright(ball: Animator, tmp_path: Path) -> None:
    mesh = extract_head_mesh(ball, ball.portrait(read_image(example_path("source.jpg"))), resolution=48)
    centre = CENTRE * [0.5, -0.5, -0.5]  # y up, z to the viewer
    distance = np.linalg.norm(mesh.vertices - centre, axis=1)
    np.testing.assert_allclose(distance, RADIUS / 2, atol=0.5 / 48 / 4)
    right = mesh.vertices[:, 0] > centre[0] + 0.01
    assert (mesh.colours[right] == (255, 128, 0)).all()
    for name in ("a.ply", "a.glb"):
        write_mesh(tmp_path / name, mesh)
        read = trimesh.load_mesh(tmp_path / name)
        read = read if isinstance(read, trimesh.Trimesh) else read.to_geometry()
        assert read.is_watertight
        assert read.volume == pytest.approx(4 / 3 * np.pi * (RADIUS / 2) ** 3, rel=0.03)  # faces look outwards
        np.testing.assert_allclose(read.centroid, centre, atol=2e-3)
        assert SYNTHETIC_COMMENT.encode() in (tmp_path / name).read_bytes()
        if name == "a.ply":
            assert (np.asarray(read.visual.vertex_colors)[right, :3] == (255, 128, 0)).all()
    assert (glb_colours(tmp_path / "a.glb")[right, :3] == (255, 55, 0)).all()  # glTF's are linear


def test_head_mesh_excludes_the_photo_s_surroundings(animator: Animator) -> None:
    portrait = animator.portrait(read_image(example_path("source.jpg")))
    mesh = extract_head_mesh(animator, portrait, resolution=32)
    assert len(mesh.vertices) > 100
    assert mesh.faces.max() == len(mesh.vertices) - 1
    assert np.abs(mesh.vertices).max() <= 0.26
    uv = project_points(portrait.camera, mesh.vertices * [2, -2, -2])
    assert uv.min() > -0.1
    assert uv.max() < 1.1


def read_targets(path: Path) -> dict[str, np.ndarray]:
    """Return the morph targets of a .glb with one mesh, (V, 3) each, by their names."""
    data = path.read_bytes()
    length = int.from_bytes(data[12:16], "little")
    tree = json.loads(data[20 : 20 + length])
    (mesh,) = tree["meshes"]

    def view(number: int, kind: type) -> np.ndarray:
        where = tree["bufferViews"][number]
        return np.frombuffer(data, kind, where["byteLength"] // 4, 28 + length + where["byteOffset"])

    targets = {}
    for name, target in zip(mesh["extras"]["targetNames"], mesh["primitives"][0]["targets"], strict=True):
        accessor = tree["accessors"][target["POSITION"]]
        targets[name] = np.zeros((accessor["count"], 3), np.float32)
        sparse = accessor["sparse"]
        values = view(sparse["values"]["bufferView"], np.float32).reshape(sparse["count"], 3)
        targets[name][view(sparse["indices"]["bufferView"], np.uint32)] = values
    return targets


def test_morph_targets_move_what_their_names_say(tmp_path: Path) -> None:
    animator = Animator.from_weights(device="cpu", quality="fast")
    portrait = animator.portrait(read_image(example_path("source.jpg")), framing="face", size=256)
    mesh = extract_head_mesh(animator, portrait, resolution=64, morphs=True)
    write_mesh(tmp_path / "head.glb", mesh)
    targets = read_targets(tmp_path / "head.glb")
    assert tuple(targets) == ARKIT_NAMES
    assert mesh.morphs is not None
    for values, expected in zip(targets.values(), mesh.morphs, strict=True):
        np.testing.assert_allclose(values, expected, atol=2e-5)
    jaw, smile = targets["jawOpen"], targets["mouthSmileLeft"]
    lowest = mesh.vertices[np.argmin(jaw[:, 1])]
    assert jaw[:, 1].min() < -0.004 and lowest[1] < mesh.vertices[:, 1].mean()  # the chin falls by 4 mm or more
    assert mesh.vertices[np.argmax(smile[:, 1])][0] > 0  # the person's left is the image's right
    back = mesh.vertices[:, 2] < -0.05
    assert back.any() and np.abs(mesh.morphs[:, back]).max() < 1e-3 < 5e-3 < np.abs(mesh.morphs).max() < 0.06
    assert not targets["cheekPuff"].any()  # which did not vary in training
    scene = trimesh.load(tmp_path / "head.glb")
    (loaded,) = scene.geometry.values()
    assert len(loaded.vertices) == len(mesh.vertices)
    with pytest.raises(InputError, match=r"need a \.glb"):
        write_mesh(tmp_path / "head.ply", mesh)


def test_check_mesh_output_names_wrong_suffix_and_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"\.obj"):
        mesh_export.check_mesh_output(Path("a.obj"))

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'export3d-cli\[mesh\]'"):
        mesh_export.check_mesh_output(Path("a.ply"))
