"""Animate several portraits by one driver, which is tracked once; and plan it without writing."""

import contextlib
import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from export3d_cli.core.animation.animator import Animator, bounding_box
from export3d_cli.core.animation.clip_editing import MAX_BATCH, edit_clip, edited_regions
from export3d_cli.core.animation.compositor import Compositor, is_video, load_photo
from export3d_cli.core.animation.options import Progress, ReenactOptions, Summary
from export3d_cli.core.animation.reenact import open_driver, reenact
from export3d_cli.core.face.face_track import TrackCache, choose_face
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.device import peak_memory, precision_notes
from export3d_cli.core.runtime.errors import Export3DError, InputError, NoFaceError
from export3d_cli.core.runtime.files import check_name_length, shorten_name

_PLACEHOLDER = re.compile(r"\{(src|drive)\}")


@dataclass(frozen=True)
class BatchSummary:
    """Result of each source."""

    done: tuple[Summary, ...]
    skipped: tuple[Path, ...]  # outputs that existed
    failed: tuple[str, ...]  # "source: reason"
    seconds: float  # wall-clock
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class PlannedSource:
    """A portrait that would be animated."""

    source: Path
    face: tuple[int, int, int, int] | None  # box of the chosen face: x0, y0, x1, y1 in pixels; None: not found
    size: tuple[int, int]  # width, height of the result
    out: Path
    exists: bool  # whether `out` exists

    def __str__(self) -> str:
        width, height = self.size
        face = "no face found" if self.face is None else f"face at {self.face}"
        return f"{self.source} -> {self.out}{' (exists)' * self.exists}, {width}x{height}, {face}"


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    sources: tuple[PlannedSource, ...]
    driver: Path
    frames: int  # of each result
    fps: Fraction
    device: str
    memory_mb: int | None  # peak after some frames, which does not grow with the driver; None: unknown
    seconds: float | None  # estimate, from some frames of one result; None: no face to time
    notes: tuple[str, ...] = field(default=())


def output_paths(sources: Sequence[Path], driver: Path, out: str) -> list[Path]:
    """Return each source's output path: `out` with {src} and {drive} replaced by the files' names.

    Names keep only letters, digits, `_`, `-` and `.`, so that the result stays in its folder.
    """
    remainder = _PLACEHOLDER.sub("", out)
    if "{" in remainder or "}" in remainder:
        raise InputError(f"{out} has a placeholder other than {{src}} and {{drive}}: use only these two")
    if out.endswith(("/", os.sep)) or os.path.isdir(out):
        out = os.path.join(out, "{src}-{drive}.mp4")
    names = [{"src": _sanitize_name(s.stem), "drive": _sanitize_name(driver.name.split(".")[0])} for s in sources]
    paths = [Path(_PLACEHOLDER.sub(lambda match, name=name: name[match[1]], out)) for name in names]  # type: ignore[misc]
    for path in paths:
        check_name_length(path)
    if len(set(paths)) < len(paths):
        repeated = next(path for path in paths if paths.count(path) > 1)
        hint = "rename one of the sources" if "{src}" in out else "use a template such as {src}-{drive}.mp4"
        raise InputError(f"several sources would be written to {repeated}: {hint}")
    return paths


