"""`export3d evaluate DATASET`: score the weights on a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export3d_cli import console, options

if TYPE_CHECKING:
    from export3d_cli.core.evaluation.evaluate import Evaluation

_FOLDER, _EXISTING_FOLDER = (click.Path(exists=exists, file_okay=False, path_type=Path) for exists in (False, True))


def _check_identity(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and value != "dlib" and not Path(value).is_file():
        raise click.BadParameter(f"must be dlib or an existing file, got {value!r}", ctx, param)
    return value


@click.command()
@click.argument("dataset", type=_EXISTING_FOLDER, metavar="DATASET")
@click.option("-o", "--output", type=_FOLDER, help="Folder for report.html, scores.csv, scores.json and pictures.")
@click.option(
    "--max-frames", type=click.IntRange(0), default=50, show_default=True, help="Maximum frames per clip; 0: all."
)
@click.option(
    "--take", type=click.Choice(["spread", "first"]), default="spread", show_default=True,
    help="Which frames of a clip to score: evenly spread, or the first.",
)  # fmt: skip
@click.option("--cross", is_flag=True, help="Let another person drive.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True, help="With --cross: number of pairs.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed of the pairs and intervals."
)
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
    help="Also score finished videos of any tool: CASE.mp4 in a folder, framed as the clips. Repeatable.",
)  # fmt: skip
@click.option("--model/--no-model", default=True, help="Without the model: score only --results and the source image.")
@click.option("--views/--no-views", default=None, help="Novel views, yaw -30 to 30 deg.  [default: without --cross]")
@click.option("--write-inputs", type=_FOLDER, help="Only write each case's source and driver there, for another tool.")
@options.quality_option
@options.smooth_option
@options.model_options
@options.json_option
@click.pass_context
def evaluate(
    ctx: click.Context, dataset: Path, output: Path | None, write_inputs: Path | None, as_json: bool, **chosen: Any
) -> None:
    """Score self-reenactment on DATASET, a folder written by `preprocess`, next to two baselines without a network.

    The most frontal frame of each clip is animated by the clip, with the quality and smoothing that `reenact` uses by
    default, but framed as the clip's crop at the network's size. Baselines: `flow` warps that frame by the basis flow
    alone, `repeat` leaves it unchanged. Printed are means over clips and, in brackets, their 95 % intervals;
    report.html explains the metrics.
    """
    from export3d_cli import core

    given = options.only_given(ctx, {"output": output, **chosen})
    if write_inputs is not None:
        options.refuse_unused(set(given) - {"cross", "pairs", "seed", "weights", "device"}, "--write-inputs")
    if not chosen["model"]:
        options.refuse_unused({"quality", "precision"}, "--no-model")
    setup = {name: chosen.pop(name) for name in ("weights", "device", "precision", "quality")}
    chosen |= {name: given[name] for name in ("pairs", "smooth")}
    chosen["max_frames"] = chosen["max_frames"] or None
    evaluation = core.EvaluateOptions(**chosen)
    animator = core.Animator.from_weights(**setup)
    if write_inputs is not None:
        files = [*map(str, core.write_inputs(dataset, evaluation, write_inputs, animator.model.config.image_size))]
        if as_json:
            click.echo(json.dumps({"files": files}))
        else:
            console.print_lines(files)
        return
    with console.show_progress() as progress:
        result = core.evaluate_model(animator, dataset, evaluation, out=output, progress=progress)
    if as_json:
        console.print_summary(result, as_json=True)
    elif not console.is_quiet():
        _print_table(result)


def _print_table(result: Evaluation) -> None:
    """Print a row per metric and a column per method on stderr."""
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
            interval = f" [{bounds[0]:.{metric.digits}f}, {bounds[1]:.{metric.digits}f}]" if bounds else ""
            cells.append("-" if value is None else f"{value:.{metric.digits}f}{interval}")
        if any(cell != "-" for cell in cells):
            table.add_row(f"{key.replace('_', ' ')} {metric.unit}".strip(), *map(Text, cells), metric.better)
    Console(stderr=True, width=None if Console(stderr=True).is_terminal else 120).print(table)
    console.print_lines(map(str, result.files))
