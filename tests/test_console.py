"""Messages of native libraries, which print to file descriptor 2, while a command runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export3d_cli.console import print_summary
from export3d_cli.core.animation.personalize import PersonSummary
from export3d_cli.core.runtime.weights import example_path

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_summary_leaves_out_what_there_is_none_of(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(PersonSummary(Path("me.person.safetensors"), ("a.jpg", "b.jpg"), None, None, 1.2, 3.4))
    assert capsys.readouterr().err == "out me.person.safetensors, photos 2, size_mb 1.20, seconds 3.40\n"


def test_native_messages_are_hidden_and_python_messages_shown() -> None:
    done = run_python(
        "import os, sys; from export3d_cli.console import hide_library_messages\n"
        "with hide_library_messages():\n"
        "    os.write(2, b'native\\n'); print('python', file=sys.stderr)\n"
        "    os.system('echo child 1>&2')\n"
        "os.write(2, b'native after\\n'); print('python after', file=sys.stderr)"
    )
    assert done.stderr.split("\n") == ["python", "native after", "python after", ""]


def test_a_crash_of_a_native_library_is_reported() -> None:
    done = run_python(
        "import os; from export3d_cli.console import hide_library_messages\nwith hide_library_messages(): os.abort()"
    )
    assert "Fatal Python error: Aborted" in done.stderr


def test_a_command_prints_no_line_of_litert(tmp_path: Path) -> None:
    code = "from export3d_cli.main import main; main()"
    out = tmp_path / "drive.motion.npz"
    done = run_python(code, "-q", "preprocess", example_path("drive.mp4"), "-o", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.exists()
