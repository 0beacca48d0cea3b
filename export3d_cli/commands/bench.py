"""`export3d bench`: how fast this machine animates, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from export3d_cli import console, options

if TYPE_CHECKING:
    from export3d_cli.core.diagnostics.benchmark import BenchmarkResult
    from export3d_cli.core.diagnostics.cost_curves import CostCurves


@click.command()
@click.option("--source", type=options.EXISTING_FILE, help="Portrait.  [default: the bundled example]")
@click.option("--driver", type=options.EXISTING_FILE, help="Video that drives it.  [default: the bundled example]")
@click.option("--frames", type=click.IntRange(2, 10_000), default=30, show_default=True, help="Frames to measure.")
@options.batch_option
@click.option("--curves", type=options.OUTPUT_FILE, help="Draw time and memory against sizes there (.png) instead.")
@options.model_options
@options.json_option
def bench(
    source: Path | None,
    driver: Path | None,
    frames: int,
    batch: int,
    curves: Path | None,
    weights: str | None,
    device: str,
    precision: str,
    threads: int,
    as_json: bool,
) -> None:
    """Time the stages of `reenact`, in ms a frame, and the whole, in frames/s; nothing is kept.

    Beside the median and its spread stand the work of a frame, counted, what it would take at this machine's measured
    rates, and the shares of its matrix rate and of its bandwidth that were reached. `--curves` measures how cost grows
    instead: with frames, sources, resolution, samples a ray and batch.
    """
    from export3d_cli import core

    if curves is not None and curves.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise click.BadParameter(f"{str(curves)!r} is no picture: give a name that ends in .png or .jpg")
    animator = core.Animator.from_weights(weights, device=device, precision=precision, threads=threads, batch=batch)
    if curves is not None:
        with console.show_progress() as report:
            found = core.cost_curves(animator, curves, progress=report)
        if as_json:
            console.print_summary(found, as_json=True)
        else:
            _print_curves(found)
        return
    with console.show_progress() as report:
        result = core.run_benchmark(animator, source, driver, frames=frames, progress=report)
    if as_json:
        console.print_summary(result, as_json=True)
    else:
        _print_result(result)


def _print_result(result: BenchmarkResult) -> None:
    """The table is what was asked for: it goes to stdout, with -q too."""
    click.echo(f"{result.device}, {result.threads} threads, {result.frames} frames, {result.batch} at once")
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in result.machine.matrix.items())
    click.echo(f"this machine: {rates}, {result.machine.bandwidth:.1f} GB/s")
    click.echo(
        f"{'stage':<18}{'ms':>9}{'10 %':>9}{'90 %':>9}{'GFLOP':>9}{'MB':>9}{'limit ms':>10}{'matrix':>8}{'memory':>8}"
    )
    for name, stage in result.stages.items():
        line = f"{name:<18}{stage.median:>9.2f}{stage.low:>9.2f}{stage.high:>9.2f}"
        if stage.limit is not None:
            line += f"{stage.gflops:>9.3f}{stage.megabytes:>9.1f}{stage.limit:>10.3f}"
            line += "".join(f"{100 * (share or 0):>6.0f} %" for share in (stage.matrix_share, stage.bandwidth_share))
        click.echo(line)
    if result.tri_planes < 1:
        click.echo(
            f"{100 * result.tri_planes:.0f} of 100 frames have a tri-plane of their own, the others blended ones"
        )
    click.echo(f"{result.fps:.2f} frames/s from files to file")
    for what, peak in (("process", result.peak_memory), ("GPU", result.peak_gpu)):
        if peak is not None:
            click.echo(f"{peak / 2**20:.0f} MiB at most in the {what}")


def _print_curves(result: CostCurves) -> None:
    click.echo(f"{result.device}, {result.threads} threads")
    for curve in result.curves:
        power = "^2" if curve.name == "resolution" else ""
        fit = f"{curve.fixed:.3g} + {curve.each:.3g} x{power}, R2 {curve.r2:.3f}"
        click.echo(f"{curve.name} ({curve.what}): {fit}")
        for point in curve.points:
            memory = "" if point.memory is None else f"{point.memory / 2**20:>9.0f} MiB"
            click.echo(f"{point.x:>8g}{point.seconds:>10.3f} s{memory}")
    click.echo(str(result.out))
