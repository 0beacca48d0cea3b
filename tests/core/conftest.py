"""Short clips of the bundled driver, and an animator with tiny weights."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.runtime.weights import example_path

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
def animator(tiny_weights: Path) -> Animator:
    return Animator.from_weights(tiny_weights, device="cpu", precision="fp32")
