"""Write a video while its next frames are rendered; write views and edits as a video, image or contact sheet."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.options import PortraitOptions, Progress, Summary
from export3d_cli.core.animation.pipeline import BackgroundWriter
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.media.image import MAX_PIXELS, contact_sheet, write_image
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT, VideoWriter, check_output_suffix
from export3d_cli.core.runtime.device import trim_heap
from export3d_cli.core.runtime.errors import InputError

T = TypeVar("T")
TRIM_INTERVAL = 128  # frames between two calls of `trim_heap`
SHEET_CELL_PX = 512  # longer side of the cells of a contact sheet, unless asked otherwise
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")  # formats that can carry the mark that they are synthetic


@dataclass(frozen=True)
class ViewOptions(PortraitOptions):
    """Number, rate and arrangement of the frames of novel views and expression edits."""

    frames: int = 60
    fps: Fraction = Fraction(25)
    grid: bool = False  # a contact sheet instead of a video

    @property
    def single(self) -> bool:
        """Whether all frames would be the same."""
        return self.frames == 1 or self.expression.is_constant

    def check_outputs(self, *outputs: Path) -> None:
        """Raise `InputError` for outputs that exist or cannot hold the frames."""
        super().check_outputs(*outputs)
        for out in outputs:
            if not is_image_output(out):
                check_output_suffix(out)
            if self.grid and not is_image_output(out):
                raise InputError(f"a contact sheet is an image: the output must end in .png or .jpg, got {out.name!r}")
            if is_image_output(out) and not (self.grid or self.single):
                raise InputError(f"{out} can hold one view: give one value for A:B, --frames 1, --grid, or a video")


def is_image_output(out: Path) -> bool:
    """Return whether an output of `ViewOptions` is an image, not a video."""
    return out.suffix.lower() in IMAGE_SUFFIXES


def write_video(items: Iterable[T], out: Path, options: PortraitOptions, compose: Callable[[T], np.ndarray], *,
                size: tuple[int, int], fps: Fraction, depth: int, total: int | None, progress: Progress | None = None,
                audio: Path | None = None, audio_start: float = 0.0, alpha: bool = False) -> int:  # fmt: skip
    """Compose and write items in a thread, at most `depth` behind, see `VideoWriter`; return the number of frames."""
    writer = VideoWriter(out, size=size, fps=fps, crf=options.crf, audio=audio, audio_start=audio_start, alpha=alpha)
    with writer:
        with BackgroundWriter[T](lambda item: writer.write(compose(item)), depth, stop=writer.abort) as background:
            for item in report_each(items, total, progress):
                background.put(item)
        return writer.frame_count


def write_views(animator: Animator, frames: Generator[np.ndarray, None, None], total: int, out: Path,
                options: ViewOptions, size: tuple[int, int], *, columns: int, labels: Sequence[str],
                notes: Sequence[str], began: float, progress: Progress | None) -> Summary:  # fmt: skip
    """Write frames of `size` (width, height) into a video, or into one image, a contact sheet where there are several.

    `began` is the job's start by `time.monotonic`.
    """
    add_watermark, fps = get_watermarker(options.watermark), Fraction(0)
    with closing(frames):  # ends the rendering threads
        if not is_image_output(out):
            fps = options.fps
            write_video(frames, out, options, add_watermark, size=size, fps=fps, depth=animator.chunk_size, total=total,
                        progress=progress)  # fmt: skip
        elif total * size[0] * size[1] > MAX_PIXELS:
            limit = MAX_PIXELS // (size[0] * size[1])
            raise InputError(f"a contact sheet of {total} views is too large, {limit} fit: set --frames or --size")
        else:
            sheet = contact_sheet(list(report_each(frames, total, progress)), columns, labels)
            write_image(out, add_watermark(sheet), comment=SYNTHETIC_COMMENT)
    return Summary(out, total, 0, fps, time.monotonic() - began, animator.device_name, tuple(notes))


def report_each(items: Iterable[T], total: int | None, progress: Progress | None) -> Iterator[T]:
    """Yield frames, and report each once it has been used."""
    for count, item in enumerate(items, start=1):
        yield item
        if progress is not None:
            progress("frames", count, total)
        if count % TRIM_INTERVAL == 0:
            trim_heap()
