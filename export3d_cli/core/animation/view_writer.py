"""What novel views and expression edits have in common: options, and frames into a video, image or contact sheet."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.options import PortraitOptions, Progress, Summary
from export3d_cli.core.animation.pipeline import BackgroundWriter, report_each
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.media.image import MAX_PIXELS, contact_sheet, write_image
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT, VideoWriter
from export3d_cli.core.runtime.errors import InputError

SHEET_CELL_PX = 512  # longer side of the cells of a contact sheet, unless asked otherwise
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")  # formats that can carry the mark that they are synthetic


@dataclass(frozen=True)
class ViewOptions(PortraitOptions):
    """Number, rate and arrangement of the frames."""

    frames: int = 60
    fps: Fraction = Fraction(25)
    grid: bool = False  # a contact sheet instead of a video


def is_image_output(out: Path, grid: bool) -> bool:
    """Return whether `out` is an image, else it is a video. Raises `InputError` for a contact sheet that is none."""
    is_image = out.suffix.lower() in IMAGE_SUFFIXES
    if grid and not is_image:
        raise InputError(f"a contact sheet is an image: the output must end in .png or .jpg, got {out.name!r}")
    return is_image


def write_views(
    animator: Animator, frames: Generator[np.ndarray, None, None], total: int, out: Path, options: ViewOptions,
    size: tuple[int, int], *, columns: int, labels: Sequence[str], notes: Sequence[str], began: float,
    progress: Progress | None,
) -> Summary:  # fmt: skip
    """Write frames of `size` (width, height) into a video, or into one image, a contact sheet where there are several.

    `began` is the job's start by `time.monotonic`.
    """
    add_watermark, reported = get_watermarker(options.watermark), report_each(frames, total, progress)
    is_image = is_image_output(out, options.grid)
    if not is_image:
        with (
            VideoWriter(out, size=size, fps=options.fps, crf=options.crf) as writer,
            BackgroundWriter[np.ndarray](
                lambda frame: writer.write(add_watermark(frame)), animator.window, stop=writer.abort
            ) as background,
            closing(frames),  # ends the rendering threads
        ):
            for frame in reported:
                background.put(frame)
    elif total * size[0] * size[1] > MAX_PIXELS:
        limit = MAX_PIXELS // (size[0] * size[1])
        raise InputError(f"a contact sheet of {total} views is too large, {limit} fit: set --frames or --size")
    else:
        sheet = contact_sheet(list(reported), columns, labels)
        write_image(out, add_watermark(sheet), comment=SYNTHETIC_COMMENT)
    fps = Fraction(0) if is_image else options.fps
    return Summary(out, total, 0, fps, time.monotonic() - began, animator.device_name, tuple(notes))
