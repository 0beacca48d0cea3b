"""Valid inputs of the fault tests: tiny untrained weights, a short driver (video, motion, CSV), a small data set."""

from __future__ import annotations

import csv
import json
import subprocess
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import write_image
from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.model.checkpoint import save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import head_pose, orbit_camera, project_points
from export3d_cli.core.runtime.weights import example_path

SIDE, FRAMES = 64, 8


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Paths of valid files: source, clip (8 frames with sound), motion, csv, weights, data (a data set), config."""
    folder = tmp_path_factory.mktemp("good")
    source = example_path("source.jpg")
    clip = folder / "clip.mp4"
    inputs = ["-i", str(example_path("drive.mp4")), "-f", "lavfi", "-i", "sine=d=1", "-map", "0:v", "-map", "1:a"]
    encode = ["-frames:v", str(FRAMES), "-t", "0.32", "-vf", "scale=256:256", "-c:v", "libx264", "-preset", "ultrafast"]
    subprocess.run([ffmpeg_path(), "-loglevel", "error", *inputs, *encode, "-c:a", "aac", str(clip)], check=True)
    return SimpleNamespace(
        folder=folder, source=source, clip=clip, motion=_motion(folder), csv=_csv(folder), weights=_weights(folder),
        data=_data(folder), config=_config(folder),
    )  # fmt: skip


def motion_of(seed: int, frames: int) -> Motion:
    """Return the motion of a slightly turning head, made without a tracker."""
    rng = np.random.default_rng(seed)
    face = load_canonical_face().points
    cameras = [orbit_camera(rng.uniform(-15, 15), rng.uniform(-8, 8)) for _ in range(frames)]
    marks = []
    for camera in cameras:
        rotation, centre = head_pose(camera)
        depth = (face @ rotation.T + centre)[:, 2]
        marks.append(np.column_stack([project_points(camera, face), (depth - 2.7) * 4.2647 / 2.7]))
    return Motion(
        rng.uniform(0, 0.3, (frames, 64)).astype(np.float32), np.stack(cameras),
        np.stack(marks).astype(np.float32), np.ones(frames, bool), Fraction(25), (0.0, 0.0, 64.0), (SIDE, SIDE),
    )  # fmt: skip


def _motion(folder: Path) -> Path:
    path = folder / "drive.motion.npz"
    motion_of(0, FRAMES).save(path)
    return path


def _csv(folder: Path) -> Path:
    path = folder / "take.csv"
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Timecode", "BlendShapeCount", *ARKIT_NAMES, "HeadYaw", "HeadPitch", "HeadRoll"])
        for frame in range(FRAMES):
            rows.writerow([f"10:00:00:{frame:02d}.000", 52, *rng.uniform(0, 0.3, 52).round(4), 0.1, 0.0, 0.0])
    return path


def _weights(folder: Path) -> Path:
    path = folder / "tiny.safetensors"
    torch.manual_seed(0)
    model = Export3D(PRESETS["tiny"])
    assert model.flow is not None
    triangles = load_canonical_face().flow_triangles
    model.flow.triangles.copy_(torch.from_numpy(triangles))
    model.flow.basis.normal_(std=0.003)
    save_weights(path, model.state_dict(), PRESETS["tiny"], {})
    return path


def _data(folder: Path) -> Path:
    data = folder / "data"
    (data / "clips").mkdir(parents=True)
    lines = []
    for number, name in enumerate(("a_t00", "b_t00")):
        motion_of(number, FRAMES).save(data / f"clips/{name}.motion.npz")
        with VideoWriter(data / f"clips/{name}.mp4", size=(SIDE, SIDE), fps=Fraction(25)) as writer:
            for t in range(FRAMES):
                writer.write(np.full((SIDE, SIDE, 3), 20 * t + number, np.uint8))
        lines.append({"id": name, "person": name[0], "file": f"clips/{name}.mp4", "frames": FRAMES})
    motion_of(9, 1).save(data / "clips/c.motion.npz")
    write_image(data / "clips/c.png", np.full((SIDE, SIDE, 3), 128, np.uint8))
    lines.append({"id": "c", "person": "c", "file": "clips/c.png", "frames": 1})
    for line in lines:
        line |= {"motion": f"clips/{line['id']}.motion.npz", "fps": "25/1", "split": "train", "source": line["id"]}
    (data / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data


def _config(folder: Path) -> Path:
    """Write a configuration of a few steps; tests override `run` and `data.path`."""
    path = folder / "tiny.yaml"
    path.write_text(
        "preset: tiny\ndevice: cpu\nprecision: fp32\nbatch: 2\nsteps: 4\ncheckpoint_every: 2\nsample_every: 0\n"
        "log_every: 1\nlicense: CC0-1.0\n"
        "clebs: {steps: 2, geometry_warmup_steps: 1, negatives: 6, image_size: 32, encoder_width: 4,"
        " geometry: 1.0, geometry_pairs: 8, ridge_pairs: 64, ridge: 1e-3}\n"
    )
    return path
