"""`export3d train --config FILE`: contrastive pre-training, then reconstruction."""

from __future__ import annotations

from pathlib import Path

import click

from export3d_cli import console, options


@click.command()
@click.option("--config", type=options.EXISTING_FILE, required=True, help="YAML file; see examples/configs.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), help="Save and stop after this long.")
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop.")
@options.json_option
def train(config: Path, overrides: tuple[str, ...], max_minutes: float | None, dry_run: bool, as_json: bool) -> None:
    """Train a model on data sets written by `preprocess`; KEY=VALUE replaces keys of the file (`loss.l1=1`).

    The same command again goes on where the run stopped.
    """
    from export3d_cli import core

    if max_minutes is not None:
        overrides = (*overrides, f"max_minutes={max_minutes}")
    resolved = core.load_train_config(config, overrides)
    if dry_run:
        import yaml

        click.echo(yaml.safe_dump(core.to_dict(resolved), sort_keys=False), nl=False)
        return
    with console.progress() as report:
        summary = core.train_model(resolved, progress=lambda event: console.training(report, event))
    console.finish(summary, as_json=as_json)
