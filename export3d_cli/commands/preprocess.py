"""`export3d preprocess INPUT... -o OUT`: videos become a motion file or a training data set."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import click

from export3d_cli import console, options


def _parse_shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", value)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise click.BadParameter(f"{value!r} is no share of the inputs: use I/N with I from 1 to N", ctx, param)
    return int(found[1]), int(found[2])


def _check_inputs(ctx: click.Context, param: click.Parameter, value: tuple[Path, ...]) -> tuple[Path, ...]:
    for path in value:
        if str(path) == "-":
            raise click.BadParameter("- (standard input) cannot be read twice: give a file", ctx, param)
        if not path.exists():
            raise click.BadParameter(f"{str(path)!r} does not exist: give a video, a photo or a folder", ctx, param)
    return value


@click.command()
@click.argument(
    "inputs", type=click.Path(path_type=Path), metavar="INPUT...", nargs=-1, required=True, callback=_check_inputs
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True,
    help="Data set folder to write, or for one video a file X.motion.npz.",
)  # fmt: skip
@click.option("--size", type=click.IntRange(32, 1024), default=256, show_default=True, help="Side of crops, pixels.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Videos tracked at once.")
@click.option("--max-frames", type=click.IntRange(1), help="Frames taken of each video.  [default: all]")
@click.option(
    "--fps", type=options.FrameRate(), help="Rate of X.motion.npz.  [default: the video's; 25 of a picture folder]"
)
@click.option("--min-seconds", type=click.FloatRange(0), default=1.0, show_default=True, help="Of a clip.")
@click.option("--max-seconds", type=click.FloatRange(1), default=60.0, show_default=True, help="Longer ones are split.")
@click.option("--min-face", type=click.FloatRange(0), default=64, show_default=True, help="Side of faces, pixels.")
@click.option(
    "--max-yaw", type=click.FloatRange(0, 90), default=65, show_default=True, help="Degrees, of 95% of frames."
)
@click.option(
    "--person", type=click.Choice(["name", "folder"]), default="name", show_default=True,
    help="Who is seen: a file's name up to its last _, or its folder.",
)  # fmt: skip
@click.option(
    "--shard", metavar="I/N", callback=_parse_shard, help="Do every N-th input; a run without --shard merges."
)
@click.option(
    "--face", default="largest", show_default=True, metavar="largest|left|right|index:N", callback=options.validate_face,
    help="Of X.motion.npz: whose, where there are several.",
)  # fmt: skip
@options.tracker_option
@click.option("--overlay", type=options.OUTPUT_FILE, help="For X.motion.npz: the video with what was found drawn in.")
@click.option("--report", is_flag=True, help="Write report.png: clips, poses and expressions of the data set.")
@options.json_option
def preprocess(
    inputs: tuple[Path, ...],
    output: Path,
    size: int,
    workers: int,
    max_frames: int | None,
    fps: Fraction | None,
    min_seconds: float,
    max_seconds: float,
    min_face: float,
    max_yaw: float,
    person: str,
    shard: tuple[int, int] | None,
    face: str,
    tracker: str,
    overlay: Path | None,
    report: bool,
    as_json: bool,
) -> None:
    """Track faces in INPUT (videos, images, or folders of them).

    One video (or CSV of Live Link Face) and an OUT that ends in .motion.npz: a driver for `reenact`. Otherwise: a data
    set for `train`, its videos cut into clips of one face; rejected.jsonl says what was left out and why. The same
    command again goes on.
    """
    from export3d_cli import core

    gates = core.ClipFilter(min_seconds=min_seconds, max_seconds=max_seconds, min_face_px=min_face, max_yaw=max_yaw)
    with console.show_progress() as progress:
        summary = core.build_dataset(
            list(inputs), output, size=size, workers=workers, max_frames=max_frames, fps=fps, clip_filter=gates,
            person=person, shard=shard, face=face, tracker=tracker, overlay=overlay, report=report,
            progress=progress,
        )  # fmt: skip
    console.print_summary(summary, as_json=as_json)
