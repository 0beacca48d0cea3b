"""Installations of OpenCV that cannot be used, as stand-in modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export3d_cli.core.runtime.errors import find_opencv_problem

ROOT = Path(__file__).parents[3]
NO_LIBRARY = "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
LOADER = """
import sys
if hasattr(sys, "OpenCV_LOADER"):
    print(sys.path)
    raise ImportError("recursion is detected")
sys.OpenCV_LOADER = True
raise ModuleNotFoundError("No module named 'cv2.load_config_py3'")
"""
CASES = {
    "libGL": (NO_LIBRARY, "OpenCV cannot be loaded (libGL.so.1, cannot open shared object file, No such file"),
    "loader": ("raise RuntimeError('missing configuration file: config.py')", "configuration file, config.py)"),
    "lost file": (LOADER, "OpenCV cannot be loaded (No module named 'cv2.load_config_py3')"),
    "half removed": ("", "OpenCV is damaged (cv2 lacks its version)"),
    "OpenCV 4": ("__version__ = '4.11.0'", "OpenCV 4.11.0 is installed, and the face detector needs 5 or later"),
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
    problem, _, remedy = find_opencv_problem().rpartition(": ")
    sys.modules.pop("cv2", None)
    assert expected in problem
    assert remedy.startswith("run `pip uninstall -y opencv-python ")


def test_find_opencv_problem_of_this_installation_is_empty() -> None:
    assert find_opencv_problem() == ""


@pytest.mark.parametrize("kind", ["half removed", "lost file"])
def test_command_without_usable_opencv_ends_in_one_line(tmp_path: Path, kind: str) -> None:
    code, expected = CASES[kind]
    environment = stand_in(tmp_path, code)
    source, driver = ROOT / "examples" / "source.jpg", ROOT / "examples" / "drive.mp4"
    command = [sys.executable, "-m", "export3d_cli", "reenact", str(source), str(driver), "-o", str(tmp_path / "a.mp4")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert expected in done.stderr


@pytest.mark.parametrize(("code", "reason"), [(NO_LIBRARY, "libGL"), (LOADER, "load_config_py3")])
def test_doctor_without_usable_opencv_advises_only_to_replace_it(tmp_path: Path, code: str, reason: str) -> None:
    """The tracker fails with it, and must not be blamed."""
    environment = stand_in(tmp_path, code)
    done = subprocess.run(
        [sys.executable, "-m", "export3d_cli", "doctor"], env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    bad = [line for line in lines if not line.startswith("ok ")]
    assert done.returncode == 1 and len(bad) >= 2
    assert all(reason in line and "-> run `pip uninstall -y opencv-python " in line for line in bad)
