"""A hanging or stopped ffmpeg is killed, and the command fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from faultkit import list_names, session_processes
from test_resources import READING, ROOT, SMALL, WRITING, script

from export3d_cli.core.media import ffmpeg_process as process
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import Export3DWarning, MediaError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="programs and signals of POSIX")
SLEEP = "import time; time.sleep(600)"
WHEN = {
    "answers": ("'-h' in sys.argv", SLEEP),
    "tells": ("sys.argv[-2:-1] == ['-i']", SLEEP),
    "reads": (READING, SLEEP),
    "reads on": (READING, "subprocess.run([real, *sys.argv[1:-1], '-frames:v', '3', 'pipe:1']); " + SLEEP),
    "takes": (WRITING, SLEEP),
    "ends": (WRITING, "subprocess.run([real, *sys.argv[1:]]); " + SLEEP),
    "tries sound": ("'-abort_on' in sys.argv", SLEEP),
}
READS = ("answers", "tells", "reads", "reads on")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STALL_S", 2.0)


@pytest.mark.parametrize("kind", WHEN)
def test_hanging_ffmpeg_is_killed(
    kind: str, good: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line on stderr, no partial output and no process remain."""
    when, how = WHEN[kind]
    out = tmp_path / "out.mp4"
    clip = tmp_path / f"{kind}.mp4"  # a new name, because probe caches its results
    clip.write_bytes(good.clip.read_bytes())
    fake = script(tmp_path / "ffmpeg", f"if {when}:\n    {how}\nos.execv(real, [real, *sys.argv[1:]])\n")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", fake["IMAGEIO_FFMPEG_EXE"])
    with pytest.raises(MediaError, match="no progress for 2 s") as raised:
        read(clip) if kind in READS else write(out, good.clip if kind == "tries sound" else None)
    assert "\n" not in str(raised.value)
    assert list_names(tmp_path) == sorted([clip.name, "ffmpeg"])
    assert running(tmp_path / "ffmpeg") == []


def test_ffmpeg_that_hangs_while_sound_is_added_leaves_picture(
    good: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = script(tmp_path / "ffmpeg", f"if '1:a:0' in sys.argv:\n    {SLEEP}\nos.execv(real, [real, *sys.argv[1:]])\n")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", fake["IMAGEIO_FFMPEG_EXE"])
    with pytest.warns(Export3DWarning, match="is silent, because .* no progress for 2 s"):
        write(tmp_path / "out.mp4", good.clip)
    assert list_names(tmp_path) == ["ffmpeg", "out.mp4"]
    assert len(list(VideoReader(tmp_path / "out.mp4"))) == 3
    assert running(tmp_path / "ffmpeg") == []


def read(clip: Path) -> None:
    assert list(VideoReader(clip))


def write(out: Path, audio: Path | None) -> None:
    with VideoWriter(out, size=(1024, 512), fps=Fraction(25), audio=audio) as writer:
        for _ in range(3):  # more than a pipe buffers
            writer.write(np.zeros((512, 1024, 3), np.uint8))


def running(program: Path) -> list[str]:
    """Return the command lines of running processes of a program."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(program) in line:
            found.append(line)
    return found


def test_slow_ffmpeg_is_not_killed(good: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow output and a slow consumer are not hanging."""
    how = (
        "import time\n"
        "    all = subprocess.run([real, *sys.argv[1:]], stdout=-1).stdout\n"
        "    for at in range(0, len(all), len(all) // 4 + 1):\n"
        "        time.sleep(0.5); os.write(1, all[at:at + len(all) // 4 + 1])\n    sys.exit()"
    )
    fake = script(tmp_path / "ffmpeg", f"if {READING}:\n    {how}\nos.execv(real, [real, *sys.argv[1:]])\n")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", fake["IMAGEIO_FFMPEG_EXE"])
    frames = 0
    for frames, _ in enumerate(VideoReader(good.clip, size=(16, 16)), 1):
        if frames == 1:
            time.sleep(2.4)
    assert frames == 8


def test_stopped_encoder_fails_command(good: SimpleNamespace, tmp_path: Path) -> None:
    """SIGSTOP to the ffmpeg of a command: exit code 1, one line, and the old output file stays."""
    out = tmp_path / "out.mp4"
    out.write_bytes(b"the one before")
    code = (
        "from export3d_cli.core.media import ffmpeg_process; ffmpeg_process.STALL_S = 2.0; "
        "from export3d_cli.main import main; main()"
    )
    args = ["reenact", good.source, good.motion, "-o", out, "--overwrite", "--weights", good.weights, *SMALL]
    work = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True,
    )  # fmt: skip
    while work.poll() is None:
        for pid in session_processes(work.pid, tmp_path):
            line = Path(f"/proc/{pid}/cmdline")
            if pid != work.pid and line.exists() and b"pipe:0" in line.read_bytes():
                os.kill(pid, signal.SIGSTOP)
                break
        else:
            time.sleep(0.01)
            continue
        break
    _, err = work.communicate(timeout=120)
    assert work.returncode == 1, err
    assert err.startswith("error: encoding ") and err.count("\n") == 1, err
    assert "no progress for 2 s" in err
    assert out.read_bytes() == b"the one before"
    assert list_names(tmp_path) == ["out.mp4"]
    assert session_processes(work.pid, tmp_path) == []
