import subprocess

import pytest

from export3d_cli.core.media.probe import ffmpeg_path


@pytest.fixture
def make(tmp_path):
    """Return a function that runs ffmpeg with an output name and arguments and returns the path."""

    def run(name, *args):
        path = tmp_path / name
        subprocess.run([ffmpeg_path(), "-loglevel", "error", "-y", *args, str(path)], check=True)
        return path

    return run


@pytest.fixture
def picture(make):
    """Return a function that encodes a test video."""

    def run(name, rate="25", frames=12, *args, size="64x48"):
        source = ["-f", "lavfi", "-i", f"testsrc=s={size}:r={rate}", "-frames:v", str(frames)]
        codec = [] if name.endswith((".gif", ".webm")) else ["-c:v", "libx264", "-pix_fmt", "yuv420p"]
        return make(name, *source, *codec, *args)

    return run


@pytest.fixture
def sound(make):
    """Return a function that encodes a sine tone."""

    def run(name, seconds=3, *args):
        return make(name, "-f", "lavfi", "-i", f"sine=d={seconds}", *args)

    return run
