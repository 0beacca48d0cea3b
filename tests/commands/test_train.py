"""`export3d train --dry-run`: a configuration that can be read again, with its costs as comments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from export3d_cli import console
from export3d_cli.core.config.schema import load_train_config
from export3d_cli.core.train.training_run import TrainEvent
from export3d_cli.main import cli


def test_dry_run_tells_sizes_and_costs(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("preset: tiny\nbatch: 4\nstages: [reconstruction, adversarial]\n")
    told = CliRunner().invoke(cli, ["train", "--config", str(config), "--skip-nonfinite", "3", "--dry-run"])
    assert told.exit_code == 0, told.output
    for words in ("# parameters of generator: ", "# parameters of discriminator: ", "GFLOPs", "MiB"):
        assert words in told.stdout
    again = tmp_path / "again.yaml"
    again.write_text(told.stdout)
    assert load_train_config(again).skip_nonfinite == 3
    plain = CliRunner().invoke(cli, ["train", "--config", str(config), "--dry-run", "--json"])
    assert json.loads(plain.stdout)["plan"]["gflops_frame"] > 0


def test_dry_run_applies_overrides_and_names_unknown_keys(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("preset: tiny\nbatch: 3\n")
    command = ["train", "--config", str(config), "--dry-run"]
    resolved = CliRunner().invoke(cli, [*command, "loss.l1=0.5", "--max-minutes", "2"])
    for line in ("preset: tiny", "batch: 3", "l1: 0.5", "max_minutes: 2.0"):
        assert line in resolved.stdout
    unknown = CliRunner().invoke(cli, [*command, "bach=3"])
    assert unknown.exit_code == 2
    assert "did you mean 'batch'" in unknown.stderr


def test_wrong_choices_are_named(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("preset: tiny\n")
    told = CliRunner().invoke(cli, ["train", "--config", str(config), "model.conditioning=film", "--dry-run"])
    assert told.exit_code == 2
    assert "eadaln, cross_attention" in told.stderr


def event(stage: str, step: int, message: str = "", **values: float) -> TrainEvent:
    seconds_left = 90.4 if values else None
    return TrainEvent(stage, step, 400 if step else 0, values, message, seconds_left)


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.show_training() as show:
        show(event("data", 0, message="clips decoded"))
        show(event("reconstruction", 10, loss=0.5, lr=1e-4, images_a_second=3.25, seconds_a_step=1.0))
        show(event("reconstruction", 20, loss=0.4, images_a_second=3.0))  # too soon after the first to be told
        show(event("reconstruction", 400, loss=0.3, images_a_second=3.0))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "clips decoded",
        "reconstruction 10/400, 3.2 images/s, 0:01:30 left, loss 0.5",
        "reconstruction 400/400, 3.0 images/s, loss 0.3",
    ]


def test_table_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "120")
    with console.show_training() as show:
        show(event("data", 0, message="[clips] decoded"))
        show(event("clebs", 10, contrast=3.1, images_a_second=40.0))
        show(event("reconstruction", 20, loss=0.25, images_a_second=12.0))
    told = capsys.readouterr().err
    assert "[clips] decoded" in told
    last = told[told.rindex("losses") :].splitlines()
    cells = [line.replace("│", " ").split() for line in last]
    assert ["clebs", "10/400", "40.0", "0:01:30", "contrast", "3.1"] in cells
    assert ["reconstruction", "20/400", "12.0", "0:01:30", "loss", "0.25"] in cells


def test_quiet_tells_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "current_settings", lambda: console.Settings(quiet=True))
    with console.show_training() as show:
        show(event("reconstruction", 20, message="words", loss=0.4))
    assert capsys.readouterr().err == ""
