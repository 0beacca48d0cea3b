"""Progress bars and Ctrl-C in a pseudo-terminal with its own session."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from export3d_cli.core.runtime.weights import example_path

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
ROOT = Path(__file__).resolve().parents[1]
# Background jobs of a shell ignore SIGINT and their children inherit that.
START = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
)
CONTROL_SEQUENCE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
TIMEOUT_S = 100.0


class Terminal:
    """`export3d ARGS` in a terminal of 100 columns; `text` accumulates its output."""

    def __init__(self, folder: Path, *args: object, **environment: str) -> None:
        self.master, slave = pty.openpty()
        subprocess.run(["stty", "cols", "100"], stdin=slave, check=True)
        command = [sys.executable, "-c", START, sys.executable, "-m", "export3d_cli", *map(str, args)]
        env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        env |= {"TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(ROOT), **environment}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=env, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def read_until(self, done: Callable[[str], object]) -> None:
        """Read until `done(text)` or the end of the program."""
        deadline = time.monotonic() + TIMEOUT_S
        while not done(self.text):
            assert time.monotonic() < deadline, self.text
            if not select.select([self.master], [], [], 0.2)[0]:
                continue
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux reports a closed terminal this way
                return
            if not data:
                return
            self.text += data.decode("utf-8", "replace")

    def wait(self) -> int:
        """Wait for the program and return its exit code."""
        self.read_until(lambda text: False)
        return self.process.wait(TIMEOUT_S)

    def has_processes(self) -> bool:
        """Return whether the program or any child of it is still running."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        if self.has_processes():
            os.killpg(self.process.pid, 9)
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*args: object, **environment: str) -> Terminal:
        opened.append(Terminal(tmp_path, *args, **environment))
        return opened[-1]

    yield start
    for item in opened:
        item.close()


def test_progress_bar_shows_count_rate_and_time_left_unless_quiet(terminal: Callable[..., Terminal]) -> None:
    track = ["preprocess", example_path("drive.mp4"), "--max-frames", 30, "-o"]
    coloured, plain = terminal(*track, "a.motion.npz"), terminal(*track, "b.motion.npz", NO_COLOR="1")
    assert coloured.wait() == plain.wait() == 0, coloured.text
    text = CONTROL_SEQUENCE.sub("", coloured.text)
    assert re.search(r"━+ +30/30 ", text)
    assert re.search(r"\d+\.\d/s +\d:\d\d:\d\d", text)
    colours = re.compile(r"\x1b\[[\d;]*3[0-9][\d;]*m")
    assert colours.search(coloured.text)
    assert not colours.search(plain.text)
    quiet = terminal("-q", *track, "c.motion.npz")
    assert quiet.wait() == 0
    assert quiet.text == ""


def test_ctrl_c_leaves_no_partial_files_and_no_processes(
    terminal: Callable[..., Terminal], tmp_path: Path, tiny_weights: Path
) -> None:
    files = [example_path("source.jpg"), example_path("drive.mp4"), "-o", "out.mp4"]
    running = terminal("reenact", *files, "--weights", tiny_weights, "--device", "cpu", "--threads", 1)
    running.read_until(
        lambda text: (
            re.search(r" ([1-9]|\d\d+)/\d+ ", CONTROL_SEQUENCE.sub("", text))
            and any(path.suffix == ".mp4" for path in tmp_path.iterdir())  # a hidden temporary file, made by ffmpeg
        )
    )
    os.write(running.master, b"\x03")
    assert running.wait() == 130
    assert "interrupted" in running.text
    assert "Traceback" not in running.text
    assert list(tmp_path.iterdir()) == []
    assert not running.has_processes()


def test_ctrl_c_ends_worker_processes(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (videos / name).write_bytes(example_path("drive.mp4").read_bytes())
    running = terminal("preprocess", videos, "-o", "data", "--workers", 2)
    running.read_until(lambda text: list(tmp_path.glob("data/**/*.mp4")) or "0/2" in text)
    os.write(running.master, b"\x03")
    assert running.wait() == 130
    assert "Traceback" not in running.text
    assert not list(tmp_path.glob("data/**/*.part*"))
    deadline = time.monotonic() + 10
    while running.has_processes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
