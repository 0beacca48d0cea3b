"""Untrusted files, names and settings cannot escape their folder or leak secrets, and nothing leaves the machine."""

from __future__ import annotations

import csv
import json
import os
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from faultkit import run
from hypothesis import given, settings
from hypothesis import strategies as st

from export3d_cli.core import output_paths
from export3d_cli.core.dataset.preprocess import _find_inputs
from export3d_cli.core.evaluation.evaluate import EvaluateOptions, Evaluation
from export3d_cli.core.evaluation.report import METRICS, write_report
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--device", "cpu", "--precision", "fp32", "--batch", "2")
TOKEN = "hf_" + "abcdefgh" * 4
NAMES = st.text(
    st.sampled_from(string.ascii_letters + "./\\:{}~$%-_ \n\0\x1b\u202e\ud800") | st.characters(), max_size=40
)

# Records every file the command opens, every process it starts and every host it contacts.
AUDIT_SCRIPT = """
import sys
log = open(sys.argv.pop(1), "w", encoding="utf-8", errors="replace")
def audit(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        log.write(f"{event} {args[1:]}\\n")
    elif event == "open":
        log.write(f"open {args[0]}\\n")
    elif event == "subprocess.Popen":
        log.write(f"run {args[1]}\\n")
    log.flush()
sys.addaudithook(audit)
from export3d_cli.main import main
main()
"""


