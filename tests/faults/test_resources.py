"""Lack of disk space, permission, memory, ffmpeg, a home folder, open files, or a reader of stdout."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from faultkit import CommandResult, check_error, command_line, limit_resource, list_names
from faultkit import run as run_here

from export3d_cli.core.media.probe import ffmpeg_path, probe
from export3d_cli.core.media.reader import VideoReader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and capabilities as Linux has them")
SMALL = ("--device", "cpu", "--precision", "fp32", "--batch", "2")
ROOT = Path(__file__).resolve().parents[2]


def reenact(good: SimpleNamespace, out: Path, *more: object) -> list[object]:
    return ["reenact", good.source, good.clip, "-o", out, "--weights", good.weights, *SMALL, *more]


def run(args: list[object], **more: object) -> subprocess.CompletedProcess[str]:
    """Run `export3d ARGS` in a subprocess."""
    options: dict[str, object] = {"capture_output": True, "text": True, "timeout": 900, "check": False} | more
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("environment", {})}  # type: ignore[dict-item]
    return subprocess.run(command_line(*args), env=environment, **options)  # type: ignore[call-overload, no-any-return]


def check_failure(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Check for this exit code and one line on stderr with these words."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def without_privileges() -> None:
    """Drop the capabilities by which root bypasses file permissions."""
    for capability in (1, 2, 3):  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def script(path: Path, text: str) -> dict[str, str]:
    """Write a fake ffmpeg; return the environment variable that selects it."""
    path.write_text(f"#!{sys.executable}\nimport os, signal, subprocess, sys\nreal = {ffmpeg_path()!r}\n{text}")
    path.chmod(0o755)
    return {"IMAGEIO_FFMPEG_EXE": str(path)}


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (lambda good, out: reenact(good, out / "out.mp4", "--compare", "--crf", "0"), "out.mp4"),
        (lambda good, out: ["train", "--config", good.config, f"run={out}", f"data.path=[{good.data}]"], ""),
    ],
    ids=["reenact", "train"],
)
def test_full_disk(
    args: Callable[[SimpleNamespace, Path], list[object]], name: str, good: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if name:
        (out / name).write_bytes(b"the one before")
    more = ["--overwrite"] if name == "out.mp4" else []
    done = run([*args(good, out), *more], preexec_fn=limit_resource(resource.RLIMIT_FSIZE, 8_000))
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    if name:
        assert list_names(out) == [name]
        assert (out / name).read_bytes() == b"the one before"
    assert not list(out.rglob("*.part*"))


def test_full_standard_output(good: SimpleNamespace, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run(
            reenact(good, tmp_path / "out.mp4", "--json"), capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    check_failure(done, 1, "No space left")
    assert len(list(VideoReader(tmp_path / "out.mp4"))) == 8


def test_closed_output_pipes(good: SimpleNamespace, tmp_path: Path) -> None:
    """Without stdout and stderr, the output is complete."""

    def close() -> None:
        os.close(1)
        os.close(2)

    done = run(reenact(good, tmp_path / "b.mp4", "--json"), capture_output=False, preexec_fn=close)
    assert done.returncode in (0, 1)
    assert list_names(tmp_path) == ["b.mp4"]
    assert len(list(VideoReader(tmp_path / "b.mp4"))) == 8


def test_no_permission(good: SimpleNamespace, tmp_path: Path) -> None:
    locked, secret = tmp_path / "locked", tmp_path / "secret.jpg"
    locked.mkdir()
    locked.chmod(0o555)
    secret.write_bytes(good.source.read_bytes())
    secret.chmod(0)
    check_failure(run(reenact(good, locked / "new" / "out.mp4"), preexec_fn=without_privileges), 2, "locked")
    args = ["train", "--config", good.config, f"run={locked / 'run'}", f"data.path=[{good.data}]"]
    check_failure(run(args, preexec_fn=without_privileges), 2, "locked")
    args = reenact(good, tmp_path / "out.mp4")
    done = run(["reenact", secret, *args[2:]], preexec_fn=without_privileges)
    assert done.returncode == 2
    assert "secret.jpg" in done.stderr
    assert "Traceback" not in done.stderr
    assert list_names(locked) == []
    assert not (tmp_path / "out.mp4").exists()
    locked.chmod(0o755)


@pytest.mark.parametrize("name", ["a file", "a folder"])
def test_output_path_is_taken(name: str, good: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"") if name == "a file" else (tmp_path / "taken.mp4").mkdir()
    out = tmp_path / ("taken/out.mp4" if name == "a file" else "taken.mp4")
    before = list_names(tmp_path)
    more = ["--overwrite"] if name == "a folder" else []
    check_error(run_here(*reenact(good, out, *more)), {0} if more else {2})  # the folder takes a file
    assert list_names(tmp_path) == before


@pytest.mark.parametrize("megabytes", [300, 1400])
def test_little_memory(megabytes: int, good: SimpleNamespace, tmp_path: Path) -> None:
    done = run(reenact(good, tmp_path / "out.mp4"), preexec_fn=limit_resource(resource.RLIMIT_AS, megabytes << 20))
    if done.returncode == 0:
        assert len(list(VideoReader(tmp_path / "out.mp4"))) == 8
    else:
        assert list_names(tmp_path) == []
        assert done.returncode in (1, -6, -11), done.stderr  # a library may abort
        assert "Traceback" not in done.stderr, done.stderr


def test_few_open_files(good: SimpleNamespace, tmp_path: Path) -> None:
    seen = set()
    for count in (10, 20):
        done = run(reenact(good, tmp_path / "out.mp4"), preexec_fn=limit_resource(resource.RLIMIT_NOFILE, count))
        seen.add(done.returncode)
        assert done.returncode in (0, 1, 2, 4), done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        assert list_names(tmp_path) in ([], ["out.mp4"])
        (tmp_path / "out.mp4").unlink(missing_ok=True)
    assert seen & {1, 2, 4}


def run_with_ffmpeg(program: Path, args: list[object], monkeypatch: pytest.MonkeyPatch) -> CommandResult:
    """Run `export3d ARGS` in this process with another ffmpeg."""
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    return run_here(*args)


@pytest.mark.parametrize("kind", ["missing", "folder", "no program", "fails"])
def test_no_ffmpeg(kind: str, good: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "ffmpeg"
    if kind == "folder":
        fake.mkdir()
    elif kind == "no program":
        fake.write_bytes(b"\0\1\2")
        fake.chmod(0o755)
    elif kind == "fails":
        script(fake, "sys.exit(3)")
    ended = run_with_ffmpeg(fake, reenact(good, tmp_path / "out.mp4"), monkeypatch)
    check_error(ended, {1})
    assert "ffmpeg" in ended.stderr
    assert not (tmp_path / "out.mp4").exists()


READING = "'rawvideo' in sys.argv[-4:] and 'pipe:1' in sys.argv"
WRITING = "'pipe:0' in sys.argv"


@pytest.mark.parametrize(
    ("when", "how"),
    [
        (READING, "got = subprocess.run([real, *sys.argv[1:]], stdout=-1).stdout; os.write(1, got[:500000]); "
         "os.kill(os.getpid(), signal.SIGKILL)"),
        (READING, "sys.exit('disk on fire')"),
        (WRITING, "sys.stdin.buffer.read(20000); os.kill(os.getpid(), signal.SIGSEGV)"),
        (WRITING, "sys.stdin.buffer.read(); sys.exit('no encoder')"),
    ],
    ids=["reader killed", "reader fails", "writer crashes", "writer fails"],
)  # fmt: skip
def test_failing_ffmpeg_fails_command(
    when: str, how: str, good: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "ffmpeg", f"if {when}:\n    {how}\nos.execv(real, [real, *sys.argv[1:]])\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "out.mp4").write_bytes(b"the one before")
    ended = run_with_ffmpeg(tmp_path / "ffmpeg", reenact(good, out / "out.mp4", "--overwrite"), monkeypatch)
    check_error(ended, {1, 2})
    assert list_names(out) == ["out.mp4"]
    assert (out / "out.mp4").read_bytes() == b"the one before"


def test_sound_that_cannot_be_added_leaves_picture_and_note(
    good: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = "if '1:a:0' in sys.argv:\n    sys.exit('no room')\nos.execv(real, [real, *sys.argv[1:]])\n"
    script(tmp_path / "ffmpeg", fake)
    out = tmp_path / "out" / "out.mp4"
    ended = run_with_ffmpeg(tmp_path / "ffmpeg", reenact(good, out), monkeypatch)
    assert ended.exit_code == 0, ended.stderr
    assert "out.mp4 is silent, because adding the sound of" in ended.stderr
    assert "no room" in ended.stderr
    assert list_names(out.parent) == ["out.mp4"]
    assert (probe(out).frame_count, probe(out).has_audio) == (8, False)


def test_no_home_no_cache_no_temporary_folder(good: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    nowhere = str(tmp_path / "file" / "nowhere")  # where even root cannot create a folder
    names = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")
    other = tmp_path / "other.jpg"
    other.write_bytes(good.source.read_bytes())
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "LD_LIBRARY_PATH")}
    environment |= {"PYTHONPATH": str(ROOT), **dict.fromkeys(names, nowhere)}
    out = tmp_path / "out"
    args = ["reenact", good.source, other, good.clip, "-o", out / "{src}.mp4", "--weights", good.weights, *SMALL]
    done = subprocess.run(command_line(*args), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list_names(out) == ["other.mp4", "source.mp4"]
