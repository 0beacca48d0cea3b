"""`export3d bench`: measure how fast this machine animates."""

import statistics
from pathlib import Path

import click

from export3d_cli import console, core, options


@click.command()
@click.option("--source", type=options.EXISTING_FILE, help="Portrait.  [default: the bundled example]")
@click.option("--driver", type=options.EXISTING_FILE, help="Driving video.  [default: the bundled example]")
@click.option("--frames", type=click.IntRange(2, 10_000), default=30, show_default=True, help="Frames to measure.")
@click.option("--against", metavar="COMMAND",
              help="Time another tool instead, in turn with `reenact`: "
              "its command, with {src}, {drv} and {out}.")  # fmt: skip
@options.batch_option
@options.model_options
@options.json_option
@click.pass_context
def bench(ctx: click.Context, source: Path | None, driver: Path | None, frames: int, against: str | None,
          as_json: bool) -> None:  # fmt: skip
    """Measure the stages of `reenact` one by one in ms per frame, and its speed in frames/s from file to file."""
    if against is not None:
        options.refuse_unused({"frames", "batch", "threads"}, "--against, which times whole runs")
        model = ctx.meta["model"].items()
        chosen = [f"--{name}={value}" for name, value in model if value is not None and name != "batch"]
        comparison = core.compare_speed(against, source, driver, arguments=chosen)
        if as_json:
            console.print_json(comparison)
            return
        for name, seconds in (("export3d", comparison.seconds), ("the other tool", comparison.other_seconds)):
            spread = f"{min(seconds):.2f} to {max(seconds):.2f} s in {len(seconds)} runs"
            click.echo(f"{name:<18}{statistics.median(seconds):>9.2f} s, {spread}")
        click.echo(f"ratio {comparison.ratio:.2f}: above 1 export3d is faster")
        return
    result = core.run_benchmark(options.load_animator(), source, driver, frames=frames)
    if as_json:
        console.print_json(result)
        return
    # on stdout, even with -q, because it is the command's output
    click.echo(f"{result.device}, {result.threads} threads, {result.frames} frames, {result.batch} at once")
    for name, milliseconds in result.stages.items():
        click.echo(f"{name:<18}{milliseconds:>9.2f} ms")
    click.echo(f"{result.fps:.2f} frames/s from file to file")
    for what, peak in (("process", result.peak_memory), ("GPU", result.peak_gpu)):
        if peak is not None:
            click.echo(f"{peak / 2**20:.0f} MiB peak memory of the {what}")
