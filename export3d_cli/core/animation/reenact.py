"""Animate one portrait by one driver, from files to a file."""

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import groupby, tee
from pathlib import Path

import numpy as np

from export3d_cli.core.animation.animator import Animator, Notify, Portrait
from export3d_cli.core.animation.clip_editing import edit_clip
from export3d_cli.core.animation.compositor import Compositor, is_video, load_photo, read_portrait
from export3d_cli.core.animation.driver_stream import DriverStream, MotionBatch
from export3d_cli.core.animation.expression_controls import EditedExpression, edit_expression, shut_lips
from export3d_cli.core.animation.frame_writer import write_video
from export3d_cli.core.animation.options import Progress, ReenactOptions, Summary, choose_sound
from export3d_cli.core.animation.person import main_photo
from export3d_cli.core.animation.photo_canvas import FrameLayers
from export3d_cli.core.animation.pipeline import PrefetchIterator
from export3d_cli.core.animation.retargeting import Control
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.face_track import TrackCache
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.soundtrack import find_silence
from export3d_cli.core.runtime.device import precision_notes
from export3d_cli.core.runtime.errors import InputError

PREFETCH_DEPTH = 2  # batches of the driver's motion that are read ahead


def reenact(animator: Animator, source: Path | Portrait, driver: Path, out: Path, options: ReenactOptions | None = None,
            *, progress: Progress | None = None, track_cache: TrackCache | None = None) -> Summary:  # fmt: skip
    """Animate the portrait `source` by `driver` (video, sound, image, `.motion.npz` or ARKit CSV) into the video `out`.

    A `source` that is a video is edited, see `edit_clip`; options that say how a photo is read have no effect on one
    that `Animator.portrait` has encoded.

    A `track_cache` that is passed to several calls with one driver and the same options has it tracked only once.
    """
    if isinstance(source, Path) and is_video(source):
        return edit_clip(animator, source, out, options, driver=driver, progress=progress)
    options, began = (options or ReenactOptions()).for_driver(driver), time.monotonic()
    if options.length != "source":
        raise InputError(f"--length {options.length} is for a video as SRC, and {source} is a photo: leave it out")
    options.check_outputs(out)
    add_watermark = get_watermarker(options.watermark)
    portraits = load_portraits(animator, source, options)
    compositor = Compositor(portraits, background=options.background, compare=options.compare)
    audio = choose_sound(options, None, driver)
    audio_start = options.start if audio == driver else 0.0
    notes = dict.fromkeys(precision_notes(animator.precision, animator.device))  # each shot may give the same ones

    def compose(item: tuple[tuple[FrameLayers, np.ndarray | None], ...]) -> np.ndarray:
        return add_watermark(compositor(*(layers for layers, _ in item), driver=item[0][1]))

    with ExitStack() as stack:
        stream = stack.enter_context(open_driver(animator, portraits[0], driver, options, track_cache))
        streams = [stream]
        for portrait, (_, other) in zip(portraits[1:], options.pairs, strict=False):
            of_other = replace(options, fps=stream.fps, text=None).for_driver(other)
            streams.append(stack.enter_context(open_driver(animator, portrait, other, of_other)))
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
            frames = _animate_stream(animator, portrait, batches, options, edit, notes.setdefault, silent)
            animated.append(stack.enter_context(closing(frames)))  # which ends the rendering threads
        items = zip(*animated, strict=False)  # the shortest driver ends the video
        count = write_video(items, out, options, compose, size=compositor.size, fps=stream.fps,
                            depth=animator.chunk_size, total=min(s.total for s in streams), progress=progress,
                            audio=audio, audio_start=audio_start, alpha=compositor.transparent)  # fmt: skip
    return Summary(out, count, stream.missing, stream.fps, time.monotonic() - began, animator.device_name,
                   (*dict.fromkeys(note for s in streams for note in s.notes), *notes))  # fmt: skip


def load_portraits(animator: Animator, source: Path | Portrait, options: ReenactOptions) -> list[Portrait]:
    """Encode the faces of a photo that are animated: one, all, or one and those of `options.pairs`."""
    if isinstance(source, Portrait):
        return [source]
    if options.face == "all":
        count = len(animator.tracker().find_all(main_photo(read_portrait(source))))
        faces = [f"index:{k}" for k in range(count)] or ["largest"]  # which raises if there is none
    else:
        faces = [options.face, *(face for face, _ in options.pairs)]
    portraits = [load_photo(animator, source, replace(options, face=face, pairs=())) for face in faces]
    if len({portrait.face_box for portrait in portraits}) < len(portraits):
        raise InputError(f"two drivers are given to one face of {source}: choose faces by left, right or index:N")
    return portraits


def open_driver(animator: Animator, portrait: Portrait, driver: Path, options: ReenactOptions,
                track_cache: TrackCache | None = None) -> DriverStream:  # fmt: skip
    """Open the driver's motion for a portrait, with driver crops as high as its frames if they are to be compared."""
    reads_pixels = options.motion != "landmarks"
    if reads_pixels and animator.model.planedict is None:
        raise InputError(f"these weights read no motion from pixels: leave out --motion {options.motion}, or train "
                         "with model.motion=planedict")  # fmt: skip
    return DriverStream(driver, animator.tracker(options.tracker), options, batch=animator.chunk_size,
                        crop_scale=portrait.crop_scale, crop_size=portrait.frame_size[1] if options.compare else None,
                        source=portrait.motion, track_cache=None if reads_pixels else track_cache,
                        matting=animator.matting if options.torso == "driver" else None,
                        read_code=animator.read_code if reads_pixels else None)  # fmt: skip


def _animate_stream(
    animator: Animator, portrait: Portrait, batches: Iterable[MotionBatch], control: Control,
    edit: EditedExpression | None, notify: Notify, silent: np.ndarray | None = None,
) -> Generator[tuple[FrameLayers, np.ndarray | None], None, None]:  # fmt: skip
    """Yield frames with the driver crops shown next to them; lips shut by the weights `silent` of the frames."""
    crops: deque[np.ndarray | None] = deque()
    count = 0

    def motions(batches: Iterable[MotionBatch]) -> Iterator[Motion]:
        nonlocal count
        for batch in batches:
            crops.extend(batch.driver_crops)
            motion = batch.motion
            if silent is not None:
                beta = shut_lips(motion.beta, silent, count).astype(np.float32)
                motion = replace(motion, beta=beta, landmarks=motion.landmarks[:, :0])  # whose lips are not shut
            count += len(motion)
            yield motion

    for reference, shot in groupby(batches, key=lambda batch: batch.reference):
        frames = animator.animate(portrait, motions(shot), control=control, reference=reference, edit=edit,
                                  notify=notify, layers=True)  # fmt: skip
        for frame in frames:
            yield frame, crops.popleft()
