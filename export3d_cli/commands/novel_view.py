"""`export3d novel-view [SRC] --yaw A:B`: the camera moves around a portrait."""

from __future__ import annotations

from pathlib import Path

import click

from export3d_cli import console, options


@click.command("novel-view")
@click.argument("source", type=options.EXISTING_FILE, metavar="[SRC]", required=False)
@click.option("-o", "--output", type=options.NEW_FILE, help="Video to write.  [default: novel_view.mp4, replaced]")
@click.option(
    "--yaw", type=options.Range(), default="-30:30", show_default=True, help="Degrees, + is to the image's right."
)
@click.option("--pitch", type=options.Range(), help="Degrees, + is up.")
@click.option("--roll", type=options.Range(), help="Degrees, + is clockwise.")
@options.frames_option(60)
@click.option("--loop", type=click.Choice(["pingpong", "once"]), default="pingpong", show_default=True, help="Path.")
@options.model_options
@options.output_options
def novel_view(
    source: Path | None,
    output: Path | None,
    yaw: tuple[float, float],
    pitch: tuple[float, float] | None,
    roll: tuple[float, float] | None,
    frames: int,
    loop: str,
    weights: str | None,
    device: str,
    precision: str,
    threads: int,
    crf: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn the portrait SRC (the bundled example when none is given), from A to B degrees."""
    from export3d_cli import core

    animator = core.Animator.from_weights(weights, device=device, precision=precision, threads=threads)
    chosen = core.NovelViewOptions(
        yaw=yaw, pitch=pitch, roll=roll, frames=frames, loop=loop, crf=crf, overwrite=overwrite or output is None
    )
    with console.progress() as report:
        summary = core.novel_view(
            animator, source or core.example("source.jpg"), output or Path("novel_view.mp4"), chosen, progress=report
        )
    console.finish(summary, as_json=as_json)
