"""`export3d train --dry-run`: a configuration that can be read again, with its costs as comments."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from export3d_cli.core.config import load_train_config
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


def test_wrong_choices_are_named(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("preset: tiny\n")
    told = CliRunner().invoke(cli, ["train", "--config", str(config), "model.conditioning=film", "--dry-run"])
    assert told.exit_code == 2
    assert "eadaln, cross_attention" in told.stderr
