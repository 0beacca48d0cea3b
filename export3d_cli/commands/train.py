"""`export3d train --config FILE`: contrastive pre-training, reconstruction, and the stages around them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from export3d_cli import console, options


@click.command()
@click.option("--config", type=options.EXISTING_FILE, required=True, help="YAML file; see examples/configs.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), help="Save and stop after this long.")
@click.option(
    "--skip-nonfinite",
    type=click.IntRange(0),
    metavar="N",
    help="Leave out up to N steps in a row whose loss is no number, instead of stopping at the first.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration, its sizes and costs, and stop.")
@options.json_option
def train(
    config: Path,
    overrides: tuple[str, ...],
    max_minutes: float | None,
    skip_nonfinite: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a model on data sets written by `preprocess`; KEY=VALUE replaces keys of the file (`loss.l1=1`).

    The same command again goes on where the run stopped. Started by torchrun, its processes share every batch.
    """
    from export3d_cli import core

    for key, value in (("max_minutes", max_minutes), ("skip_nonfinite", skip_nonfinite)):
        if value is not None:
            overrides = (*overrides, f"{key}={value}")
    resolved = core.load_train_config(config, overrides)
    if dry_run:
        _print_plan(core.to_dict(resolved), core.to_dict(core.plan_training(resolved)), as_json=as_json)
        return
    with console.show_training() as show:
        summary = core.train_model(resolved, progress=show)
    if os.environ.get("RANK", "0") == "0":
        console.print_summary(summary, as_json=as_json)


def _print_plan(config: dict[str, Any], plan: dict[str, Any], *, as_json: bool) -> None:
    """The configuration as YAML, with what it costs as comments: the output is a configuration file itself."""
    import json

    import yaml

    if as_json:
        click.echo(json.dumps({"config": config, "plan": plan}))
        return
    click.echo(yaml.safe_dump(config, sort_keys=False), nl=False)
    for box, count in plan["parameters"].items():
        click.echo(f"# parameters of {box}: {count:,}, work for a frame: {plan['gflops'].get(box, 0.0):.3f} GFLOPs")
    click.echo(f"# parameters of the model: {plan['total_parameters']:,}")
    click.echo(
        f"# work for a source: {plan['gflops_source']:.2f} GFLOPs, for a frame: {plan['gflops_frame']:.2f} GFLOPs"
    )
    click.echo(
        f"# memory, about: {plan['memory_mib']:.0f} MiB ({plan['weights_mib']:.0f} for weights and their optimiser, "
        f"{plan['activations_mib_a_pair']:.0f} a pair of a batch, at fp32)"
    )
