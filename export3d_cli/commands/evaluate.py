"""`export3d evaluate DATASET`: how well the weights animate the faces of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from export3d_cli import console, options

if TYPE_CHECKING:
    from export3d_cli.core.evaluate import Evaluation

_DIGITS = {"psnr": 2, "akd478": 2, "akd68": 2, "yaw_error": 2, "pitch_error": 2}


@click.command()
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DATASET")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for tables, pictures.")
@click.option(
    "--max-frames", type=click.IntRange(0), default=50, show_default=True,
    help="Frames of each clip, spread evenly; 0: all.",
)  # fmt: skip
@click.option("--cross", is_flag=True, help="Let another person drive.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True, help="How many, with --cross.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Picks the pairs of --cross.")
@click.option("--identity", type=options.EXISTING_FILE, help="TorchScript face embedder, to measure identity.")
@options.model_options
@options.json_option
def evaluate(
    dataset: Path,
    output: Path | None,
    max_frames: int,
    cross: bool,
    pairs: int,
    seed: int,
    identity: Path | None,
    weights: str | None,
    device: str,
    precision: str,
    threads: int,
    as_json: bool,
) -> None:
    """Score self-reenactment on DATASET, a folder written by `preprocess`, beside two methods without a network.

    The most frontal frame of each clip is animated by the clip. `flow` warps it by the basis flow alone, `repeat` shows
    it as it is. Distances are in pixels of a 256 image, angles in degrees; jaw, blink, smile and yaw are correlations.
    """
    from export3d_cli import core

    animator = core.Animator.from_weights(weights, device=device, precision=precision, threads=threads)
    chosen = core.EvaluateOptions(max_frames=max_frames or None, cross=cross, pairs=pairs, seed=seed, identity=identity)
    with console.progress() as report:
        result = core.evaluate_model(animator, dataset, chosen, out=output, progress=report)
    if as_json:
        console.finish(result, as_json=True)
    elif not console.settings().quiet:
        _show(result)


def _show(result: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.dataset.name}: {result.cases} clips, {result.frames} frames, {result.seconds:.0f} s")
    known = [k for k in next(iter(result.mean.values())) if any(row[k] is not None for row in result.mean.values())]
    table.add_column("method")
    for name in known:
        table.add_column(name.replace("_", " "), justify="right")
    for method, row in result.mean.items():
        values = ("-" if row[k] is None else f"{row[k]:.{_DIGITS.get(k, 3)}f}" for k in known)
        table.add_row(method, *values)
    Console(stderr=True, width=None if Console(stderr=True).is_terminal else 160).print(table)
    for file in result.files:
        click.echo(str(file), err=True)
