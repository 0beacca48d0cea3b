import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from export3d_cli import __version__, examples, options
from export3d_cli.core.runtime import errors
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import _InterruptHandler, cli

HEAVY = ("torch", "cv2", "ai_edge_litert", "numba", "scipy", "numpy", "rich", "huggingface_hub")
COMMANDS = tuple(examples.COMMANDS)


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def failing(monkeypatch, error):
    """Make `weights list` raise."""

    def manifest():
        raise error

    monkeypatch.setattr("export3d_cli.core.weights_manifest", manifest, raising=False)


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys\nfrom export3d_cli.main import main\nsys.argv = ['export3d', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage: export3d" in done.stdout


def test_help_is_quick():
    """In seconds of processor time, which others at work on the machine do not change."""

    def spent(*args):
        before = os.times()
        subprocess.run([sys.executable, *args], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(spent("-m", "export3d_cli", "--help") for _ in range(3)) < 0.3


def test_version_tells_what_results_depend_on():
    told = dict(line.split(maxsplit=1) for line in run("--version").stdout.splitlines())
    assert told["export3d"] == __version__
    assert set(told) == {"export3d", "python", "torch", "cuda", "ffmpeg"}
    assert "missing" not in told.values()


def test_alone_it_shows_where_to_start():
    result = run()
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout
    assert "export3d reenact src.jpg drive.mp4 -o out.mp4" in result.stdout


def everything(command, name=""):
    """Every command with its full name."""
    context = click.Context(command)
    for below in command.list_commands(context) if isinstance(command, click.Group) else ():
        yield from everything(command.get_command(context, below), f"{name} {below}".strip())
    if name:
        yield name


@pytest.mark.parametrize("name", list(everything(cli)))
def test_every_help_ends_with_two_examples_that_are_valid(name, tmp_path, monkeypatch):
    help_text = run(*name.split(), "--help").stdout
    lines = help_text.rpartition("Examples:\n")[2].splitlines()
    assert [line.strip() for line in lines] == [f"export3d {line}" for line in examples.EXAMPLES[name]]
    monkeypatch.chdir(tmp_path)
    for file in ("src.jpg", "drive.mp4", "config.yaml", "my.safetensors", "out.mp4", "picture.png"):
        (tmp_path / file).touch()
    for folder in ("videos", "data"):
        (tmp_path / folder).mkdir()
    for line in examples.EXAMPLES[name]:
        command, words, parent = cli, line.split(), click.Context(cli)
        while isinstance(command, click.Group):
            parent = click.Context(command, parent=parent)
            command = command.get_command(parent, words.pop(0))
        command.make_context(name, words, parent=parent)  # raises what is misused


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_with_its_options(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


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
def test_errors_are_one_line_and_an_exit_code(monkeypatch, error, code):
    failing(monkeypatch, error)
    result = run("weights", "list")
    assert result.exit_code == code
    assert result.stderr == "error: it failed\n"
    assert result.stdout == ""
    for where in (["-v", "weights", "list"], ["weights", "-v", "list"], ["weights", "list", "-v"]):
        loud = run(*where)
        assert loud.exit_code == code
        assert "Traceback" in loud.stderr
        assert loud.stderr.endswith("error: it failed\n")


def test_quiet_is_taken_before_and_behind_a_command(tmp_path):
    track = ["preprocess", example_path("drive.mp4"), "--max-frames", 2, "-o"]
    assert run(*track, tmp_path / "a.motion.npz").output
    for name, where in (("b", ["-q", *track]), ("c", ["preprocess", "-q", *track[1:]])):
        quiet = run(*where, tmp_path / f"{name}.motion.npz")
        assert (quiet.exit_code, quiet.output) == (0, "")
        assert (tmp_path / f"{name}.motion.npz").exists()


def test_an_error_after_ctrl_c_is_an_interruption(monkeypatch):
    monkeypatch.setattr(_InterruptHandler, "received", True)
    failing(monkeypatch, errors.MediaError("ffmpeg was ended by signal 2"))
    result = run("weights", "list")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_ctrl_c_in_a_finaliser_comes_again():
    code = """
import signal, time
from export3d_cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored

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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("again\n", "")


def test_interruption_is_130(monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    assert run("weights", "list").exit_code == 130


def test_a_defect_keeps_its_traceback(monkeypatch):
    failing(monkeypatch, ZeroDivisionError("ours"))
    result = run("weights", "list")
    assert isinstance(result.exception, ZeroDivisionError)


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
        ["novel-view", "--yaw", "1:2:3"],
        ["novel-view", "--yaw", "nan:inf"],
        ["edit-basis", "--v", "0", "--scale", "1:2"],
        ["edit-basis", "--v", "1", "--v", "2", "--scale", "1:2"],
        ["preprocess", "nowhere", "-o", "out"],
        ["train"],
        ["weights", "verify", "nonsense"],
    ],
)
def test_misuse_is_2_and_says_why(args):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("--help`\n")  # where to read on


def test_ranges_and_rates():
    assert options.NumberRange().convert("-30:30", None, None) == (-30.0, 30.0)
    assert options.NumberRange().convert("4", None, None) == (4.0, 4.0)
    rates = {"25": "25", "29.97": "30000/1001", "23.976": "24000/1001", "30000/1001": "30000/1001", "12.5": "25/2"}
    for text, rate in rates.items():
        assert str(options.FrameRate().convert(text, None, None)) == rate
    with pytest.raises(click.BadParameter):
        options.FrameRate().convert("1/0", None, None)


def test_weights_list_and_verify():
    rows = json.loads(run("weights", "list", "--json").stdout)
    assert {"name", "file", "sha256", "size", "licence", "source", "what"} == set(rows[0])
    assert "Apache-2.0" in run("weights", "list").stdout
    assert "face_landmarker: OK" in run("weights", "verify", "face_landmarker").stdout


def test_train_dry_run_prints_the_resolved_configuration(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("preset: tiny\nbatch: 3\n")
    result = run("train", "--config", config, "loss.l1=0.5", "--max-minutes", "2", "--dry-run")
    assert result.exit_code == 0
    for line in ("preset: tiny", "batch: 3", "l1: 0.5", "max_minutes: 2.0"):
        assert line in result.stdout
    wrong = run("train", "--config", config, "bach=3", "--dry-run")
    assert wrong.exit_code == 2
    assert "did you mean 'batch'" in wrong.stderr
