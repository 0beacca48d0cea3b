import json
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from export3d_cli import __version__, options
from export3d_cli.core import errors
from export3d_cli.main import cli

HEAVY = ("torch", "cv2", "ai_edge_litert", "numba", "scipy", "numpy", "rich", "huggingface_hub")
COMMANDS = ("reenact", "novel-view", "edit-basis", "preprocess", "train", "evaluate", "weights")


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def failing(monkeypatch, error):
    """Make `weights list` raise."""

    def manifest():
        raise error

    monkeypatch.setattr("export3d_cli.core.manifest", manifest, raising=False)


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
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "export3d_cli", "--help"], capture_output=True, check=True)
        bare = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], capture_output=True, check=True)
        times.append(bare - start - (time.perf_counter() - bare))  # beyond what Python itself takes
    assert min(times) < 0.3


def test_version():
    assert __version__ in run("--version").output


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
    loud = run("-v", "weights", "list")
    assert loud.exit_code == code
    assert "Traceback" in loud.stderr
    assert loud.stderr.endswith("error: it failed\n")


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
    assert "Error" in result.stderr
    assert "Traceback" not in result.stderr


def test_ranges_and_rates():
    assert options.Range().convert("-30:30", None, None) == (-30.0, 30.0)
    assert options.Range().convert("4", None, None) == (4.0, 4.0)
    rates = {"25": "25", "29.97": "30000/1001", "23.976": "24000/1001", "30000/1001": "30000/1001", "12.5": "25/2"}
    for text, rate in rates.items():
        assert str(options.Rate().convert(text, None, None)) == rate
    with pytest.raises(click.BadParameter):
        options.Rate().convert("1/0", None, None)


def test_weights_list_and_verify():
    rows = json.loads(run("weights", "list", "--json").stdout)
    assert {"name", "file", "sha256", "size", "licence", "source", "what"} == set(rows[0])
    assert "Apache-2.0" in run("weights", "list").stdout
    assert "face_landmarker: as listed" in run("weights", "verify", "face_landmarker").stdout


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
