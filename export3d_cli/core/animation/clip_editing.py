"""Edit the expression in a video, by a driver, by controls, or by both; all else of each frame stays as it is.

The video is read twice: once to track its face, once for the frames, so that none waits in memory. What is repeated
(the clip with length `driver`, the driver with `loop`) is tracked once, into a temporary file.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.compositor import is_video
from export3d_cli.core.animation.driver_stream import DriverStream
from export3d_cli.core.animation.expression_controls import CONTROLS, hold_expression, look_at_camera, shut_lips
from export3d_cli.core.animation.frame_writer import write_video
from export3d_cli.core.animation.options import Progress, ReenactOptions, Summary, choose_sound
from export3d_cli.core.animation.pipeline import PrefetchIterator
from export3d_cli.core.animation.retargeting import DRIVABLE
from export3d_cli.core.animation.retouching import FaceWindows, retouch
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.cover_detection import CoveredParts
from export3d_cli.core.face.crop import CROP_SCALE, crop_with_padding
from export3d_cli.core.face.expression_coefficients import REGIONS, region_of
from export3d_cli.core.face.face_track import TrackCache, rotate_clockwise
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import has_image_suffix
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.soundtrack import find_silence
from export3d_cli.core.runtime.device import precision_notes
from export3d_cli.core.runtime.errors import InputError

FADE_S = 0.2  # seconds over which an edit fades next to frames without a face, at covers, and where the driver ends
CALIBRATION_S = 2.0  # seconds of the clip from which the frame is taken that controls are calibrated on
MAX_BATCH = 8  # frames that are edited at once, and wait in memory at full size
PREFETCH_DEPTH = 16  # frames that are tracked ahead of the editing
_OF_PHOTOS = {  # fields of the options that have no effect on a video -> their options
    "framing": "--frame", "crop": "--crop", "size": "--size", "background": "--background", "compare": "--compare",
    "torso": "--torso", "pose": "--pose", "pose_scale": "--pose-scale", "landmarks": "--landmarks",
    "pairs": "--pair", "motion": "--motion", "also": "--also", "look": "--look",
}  # fmt: skip


class ClipRow(NamedTuple):
    """A frame of the clip or of its driver."""

    motion: Motion  # one row
    reference: Motion | None = None  # one row: the frame that relative expression counts from
    strength: float = 1.0  # of the edit or of the driver, [0, 1]


def edit_clip(animator: Animator, clip: Path, out: Path, options: ReenactOptions | None = None, *,
              driver: Path | None = None, progress: Progress | None = None) -> Summary:  # fmt: skip
    """Edit the expression of a face in the video `clip`: the result has its size, its exact rate and its sound.

    A driver changes the regions that it drives; if its sound drives, the result has it. Controls hold their values in
    every frame. Frames without a face pass unchanged; in the others only pixels of the face change, and those of a
    watermark. Without a driver, start and duration of `options` are the clip's, else the driver's. Raises `InputError`
    for options that need a photo, and if there is nothing to edit.
    """
    options, began = options or ReenactOptions(), time.monotonic()
    regions = edited_regions(clip, driver, options)
    options.check_outputs(out)
    add_watermark = get_watermarker(options.watermark)
    of_clip = options_of_clip(options, driver)
    is_still = driver is not None and has_image_suffix(driver)
    length = "source" if driver is None or is_still else options.length
    audio = choose_sound(options, clip, driver)
    audio_start = options.start if audio == (driver or clip) else 0.0

    with ExitStack() as stack:

        def track(path: Path, options: ReenactOptions, is_repeated: bool) -> DriverStream:
            cache = stack.enter_context(TrackCache()) if is_repeated else None
            return stack.enter_context(DriverStream(path, animator.tracker(options.tracker), options,
                                                    batch=animator.chunk_size, crop_scale=CROP_SCALE[0],
                                                    track_cache=cache))  # fmt: skip

        stream = track(clip, of_clip, length == "driver")
        fps, total, fade = stream.fps, stream.total, max(1, round(FADE_S * stream.fps))
        read_clip = partial(VideoReader, clip, fps=of_clip.fps, start=of_clip.start, duration=of_clip.duration)
        reader = stack.enter_context(read_clip())
        frames = chain.from_iterable([reader] if stream.track_cache is None else repeat(reader))
        faded = PrefetchIterator(_fade_at_gaps(rows_of(stream), fade), PREFETCH_DEPTH, stop=stream.stop)
        rows: Iterator[ClipRow] = iter(stack.enter_context(faded))
        driver_rows: Iterator[ClipRow | None] = repeat(None)
        if driver is not None:
            other = track(driver, replace(options, fps=fps, pose="absolute", max_frames=None), length == "loop")
            total = {"driver": other.total, "shortest": min(total, other.total)}.get(length, total)
            driven: Iterable[ClipRow] = cycle(rows_of(other)) if is_still else rows_of(other)
            if options.tracker != "fan":  # which computes with torch and needs all cores itself
                driven = stack.enter_context(PrefetchIterator(driven, PREFETCH_DEPTH, stop=other.stop))
            driver_rows = _fade_at_end(driven, fade) if length == "source" else iter(driven)
        notes = dict.fromkeys(precision_notes(animator.precision, animator.device))
        editor = ClipEditor(animator, options, regions, 1 / fade)
        if options.expression:
            rows = _calibrate_on(rows, editor, stream, read_clip, max(1, round(CALIBRATION_S * fps)))
        if options.lips_shut_when_silent:
            editor.silent = find_silence(audio, fps, audio_start)
        items = islice(zip(frames, rows, driver_rows, strict=False), options.max_frames)
        count = write_video(edit_frames(items, editor, stream, min(animator.batch, MAX_BATCH)), out, options,
                            lambda item: add_watermark(item[0]) if item[1] else item[0],
                            size=(reader.info.width, reader.info.height), fps=fps, depth=MAX_BATCH,
                            total=min(total, options.max_frames or total), progress=progress, audio=audio,
                            audio_start=audio_start)  # fmt: skip
    return Summary(out, count, stream.missing, fps, time.monotonic() - began, animator.device_name,
                   (*stream.notes, *notes, *editor.notes))  # fmt: skip


def options_of_clip(options: ReenactOptions, driver: Path | None) -> ReenactOptions:
    """Return the options by which the clip is tracked; without a driver, start and duration are the clip's."""
    if driver is not None:
        options = replace(options, start=0.0, duration=None)
    return replace(options, driver_face=options.face, tracker="landmarker", on_missing="hold", pose="absolute",
                   max_frames=None, relative_expression=False, drive_by="auto", text=None)  # fmt: skip


