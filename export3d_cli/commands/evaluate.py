"""`export3d evaluate DATASET`: how well the weights animate the faces of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from export3d_cli import console, options

if TYPE_CHECKING:
    from export3d_cli.core.evaluation.evaluate import Evaluation

_FOLDER, _EXISTING_FOLDER = (click.Path(exists=there, file_okay=False, path_type=Path) for there in (False, True))


def _check_identity(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and value != "dlib" and not Path(value).is_file():
        raise click.BadParameter(f"{value!r} is neither dlib nor a file", ctx, param)
    return value


@click.command()
@click.argument("dataset", type=_EXISTING_FOLDER, metavar="DATASET")
@click.option("-o", "--output", type=_FOLDER, help="Folder for report.html, scores.csv, scores.json and pictures.")
@click.option("--max-frames", type=click.IntRange(0), default=50, show_default=True, help="Of each clip; 0: all.")
@click.option(
    "--take", type=click.Choice(["spread", "first"]), default="spread", show_default=True,
    help="Which frames of a clip: spread evenly, or the first.",
)  # fmt: skip
@click.option("--cross", is_flag=True, help="Let another person drive.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True, help="How many, with --cross.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of pairs and intervals.")
@click.option(
    "--identity", metavar="dlib|FILE", callback=_check_identity,
    help="Measure identity with dlib (pip install 'export3d-cli[eval]') or a TorchScript face embedder.",
)  # fmt: skip
@click.option(
    "--perceptual", type=options.EXISTING_FILE, help="Measure perceptual distance with a VGG16 or MobileNetV2."
)
@click.option("--lpips", type=options.EXISTING_FILE, help="LPIPS' learned weights for that VGG16.")
@click.option(
    "--results", type=_EXISTING_FOLDER, multiple=True,
    help="Score finished videos of any tool too: CASE.mp4 in a folder, framed as the clips. Repeatable.",
)  # fmt: skip
@click.option("--model/--no-model", default=True, help="Leave the model out: only --results and the repeated source.")
@click.option("--views/--no-views", default=True, help="Novel views of each source, yaw -30 to 30 degrees.")
@click.option("--write-inputs", type=_FOLDER, help="Only write each case's source and driver there, for another tool.")
@options.model_options
@options.json_option
def evaluate(
    dataset: Path,
    output: Path | None,
    max_frames: int,
    take: Literal["spread", "first"],
    cross: bool,
    pairs: int,
    seed: int,
    identity: str | None,
    perceptual: Path | None,
    lpips: Path | None,
    results: tuple[Path, ...],
    model: bool,
    views: bool,
    write_inputs: Path | None,
    weights: str | None,
    device: str,
    precision: str,
    threads: int,
    as_json: bool,
) -> None:
    """Score self-reenactment on DATASET, a folder written by `preprocess`, beside two methods without a network.

    The most frontal frame of each clip is animated by the clip. `flow` warps it by the basis flow alone, `repeat` shows
    it as it is. Means over clips, in brackets their 95 % interval. What each number means stands in report.html.
    """
    from export3d_cli import core

    if not (model or results):
        raise click.UsageError("--no-model leaves nothing to score: add --results FOLDER")
    chosen = core.EvaluateOptions(
        max_frames=max_frames or None, take=take, cross=cross, pairs=pairs, seed=seed, identity=identity,
        perceptual=perceptual, lpips=lpips, results=results, model=model, views=views,
    )  # fmt: skip
    animator = core.Animator.from_weights(weights, device=device, precision=precision, threads=threads, quality="best")
    if write_inputs is not None:
        console.print_lines(
            map(str, core.write_inputs(dataset, chosen, write_inputs, animator.model.config.image_size))
        )
        return
    with console.show_progress() as report:
        result = core.evaluate_model(animator, dataset, chosen, out=output, progress=report)
    if as_json:
        console.print_summary(result, as_json=True)
    elif not console.current_settings().quiet:
        _print_table(result)


def _print_table(result: Evaluation) -> None:
    """A row for each metric, a column for each method, on stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from export3d_cli import core

    table = Table(title=f"{result.dataset.name}: {result.cases} clips, {result.frames} frames, {result.seconds:.0f} s")
    table.add_column("")
    for method in result.mean:
        table.add_column(method, justify="right")
    table.add_column("better")
    for key, metric in core.METRICS.items():
        cells = []
        for method, row in result.mean.items():
            value, bounds = row[key], result.interval[method][key]
            spread = f" [{bounds[0]:.{metric.digits}f}, {bounds[1]:.{metric.digits}f}]" if bounds else ""
            cells.append("-" if value is None else f"{value:.{metric.digits}f}{spread}")
        if any(cell != "-" for cell in cells):
            table.add_row(f"{key.replace('_', ' ')} {metric.unit}".strip(), *map(Text, cells), metric.better)
    Console(stderr=True, width=None if Console(stderr=True).is_terminal else 120).print(table)
    console.print_lines(map(str, result.files))
