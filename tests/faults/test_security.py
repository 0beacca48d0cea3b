"""What a stranger's file, name or setting cannot do; and that nothing leaves the machine."""

from __future__ import annotations

import ast
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
from faultkit import command, run
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

# In the process that runs the command: everything it opens and whoever it wants to reach is written down.
WATCH = """
import sys
seen = open(sys.argv.pop(1), "w", encoding="utf-8", errors="replace")
def watch(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        seen.write(f"{event} {args[1:]}\\n")
    elif event == "open":
        seen.write(f"open {args[0]}\\n")
    elif event == "subprocess.Popen":
        seen.write(f"run {args[1]}\\n")
    seen.flush()
sys.addaudithook(watch)
from export3d_cli.main import main
main()
"""


def watched(folder: Path, *args: object, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A command, and what it opened, started and wanted to reach."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = [sys.executable, "-c", WATCH, str(folder / "seen"), *map(str, args)]
    done = subprocess.run(line, cwd=folder, env=known, capture_output=True, text=True, check=False)
    return done, (folder / "seen").read_text(encoding="utf-8").splitlines()


def nodes(kind: type[ast.AST]) -> list[tuple[str, ast.AST]]:
    return [
        (f"{path.name}:{node.lineno}", node)  # type: ignore[attr-defined]
        for path in (ROOT / "export3d_cli").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kind)
    ]


def test_nothing_in_our_code_runs_what_it_reads() -> None:
    """No eval, no shell, no pickle by a back door; YAML is safe_load, torch.load takes weights only."""
    for where, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        name = ast.unparse(node.func)
        if "(" in name:  # what a call gives is another matter
            continue
        keywords = {key.arg: key.value for key in node.keywords}
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "__import__", "pickle.loads"}, where
        assert not name.startswith(("os.spawn", "os.exec", "subprocess.getoutput", "subprocess.getstatusoutput")), where
        if name.startswith("yaml."):
            assert name in {"yaml.safe_load", "yaml.safe_dump"}, where
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True", where
        if name in {"np.load", "numpy.load"}:
            allowed = keywords.get("allow_pickle")
            assert allowed is None or ast.unparse(allowed) == "False", where
        if name.startswith("subprocess."):
            assert "shell" not in keywords, where
            assert not isinstance(node.args[0], (ast.Constant, ast.JoinedStr)), where
        if name.endswith(("tempfile.mktemp", "extractall", "extract")):
            raise AssertionError(where)


@settings(max_examples=150, deadline=None)
@given(
    source=NAMES,
    driver=NAMES,
    template=st.sampled_from(["{src}.mp4", "{drive}.mp4", "{src}-{drive}.mp4", "x/{src}/{drive}.mp4"]),
)
def test_a_template_stays_in_its_folder(source: str, driver: str, template: str) -> None:
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
def test_a_template_is_no_format_string(template: str, good: SimpleNamespace, tmp_path: Path) -> None:
    ended = run("reenact", good.source, good.motion, "-o", tmp_path / template, "--weights", good.weights)
    assert ended.code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.mp4", "/etc/passwd", "clips/../../outside.mp4"])
def test_a_data_set_names_only_its_own_files(name: str, good: SimpleNamespace, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.jsonl").write_text(json.dumps({"id": "a", "file": name, "motion": "clips/a.motion.npz"}) + "\n")
    ended = run("train", "--config", good.config, f"data.path=[{data}]", f"run={tmp_path / 'run'}")
    assert ended.code == 2
    assert "inside the data set" in ended.err


def test_a_link_is_replaced_not_followed(good: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / "out.mp4").symlink_to("precious")
    args = ["reenact", good.source, good.motion, "-o", tmp_path / "out.mp4", "--weights", good.weights, *SMALL]
    assert run(*args).code == 2
    assert run(*args, "--overwrite").code == 0
    assert (tmp_path / "precious").read_bytes() == b"mine"
    assert not (tmp_path / "out.mp4").is_symlink()


def test_links_in_circles_end_and_hidden_folders_stay_closed(tmp_path: Path) -> None:
    """A folder that holds itself, twice; what is found there is the two videos, once each."""
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
def test_a_name_does_nothing_to_the_terminal(name: str, good: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no picture")
    ended = run("reenact", tmp_path / name, good.motion, "-o", tmp_path / "out.mp4", "--weights", good.weights)
    assert ended.code == 2
    assert ended.err.removesuffix("\n").isprintable(), ended.err


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1+1", "@SUM(A1)", "\tx", "plain"])
def test_a_name_is_no_formula(name: str, tmp_path: Path) -> None:
    """Names of clips come from data sets of others, and people open tables in spreadsheets."""
    row = {"case": name, "method": "export3d", "frames": 1, **dict.fromkeys(METRICS)}
    result = Evaluation(
        dataset=tmp_path, protocol="self", cases=1, frames=1, device="cpu", seconds=1.0, options=EvaluateOptions(),
        clips=[row], mean={}, interval={}, views=[],
    )  # fmt: skip
    write_report(result, {}, tmp_path)
    with (tmp_path / "scores.csv").open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert read["case"] == (name if name == "plain" else f"'{name}")


def test_offline_nothing_is_reached_and_no_secret_is_read(good: SimpleNamespace, tmp_path: Path) -> None:
    """Not even the name of a host is looked up; ffmpeg is told to read files and pipes alone; `.env` stays closed."""
    for name in (".env", ".netrc", ".git-credentials"):
        (tmp_path / name).write_text(f"HF_TOKEN={TOKEN}\n")
    args = ["reenact", good.source, good.clip, "-o", tmp_path / "out.mp4", *SMALL, "--max-frames", "2"]
    done, seen = watched(tmp_path, *args, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line for line in seen if line.startswith("socket.")] == []
    opened = [Path(line[5:]).name for line in seen if line.startswith("open ")]
    assert "source.jpg" in opened
    assert not set(opened) & {".env", ".netrc", ".git-credentials", "token", "stored_tokens"}
    runs = [line for line in seen if line.startswith("run ")]
    assert all("-protocol_whitelist" in line or "pipe:0" in line for line in runs if " -i" in line or "'-i'" in line), (
        runs
    )


def test_the_result_needs_no_network(good: SimpleNamespace, tmp_path: Path) -> None:
    """The same bytes in a namespace that has no network at all, ffmpeg included."""
    alone = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, prefix in (("a.mp4", []), ("b.mp4", alone)):
        args = command("reenact", good.source, good.clip, "-o", tmp_path / name, "--weights", good.weights, *SMALL)
        subprocess.run([*prefix, *args], env=environment, check=True, capture_output=True)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("more", [[], ["-v"]])
def test_a_token_is_never_shown(more: list[str], tmp_path: Path) -> None:
    """The hub cannot be reached (nobody listens at port 9): the error, with its traceback too, holds no secret."""
    environment = {
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": f"http://user:{TOKEN}@127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done, _ = watched(tmp_path, *more, "weights", "download", "hf:someone/something", **environment)
    assert done.returncode == 4, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN not in path.read_text(errors="replace") for path in (tmp_path / "hf").rglob("*") if path.is_file())


def test_a_file_of_the_manifest_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    result = CliRunner().invoke(cli, ["weights", "verify", "face_landmarker"])
    assert result.exit_code == 4
    assert "damaged" in result.stderr
