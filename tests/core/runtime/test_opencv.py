"""Installations of OpenCV that cannot be used, as stand-in modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export3d_cli.core.runtime import opencv
from export3d_cli.core.runtime.opencv import find_opencv_problem

ROOT = Path(__file__).parents[3]
NO_FILE = "cannot open shared object file: No such file or directory"
CASES = {
    "libGL": (f"raise ImportError('libGL.so.1: {NO_FILE}')", ["libGL.so.1", "libgl1", "opencv-python-headless>=5"]),
    "glib": (f"raise ImportError('libgthread-2.0.so.0: {NO_FILE}')", ["libglib2.0-0", "opencv-python-headless>=5"]),
    "empty file": ("raise ImportError('/lib/libGL.so.1: file too short')", ["file too short", "libgl1"]),
    "libfoo": (f"raise ImportError('libfoo.so.3: {NO_FILE}')", ["libfoo.so.3", "opencv-python-headless>=5"]),
    "NumPy": ("raise ImportError('numpy.core.multiarray failed to import')", ["multiarray", "opencv-python>=5"]),
    "loader": ("raise RuntimeError('missing configuration file: config.py')", ["config.py", "opencv-python>=5"]),
    "half removed": ("", ["is damaged", "its version", "opencv-python>=5"]),
    "no detector": ("__version__ = '5.0.0'", ["is damaged", "FaceDetectorYN", "opencv-python>=5"]),
    "OpenCV 4": ("__version__ = '4.11.0'", ["4.11.0", "needs 5 or later", "opencv-python>=5"]),
}


def stand_in(folder: Path, code: str) -> dict[str, str]:
    """Write a module cv2; return the environment in which it hides the installed one."""
    (folder / "cv2").mkdir()
    (folder / "cv2" / "__init__.py").write_text(code)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.mark.parametrize("kind", CASES)
def test_find_opencv_problem_names_problem_and_remedy(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, expected = CASES[kind]
    stand_in(tmp_path, code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2")
    monkeypatch.setattr(opencv, "_is_installed", lambda name: name in ("opencv-python", "opencv-contrib-python"))
    problem = find_opencv_problem()
    sys.modules.pop("cv2", None)
    assert [word for word in expected if word not in problem] == []
    reason, _, remedy = problem.rpartition(": ")
    assert reason
    assert "`pip uninstall -y opencv-python opencv-contrib-python`" in remedy


def test_find_opencv_problem_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert find_opencv_problem() == "OpenCV is not installed: run `pip install opencv-python`"


def test_find_opencv_problem_of_this_installation_is_empty() -> None:
    assert find_opencv_problem() == ""


@pytest.mark.parametrize("kind", ["libGL", "half removed"])
def test_command_without_usable_opencv_ends_in_one_line(kind: str, tmp_path: Path) -> None:
    code, expected = CASES[kind]
    environment = stand_in(tmp_path, code)
    source, driver = ROOT / "examples" / "source.jpg", ROOT / "examples" / "drive.mp4"
    command = [sys.executable, "-m", "export3d_cli", "reenact", str(source), str(driver), "-o", str(tmp_path / "a.mp4")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: OpenCV ")
    assert [word for word in expected if word not in done.stderr] == []
