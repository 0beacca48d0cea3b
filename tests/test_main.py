"""The `export3d` group: start-up, help, version, global options, errors and exit codes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from export3d_cli import __version__, examples
from export3d_cli.core.runtime import errors
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import _InterruptHandler, cli

HEAVY_MODULES = ("torch", "cv2", "ai_edge_litert", "numba", "scipy", "numpy", "rich", "huggingface_hub")
COMMANDS = tuple(examples.COMMANDS)


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def make_weights_list_raise(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raise_error() -> None:
        raise error

    monkeypatch.setattr("export3d_cli.core.weights_manifest", raise_error, raising=False)


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_help_imports_no_heavy_module_and_openmp_threads_do_not_spin(given: str | None, expected: str) -> None:
    """The wait policy is set before torch is imported, unless the user has set one."""
    code = (
        "import os, sys\nfrom export3d_cli.main import main\n"
        f"for args in [[], *([name] for name in {COMMANDS})]:\n"
        "    sys.argv = ['export3d', *args, '--help']\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert not end.code\n"
        f"print([name for name in {HEAVY_MODULES} if name in sys.modules], file=sys.stderr)\n"
        "print(os.environ['OMP_WAIT_POLICY'], file=sys.stderr)"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.split("\n") == ["[]", expected, ""]
    assert done.stdout.count("Usage: export3d") == 1 + len(COMMANDS)


def test_version_lists_everything_results_depend_on() -> None:
    versions = dict(line.split(maxsplit=1) for line in run("--version").stdout.splitlines())
    assert versions["export3d"] == __version__
    assert set(versions) == {"export3d", "python", "torch", "cuda", "ffmpeg"}
    assert "missing" not in versions.values()


def test_no_arguments_print_the_overview() -> None:
    result = run()
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout
    assert "export3d reenact src.jpg drive.mp4 -o out.mp4" in result.stdout


def command_names(command: click.Command, name: str = "") -> Iterator[str]:
    """Yield the full name of every command and subcommand."""
    context = click.Context(command)
    for subname in command.list_commands(context) if isinstance(command, click.Group) else ():
        subcommand = command.get_command(context, subname)  # type: ignore[union-attr]
        assert subcommand is not None
        yield from command_names(subcommand, f"{name} {subname}".strip())
    if name:
        yield name


@pytest.mark.parametrize("name", list(command_names(cli)))
def test_help_ends_with_two_valid_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    help_text = run(*name.split(), "--help").stdout
    lines = help_text.rpartition("Examples:\n")[2].splitlines()
    assert [line.strip() for line in lines] == [f"export3d {line}" for line in examples.EXAMPLES[name]]
    monkeypatch.chdir(tmp_path)
    files = "src.jpg clip.mp4 drive.mp4 config.yaml my.safetensors out.mp4 picture.png speech.txt speech.wav"
    for file in files.split():
        (tmp_path / file).touch()
    for folder in ("videos", "data"):
        (tmp_path / folder).mkdir()
    for line in examples.EXAMPLES[name]:
        command: click.Command = cli
        words, parent = shlex.split(line), click.Context(cli)
        while isinstance(command, click.Group):
            parent = click.Context(command, parent=parent)
            subcommand = command.get_command(parent, words.pop(0))
            assert subcommand is not None
            command = subcommand
        command.make_context(name, words, parent=parent)  # raises on misuse


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.Export3DError("it failed"), 1),
        (errors.MediaError("it failed"), 1),
        (errors.TrainingError("it failed"), 1),
        (errors.InputError("it failed"), 2),
        (errors.ConfigError("it failed"), 2),
        (errors.NoFaceError("it failed"), 3),
        (errors.WeightsError("it failed"), 4),
    ],
)
def test_errors_are_one_line_and_an_exit_code(monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    make_weights_list_raise(monkeypatch, error)
    result = run("weights", "list")
    assert result.exit_code == code
    assert result.stderr == "error: it failed\n"
    assert result.stdout == ""
    for args in (["-v", "weights", "list"], ["weights", "-v", "list"], ["weights", "list", "-v"]):
        verbose = run(*args)
        assert verbose.exit_code == code
        assert "Traceback" in verbose.stderr
        assert verbose.stderr.endswith("error: it failed\n")


def test_quiet_works_before_and_after_the_command(tmp_path: Path) -> None:
    args = ["preprocess", example_path("drive.mp4"), "--max-frames", 2, "-o"]
    assert run(*args, tmp_path / "a.motion.npz").output
    for name, quiet_args in (("b", ["-q", *args]), ("c", ["preprocess", "-q", *args[1:]])):
        quiet = run(*quiet_args, tmp_path / f"{name}.motion.npz")
        assert (quiet.exit_code, quiet.output) == (0, "")
        assert (tmp_path / f"{name}.motion.npz").exists()


def test_error_after_ctrl_c_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_InterruptHandler, "received", True)
    make_weights_list_raise(monkeypatch, errors.MediaError("ffmpeg was ended by signal 2"))
    result = run("weights", "list")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_ctrl_c_inside_a_finaliser_is_raised_again() -> None:
    code = """
import signal, time
from export3d_cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT

class Slow:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)

def job(**_):
    Slow()
    time.sleep(20)

main.cli = job
try:
    main.main()
except KeyboardInterrupt:
    print("again")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=18)
    assert (done.stdout, done.stderr) == ("again\n", "")


def test_keyboard_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    make_weights_list_raise(monkeypatch, KeyboardInterrupt())
    assert run("weights", "list").exit_code == 130


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    make_weights_list_raise(monkeypatch, ZeroDivisionError("ours"))
    assert isinstance(run("weights", "list").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["reenact"],
        ["reenact", "nowhere.jpg", "nowhere.mp4", "-o", "out.mp4"],
        ["reenact", __file__, __file__],
        ["reenact", __file__, __file__, "-o", "out.mp4", "--device", "tpu"],
        ["reenact", __file__, __file__, "-o", "out.mp4", "--fps", "0"],
        ["reenact", __file__, __file__, "-o", "out.mp4", "--audio", "nowhere.wav"],
        ["reenact", __file__, __file__, "-o", "out.mp4", "--start", "-1"],
        ["novel-view", "--yaw", "a:b"],
        ["edit-basis", "--v", "0", "--scale", "1:2"],
        ["edit-basis", "--v", "1", "--v", "2", "--scale", "1:2"],
        ["preprocess", "nowhere", "-o", "out"],
        ["train"],
    ],
)
def test_misuse_exits_2_and_points_to_help(args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("--help`\n")


def test_audio_file_without_sound_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "text.mp3").write_text("hello")
    result = run("reenact", __file__, __file__, "-o", str(tmp_path / "out.mp4"), "--audio", str(tmp_path / "text.mp3"))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.endswith("text.mp3 has no sound: give an audio file or a video with sound\n")


def test_weights_list() -> None:
    rows = json.loads(run("weights", "list", "--json").stdout)
    assert {"name", "file", "sha256", "size", "licence", "source", "what"} == set(rows[0])
    assert "Apache-2.0" in run("weights", "list").stdout