def run_audited(folder: Path, *args: object, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a command; return its result and the audit events."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = [sys.executable, "-c", AUDIT_SCRIPT, str(folder / "audit.log"), *map(str, args)]
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done, (folder / "audit.log").read_text(encoding="utf-8").splitlines()


@settings(max_examples=150, deadline=None)
@given(
    source=NAMES,
    driver=NAMES,
    template=st.sampled_from(["{src}.mp4", "{drive}.mp4", "{src}-{drive}.mp4", "x/{src}/{drive}.mp4"]),
)
def test_output_template_stays_in_its_folder(source: str, driver: str, template: str) -> None:
    folder = Path("/out")
    try:
        (path,) = output_paths([Path("in") / source], Path("in") / driver, str(folder / template))
    except (InputError, ValueError):
        return
    assert os.path.normpath(path).startswith("/out/")
    assert path.parts[: len(folder.parts)] == folder.parts
    assert len(path.parts) == len((folder / template).parts)
    assert ".." not in path.parts
    assert path.name.isprintable()


@pytest.mark.parametrize(
    "template", ["{src.__class__}.mp4", "{0}.mp4", "{src!r}.mp4", "{src:>99999999}.mp4", "{home}.mp4"]
)
def test_output_template_is_not_a_format_string(template: str, good: SimpleNamespace, tmp_path: Path) -> None:
    ended = run("reenact", good.source, good.motion, "-o", tmp_path / template, "--weights", good.weights)
    assert ended.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.mp4", "/etc/passwd", "clips/../../outside.mp4"])
def test_manifest_paths_outside_the_data_set_are_refused(name: str, good: SimpleNamespace, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.jsonl").write_text(json.dumps({"id": "a", "file": name, "motion": "clips/a.motion.npz"}) + "\n")
    ended = run("train", "--config", good.config, f"data.path=[{data}]", f"run={tmp_path / 'run'}")
    assert ended.exit_code == 2
    assert "inside the dataset" in ended.stderr


def test_output_link_is_replaced_not_followed(good: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / "out.mp4").symlink_to("precious")
    args = ["reenact", good.source, good.motion, "-o", tmp_path / "out.mp4", "--weights", good.weights, *SMALL]
    assert run(*args).exit_code == 2
    assert run(*args, "--overwrite").exit_code == 0
    assert (tmp_path / "precious").read_bytes() == b"mine"
    assert not (tmp_path / "out.mp4").is_symlink()


def test_link_cycles_end_and_hidden_folders_are_skipped(tmp_path: Path) -> None:
    """A folder that links to itself twice yields each of its two videos once."""
    videos = tmp_path / "videos"
    for folder in (videos / "deeper", videos / ".thumbnails"):
        folder.mkdir(parents=True)
    for name in ("a.mp4", "deeper/b.mp4", ".thumbnails/a.mp4"):
        (videos / name).write_bytes(b"video")
    (videos / "again").symlink_to(".")
    (videos / "deeper" / "up").symlink_to("..")
    (videos / "me.mp4").symlink_to("me.mp4")
    assert [name for _, name in _find_inputs([videos], tmp_path / "out")] == ["a", "deeper-b"]


@pytest.mark.parametrize("name", ["a\x1b]0;title\x07.jpg", "a\r\nerror: b.jpg", "a\u202egpj.jpg"])
def test_file_name_cannot_control_the_terminal(name: str, good: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no picture")
    ended = run("reenact", tmp_path / name, good.motion, "-o", tmp_path / "out.mp4", "--weights", good.weights)
    assert ended.exit_code == 2
    assert ended.stderr.removesuffix("\n").isprintable(), ended.stderr


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1+1", "@SUM(A1)", "\tx", "plain"])
def test_clip_name_is_not_a_spreadsheet_formula(name: str, tmp_path: Path) -> None:
    """Clip names come from other people's data sets, and scores.csv is opened in spreadsheets."""
    row = {"case": name, "method": "export3d", "frames": 1, **dict.fromkeys(METRICS)}
    result = Evaluation(
        dataset=tmp_path, protocol="self-reenactment", cases=1, frames=1, skipped=(), device="cpu", seconds=1.0,
        options=EvaluateOptions(), quality="balanced", clips=[row], mean={}, interval={},
    )  # fmt: skip
    write_report(result, tmp_path)
    with (tmp_path / "scores.csv").open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert read["case"] == (name if name == "plain" else f"'{name}")


def test_reenact_opens_no_connection_and_no_secret_file(good: SimpleNamespace, tmp_path: Path) -> None:
    """No host name is resolved, ffmpeg may read only files and pipes, and `.env` is not opened."""
    for name in (".env", ".netrc", ".git-credentials"):
        (tmp_path / name).write_text(f"HF_TOKEN={TOKEN}\n")
    args = ["reenact", good.source, good.clip, "-o", tmp_path / "out.mp4", *SMALL, "--max-frames", "2"]
    done, events = run_audited(tmp_path, *args, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line for line in events if line.startswith("socket.")] == []
    opened = [Path(line[5:]).name for line in events if line.startswith("open ")]
    assert "source.jpg" in opened
    assert not set(opened) & {".env", ".netrc", ".git-credentials", "token", "stored_tokens"}
    runs = [line for line in events if line.startswith("run ")]
    assert all("-protocol_whitelist" in line or "pipe:0" in line for line in runs if " -i" in line or "'-i'" in line), (
        runs
    )


@pytest.mark.parametrize("more", [[], ["-v"]])
def test_token_is_never_printed_or_stored(more: list[str], tmp_path: Path) -> None:
    """The error of an unreachable hub (port 9), and its traceback, contain no token."""
    environment = {
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": f"http://user:{TOKEN}@127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done, _ = run_audited(tmp_path, *more, "weights", "download", "hf:someone/something", **environment)
    assert done.returncode == 4, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN not in path.read_text(errors="replace") for path in (tmp_path / "hf").rglob("*") if path.is_file())


def test_modified_weights_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from export3d_cli.core.runtime import weights

    folder = tmp_path / "weights"
    folder.mkdir()
    for path in weights.weights_dir().iterdir():
        (folder / path.name).symlink_to(path)
    changed = folder / "face_landmarker.task"
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.unlink()
    changed.write_bytes(data)
    monkeypatch.setattr(weights, "weights_dir", lambda: folder)
    result = CliRunner().invoke(cli, ["weights", "info", "face_landmarker"])
    assert result.exit_code == 4
    assert "damaged" in result.stderr
