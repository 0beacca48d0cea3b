"""Animate one portrait by one driver, from files to a file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import groupby, tee
from pathlib import Path
from typing import Any

import numpy as np

from export3d_cli.core.animation.animator import Animator, Notify, Portrait
from export3d_cli.core.animation.clip_editing import edit_clip
from export3d_cli.core.animation.compositor import (
    Compositor,
    GroupCompositor,
    check_outputs,
    is_video,
    load_photo,
    read_portrait,
)
from export3d_cli.core.animation.driver_stream import DriverStream, MotionBatch
from export3d_cli.core.animation.expression_controls import EditedExpression, edit_expression, shut_lips
from export3d_cli.core.animation.options import Progress, ReenactOptions, Summary, check_overwrite, choose_sound
from export3d_cli.core.animation.pipeline import BackgroundWriter, PrefetchIterator, report_each
from export3d_cli.core.animation.retargeting import Control
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.track_cache import TrackCache
from export3d_cli.core.media.soundtrack import find_silence
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.device import precision_notes, trim_heap
from export3d_cli.core.runtime.errors import InputError

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

    A `source` that is a video is edited, see `edit_clip`.

    A `track_cache` that is passed to several calls with one driver and the same options has it tracked only once.
    """
    if is_video(source):
        return edit_clip(animator, source, out, options, driver=driver, progress=progress)
    options, began = (options or ReenactOptions()).for_driver(driver), time.monotonic()
    check_outputs([out], options.background, options.crf)
    check_overwrite(out, options.overwrite)
    add_watermark = get_watermarker(options.watermark)
    portraits = load_portraits(animator, source, options)
    one = Compositor(portraits[0], background=options.background, compare=options.compare)
    group = None if len(portraits) == 1 else GroupCompositor(portraits)
    audio = choose_sound(options.audio, None, driver)
    audio_start = options.start if audio == driver else 0.0
    notes = dict.fromkeys(precision_notes(animator.precision, animator.device))  # each shot may give the same ones

    def write(item: tuple[tuple[Any, np.ndarray | None], ...]) -> None:
        (layers, crop), *others = item
        frame = one(layers, crop) if group is None else group([layers, *(layers for layers, _ in others)])
        writer.write(add_watermark(frame))

    with ExitStack() as stack:
        stream = stack.enter_context(open_driver(animator, portraits[0], driver, options, track_cache))
        streams = [stream]
        for portrait, (_, other) in zip(portraits[1:], options.pairs, strict=False):
            of_other = replace(options, fps=stream.fps).for_driver(other)
            streams.append(stack.enter_context(open_driver(animator, portrait, other, of_other)))
        writer = stack.enter_context(VideoWriter(
            out, size=one.size, fps=stream.fps, crf=options.crf, audio=audio, audio_start=audio_start,
            alpha=one.transparent,
        ))  # fmt: skip
        background = stack.enter_context(BackgroundWriter(write, animator.window, stop=writer.abort))
        tracked: list[Iterable[MotionBatch]] = list(streams)
        if options.tracker != "fan":  # which computes with torch and needs all cores itself
            tracked = [stack.enter_context(PrefetchIterator(s, PREFETCH_DEPTH, stop=s.stop)) for s in streams]
        if options.face == "all":  # one driver for all
            tracked = list(tee(tracked[0], len(portraits)))
        silent = find_silence(audio, stream.fps, audio_start) if options.lips_shut_when_silent else None
        animated = []
        for portrait, batches in zip(portraits, tracked, strict=True):
            edit = edit_expression(animator, portrait, options.expression) if options.expression else None
            notes |= dict.fromkeys(edit.notes if edit is not None else ())
            frames = _animate_stream(animator, portrait, batches, options.control, edit, notes.setdefault, silent)
            animated.append(stack.enter_context(closing(frames)))  # which ends the rendering threads
        items = zip(*animated, strict=False)  # the shortest driver ends the video
        for item in report_each(items, min(s.total for s in streams), progress):
            background.put(item)
    return Summary(
        out, writer.frame_count, stream.missing, stream.fps, time.monotonic() - began, animator.device_name,
        (*dict.fromkeys(note for s in streams for note in s.notes), *notes),
    )  # fmt: skip


def load_portraits(animator: Animator, source: Path, options: ReenactOptions) -> list[Portrait]:
    """Encode the faces of a photo that are animated: one, all, or one and those of `options.pairs`."""
    if options.face == "all":
        photo = read_portrait(source)
        count = len(animator.tracker().find_all(photo))
        faces = [f"index:{k}" for k in range(count)] or ["largest"]  # which raises if there is none
    else:
        faces = [options.face, *(face for face, _ in options.pairs)]
    portraits = [load_photo(animator, source, replace(options, face=face, pairs=())) for face in faces]
    if len({portrait.face_box for portrait in portraits}) < len(portraits):
        raise InputError(f"two drivers are given to one face of {source}: choose faces by left, right or index:N")
    return portraits


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
    edit: EditedExpression | None, notify: Notify, silent: np.ndarray | None = None,
) -> Generator[tuple[np.ndarray, np.ndarray | None], None, None]:  # fmt: skip
    """Yield each frame with the driver crop that is shown next to it; each shot has a reference frame of its own.

    `silent` are the weights of silence of the frames, in which lips are shut.
    """
    crops: deque[np.ndarray | None] = deque()
    count = 0

    def motions(batches: Iterable[MotionBatch]) -> Iterator[Motion]:
        nonlocal count
        for number, batch in enumerate(batches):
            crops.extend(batch.driver_crops)
            motion = batch.motion
            if silent is not None:
                motion = replace(motion, beta=shut_lips(motion.beta, silent, count).astype(np.float32))
            count += len(motion)
            yield motion
            if number % TRIM_INTERVAL == 0:
                trim_heap()

    for reference, shot in groupby(batches, key=lambda batch: batch.reference):
        frames = animator.animate(
            portrait, motions(shot), control=control, reference=reference, edit=edit, notify=notify, layers=True
        )
        for frame in frames:
            yield frame, crops.popleft()
