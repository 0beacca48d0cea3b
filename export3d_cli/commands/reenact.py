"""`export3d reenact SRC... DRIVE -o OUT`: animate photos, or faces in videos, by a driver."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from export3d_cli import console, core, options


def _parse_scales(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    pairs = [text.partition("=")[::2] for text in value]
    return tuple((name, SCALE_RANGE(scale, param, ctx)) for name, scale in pairs)


def _parse_pairs(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    pairs = (text.partition("=")[::2] for text in value)
    return tuple((options.validate_face(ctx, param, a), options.EXISTING_PATH(b, param, ctx)) for a, b in pairs)


def _parse_torso(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    words = {"follow": None, "driver": "driver"}
    return words[value] if value in words else click.FloatRange(0, 1)("0" if value == "still" else value, param, ctx)


SCALE_RANGE = click.FloatRange(-10, 10)


@click.command()
@click.argument("sources", type=options.EXISTING_FILE, metavar="SRC...", nargs=-1)
@click.argument("driver", type=options.EXISTING_PATH, metavar="DRIVE")
@click.option("-o", "--output", required=True,
              help="Output: .mp4, .mov, .mkv, .webm or .gif; a template {src}-{drive}.mp4; or a folder.")  # fmt: skip
@click.option("--drive-by", type=click.Choice(["auto", "sound"]), default="auto", show_default=True,
              help="sound: move the lips by what the sound of DRIVE says, not by its "
              "video; auto: so only if it has no video.")  # fmt: skip
@click.option("--text", type=options.EXISTING_FILE, metavar="FILE",
              help="What the sound of DRIVE says, for exact lips: a text of the part in "
              "use (at most 180 s), or subtitles (SRT).")  # fmt: skip
@options.range_options
@click.option("--fps", type=options.FrameRate(),
              help="Frame rate of the result.  [default: exactly the driver's; 25 of a sound]")  # fmt: skip
@click.option("--audio", default="auto", show_default=True, metavar="auto|driver|source|none|FILE",
              callback=options.validate_audio,
              help="Sound of the result; auto is DRIVE's, or that of a video as SRC.")  # fmt: skip
@click.option("--length", type=click.Choice(["source", "driver", "shortest", "loop"]), default="source",
              show_default=True,
              help="Length of the result if SRC is a video: SRC's (after DRIVE's end it is not edited), DRIVE's (SRC "
              "repeats), the shorter one, or SRC's while DRIVE repeats.")  # fmt: skip
@click.option("--on-missing", type=click.Choice(["hold", "skip", "fail"]), default="hold", show_default=True,
              help="For driver frames without a face: repeat the "
              "last motion, leave the frame out, or stop.")  # fmt: skip
@options.source_options
@click.option("--pair", "pairs", multiple=True, metavar="FACE=DRIVE", callback=_parse_pairs,
              help="A face of the photo SRC and its own driver, in place of DRIVE or next to it: "
              "--pair left=a.mp4 --pair right=b.mp4. The shortest driver ends the result.")  # fmt: skip
@click.option("--driver-face", default="largest", show_default=True, metavar="largest|left|right|index:N",
              callback=options.validate_face,
              help="Which face of DRIVE to follow, chosen in the first frame with a face.")  # fmt: skip
@click.option("--drive", default="all", show_default=True, metavar="REGION,...",
              callback=lambda ctx, param, names: tuple(names.split(",")),
              help="Regions that DRIVE moves: eyes (lids), gaze, brows, mouth (lips, jaw), head (the torso follows), "
              "expression (all but head), pose (head). The others stay as in SRC: --drive mouth,head.")  # fmt: skip
@click.option("--scale", "scales", multiple=True, metavar="REGION=X", callback=_parse_scales,
              help="Strength of a region of DRIVE's motion: "
              "--scale mouth=1.2 --scale brows=.5. Repeatable.")  # fmt: skip
@click.option("--expression-scale", type=SCALE_RANGE, default=1.0,
              help="Strength of DRIVE's expression: 0 keeps SRC's, 1 copies "
              "DRIVE's, more exaggerates.  [default: 1]")  # fmt: skip
@click.option("--pose-scale", type=SCALE_RANGE, default=1.0,
              help="Strength of DRIVE's head pose, likewise.  [default: 1]")  # fmt: skip
@options.motion_option
@options.pose_option
@click.option("--torso", default="follow", show_default=True, metavar="follow|driver|still|0..1", callback=_parse_torso,
              help="Motion of the torso, as a fraction of the neck's: follow is what torsos usually do, still is 0; "
              "or driver: as DRIVE's shoulders move, where they can be seen.")  # fmt: skip
@click.option("--relative-expression/--absolute-expression", default=False,
              help="Add DRIVE's change of expression from its reference frame "
              "to SRC's expression.  [default: absolute]")  # fmt: skip
@click.option("--reference-frame", type=click.IntRange(0),
              help="Frame of DRIVE, from 0 after --start, that relative motion refers to.  [default: with --pose auto "
              "one of the first 10 s of each shot, see --pose; else 0]")  # fmt: skip
@options.expression_options
@options.correction_options
@options.smooth_option
@options.tracker_option
@click.option("--compare", is_flag=True, help="Show source, driver and result side by side.")
@click.option("--paste-back", is_flag=True, help="Same as --frame photo, the default.")
@click.option("--background", default="source", show_default=True, metavar="source|#rrggbb|FILE|transparent",
              help="Background behind the person; transparent needs .webm, .mov or FOLDER/%05d.png.")  # fmt: skip
@options.batch_option
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, expose_value=False,
              help="Has no effect: rendering is deterministic.  [default: 0]")  # fmt: skip
@options.dry_run_option
@options.quality_option
@options.model_options
@options.output_options
@click.pass_context
def reenact(ctx: click.Context, sources: tuple[Path, ...], driver: Path, output: str, dry_run: bool, as_json: bool,
            **chosen: Any) -> None:  # fmt: skip
    """Animate the portraits SRC with the head and face motion of DRIVE.

    DRIVE is a video, a sound, an image, a .motion.npz or a CSV of Live Link Face. The result has its frame rate and
    sound. SRC may be a video, too: its frames keep the head's pose and all but the regions of the face that DRIVE
    drives.

    A sound (.wav, .mp3, ...; needs `pip install 'export3d-cli[speech]'`) gives lip shapes by the phones that an
    English acoustic model hears, other languages work approximately; blinks, brows and small head movements are
    made up. A --text makes the phones exact.
    """
    if chosen.pop("paste_back") and chosen["framing"] == "face":
        raise click.UsageError("--paste-back means --frame photo: leave out one of --paste-back and --frame face")
    if not sources:
        if not chosen["pairs"]:
            raise click.MissingParameter(param_hint="'DRIVE'", param_type="argument")
        options.refuse_unused({"face"}, "--pair in place of DRIVE")
        sources = (driver,)
        (chosen["face"], driver), *others = chosen["pairs"]
        chosen["pairs"] = tuple(others)
    if len(sources) > 1:
        options.refuse_unused({"also", "landmarks"}, "several SRC")
    job = core.ReenactOptions(**chosen)
    paths = core.output_paths(sources, driver, output)
    # of several outputs, existing ones are skipped
    dataclasses.replace(job, overwrite=job.overwrite or dry_run or len(paths) > 1).check_outputs(*paths)
    animator = options.load_animator()
    if dry_run:
        planned = core.plan_reenact(animator, sources, driver, output, job)
        console.print_lines(map(str, planned.sources))
        console.print_summary(planned, as_json=as_json)
        return
    if len(sources) == 1:
        console.run(core.reenact, animator, sources[0], driver, paths[0], job, as_json=as_json)
        return
    summary = console.run(core.reenact_all, animator, sources, driver, output, job, as_json=as_json)
    if summary.failed:
        console.print_lines(f"failed: {line}" for line in summary.failed)
        ctx.exit(1)
