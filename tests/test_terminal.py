"""The program in a real terminal: a pseudo-terminal with its own session, so that bars and Ctrl-C are what they are."""

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

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.model.checkpoint import save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.weights import example_path

pty = pytest.importorskip("pty", reason="a system without pseudo-terminals")
ROOT = Path(__file__).resolve().parents[1]
# a shell in the background has Ctrl-C ignored, and what it starts inherits that
START = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
)
CONTROLS = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
LIMIT = 100.0  # seconds before a test gives up


class Terminal:
    """`export3d ARGS` in a terminal of 100 columns; what it says gathers in `text`."""

    def __init__(self, folder: Path, *args: object, **environment: str) -> None:
        self.master, slave = pty.openpty()
        subprocess.run(["stty", "cols", "100"], stdin=slave, check=True)
        command = [sys.executable, "-c", START, sys.executable, "-m", "export3d_cli", *map(str, args)]
        known = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        known |= {"TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(ROOT), **environment}
        self.run = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=known, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def read_until(self, done: Callable[[str], object]) -> None:
        """Listen until `done(text)` or the end of the program."""
        deadline = time.monotonic() + LIMIT
        while not done(self.text):
            assert time.monotonic() < deadline, self.text
            if not select.select([self.master], [], [], 0.2)[0]:
                continue
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                return
            if not data:
                return
            self.text += data.decode("utf-8", "replace")

    def end(self) -> int:
        """Its exit code."""
        self.read_until(lambda text: False)
        return self.run.wait(LIMIT)

    def processes(self) -> bool:
        """Whether anything that it started is still there."""
        try:
            os.killpg(self.run.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        if self.processes():
            os.killpg(self.run.pid, 9)
        self.run.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*args: object, **environment: str) -> Terminal:
        opened.append(Terminal(tmp_path, *args, **environment))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, Export3D(PRESETS["tiny"]).state_dict(), PRESETS["tiny"], {})
    return path


def test_a_bar_shows_frames_rate_and_time_left_and_none_with_quiet(terminal: Callable[..., Terminal]) -> None:
    track = ["preprocess", example_path("drive.mp4"), "--max-frames", 30, "-o"]
    shown, plain = terminal(*track, "a.motion.npz"), terminal(*track, "b.motion.npz", NO_COLOR="1")
    assert shown.end() == plain.end() == 0, shown.text
    text = CONTROLS.sub("", shown.text)
    assert re.search(r"━+ +30/30 ", text)
    assert re.search(r"\d+\.\d/s +\d:\d\d:\d\d", text)
    colours = re.compile(r"\x1b\[[\d;]*3[0-9][\d;]*m")
    assert colours.search(shown.text)
    assert not colours.search(plain.text)
    quiet = terminal("-q", *track, "c.motion.npz")
    assert quiet.end() == 0
    assert quiet.text == ""


def test_ctrl_c_leaves_neither_half_files_nor_processes(
    terminal: Callable[..., Terminal], tmp_path: Path, tiny: Path
) -> None:
    files = [example_path("source.jpg"), example_path("drive.mp4"), "-o", "out.mp4"]
    running = terminal("reenact", *files, "--weights", tiny, "--device", "cpu", "--threads", 1)
    running.read_until(lambda text: re.search(r" ([1-9]|\d\d+)/\d+ ", CONTROLS.sub("", text)))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".mp4"] != []  # being written, hidden
    os.write(running.master, b"\x03")
    assert running.end() == 130
    assert "interrupted" in running.text
    assert "Traceback" not in running.text
    assert list(tmp_path.iterdir()) == []
    assert not running.processes()


def test_ctrl_c_ends_workers_too(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (videos / name).write_bytes(example_path("drive.mp4").read_bytes())
    running = terminal("preprocess", videos, "-o", "data", "--workers", 2)
    running.read_until(lambda text: list(tmp_path.glob("data/**/*.mp4")) or "0/2" in text)
    os.write(running.master, b"\x03")
    assert running.end() == 130
    assert "Traceback" not in running.text
    assert not list(tmp_path.glob("data/**/*.part*"))
    deadline = time.monotonic() + 10
    while running.processes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
