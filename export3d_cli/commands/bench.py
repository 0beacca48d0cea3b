"""`export3d bench`: how fast this machine animates, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from export3d_cli import console, options

if TYPE_CHECKING:
    from export3d_cli.core.bench import Bench


@click.command()
@click.option("--source", type=options.EXISTING_FILE, help="Portrait.  [default: the bundled example]")
@click.option("--driver", type=options.EXISTING_FILE, help="Video that drives it.  [default: the bundled example]")
@click.option("--frames", type=click.IntRange(2, 10_000), default=30, show_default=True, help="Frames to measure.")
@click.option("--batch", type=click.IntRange(0), default=0, help="Frames at once.  [default: chosen for the device]")
@options.model_options
@options.json_option
def bench(
    source: Path | None,
    driver: Path | None,
    frames: int,
    batch: int,
    weights: str | None,
    device: str,
    precision: str,
    threads: int,
    as_json: bool,
) -> None:
    """Time the stages of `reenact`, in ms a frame, and the whole, in frames/s; nothing is kept."""
    from export3d_cli import core

    animator = core.Animator.from_weights(weights, device=device, precision=precision, threads=threads, batch=batch)
    with console.progress() as report:
        result = core.run_bench(animator, source, driver, frames=frames, progress=report)
    if as_json:
        console.finish(result, as_json=True)
    else:
        _show(result)


def _show(result: Bench) -> None:
    """The table is what was asked for: it goes to stdout, with -q too."""
    click.echo(f"{result.device}, {result.threads} threads, {result.frames} frames, {result.batch} at once")
    click.echo(f"{'stage':<18}{'ms':>9}{'10 %':>9}{'90 %':>9}")
    for name, stage in result.stages.items():
        click.echo(f"{name:<18}{stage.median:>9.2f}{stage.low:>9.2f}{stage.high:>9.2f}")
    click.echo(f"{result.fps:.2f} frames/s from files to file")
    for what, peak in (("process", result.peak_memory), ("GPU", result.peak_gpu)):
        if peak is not None:
            click.echo(f"{peak / 2**20:.0f} MiB at most in the {what}")
