"""Short videos made of the bundled driver, and tiny untrained weights."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.canonical_face import load_canonical_face, make_flow_triangles
from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.model.checkpoint import save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.weights import example_path, weights_dir

MakeClip = Callable[..., Path]


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory) -> MakeClip:
    """The first frames of the bundled driver through a filter, without loss; more arguments go to ffmpeg."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name: str, *args: str, frames: int = 6, rate: str = "30000/1001", filters: str = "null") -> Path:
        path = folder / name
        if not path.exists():
            command = [ffmpeg_path(), "-loglevel", "error", "-i", str(example_path("drive.mp4")), *args]
            command += ["-vf", f"{filters},settb=AVTB,setpts=N/({rate})/TB", "-r", rate, "-frames:v", str(frames)]
            command += ["-c:v", "libx264", "-crf", "0", "-pix_fmt", "yuv420p"]
            subprocess.run([*command, *([] if args else ["-an"]), str(path)], check=True)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model in which expression and camera show: what starts at 0 is moved away from it."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    model = Export3D(PRESETS["tiny"])
    assert model.flow is not None
    triangles = make_flow_triangles(load_canonical_face(weights_dir() / "face_landmarker.task"))
    model.flow.triangles.copy_(torch.from_numpy(triangles))
    model.flow.basis.normal_(std=0.003)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    save_weights(path, model.state_dict(), PRESETS["tiny"], {}, half=False)
    return path


@pytest.fixture(scope="session")
def animator(tiny_weights: Path) -> Animator:
    return Animator.from_weights(tiny_weights, device="cpu", precision="fp32")
