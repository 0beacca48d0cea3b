"""`examine` on installations that cannot be used: it tests what the commands use."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
from click.testing import CliRunner

from export3d_cli.core.diagnostics import doctor
from export3d_cli.core.diagnostics.doctor import Finding, examine
from export3d_cli.core.face import detector
from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.runtime import weights
from export3d_cli.core.runtime.errors import MediaError
from export3d_cli.main import cli

CV2_PROBLEM = "OpenCV 4.11.0 is installed, and the face detector needs 5 or later: run `pip install`"


def failed(findings: list[Finding]) -> dict[str, Finding]:
    assert all(finding.advice for finding in findings if not finding.ok)
    return {finding.what: finding for finding in findings if not finding.ok}


def fake_ffmpeg(path: Path, condition: str, action: str) -> None:
    """Write a program that runs the real ffmpeg unless a condition on its arguments holds."""
    code = f"import os, sys\nif {condition}:\n    {action}\nos.execv({ffmpeg_path()!r}, [sys.argv[0], *sys.argv[1:]])\n"
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)


def test_examine_of_this_installation_finds_no_problem() -> None:
    findings = examine()
    assert failed(findings) == {}
    assert {"cv2", "ffmpeg", "tracker"} <= {finding.what for finding in findings}


def test_command_prints_all_problems_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise MediaError("no ffmpeg found: bring one")

    (tmp_path / "manifest.yaml").write_text("weights: []")
    monkeypatch.setattr(weights, "weights_dir", lambda: tmp_path)
    monkeypatch.setattr("export3d_cli.core.media.probe.ffmpeg_path", broken)
    monkeypatch.setattr(doctor, "find_opencv_problem", lambda: CV2_PROBLEM)
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 1
    problems = [line.removeprefix("BAD  ") for line in result.stdout.splitlines() if line.startswith("BAD")]
    expected = (
        r"cv2: OpenCV 4\.11\.0 is installed, and the face detector needs 5 or later -> run `pip install`",
        r"ffmpeg: no ffmpeg found: bring one -> .*pip install",
        r"weights: no weights 'export3d-compact': .* -> `pip install",
        r"tracker: no weights 'yunet': .* -> `pip install",
    )
    assert len(problems) == len(expected)
    for line, pattern in zip(problems, expected, strict=True):
        assert re.match(pattern, line), line


def test_examine_with_old_opencv_advises_only_to_replace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads, but the tracker's face detector fails."""

    def fail(*args: object) -> None:
        raise cv2.error("unknown layer")

    monkeypatch.setattr(cv2, "FaceDetectorYN", SimpleNamespace(create=fail))
    for module in (doctor, detector):
        monkeypatch.setattr(module, "find_opencv_problem", lambda: CV2_PROBLEM)
    problems = failed(examine())
    assert sorted(problems) == ["cv2", "tracker"]
    assert {finding.advice for finding in problems.values()} == {"run `pip install`"}


@pytest.mark.parametrize(
    ("condition", "action", "found"),
    [
        ("'-h' in sys.argv", "print('-vsync method'); sys.exit()", "is too old"),
        ("any('fps=' in word for word in sys.argv)", "sys.exit('No such filter: fps')", "No such filter: fps"),
        ("any('fps=' in word for word in sys.argv)", "sys.exit()", "no frame of"),
        ("'libx264' in sys.argv", "sys.exit('Unknown encoder')", "Unknown encoder"),
        ("'-h' in sys.argv", "sys.exit(1)", "cannot be run"),
    ],
    ids=["ffmpeg 4", "no filter", "no frames", "no encoder", "fails"],
)  # fmt: skip
def test_examine_with_unusable_ffmpeg_advises_to_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, condition: str, action: str, found: str
) -> None:
    fake_ffmpeg(tmp_path / "ffmpeg", condition, action)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    problems = failed(examine())
    assert sorted(problems) == ["ffmpeg"]
    assert re.search(found, problems["ffmpeg"].found)
    assert "unset" in problems["ffmpeg"].advice


def test_ffmpeg_path_of_old_ffmpeg_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path / "ffmpeg", "'-h' in sys.argv", "print('-vsync method'); sys.exit()")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    with pytest.raises(MediaError, match=r"ffmpeg is too old, 5\.1 or later is needed: unset IMAGEIO_FFMPEG_EXE"):
        ffmpeg_path()


def test_ffmpeg_path_of_system_checks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path / "ffmpeg", "'-h' in sys.argv", "sys.exit()")
    assert "IMAGEIO_FFMPEG_EXE" not in os.environ
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(tmp_path / "ffmpeg"))
    with pytest.raises(MediaError, match=r"ffmpeg is too old, .* or run `pip install"):
        ffmpeg_path()