def edited_regions(clip: Path, driver: Path | None, options: ReenactOptions) -> set[str]:
    """Return the regions that the driver or controls change; raise `InputError` for what a video cannot do."""
    if not is_video(clip):
        raise InputError(f"{clip} is not a video: give a photo to reenact, novel-view or edit-basis")
    default = ReenactOptions()
    unused = [name for field, name in _OF_PHOTOS.items() if getattr(options, field) != getattr(default, field)]
    if unused:
        raise InputError(f"{clip} is a video, whose frames keep their pose and picture: leave out {', '.join(unused)}")
    if options.face == "all":
        raise InputError(f"{clip} is a video, and one face is edited: edit its faces one by one, with --face index:N")
    drive = set(options.drive)
    if "head" in drive and drive != set(DRIVABLE):
        raise InputError(f"{clip} is a video, whose head keeps its own motion: leave head out of --drive")
    regions = drive & set(REGIONS) if driver is not None else set()
    regions |= {region_of(c) for name in options.expression.controls for c in sum(CONTROLS[name], ())}
    regions |= {"mouth", "brows"} if options.expression.from_neutral else set()
    regions |= {"gaze"} if options.eyes_to_camera else set()
    regions |= {"mouth"} if options.lips_shut_when_silent else set()
    if not regions:
        raise InputError("nothing to edit: give a control, such as --smile .4, or a driver and regions that it drives")
    return regions


def rows_of(stream: DriverStream) -> Iterator[ClipRow]:
    """Yield the motion of a clip or driver frame by frame; without end if the stream keeps its tracks."""
    for again in [stream] if stream.track_cache is None else repeat(stream):
        for batch in again:
            for k in range(len(batch.motion)):
                yield ClipRow(batch.motion.select(np.array([k])), batch.reference)


def _fade_at_gaps(rows: Iterable[ClipRow], fade: int) -> Iterator[ClipRow]:
    """Let the strength fall to 0 within `fade` frames before and after frames without a face."""
    ahead: deque[ClipRow] = deque()
    distance = fade  # to the last frame without a face
    for row in chain(rows, repeat(None, fade)):
        ahead += () if row is None else (row,)
        if len(ahead) > fade or (row is None and ahead):
            current = ahead.popleft()
            distance = min(distance + 1, fade) if current.motion.found[0] else 0
            gap = next((k for k, later in enumerate(ahead, start=1) if not later.motion.found[0]), fade)
            yield current._replace(strength=min(distance, gap) / fade)


def _fade_at_end(rows: Iterable[ClipRow], fade: int) -> Iterator[ClipRow]:
    """Repeat the last row without end, with a strength that falls to 0."""
    for row in rows:
        yield row
    for k in chain(range(fade - 1, 0, -1), repeat(0)):
        yield row._replace(strength=k / fade)


def _calibrate_on(rows: Iterator[ClipRow], editor: ClipEditor, stream: DriverStream,
                  read_clip: Callable[[], VideoReader], count: int) -> Iterator[ClipRow]:  # fmt: skip
    """Pass rows on; of the first `count` from a face on, calibrate controls on the one of the most usual expression."""
    for number, row in enumerate(rows):
        if not row.motion.found[0]:
            yield row
            continue
        ahead = [row, *islice(rows, count - 1)]
        found = [k for k, row in enumerate(ahead) if row.motion.found[0]]
        betas = np.concatenate([ahead[k].motion.beta for k in found])
        usual = found[int(np.abs(betas - np.median(betas, axis=0)).mean(1).argmin())]
        with read_clip() as reader:
            frame = rotate_clockwise(next(islice(reader, number + usual, None)), stream.rotation)
        editor.calibrate(frame, ahead[usual].motion)
        yield from chain(ahead, rows)


