"""`export3d live [SRC...]`: animate a portrait by a camera."""

from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


def _parse_camera(ctx: click.Context, param: click.Parameter, value: str) -> int | Path:
    """Return the number of a camera, or the path of a video file."""
    return int(value) if value.isdecimal() and len(value) < 4 else options.EXISTING_FILE.convert(value, param, ctx)


@click.command()
@click.argument("sources", type=options.EXISTING_FILE, metavar="[SRC]...", nargs=-1)
@click.option("--camera", default="0", show_default=True, metavar="N|FILE", callback=_parse_camera,
              help="Number of the camera, or a video file that stands in for one and is repeated.")  # fmt: skip
@click.option("--from", "receive", metavar="livelink[:PORT]|vmc[:PORT]",
              help="Motion that another program sends by UDP, instead of a camera: Live Link Face (port 11111) or the "
              "VMC protocol (port 39539; needs export3d-cli[osc]).")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address that receives it; 0.0.0.0 lets every program of the network send.")  # fmt: skip
@click.option("--send", metavar="osc://HOST:PORT",
              help="Also send the tracked expression and head rotation by the VMC protocol, after calibration and not "
              "mirrored: VSeeFace and `live --from vmc` read it (port 39539; needs export3d-cli[osc]).")  # fmt: skip
@click.option("--to", multiple=True, metavar="window|http://HOST:PORT|v4l2:/dev/videoN",
              help="Where to show the result: a window, a page that browsers and OBS can read, or a "
              "v4l2loopback device, which other programs take for a camera; may be repeated.  [default: "
              "window, or nothing with --record or --send]")  # fmt: skip
@click.option("--record", type=options.OUTPUT_FILE, metavar="OUT", help="Video file to record the result in, silent.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Stop after this time.  [default: never]")
@click.option("--mirror", is_flag=True, help="Mirror the motion, as a mirror would show it.")
@options.source_options
@click.option("--expression-scale", type=click.FloatRange(0, 10), default=1.0, show_default=True,
              help="Strength of the expression: 0 keeps SRC's, 1 copies the "
              "change seen by the camera, more exaggerates.")  # fmt: skip
@click.option("--pose-scale", type=click.FloatRange(0, 10), default=1.0, show_default=True,
              help="Strength of the head's movement, likewise.")  # fmt: skip
@click.option("--background", default="source", show_default=True, metavar="source|#rrggbb|FILE",
              help="Background behind the person.")  # fmt: skip
@options.smooth_option
@options.quality_option
@options.model_options
@options.output_options
def live(sources: tuple[Path, ...], to: tuple[str, ...], as_json: bool, **chosen: Any) -> None:
    """Animate the portraits SRC (default: the bundled example) with the face in front of a camera.

    Keep a neutral face for the first two seconds. Keys in the window and on the page, which has buttons, too: c
    calibrate again, r re-centre the head, m mirror, p pause, n next portrait, q quit. Ctrl-C also ends it and keeps
    the recording.
    """
    if chosen["receive"]:
        options.refuse_unused({"camera"}, "--from")
    else:
        options.refuse_unused({"host"}, "no --from")
    if len(sources) > 1:
        options.refuse_unused({"also"}, "several SRC")
    if not chosen["record"]:
        options.refuse_unused({"crf", "overwrite"}, "no --record")
    job = core.LiveOptions(to=to or (() if chosen["record"] or chosen["send"] else ("window",)), **chosen)
    animator = options.load_animator()
    portraits = sources or [core.example_path("source.jpg")]
    console.print_summary(core.run_live(animator, portraits, job, report=console.live_log()), as_json=as_json)
