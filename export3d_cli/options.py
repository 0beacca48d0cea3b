"""Options shared by several commands, and their parameter types."""

import functools
import re
from collections.abc import Callable, Collection
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click

from export3d_cli import core

F = TypeVar("F", bound=Callable[..., Any])
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_PATH = click.Path(exists=True, path_type=Path)
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)


class NumberRange(click.ParamType):
    """A range `A:B`, or one number for both ends."""

    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Return both ends as finite numbers."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(":")
        try:
            numbers = [float(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(abs(number) < 1e6 for number in numbers):
            self.fail(f"must be A:B, two numbers such as -30:30; got {value!r}", param, ctx)
        return numbers[0], numbers[-1]


class FrameRate(click.ParamType):
    """An exact frame rate such as `25` or `30000/1001`; 29.97 means 30000/1001."""

    name = "fps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        """Return the rate as a positive fraction."""
        if isinstance(value, Fraction):
            return value
        match = re.fullmatch(r"\d{1,9}(\.\d{1,9}|/\d{1,9})?", str(value).strip(), flags=re.ASCII)
        try:
            rate = Fraction(match[0]) if match else Fraction(0)
        except ZeroDivisionError:
            rate = Fraction(0)
        if not 0 < rate <= 1000:
            self.fail(f"must be a frame rate such as 25 or 30000/1001, at most 1000; got {value!r}", param, ctx)
        ntsc = Fraction(round(rate) * 1000, 1001)
        is_rounded_ntsc = "." in str(value) and ntsc and abs(rate / ntsc - 1) < Fraction(3, 10_000)
        return ntsc if is_rounded_ntsc else rate


class AutoInt(click.ParamType):
    """`auto` (returned as 0), or an integer whose digits match `pattern`; otherwise fail with `error`."""

    name = "auto|N"

    def __init__(self, pattern: str, error: str) -> None:
        self.pattern, self.error = pattern, error

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return a number >= 0."""
        text = "0" if value == "auto" else str(value)
        if not re.fullmatch(self.pattern, text, flags=re.ASCII):
            self.fail(f"{self.error}; got {value!r}", param, ctx)
        return int(text)


BATCH = AutoInt(r"\d{1,6}", "must be auto or a whole number of frames such as 8")
SIZE = AutoInt(r"\d{0,5}[02468]", "must be auto or an even number of pixels such as 512")  # ffmpeg requires even sides


def _set_model_option(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep an option of the animator for `load_animator`."""
    if param.name == "device" and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise click.BadParameter(f"must be auto, cpu, mps, cuda or cuda:N; got {value!r}", ctx, param)
    ctx.meta.setdefault("model", {})[param.name] = value


def load_animator() -> Any:
    """Return the running command's `Animator`, made by its model options."""
    return core.Animator.from_weights(**click.get_current_context().meta["model"])


def validate_face(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Check the rule that selects one of several faces."""
    several = "|all" if ctx.command.name == "reenact" and param.name == "face" else ""
    if not re.fullmatch(r"largest|left|right|index:\d{1,6}" + several, value, flags=re.ASCII):
        raise click.BadParameter(f"must be largest, left, right or index:N (from 0); got {value!r}", ctx, param)
    return value


def validate_audio(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Check that a sound exists if it is a file."""
    if value in ("auto", "driver", "source", "none"):
        return value
    if not Path(value).is_file():
        raise click.BadParameter(f"audio must be driver, source, none or a file with sound, got {value!r}", ctx, param)
    core.check_has_sound(Path(value))
    return value


def _together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Return a decorator that adds several options, listed by --help in this order."""

    def add(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


json_option = click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON on stdout.")
fps_option = click.option("--fps", type=FrameRate(), default="25", show_default=True, help="Frames per second.")
batch_option = click.option("--batch", type=BATCH, default="auto", show_default=True, expose_value=False,
                            callback=_set_model_option,
                            help="Frames per batch; halved when memory runs out.")  # fmt: skip
frame_option = click.option("--frame", "framing", type=click.Choice(["photo", "face"]), default="photo",
                            show_default=True,
                            help="What frames show: the whole photo, or a square around the head.")  # fmt: skip
pose_option = click.option(
    "--pose", type=click.Choice(["auto", "relative", "absolute"]), default="auto", show_default=True,
    help="auto: SRC keeps its own pose and place in the frame of DRIVE that is SRC itself, or else the first whose "
    "head is turned alike, and from there moves as DRIVE moves (a picture gives its own pose), as far as SRC can be "
    "turned; relative: the same, from a reference frame (the first by default); absolute: DRIVE's own pose and place.",
)  # fmt: skip
motion_option = click.option(
    "--motion", type=click.Choice(["landmarks", "pixels", "both"]), default="landmarks", show_default=True,
    help="What DRIVE's expression is read from: landmarks; the pixels of its face; or landmarks, corrected by pixels. "
    "The latter two need weights that were trained with model.motion=planedict; what pixels tell is not smoothed.",
)  # fmt: skip
dry_run_option = click.option("--dry-run", is_flag=True,
                              help="Print what would be done and an estimate of the time; write nothing.")  # fmt: skip
quality_option = click.option("--quality", type=click.Choice(["fast", "balanced", "best"]), default="balanced",
                              show_default=True, expose_value=False, callback=_set_model_option,
                              help="Rendering quality: balanced takes 1/5 of the samples of best (38 dB PSNR to "
                              "best or more), fast 1/8 and one tri-plane for all frames.")  # fmt: skip
smooth_option = click.option("--smooth", type=click.Choice(["off", "light", "strong"]), default="light",
                             show_default=True,
                             help="Smooth the jitter of the tracked motion; neither level delays it.")  # fmt: skip
tracker_option = click.option(
    "--tracker", type=click.Choice(["landmarker", "fan"]), default="landmarker", show_default=True,
    help="Face tracker of the driver; fan is slower and needs export3d-cli[fan]. SRC always uses landmarker.",
)  # fmt: skip
face_option = click.option("--face", default="largest", show_default=True, metavar="largest|left|right|index:N",
                           callback=validate_face,
                           help="Which face of SRC to use if there are several; index counts from the left, from 0; "
                           "all (only reenact, of a photo): DRIVE moves every face.")  # fmt: skip
# the part of a video that is read
range_options = _together(
    click.option("--start", type=click.FloatRange(0), default=0.0, show_default=True, help="Seconds to skip."),
    click.option("--duration", type=click.FloatRange(0, min_open=True), help="Seconds to use.  [default: all]"),
    click.option("--max-frames", type=click.IntRange(1), help="Stop after this many frames."),
)
landmarks_option = click.option(
    "--landmarks", type=EXISTING_FILE,
    help="Landmarks of a face that is not found, as in paintings: .json or .csv with 68 (iBUG) or 478 (MediaPipe) "
    "points x, y in pixels of SRC.",
)  # fmt: skip


def _parse_look(ctx: click.Context, param: click.Parameter, text: str | None) -> Any:
    return core.Look() if text is None else core.Look.parse(text)


# the part of the portrait that is animated, and what frames show
source_options = _together(
    face_option,
    click.option("--also", type=EXISTING_FILE, multiple=True, metavar="PHOTO",
                 help="Another photo of the same person, for what SRC does not show: teeth, shut eyes, the far cheek. "
                 "Repeatable."),
    click.option("--force", is_flag=True, help="Use a photo of --also even if it seems to show somebody else."),
    landmarks_option,
    click.option("--look", metavar="NAME=X,...", callback=_parse_look,
                 help="Change the person first, as the command look does: --look age=15,weight=-.3,hair=#5b3a1e,"
                 "beard=.4."),
    click.option("--crop", type=click.Choice(["auto", "none"]), default="auto", show_default=True,
                 help="What the network reads: a square around the face, or none for all that frames show (square)."),
    frame_option,
    click.option("--size", type=SIZE, default="auto", show_default=True,
                 help="Longer side of the frames in pixels; auto is that of SRC, at most 1080 (512 in a contact "
                 "sheet)."),
)  # fmt: skip
watermark_option = click.option(
    "--watermark", type=click.Choice(["none", "visible", "invisible"]), default="invisible", show_default=True,
    help="Mark the picture as synthetic, in addition to the metadata: by a badge, a pattern for verify-mark, or not.",
)  # fmt: skip
# how the output is written and reported
output_options = _together(
    click.option("--crf", type=click.IntRange(0, 51), show_default="18",
                 help="Constant rate factor of the video, 0 (lossless) to 51 (worst); not for .gif, images and "
                 "transparent .mov."),
    watermark_option,
    click.option("--overwrite", is_flag=True, help="Overwrite an existing output file."),
    json_option,
)  # fmt: skip


_CONTROLS = {  # option and its help, of the controls that have an option of their own
    "smile": "Smile, 0 to 1: --smile .6.",
    "jaw": "Open the jaw, 0 to 1: --jaw .4; 0 shuts the mouth.",
    "pucker": "Pucker the lips, 0 to 1: --pucker .8.",
    "blink": "Close the eyes, 0 to 1: --blink 1.",
    "eyes-open": "Open the eyes, 0 (relaxed) to 1 (wide): --eyes-open .3.",
    "brows": "Raise (to 1) or lower (to -1) the brows: --brows .5.",
}


def expression_options(command: F) -> F:
    """Add the named expression controls, passed to the command as `expression`, an `ExpressionEdit`."""

    @functools.wraps(command)
    def collect(**values: Any) -> Any:
        controls: dict[str, Any] = {}
        for preset in values.pop("preset"):
            controls |= core.read_preset(preset)
        for name in _CONTROLS:
            if (ends := values.pop(name.replace("-", "_"))) is not None:
                controls[name] = ends
        if (gaze := values.pop("gaze")) is not None:
            controls |= {"gaze-x": gaze[0], "gaze-y": gaze[1]}
        controls |= values.pop("set_")
        neutral = values.pop("origin") == "neutral"
        return command(expression=core.ExpressionEdit(controls, from_neutral=neutral), **values)

    def parse_gaze(ctx: click.Context, param: click.Parameter, text: str | None) -> list[tuple[float, float]] | None:
        if text is None:
            return None
        if text.count(",") != 1:
            raise click.BadParameter(f"must be X,Y such as 0,0 or -.5:.5,0; got {text!r}", ctx, param)
        return [NumberRange().convert(part, param, ctx) for part in text.split(",")]

    def parse_set(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
        pairs = [text.partition("=")[::2] for text in texts]
        return {name: NumberRange().convert(ends, param, ctx) for name, ends in pairs}

    named = [click.option(f"--{name}", type=NumberRange(), help=text) for name, text in _CONTROLS.items()]
    return _together(
        *named,
        click.option("--gaze", metavar="X,Y", callback=parse_gaze,
                     help="Gaze, -1 to 1; + is to the image's right and up (faces show up to about .3): --gaze 0,0."),
        click.option("--set", "set_", multiple=True, metavar="NAME=A[:B]", callback=parse_set,
                     help="Any of ARKit's coefficients: --set jawOpen=.4 --set mouthSmileLeft=.7. Repeatable."),
        click.option("--preset", multiple=True, metavar="NAME|FILE#NAME",
                     help="An expression: joy, surprise, anger, sad, kiss, sleep, or one of a YAML file, such as "
                     "mine.yaml#grin with the line `grin: {smile: 1, jaw: .2}`. Repeatable."),
        click.option("--from", "origin", type=click.Choice(["photo", "neutral"]), default="photo", show_default=True,
                     help="Expression that controls change: SRC's own, or with mouth and brows at rest."),
    )(collect)  # type: ignore[return-value]  # fmt: skip


correction_options = _together(
    click.option("--eyes-to-camera", is_flag=True,
                 help="Turn the gaze to the camera, wherever the head turns; blinks stay."),
    click.option("--lips-shut-when-silent", is_flag=True,
                 help="Shut the lips where the result's sound is silent (25 dB below speech)."),
)  # fmt: skip


def _set_threads(ctx: click.Context, param: click.Parameter, value: int) -> None:
    """Set PyTorch's thread count until the command ends."""
    if value and not ctx.resilient_parsing:
        ctx.with_resource(core.torch_state(threads=value))


# how the animator is built and computes, see `load_animator`
model_options = _together(
    click.option("--weights", metavar="NAME|PATH|hf:OWNER/REPO", help="Model weights.  [default: embedded]",
                 expose_value=False, callback=_set_model_option),
    click.option("--device", default="auto", show_default=True, expose_value=False, callback=_set_model_option,
                 metavar="auto|cpu|cuda[:N]|mps", help="Compute device; auto is CUDA if usable, else the CPU."),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True,
                 expose_value=False, callback=_set_model_option, help="Network precision."),
    click.option("--threads", type=click.IntRange(0), default=0, expose_value=False, callback=_set_threads,
                 help="Number of CPU threads.  [default: all]"),
)  # fmt: skip


def refuse_unused(names: Collection[str], because: str) -> None:
    """Raise `UsageError` for options of the running command that were given but have no effect because of `because`."""
    ctx = click.get_current_context()
    source, by_user = ctx.get_parameter_source, click.core.ParameterSource.COMMANDLINE
    given = [o.opts[-1] for o in ctx.command.params if o.name in names and source(o.name) is by_user]
    if given:
        raise click.UsageError(f"{', '.join(given)} has no effect with {because}: remove one of them", ctx)


def add_negations(command: click.Command) -> None:
    """Add `--no-x` for every flag `--x` of a command, so that a later argument can undo it."""
    for option in command.params:
        if isinstance(option, click.Option) and option.is_flag and not option.secondary_opts:
            option.secondary_opts = [f"--no-{name[2:]}" for name in option.opts if name.startswith("--")]
