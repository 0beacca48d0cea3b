"""`export3d preprocess INPUT... -o OUT`: videos become a motion file or a training data set."""

from __future__ import annotations

from pathlib import Path

import click

from export3d_cli import console, options


@click.command()
@click.argument("inputs", type=options.EXISTING_PATH, metavar="INPUT...", nargs=-1, required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True,
    help="Data set folder to write, or for one video a file X.motion.npz.",
)  # fmt: skip
@click.option("--size", type=click.IntRange(32, 1024), default=256, show_default=True, help="Side of crops, pixels.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Videos tracked at once.")
@click.option("--max-frames", type=click.IntRange(1), help="Frames taken of each video.  [default: all]")
@options.json_option
def preprocess(
    inputs: tuple[Path, ...], output: Path, size: int, workers: int, max_frames: int | None, as_json: bool
) -> None:
    """Track faces in INPUT (videos, images, or folders of them).

    One video and an OUT that ends in .motion.npz: a driver for `reenact`. Otherwise: a data set for `train`.
    """
    from export3d_cli import core

    with console.progress() as report:
        summary = core.build_dataset(
            list(inputs), output, size=size, workers=workers, max_frames=max_frames, progress=report
        )
    console.finish(summary, as_json=as_json)
