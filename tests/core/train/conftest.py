"""A dataset of heads whose only expression is an opening mouth, made without a tracker."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.config.schema import TrainConfig
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.landmarks import LIPS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import write_image
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.camera import head_pose, orbit_camera, project_points
from export3d_cli.core.runtime.weights import weights_dir

SIZE, FRAMES = 64, 12
BUNDLE = weights_dir() / "face_landmarker.task"


def motion_of(seed: int, frames: int) -> Motion:
    rng = np.random.default_rng(seed)
    face = load_canonical_face().points * rng.uniform(0.95, 1.05, 3)
    beta = rng.uniform(0, 0.01, (frames, 64)).astype(np.float32)
    jaw = rng.uniform(0, 1, frames)
    beta[:, ARKIT_NAMES.index("jawOpen")] = jaw
    cameras, landmarks = [], []
    for t in range(frames):
        camera = orbit_camera(rng.uniform(-20, 20), rng.uniform(-10, 10))
        points = face.copy()
        points[list(LIPS), 1] += 0.05 * jaw[t]
        cameras.append(camera)
        rotation, centre = head_pose(camera)
        depth = (points @ rotation.T + centre)[:, 2]
        landmarks.append(np.column_stack([project_points(camera, points), (depth - 2.7) * 4.2647 / 2.7]))
    found = np.ones(frames, bool)
    return Motion(
        beta, np.stack(cameras), np.stack(landmarks).astype(np.float32), found, Fraction(25), (0.0, 0.0, 64.0), (64, 64)
    )


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people with a clip on each of two shared tracks, and one with a still image only."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "clips").mkdir()
    lines = []
    for person in ("a", "b"):
        for track in ("t00", "t01"):
            name = f"{person}_{track}"
            motion = motion_of(len(lines), FRAMES)
            found = motion.found.copy()
            found[3] = False
            Motion(**{**motion.__dict__, "found": found}).save(folder / f"clips/{name}.motion.npz")
            with VideoWriter(folder / f"clips/{name}.mp4", size=(SIZE, SIZE), fps=Fraction(25)) as writer:
                for t in range(FRAMES):
                    writer.write(np.full((SIZE, SIZE, 3), 20 * t + len(lines), np.uint8))
            lines.append({"id": name, "person": person, "file": f"clips/{name}.mp4", "frames": FRAMES})
    motion_of(9, 1).save(folder / "clips/c.motion.npz")
    write_image(folder / "clips/c.png", np.full((SIZE, SIZE, 3), 128, np.uint8))
    lines.append({"id": "c", "person": "c", "file": "clips/c.png", "frames": 1})
    for line in lines:
        line |= {"motion": f"clips/{line['id']}.motion.npz", "fps": "25/1", "split": "train"}
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def tiny(data_set: Path, tmp_path: Path) -> TrainConfig:
    """A run of a few steps on `data_set`."""
    return make_train_config(
        {
            "run": str(tmp_path / "run"), "preset": "tiny", "device": "cpu", "precision": "fp32", "batch": 2,
            "license": "CC0-1.0", "steps": 4, "checkpoint_every": 2, "sample_every": 0, "log_every": 1,
            "data": {"path": [str(data_set)]},
            "clebs": {
                "steps": 2, "geometry_warmup_steps": 1, "negatives": 9, "image_size": 32, "encoder_width": 4,
                "geometry": 1.0, "geometry_pairs": 8, "ridge_pairs": 64, "ridge": 1e-3,
                "identity_leakage": 0.1, "mirror": 0.1, "antisymmetric_dims": 3,
            },
        }
    )  # fmt: skip
