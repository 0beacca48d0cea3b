"""Options used by two commands or more, and the parameter types that check them."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class ExistingPath(click.Path):
    """A file or folder that exists; `-` is refused, for what is read twice cannot come from a pipe."""

    def __init__(self, *, dir_okay: bool = True) -> None:
        super().__init__(exists=True, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """An existing path."""
        if str(value) == "-":
            self.fail("- (standard input) cannot be read twice: give a file", param, ctx)
        return super().convert(value, param, ctx)


EXISTING_FILE = ExistingPath(dir_okay=False)
EXISTING_PATH = ExistingPath()
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)


class NumberRange(click.ParamType):
    """`A:B`, or one number for both ends."""

    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Two finite numbers."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(":")
        try:
            numbers = [float(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(abs(number) < 1e6 for number in numbers):
            self.fail(f"{value!r} is not of the form A:B, two numbers such as -30:30", param, ctx)
        return numbers[0], numbers[-1]


class FrameRate(click.ParamType):
    """Frames per second, exactly: `25`, `30000/1001`; 29.97 means 30000/1001."""

    name = "fps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        """A positive fraction."""
        if isinstance(value, Fraction):
            return value
        plain = re.fullmatch(r"\d{1,9}(\.\d{1,9}|/\d{1,9})?", str(value).strip(), flags=re.ASCII)
        try:
            rate = Fraction(plain[0]) if plain else Fraction(0)
        except ZeroDivisionError:
            rate = Fraction(0)
        if not 0 < rate <= 1000:
            self.fail(f"{value!r} is not a frame rate: give frames per second such as 25 or 30000/1001", param, ctx)
        ntsc = Fraction(round(rate) * 1000, 1001)
        rounded = "." in str(value) and ntsc and abs(rate / ntsc - 1) < Fraction(3, 10_000)
        return ntsc if rounded else rate


class AutoInt(click.ParamType):
    """`auto`, which is 0, or a number whose digits match a pattern; `told` says what another value is."""

    name = "auto|N"

    def __init__(self, pattern: str, error: str) -> None:
        self.pattern, self.error = pattern, error

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """A number from 0."""
        text = "0" if value == "auto" else str(value)
        if not re.fullmatch(self.pattern, text, flags=re.ASCII):
            self.fail(f"{value!r} is {self.error}", param, ctx)
        return int(text)


BATCH = AutoInt(r"\d{1,6}", "not a number of frames: give auto or a whole number such as 8")
SIZE = AutoInt(r"\d{0,5}[02468]", "no size: give auto or an even number of pixels such as 512")  # ffmpeg wants it even


def _validate_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is not a device: use auto, cpu, mps, cuda or cuda:N", ctx, param)
    return value


def validate_face(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """A rule that chooses one face of several."""
    if not re.fullmatch(r"largest|left|right|index:\d{1,6}", value, flags=re.ASCII):
        raise click.BadParameter(f"{value!r} is no face; use largest, left, right or index:N (from 0)", ctx, param)
    return value


def source_options(command: F) -> F:
    """--face, --crop, --size: what of the portrait is animated, and how large."""
    command = click.option(
        "--size", type=SIZE, default="auto", show_default=True,
        help="Side of the frames, pixels; auto: 512 where the face of SRC is large enough for it, else 256.",
    )(command)  # fmt: skip
    command = click.option(
        "--crop", type=click.Choice(["auto", "none"]), default="auto", show_default=True,
        help="Of SRC: a square around the face, or the picture (a square) as it is.",
    )(command)  # fmt: skip
    return click.option(
        "--face", default="largest", show_default=True, metavar="largest|left|right|index:N", callback=validate_face,
        help="Face of SRC, where there are several; index counts from the left, from 0.",
    )(command)  # fmt: skip


def model_options(command: F) -> F:
    """--weights, --device, --precision, --threads: what the animator is made from."""
    precisions = click.Choice(["auto", "fp32", "bf16", "fp16"])
    for option in reversed([
        click.option("--weights", metavar="NAME|PATH|hf:OWNER/REPO", help="Weights.  [default: the embedded ones]"),
        click.option("--device", default="auto", show_default=True, callback=_validate_device, metavar="auto|cpu|cuda[:N]|mps",
                     help="Where to compute; auto takes CUDA when usable, else the CPU."),
        click.option("--precision", type=precisions, default="auto", show_default=True, help="Of the network."),
        click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: all]"),
    ]):  # fmt: skip
        command = option(command)
    return command


def quality_option(command: F) -> F:
    """--quality: how finely the volume is rendered."""
    told = "Of the head's rendering: balanced samples it a fifth as often as best (38 dB or more), fast an eighth."
    choices = click.Choice(["fast", "balanced", "best"])
    return click.option("--quality", type=choices, default="balanced", show_default=True, help=told)(command)


def tracker_option(command: F) -> F:
    """--tracker: what reads the face of a driver."""
    trackers = click.Choice(["landmarker", "fan"])
    told = "What reads a driver's face; fan is slower and needs export3d-cli[fan]. SRC is always read by landmarker."
    return click.option("--tracker", type=trackers, default="landmarker", show_default=True, help=told)(command)


def output_options(command: F) -> F:
    """--crf, --watermark, --overwrite, --json: how the video is written and what is told."""
    quality = "Quality of H.264, 0 (lossless) to 51."
    command = json_option(command)
    command = click.option("--overwrite", is_flag=True, help="Replace an existing output.")(command)
    command = click.option(
        "--watermark", type=click.Choice(["none", "visible", "invisible"]), default="none", show_default=True,
        help="Mark the picture too as synthetic; the metadata always says so.",
    )(command)  # fmt: skip
    return click.option("--crf", type=click.IntRange(0, 51), default=18, show_default=True, help=quality)(command)


def batch_option(command: F) -> F:
    """--batch."""
    how = "Frames at once; halved where memory runs out."
    return click.option("--batch", type=BATCH, default="auto", show_default=True, help=how)(command)


def json_option(command: F) -> F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON on stdout.")(command)


def frames_option(default: int) -> Callable[[F], F]:
    """--frames N."""
    return click.option("--frames", type=click.IntRange(1, 100_000), default=default, show_default=True, help="Length.")


def add_negations(command: click.Command) -> None:
    """Give every flag `--x` of a command, and of those below it, its `--no-x`: what a script said before is undone."""
    for option in command.params:
        if isinstance(option, click.Option) and option.is_flag and not option.secondary_opts:
            option.secondary_opts = [f"--no-{name[2:]}" for name in option.opts if name.startswith("--")]
    if isinstance(command, click.Group):
        for part in command.commands.values():
            add_negations(part)


def fps_option(command: F) -> F:
    """--fps of what has no driver."""
    return click.option("--fps", type=FrameRate(), default="25", show_default=True, help="Frames a second.")(command)
