"""What users can count on and no other test holds."""

from __future__ import annotations

import ast
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from export3d_cli.core.animation import animator as animate
from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.media.video import probe
from export3d_cli.core.model.checkpoint import save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime import weights
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli

PACKAGE = Path(__file__).resolve().parents[1] / "export3d_cli"


def test_yaml_is_read_safely() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
                assert node.attr in {"safe_load", "safe_dump", "YAMLError"}, f"{path.name} uses yaml.{node.attr}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, Export3D(PRESETS["tiny"]).state_dict(), PRESETS["tiny"], {})
    return path


@pytest.fixture
def here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with src.jpg and drive.mp4 (5 frames); small weights where none are named; no network."""

    def refuse(*args: object) -> None:
        raise AssertionError("no network was to be used")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(
        animate, "resolve_weights", lambda name=None: tiny if name is None else weights.resolve_weights(name)
    )
    Path("src.jpg").write_bytes(example_path("source.jpg").read_bytes())
    cut = [
        ffmpeg_path(),
        "-loglevel",
        "error",
        "-i",
        str(example_path("drive.mp4")),
        "-frames:v",
        "5",
        "-vf",
        "scale=256:-2",
    ]
    subprocess.run([*cut, "drive.mp4"], check=True)
    return tmp_path


def run(line: str) -> Result:
    return CliRunner().invoke(cli, line.split(), catch_exceptions=False)


def test_three_commands_run_exactly_as_typed_without_a_network(here: Path) -> None:
    for line, out in (
        ("reenact src.jpg drive.mp4 -o out.mp4", "out.mp4"),
        ("novel-view --yaw -30:30", "novel_view.mp4"),
        ("edit-basis --v 4 --scale 1:10", "edit_basis.mp4"),
    ):
        assert run(line).exit_code == 0, line
        assert run(f"verify-mark {out}").exit_code == 0
    assert sorted(path.suffix for path in here.iterdir()) == [".jpg", ".mp4", ".mp4", ".mp4", ".mp4"]
    assert probe(here / "out.mp4").frame_count == 5


def test_angles_and_frames_are_the_command_s(here: Path) -> None:
    line = "novel-view src.jpg --yaw 5:5 --pitch -10:10 --roll 0:3 --frames 4 --loop once -o a.mkv --json"
    told = run(line)
    assert json.loads(told.stdout)["frames"] == probe(here / "a.mkv").frame_count == 4
    sheet = run("novel-view src.jpg --yaw 5:5 --pitch -10:10 --roll 0:3 --frames 4 --grid -o a.png --json")
    assert json.loads(sheet.stdout)["frames"] == 4


def test_the_summary_tells_the_device(here: Path) -> None:
    told = run("reenact src.jpg drive.mp4 -o a.mkv --max-frames 1 --device auto --precision fp32 --threads 1")
    assert re.search(r"device (cpu|cuda) fp32", told.stderr)


def test_batch_is_auto_or_a_number(here: Path) -> None:
    for batch in ("auto", "1", "3"):
        assert run(f"reenact src.jpg drive.mp4 -o {batch}.mkv --batch {batch}").exit_code == 0
        assert probe(here / f"{batch}.mkv").frame_count == 5
    refused = run("reenact src.jpg drive.mp4 -o no.mkv --batch many")
    assert refused.exit_code == 2
    assert "auto or a whole number" in refused.stderr


def test_crf_makes_smaller_files(here: Path) -> None:
    for crf in (1, 45):
        assert run(f"edit-basis src.jpg --v 1 --scale 0:5 --frames 5 --crf {crf} -o {crf}.mp4").exit_code == 0
    assert (here / "45.mp4").stat().st_size < 0.8 * (here / "1.mp4").stat().st_size


def test_a_driver_without_any_face_is_3(here: Path) -> None:
    subprocess.run(
        [
            ffmpeg_path(),
            "-loglevel",
            "error",
            "-f",
            "lavfi",
            "-i",
            "testsrc=s=128x128:r=25",
            "-frames:v",
            "3",
            "wall.mp4",
        ],
        check=True,
    )
    for kind in ("hold", "skip", "fail"):
        result = run(f"reenact src.jpg wall.mp4 -o no.mp4 --on-missing {kind}")
        assert result.exit_code == 3
        assert "wall.mp4" in result.stderr
    assert not (here / "no.mp4").exists()


def test_json_is_one_object_and_nothing_else_on_stdout(here: Path) -> None:
    """In a process of its own, where nothing can hide."""
    for line in ("preprocess drive.mp4 -o a.motion.npz --json", "verify-mark drive.mp4 --json", "weights info --json"):
        done = subprocess.run(
            [sys.executable, "-m", "export3d_cli", *line.split()], capture_output=True, text=True, check=False,
            env={"PYTHONPATH": str(PACKAGE.parent), "PATH": "", "HOME": str(here)},
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        assert isinstance(json.loads(done.stdout), dict)
        assert done.stderr == ""


def test_the_driver_s_face_and_its_reader_are_chosen(here: Path) -> None:
    line = "reenact src.jpg drive.mp4 -o a.mkv --max-frames 1 --driver-face"
    assert run(f"{line} left --tracker landmarker").exit_code == 0
    for wrong in (f"{line} top", f"{line} left --tracker nose", "preprocess drive.mp4 -o b.motion.npz --tracker nose"):
        assert run(wrong).exit_code == 2, wrong


def test_faces_turned_too_far_are_left_out(here: Path) -> None:
    result = run("preprocess src.jpg -o data --max-yaw 0")
    assert result.exit_code != 0
    assert "yaw" in result.stderr or "yaw" in (here / "data" / "rejected.jsonl").read_text()


def test_what_was_said_before_is_undone(here: Path) -> None:
    assert run("novel-view src.jpg --grid --no-grid --frames 2 -o a.mkv --json --no-json").stdout == ""
    assert probe(here / "a.mkv").frame_count == 2
