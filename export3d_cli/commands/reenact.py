"""`export3d reenact SRC DRIVE -o OUT`: a portrait follows a driver."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import click

from export3d_cli import console, options


def _audio(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value not in ("driver", "none") and not Path(value).is_file():
        raise click.BadParameter(f"there is no file {value!r}; use driver, none or a file with sound", ctx, param)
    return value


@click.command()
@click.argument("source", type=options.EXISTING_FILE, metavar="SRC")
@click.argument("driver", type=options.EXISTING_FILE, metavar="DRIVE")
@click.option("-o", "--output", type=options.NEW_FILE, required=True, help="Video: mp4, mov, mkv, webm or gif.")
@click.option("--start", type=click.FloatRange(0), default=0.0, show_default=True, help="Seconds of DRIVE to skip.")
@click.option("--duration", type=click.FloatRange(0, min_open=True), help="Seconds of DRIVE to use.  [default: all]")
@click.option("--max-frames", type=click.IntRange(1), help="Stop after this many frames.")
@click.option("--fps", type=options.Rate(), help="Frame rate of the result.  [default: the driver's, exactly]")
@click.option("--audio", default="driver", show_default=True, metavar="driver|none|FILE", callback=_audio)
@click.option(
    "--on-missing", type=click.Choice(["hold", "skip", "fail"]), default="hold", show_default=True,
    help="What to do with driver frames that show no face.",
)  # fmt: skip
@click.option("--compare", is_flag=True, help="Show source, driver and result side by side.")
@click.option("--batch", type=click.IntRange(0), default=0, help="Frames at once.  [default: chosen for the device]")
@options.model_options
@options.output_options
def reenact(
    source: Path,
    driver: Path,
    output: Path,
    start: float,
    duration: float | None,
    max_frames: int | None,
    fps: Fraction | None,
    audio: str,
    on_missing: str,
    compare: bool,
    batch: int,
    weights: str | None,
    device: str,
    precision: str,
    threads: int,
    crf: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Animate the portrait SRC with the head and face motion of DRIVE: a video, an image, or a .motion.npz.

    Frame rate and sound are the driver's.
    """
    from export3d_cli import core

    animator = core.Animator.from_weights(weights, device=device, precision=precision, threads=threads, batch=batch)
    chosen = core.ReenactOptions(
        audio=audio, crf=crf, fps=fps, start=start, duration=duration, max_frames=max_frames, on_missing=on_missing,
        overwrite=overwrite, compare=compare, batch=batch,
    )  # fmt: skip
    with console.progress() as report:
        summary = core.reenact(animator, source, driver, output, chosen, progress=report)
    console.finish(summary, as_json=as_json)
