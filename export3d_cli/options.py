"""Options used by two commands or more, and the parameter types that check them."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Seen(click.Path):
    """A file or folder that exists; `-` is refused, for what is read twice cannot come from a pipe."""

    def __init__(self, *, dir_okay: bool = True) -> None:
        super().__init__(exists=True, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """An existing path."""
        if str(value) == "-":
            self.fail("- (standard input) cannot be read twice: give a file", param, ctx)
        return super().convert(value, param, ctx)


EXISTING_FILE = Seen(dir_okay=False)
EXISTING_PATH = Seen()
NEW_FILE = click.Path(dir_okay=False, path_type=Path)


class Range(click.ParamType):
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


class Rate(click.ParamType):
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


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is not a device: use auto, cpu, mps, cuda or cuda:N", ctx, param)
    return value


def model_options(command: F) -> F:
    """--weights, --device, --precision, --threads: what the animator is made from."""
    precisions = click.Choice(["auto", "fp32", "bf16", "fp16"])
    for option in reversed([
        click.option("--weights", metavar="NAME|PATH|hf:OWNER/REPO", help="Weights.  [default: the embedded ones]"),
        click.option("--device", default="auto", show_default=True, callback=_device, metavar="auto|cpu|cuda[:N]|mps"),
        click.option("--precision", type=precisions, default="auto", show_default=True, help="Of the network."),
        click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads.  [default: all]"),
    ]):  # fmt: skip
        command = option(command)
    return command


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


def json_option(command: F) -> F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON on stdout.")(command)


def frames_option(default: int) -> Callable[[F], F]:
    """--frames N."""
    return click.option("--frames", type=click.IntRange(1, 100_000), default=default, show_default=True, help="Length.")
