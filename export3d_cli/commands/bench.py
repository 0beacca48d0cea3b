"""`export3d bench`: measure how fast this machine animates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export3d_cli import console, options

if TYPE_CHECKING:
    from export3d_cli.core.diagnostics.benchmark import BenchmarkResult
    from export3d_cli.core.diagnostics.cost_curves import CostCurves


@click.command()
@click.option("--source", type=options.EXISTING_FILE, help="Portrait.  [default: the bundled example]")
@click.option("--driver", type=options.EXISTING_FILE, help="Driving video.  [default: the bundled example]")
@click.option("--frames", type=click.IntRange(2, 10_000), default=30, show_default=True, help="Frames to measure.")
@options.batch_option
@click.option(
    "--curves", type=options.OUTPUT_FILE,
    help="Instead plot time and memory against frames, portraits and batch (.png, .jpg, .svg or .pdf).",
)  # fmt: skip
@options.model_options
@options.json_option
@click.pass_context
def bench(
    ctx: click.Context,
    source: Path | None,
    driver: Path | None,
    frames: int,
    batch: int,
    curves: Path | None,
    as_json: bool,
    **model: Any,
) -> None:
    """Measure the stages of `reenact` in ms per frame, and its speed in frames/s from file to file.

    `--curves` measures how the cost grows with frames, portraits and batch size instead; it needs matplotlib
    (pip install 'export3d-cli[plots]').
    """
    from export3d_cli import core

    if curves is not None:
        if curves.suffix.lower() not in (".png", ".jpg", ".jpeg", ".svg", ".pdf"):
            message = f"must end in .png, .jpg, .svg or .pdf; got {str(curves)!r}"
            raise click.BadParameter(message, param_hint="--curves")
        given = options.only_given(ctx, {"source": source, "driver": driver, "frames": frames, "batch": batch})
        unused = ", ".join(f"--{name}" for name, value in given.items() if value is not None)
        if unused:
            raise click.UsageError(f"{unused} has no effect with --curves: remove one of them")
    animator = core.Animator.from_weights(**model, batch=batch)
    result: Any
    with console.show_progress() as progress:
        if curves is not None:
            result = core.cost_curves(animator, curves, progress=progress)
        else:
            result = core.run_benchmark(animator, source, driver, frames=frames, progress=progress)
    if as_json:
        console.print_summary(result, as_json=True)
    elif curves is not None:
        _print_curves(result)
    else:
        _print_result(result)


def _print_result(result: BenchmarkResult) -> None:
    """Print the table on stdout, even with -q, because it is the command's output."""
    click.echo(f"{result.device}, {result.threads} threads, {result.frames} frames, {result.batch} at once")
    click.echo(f"{'stage':<18}{'ms':>9}{'10 %':>9}{'90 %':>9}")
    for name, stage in result.stages.items():
        click.echo(f"{name:<18}{stage.median:>9.2f}{stage.low:>9.2f}{stage.high:>9.2f}")
    if result.tri_planes < 1:
        click.echo(f"{100 * result.tri_planes:.0f} % of the tri-planes are computed, the others interpolated")
    click.echo(f"{result.fps:.2f} frames/s from file to file")
    for what, peak in (("process", result.peak_memory), ("GPU", result.peak_gpu)):
        if peak is not None:
            click.echo(f"{peak / 2**20:.0f} MiB peak memory of the {what}")


def _print_curves(result: CostCurves) -> None:
    click.echo(f"{result.device}, {result.threads} threads")
    for curve in result.curves:
        click.echo(f"{curve.name} ({curve.what}): {curve.fixed:.3g} + {curve.each:.3g} x, R2 {curve.r2:.3f}")
        for point in curve.points:
            memory = "" if point.memory is None else f"{point.memory / 2**20:>9.0f} MiB"
            click.echo(f"{point.x:>8g}{point.seconds:>10.3f} s{memory}")
    click.echo(str(result.out))
