"""`export3d train --config FILE`: train a model on datasets written by `preprocess`."""

import os
from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


@click.command()
@click.option("--config", type=options.EXISTING_FILE, required=True, help="YAML file; see examples/configs.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--license", metavar="NAME",
              help="Licence of the trained weights (SPDX name, for example "
              "CC-BY-4.0), if the file has no key `license`.")  # fmt: skip
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), help="Save and stop after this time.")
@click.option("--skip-nonfinite", type=click.IntRange(0), metavar="N",
              help="Skip up to N consecutive steps with a "
              "non-finite loss instead of stopping at the first.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration, its size and cost, and stop.")
@options.json_option
def train(config: Path, overrides: tuple[str, ...], license: str | None, max_minutes: float | None,
          skip_nonfinite: int | None, dry_run: bool, as_json: bool) -> None:  # fmt: skip
    """Train a model on datasets written by `preprocess`; KEY=VALUE replaces keys of the file (`loss.l1=1`).

    The same command resumes a stopped run. Under torchrun, the processes share every batch.
    """
    given = (("license", license), ("max_minutes", max_minutes), ("skip_nonfinite", skip_nonfinite))
    overrides += tuple(f"{key}={value}" for key, value in given if value is not None)
    resolved = core.load_train_config(config, overrides)
    if dry_run:
        _print_plan(core.to_dict(resolved), core.to_dict(core.plan_training(resolved)), as_json=as_json)
        return
    summary = core.train_model(resolved, progress=console.training_log())
    if os.environ.get("RANK", "0") == "0":
        console.print_summary(summary, as_json=as_json)


def _print_plan(config: dict[str, Any], plan: dict[str, Any], *, as_json: bool) -> None:
    """Print the configuration as YAML, with its cost as comments: the output is a configuration file itself."""
    import yaml

    if as_json:
        console.print_json({"config": config, "plan": plan})
        return
    click.echo(yaml.safe_dump(config, sort_keys=False), nl=False)
    for name, count in plan["parameters"].items():
        click.echo(f"# parameters of {name}: {count:,}")
    click.echo(f"# parameters of the model: {plan['total_parameters']:,}")
    click.echo(f"# work per source: {plan['gflops_source']:.2f} GFLOPs, per frame: {plan['gflops_frame']:.2f} GFLOPs")
    click.echo(f"# memory, about: {plan['memory_mib']:.0f} MiB ({plan['weights_mib']:.0f} for weights and optimiser, "
               f"{plan['activations_mib_a_pair']:.0f} per pair of a batch, at fp32)")  # fmt: skip