def reenact_all(animator: Animator, sources: Sequence[Path], driver: Path, out: str,
                options: ReenactOptions | None = None, *,
                progress: Progress | None = None) -> BatchSummary:  # fmt: skip
    """Animate each source by one driver into the template `out`; existing results are kept without `overwrite`.

    A portrait that fails is recorded, and the others continue; programming errors are raised.
    """
    options = options or ReenactOptions()
    began = time.monotonic()
    done: list[Summary] = []
    skipped: list[Path] = []
    failed: list[str] = []
    paths = output_paths(sources, driver, out)
    replace(options, overwrite=True).check_outputs(*paths)
    with TrackCache() as track_cache:
        for source, path in zip(sources, paths, strict=True):
            if os.path.lexists(path) and not options.overwrite:
                skipped.append(path)
                continue
            report = _prefix_stage(progress, source)
            try:
                done.append(reenact(animator, source, driver, path, options, progress=report, track_cache=track_cache))
            except (Export3DError, OSError) as error:
                failed.append(f"{source}: {error}")
            except (RuntimeError, MemoryError) as error:  # of torch or LiteRT, such as out of memory
                if isinstance(error, NotImplementedError | RecursionError):
                    raise
                failed.append(f"{source}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    notes = [f"{path} exists and is kept: pass --overwrite to replace it" for path in skipped]
    notes += dict.fromkeys(note for summary in done for note in summary.notes)
    return BatchSummary(tuple(done), tuple(skipped), tuple(failed), time.monotonic() - began, tuple(notes))


def plan_reenact(animator: Animator, sources: Sequence[Path], driver: Path, out: str,
                 options: ReenactOptions | None = None) -> Plan:  # fmt: skip
    """Return what `reenact_all` would do: find all faces and time some frames of one portrait."""
    options, paths = options or ReenactOptions(), output_paths(sources, driver, out)
    if len(sources) == 1 and is_video(sources[0]):
        return plan_edit(animator, sources[0], paths[0], options, driver=driver)
    options = options.for_driver(driver)
    replace(options, overwrite=True).check_outputs(*paths)
    if videos := [source for source in sources if is_video(source)]:
        raise InputError(f"--dry-run plans a video alone, and {videos[0]} is one of several SRC: leave it out")
    planned, face = list[PlannedSource](), "largest" if options.face == "all" else options.face
    for source, path in zip(sources, paths, strict=True):
        portrait = load_photo(animator, source, replace(options, face=face))
        compositor = Compositor([portrait], background=options.background, compare=options.compare)
        planned.append(PlannedSource(source, portrait.face_box, compositor.size, path, os.path.lexists(path)))
    with open_driver(animator, portrait, driver, options) as stream:
        job = partial(reenact, animator, sources[-1], driver)
        return _make_plan(animator, planned, driver, stream.total, stream.fps, stream.notes, job, options)


def plan_edit(animator: Animator, clip: Path, out: Path, options: ReenactOptions | None = None, *,
              driver: Path | None = None) -> Plan:  # fmt: skip
    """Return what `edit_clip` would do: find the face in its first frames and time some frames."""
    options = options or ReenactOptions()
    edited_regions(clip, driver, options)
    with VideoReader(clip, fps=options.fps, start=options.start if driver is None else 0.0) as reader:
        found, info = map(animator.tracker().find_all, islice(reader, MAX_BATCH)), reader.info
        faces = next(filter(None, found), [])
    box = bounding_box(choose_face(faces, options.face, str(clip)).landmarks) if faces else None
    planned = [PlannedSource(clip, box, (info.width, info.height), out, os.path.lexists(out))]
    job = partial(edit_clip, animator, clip, driver=driver)
    return _make_plan(animator, planned, driver or clip, info.frame_count, info.fps, [], job, options)


class _TimedError(Exception):
    """Ends a job that has been timed."""


def _make_plan(animator: Animator, planned: Sequence[PlannedSource], driver: Path, frames: int, fps: Fraction,
               notes: Sequence[str], job: Callable[..., Summary], options: ReenactOptions) -> Plan:  # fmt: skip
    """Run a job of one source into a temporary file until some frames are done; return the plan of all."""
    began, times, enough = time.monotonic(), list[float](), 2 * animator.chunk_size + 2

    def report(stage: str, done: int, total: int | None) -> None:
        nonlocal frames
        frames = total or frames
        times.append(time.monotonic() - began)
        if done == enough:
            raise _TimedError

    with contextlib.suppress(_TimedError), tempfile.TemporaryDirectory() as folder:
        try:
            job(Path(folder) / planned[0].out.name, options=replace(options, overwrite=True), progress=report)
        except NoFaceError as error:
            notes = (*notes, str(error))
    pace = (times[-1] - times[0]) / max(1, len(times) - 1) if times else 0.0
    remaining = max(1, sum(options.overwrite or not source.exists for source in planned))
    is_cuda = animator.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(animator.device) if is_cuda else peak_memory()
    return Plan(tuple(planned), driver, frames, fps, animator.device_name, None if peak is None else peak >> 20,
                remaining * (times[0] + pace * (frames - 1)) if times else None,
                (*notes, *precision_notes(animator.precision, animator.device)))  # fmt: skip


def _sanitize_name(name: str) -> str:
    """Return a name that can be part of a file name on every system; different names stay different if they are cut."""
    clean = re.sub(r"[^\w.-]+", "_", name).strip("._")  # nothing is left of emoji
    short = shorten_name(clean, 90)
    return short if short == clean != "" else f"{short or 'file'}-{zlib.crc32(os.fsencode(name)):08x}"


def _prefix_stage(progress: Progress | None, source: Path) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{source.name}: {stage}", done, total)
