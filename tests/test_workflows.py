"""Commands as a user types them, with tiny weights and without a network."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from export3d_cli.core.animation import animator
from export3d_cli.core.media.probe import ffmpeg_path, probe
from export3d_cli.core.runtime import weights
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli

ROOT = Path(__file__).resolve().parents[1]


def run_ffmpeg(*args: str) -> None:
    subprocess.run([ffmpeg_path(), "-loglevel", "error", *args], check=True)


@pytest.fixture
def folder(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with src.jpg and drive.mp4 (5 frames); tiny default weights; refuse connections."""

    def refuse(*args: object) -> None:
        raise AssertionError("the network was used")

    def resolve(name: str | Path | None = None) -> Path:
        return tiny_weights if name is None else weights.resolve_weights(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(animator, "resolve_weights", resolve)
    Path("src.jpg").write_bytes(example_path("source.jpg").read_bytes())
    run_ffmpeg("-i", str(example_path("drive.mp4")), "-frames:v", "5", "-vf", "scale=256:-2", "drive.mp4")
    return tmp_path


def run(line: str) -> Result:
    return CliRunner().invoke(cli, line.split(), catch_exceptions=False)


def test_commands_of_the_overview_write_marked_videos(folder: Path) -> None:
    for line, out in (
        ("reenact src.jpg drive.mp4 -o out.mp4", "out.mp4"),
        ("novel-view --yaw -30:30 --frames 4", "novel_view.mp4"),
        ("edit-basis --v 4 --scale 1:10 --frames 4", "edit_basis.mp4"),
    ):
        assert run(line).exit_code == 0, line
        assert run(f"verify-mark {out}").exit_code == 0
    assert sorted(path.suffix for path in folder.iterdir()) == [".jpg", ".mp4", ".mp4", ".mp4", ".mp4"]
    assert probe(folder / "out.mp4").frame_count == 5


def test_novel_view_renders_the_requested_frames(folder: Path) -> None:
    angles = "--yaw 5:5 --pitch -10:10 --roll 0:3 --frames 4"
    result = run(f"novel-view src.jpg {angles} --loop once -o a.mkv --json")
    assert json.loads(result.stdout)["frames"] == probe(folder / "a.mkv").frame_count == 4
    sheet = run(f"novel-view src.jpg {angles} --grid -o a.png --json")
    assert json.loads(sheet.stdout)["frames"] == 4


def test_reenact_summary_names_device_and_precision(folder: Path) -> None:
    result = run("reenact src.jpg drive.mp4 -o a.mkv --max-frames 1 --device auto --precision fp32 --threads 1")
    assert re.search(r"device (cpu|cuda) fp32", result.stderr)


def test_batch_is_auto_or_a_number(folder: Path) -> None:
    for batch in ("auto", "1", "3"):
        assert run(f"reenact src.jpg drive.mp4 -o {batch}.mkv --batch {batch}").exit_code == 0
        assert probe(folder / f"{batch}.mkv").frame_count == 5
    refused = run("reenact src.jpg drive.mp4 -o no.mkv --batch many")
    assert refused.exit_code == 2
    assert "auto or a whole number" in refused.stderr


def test_higher_crf_writes_smaller_files(folder: Path) -> None:
    for crf in (1, 45):
        assert run(f"edit-basis src.jpg --v 1 --scale 0:5 --frames 5 --crf {crf} -o {crf}.mp4").exit_code == 0
    assert (folder / "45.mp4").stat().st_size < 0.8 * (folder / "1.mp4").stat().st_size


def test_driver_without_a_face_exits_3(folder: Path) -> None:
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=128x128:r=25", "-frames:v", "3", "wall.mp4")
    for policy in ("hold", "skip", "fail"):
        result = run(f"reenact src.jpg wall.mp4 -o no.mp4 --on-missing {policy}")
        assert result.exit_code == 3
        assert "wall.mp4" in result.stderr
    assert not (folder / "no.mp4").exists()


def test_json_output_is_one_object_on_stdout(folder: Path) -> None:
    """Runs in a separate process, so that output that bypasses Click would show."""
    for line in ("preprocess drive.mp4 -o a.motion.npz --json", "verify-mark drive.mp4 --json", "weights info --json"):
        done = subprocess.run(
            [sys.executable, "-m", "export3d_cli", *line.split()], capture_output=True, text=True, check=False,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder)},
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        assert isinstance(json.loads(done.stdout), dict)
        assert done.stderr == ""


def test_driver_face_and_tracker_are_checked(folder: Path) -> None:
    line = "reenact src.jpg drive.mp4 -o a.mkv --max-frames 1 --driver-face"
    assert run(f"{line} left --tracker landmarker").exit_code == 0
    for wrong in (f"{line} top", f"{line} left --tracker nose", "preprocess drive.mp4 -o b.motion.npz --tracker nose"):
        assert run(wrong).exit_code == 2, wrong


@pytest.mark.parametrize(("limit", "reason"), [("--max-yaw 0", "yaw"), ("--min-face 5000", "5000 px")])
def test_preprocess_rejects_faces_beyond_the_limits(folder: Path, limit: str, reason: str) -> None:
    result = run(f"preprocess src.jpg -o data {limit}")
    assert result.exit_code != 0
    assert reason in result.stderr or reason in (folder / "data" / "rejected.jsonl").read_text()


def test_later_negation_undoes_a_flag(folder: Path) -> None:
    assert run("novel-view src.jpg --grid --no-grid --frames 2 -o a.mkv --json --no-json").stdout == ""
    assert probe(folder / "a.mkv").frame_count == 2
