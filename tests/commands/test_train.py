"""`export3d train`: `--dry-run` prints a configuration that can be read again; progress lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from export3d_cli import console
from export3d_cli.core.config.loading import load_train_config
from export3d_cli.core.train.stage import TrainEvent
from export3d_cli.main import cli


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("preset: tiny\nbatch: 4\nstages: [reconstruction, adversarial]\n")
    return path


def test_dry_run_prints_sizes_costs_and_a_readable_config(config_file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["train", "--config", str(config_file), "--skip-nonfinite", "3", "--dry-run"])
    assert result.exit_code == 0, result.output
    for words in ("# parameters of generator: ", "# parameters of discriminator: ", "GFLOPs", "MiB"):
        assert words in result.stdout
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert load_train_config(printed).skip_nonfinite == 3
    as_json = CliRunner().invoke(cli, ["train", "--config", str(config_file), "--dry-run", "--json"])
    assert json.loads(as_json.stdout)["plan"]["gflops_frame"] > 0


def test_dry_run_applies_overrides(config_file: Path) -> None:
    args = ["loss.l1=0.5", "--max-minutes", "2", "--license", "CC-BY-4.0"]
    result = CliRunner().invoke(cli, ["train", "--config", str(config_file), "--dry-run", *args])
    for line in ("preset: tiny", "batch: 4", "l1: 0.5", "max_minutes: 2.0", "license: CC-BY-4.0"):
        assert line in result.stdout


def test_train_without_a_licence_exits_with_one_line(config_file: Path) -> None:
    result = CliRunner().invoke(cli, ["train", "--config", str(config_file)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: license is not set: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bach=3", "unknown key 'bach' in the configuration; did you mean 'batch'?"),
        ("model.conditioning=film", "model.conditioning must be one of eadaln, cross_attention, got 'film'"),
    ],
)
def test_wrong_override_exits_with_one_line(config_file: Path, override: str, message: str) -> None:
    result = CliRunner().invoke(cli, ["train", "--config", str(config_file), override, "--dry-run"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [f"error: {message}"]


def make_event(stage: str, step: int, message: str = "", **values: float) -> TrainEvent:
    seconds_left = 90.4 if values else None
    return TrainEvent(stage, step, 400 if step else 0, values, message, seconds_left)


def test_progress_prints_steps_at_intervals_unless_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [
        make_event("data", 0, message="clips decoded"),
        make_event("reconstruction", 10, loss=0.5, lr=1e-4, images_a_second=3.25, seconds_a_step=1.0),
        make_event("reconstruction", 20, loss=0.4, images_a_second=3.0),  # too soon after the first
        make_event("reconstruction", 400, loss=0.3, images_a_second=3.0),
    ]
    show = console.training_log()
    for event in events:
        show(event)
    assert capsys.readouterr() == (
        "",
        "clips decoded\nreconstruction 10/400, 3.2 images/s, 0:01:30 left, loss 0.5\n"
        "reconstruction 400/400, 3.0 images/s, loss 0.3\n",
    )
    monkeypatch.setattr(console, "is_quiet", lambda: True)
    console.training_log()(events[0])
    assert capsys.readouterr() == ("", "")