class ClipEditor:
    """Edits frames in order; what covers mouth or eyes stays as it is, and fades by `step` per frame."""

    def __init__(self, animator: Animator, options: ReenactOptions, regions: set[str], step: float) -> None:
        self._animator, self._options, self._step = animator, options, step
        self._size = animator.model.config.image_size
        self._still = np.array([not regions & set(part) for part in (("mouth",), *[("eyes", "gaze", "brows")] * 2)])
        self._covered: np.ndarray | None = None  # (3,) of the last frame, [0, 1]
        self._hold: Callable[[np.ndarray], np.ndarray] = lambda beta: beta  # see `hold_expression`
        self._notes: tuple[str, ...] = ()
        self._was_covered = np.zeros(3, bool)
        self.silent: np.ndarray | None = None  # weights of silence of all frames, in which lips are shut

    @property
    def notes(self) -> list[str]:
        """Notes for the user."""
        return [*self._notes, *([CoveredParts(*self._was_covered).note()] if self._was_covered.any() else [])]

    def calibrate(self, frame: np.ndarray, motion: Motion) -> None:
        """Measure on a frame with its motion how strongly controls show."""
        crop = crop_with_padding(frame, motion.crop, self._size)
        portrait = self._animator.portrait_from_motion(crop, motion)
        self._hold, self._notes = hold_expression(self._animator, portrait, self._options.expression)

    def __call__(self, frames: Sequence[np.ndarray], rows: Sequence[ClipRow], driver: Sequence[ClipRow | None],
                 numbers: Sequence[int]) -> list[np.ndarray]:  # fmt: skip
        """Return the edited frames, uint8 (H, W, 3); `numbers` are theirs in the result."""
        faces = FaceWindows.cut(frames, [row.motion for row in rows], self._size)
        detector = self._animator.cover_detector
        still = []
        for image, positions in zip(faces.images, faces.positions, strict=True):
            covered = np.array(detector.covered_parts(image, positions), float)
            self._was_covered |= (covered > 0) & ~self._still
            last = covered if self._covered is None else self._covered
            self._covered = last + (covered - last).clip(-self._step, self._step)
            still.append(np.maximum(self._covered, self._still))
        strength = np.array([row.strength for row in rows])[:, None]
        own = self._animator.coefficients(np.concatenate([row.motion.beta for row in rows]))
        changes = strength * self._changes(rows, driver, numbers)
        return retouch(self._animator, faces, own, changes, np.array(still))

    def _changes(self, rows: Sequence[ClipRow], driver: Sequence[ClipRow | None], numbers: Sequence[int]) -> np.ndarray:
        """Return the changes of lambda and measures (T, n + m)."""
        coefficients, control = self._animator.coefficients, self._options
        own = beta = np.concatenate([row.motion.beta for row in rows])
        change = np.zeros_like(coefficients(own))
        driven = [row for row in driver if row is not None]
        if driven:
            base = own
            if control.relative_expression:
                base = np.concatenate([row.reference.beta for row in driven if row.reference is not None])
            selected = control.select_regions(base, np.concatenate([row.motion.beta for row in driven]))
            strength = control.expression_scale * np.array([row.strength for row in driven])[:, None]
            change = strength * (coefficients(selected) - coefficients(base))
            beta = own + strength * (selected - base)
        held = shown = self._hold(beta)
        if held is not beta:
            change = change + self._animator.coefficient_change(held, beta)
        if control.eyes_to_camera:
            shown = look_at_camera(shown, np.concatenate([row.motion.camera for row in rows]))
        if self.silent is not None:
            shown = np.concatenate([shut_lips(b[None], self.silent, k) for b, k in zip(shown, numbers, strict=True)])
        return change if shown is held else change + coefficients(shown) - coefficients(held)


def edit_frames(items: Iterator[tuple[np.ndarray, ClipRow, ClipRow | None]], editor: ClipEditor, stream: DriverStream,
                batch: int) -> Iterator[tuple[np.ndarray, bool]]:  # fmt: skip
    """Edit frames in batches, and tell which: those without a face pass as they are."""
    first = 0
    while chunk := list(islice(items, batch)):
        chosen = [k for k, (_, row, _) in enumerate(chunk) if row.strength > 0]
        results = [(frame, False) for frame, _, _ in chunk]
        if chosen:
            frames = [rotate_clockwise(chunk[k][0], stream.rotation) for k in chosen]
            _, rows, driver = zip(*(chunk[k] for k in chosen), strict=True)
            edited = editor(frames, rows, driver, [first + k for k in chosen])
            for k, frame in zip(chosen, edited, strict=True):
                results[k] = rotate_clockwise(frame, -stream.rotation), True
        yield from results
        first += batch
