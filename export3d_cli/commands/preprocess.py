"""`export3d preprocess INPUT... -o OUT`: turn videos into a motion file or a training data set."""

import re
from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


def _parse_shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", value)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"must be I/N with 1 <= I <= N, for example 1/4; got {value!r}", ctx, param)
    return int(match[1]), int(match[2])


@click.command()
@click.argument("inputs", type=options.EXISTING_PATH, metavar="INPUT...", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True,
              help="Folder of the data set, or for the motion of one input "
              "X.motion.npz, or X.csv (ARKit, Live Link Face) or X.json.")  # fmt: skip
@click.option("--size", type=click.IntRange(32, 1024), default=256, show_default=True, help="Side of crops in pixels.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Number of worker processes.")
@click.option("--max-frames", type=click.IntRange(1), help="Maximum number of frames per input.  [default: all]")
@click.option("--fps", type=options.FrameRate(),
              help="Motion file: frame rate.  [default: the video's; 25 for pictures]")  # fmt: skip
@click.option("--min-seconds", type=click.FloatRange(0), default=1.0, show_default=True, help="Minimum clip duration.")
@click.option("--max-seconds", type=click.FloatRange(1), default=60.0, show_default=True,
              help="Maximum clip duration; longer clips are split.")  # fmt: skip
@click.option("--min-face", type=click.FloatRange(0), default=64, show_default=True,
              help="Minimum side of the face in pixels.")  # fmt: skip
@click.option("--max-yaw", type=click.FloatRange(0, 90), default=65, show_default=True,
              help="Maximum yaw in degrees, 95th percentile over a clip.")  # fmt: skip
@click.option("--person", type=click.Choice(["name", "folder"]), default="name", show_default=True,
              help="Take the person's id from the file name up to its last _, or from the folder.")  # fmt: skip
@click.option("--shard", metavar="I/N", callback=_parse_shard,
              help="Process every N-th input, from the I-th; all shards write the same data set.")  # fmt: skip
@click.option("--face", default="largest", show_default=True, metavar="largest|left|right|index:N",
              callback=options.validate_face, help="Motion file: which of several faces to track.")  # fmt: skip
@options.tracker_option
@click.option("--overlay", type=options.OUTPUT_FILE, help="Motion file: write the video with the tracking drawn on it.")
@click.option("--report", is_flag=True, help="Write report.png, a picture of the clips; print poses and expressions.")
@options.json_option
@click.pass_context
def preprocess(ctx: click.Context, inputs: tuple[Path, ...], output: Path, max_frames: int | None, as_json: bool,
               **chosen: Any) -> None:  # fmt: skip
    """Track faces in INPUT (videos, images, or folders of them).

    With one video, photo, sound or Live Link Face CSV and OUT ending in .motion.npz or .csv, write its motion, a driver
    for `reenact`; a .csv or .json holds ARKit's coefficients and the head's angles for other programs (-o clip.csv).
    Otherwise write a data set for `train`: videos are split into clips of one face; rejected.jsonl says which were left
    out and why. Rendered heads with exact views (a folder with clips/, labels/, depth/) keep their depth. Run the same
    command again to continue an interrupted run.
    """
    default = click.core.ParameterSource.DEFAULT
    given = {name: None if ctx.get_parameter_source(name) is default else value for name, value in chosen.items()}
    limits = {name: given.pop(name) for name in ("min_seconds", "max_seconds", "min_face", "max_yaw")}
    limits["min_face_px"] = limits.pop("min_face")
    limits = {name: value for name, value in limits.items() if value is not None}
    clip_filter = core.ClipFilter(**limits) if limits else None
    console.run(core.build_dataset, list(inputs), output, max_frames=max_frames, clip_filter=clip_filter,
                as_json=as_json, **given)  # fmt: skip
