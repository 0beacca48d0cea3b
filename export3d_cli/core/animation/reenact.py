"""Animate one portrait by one driver, from files to a file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from itertools import groupby
from pathlib import Path

import numpy as np

from export3d_cli.core.animation.animator import Animator, Notify, Portrait
from export3d_cli.core.animation.compositor import Compositor, check_outputs, load_photo
from export3d_cli.core.animation.driver_stream import DriverStream, MotionBatch, is_motion_file
from export3d_cli.core.animation.expression_controls import EditedExpression, edit_expression
from export3d_cli.core.animation.options import Progress, ReenactOptions, Summary, check_overwrite
from export3d_cli.core.animation.pipeline import BackgroundWriter, PrefetchIterator, report_each
from export3d_cli.core.animation.retargeting import Control
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.track_cache import TrackCache
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.device import precision_notes, trim_heap

PREFETCH_DEPTH = 2  # batches of the driver's motion that are read ahead
TRIM_INTERVAL = 32  # batches between two calls of `trim_heap`


def reenact(
    animator: Animator,
    source: Path,
    driver: Path,
    out: Path,
    options: ReenactOptions | None = None,
    *,
    progress: Progress | None = None,
    track_cache: TrackCache | None = None,
) -> Summary:
    """Animate the portrait `source` by `driver` (video, image, `.motion.npz` or ARKit CSV) into the video `out`.

    A `track_cache` that is passed to several calls with one driver and the same options has it tracked only once.
    """
    options, began = (options or ReenactOptions()).for_driver(driver), time.monotonic()
    check_outputs([out], options.background, options.crf)
    check_overwrite(out, options.overwrite)
    add_watermark = get_watermarker(options.watermark)
    portrait, compositor = load_portrait(animator, source, options)
    audio = {"driver": None if is_motion_file(driver) else driver, "none": None}.get(options.audio, Path(options.audio))
    audio_start = options.start if options.audio == "driver" else 0.0
    notes = dict.fromkeys(precision_notes(animator.precision, animator.device))  # each shot may give the same ones
    edit = edit_expression(animator, portrait, options.expression) if options.expression else None
    notes |= dict.fromkeys(edit.notes if edit is not None else ())

    def write(item: tuple[np.ndarray, np.ndarray | None]) -> None:
        writer.write(add_watermark(compositor(*item)))

    with (
        open_driver(animator, portrait, driver, options, track_cache) as stream,
        VideoWriter(
            out, size=compositor.size, fps=stream.fps, crf=options.crf, audio=audio, audio_start=audio_start,
            alpha=compositor.transparent,
        ) as writer,
        BackgroundWriter(write, animator.window, stop=writer.abort) as background,
        # the driver is tracked by a thread, but not by `fan`, which computes with torch and needs all cores itself
        nullcontext(stream)
        if options.tracker == "fan"
        else PrefetchIterator(stream, PREFETCH_DEPTH, stop=stream.stop) as batches,
    ):  # fmt: skip
        items = _animate_stream(animator, portrait, batches, options.control, edit, notes.setdefault)
        with closing(items):  # ends the rendering threads
            for item in report_each(items, stream.total, progress):
                background.put(item)
    return Summary(
        out, writer.frame_count, stream.missing, stream.fps, time.monotonic() - began, animator.device_name,
        (*stream.notes, *notes),
    )  # fmt: skip


def load_portrait(animator: Animator, source: Path, options: ReenactOptions) -> tuple[Portrait, Compositor]:
    """Encode a photo, and make the compositor that turns its animated crop into frames."""
    portrait = load_photo(animator, source, options)
    return portrait, Compositor(portrait, background=options.background, compare=options.compare)


def open_driver(
    animator: Animator, portrait: Portrait, driver: Path, options: ReenactOptions, track_cache: TrackCache | None = None
) -> DriverStream:
    """Open the driver's motion for a portrait, with driver crops as high as its frames if they are to be compared."""
    return DriverStream(
        driver, animator.tracker(options.tracker), options, batch=animator.window, crop_scale=portrait.crop_scale,
        crop_size=portrait.frame_size[1] if options.compare else None, source=portrait.motion,
        track_cache=track_cache,
    )  # fmt: skip


def _animate_stream(
    animator: Animator, portrait: Portrait, batches: Iterable[MotionBatch], control: Control,
    edit: EditedExpression | None, notify: Notify,
) -> Generator[tuple[np.ndarray, np.ndarray | None], None, None]:  # fmt: skip
    """Yield each frame with the driver crop that is shown next to it; each shot has a reference frame of its own."""
    crops: deque[np.ndarray | None] = deque()

    def motions(batches: Iterable[MotionBatch]) -> Iterator[Motion]:
        for number, batch in enumerate(batches):
            crops.extend(batch.driver_crops)
            yield batch.motion
            if number % TRIM_INTERVAL == 0:
                trim_heap()

    for reference, shot in groupby(batches, key=lambda batch: batch.reference):
        frames = animator.animate(
            portrait, motions(shot), control=control, reference=reference, edit=edit, notify=notify, layers=True
        )
        for frame in frames:
            yield frame, crops.popleft()
