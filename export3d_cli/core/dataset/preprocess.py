"""Videos and photos -> face crops with Motion: one file, or folders of them into a training data set.

A data set is `manifest.jsonl` (one line a clip: id, person, file, motion, frames, fps, split, source) and
`clips/<id>.mp4` or `.png` (square face crops) with `clips/<id>.motion.npz`; `rejected.jsonl` tells what was left out
and why. A video is read twice, once to follow faces (`core/dataset/segmentation.py`) and once to cut them out, so that no more than a
frame is in memory. A clip that is its whole video has the video's id, else `<id>-cNN`.

Shard i of n takes every n-th input and keeps its lists in `manifest-<i>of<n>.jsonl` and `rejected-<i>of<n>.jsonl` of
the same folder; a run without a shard merges them, and does what they left undone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from export3d_cli.core.dataset.manifest import DatasetManifest, ManifestRow
from export3d_cli.core.dataset.overview import draw_overlay, draw_report
from export3d_cli.core.dataset.segmentation import ClipFilter, Segment, sharpness, track_segments
from export3d_cli.core.dataset.track_video import extract_motion, is_arkit_csv
from export3d_cli.core.face.crop import crop_image, crop_with_padding
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.face.tracker import TrackerName, open_landmarker_tracker
from export3d_cli.core.media.image import has_image_suffix, read_image, write_image
from export3d_cli.core.media.video import VideoReader, VideoWriter
from export3d_cli.core.runtime.errors import Export3DError, InputError, NoFaceError
from export3d_cli.core.runtime.files import folder_lock, remove_stale_temporaries
from export3d_cli.core.runtime.interrupts import reraise_dropped_interrupts

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".mpg", ".mpeg", ".ts", ".mts", ".wmv")
CLIP_FPS = Fraction(25)  # of the clips of a data set
_CLIP_SUFFIX = re.compile(r"-c\d{2,}$")  # what is behind a video's name in that of one of its clips
Progress = Callable[[str, int, "int | None"], None]
PersonRule = Literal["name", "folder"]


@dataclass(frozen=True)
class PreprocessSummary:
    """What became of the inputs."""

    clips: int
    frames: int
    rejected: list[str] = field(default_factory=list)  # "file: reason", of this run
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class InputJob:
    """One input and all that a worker needs to know for it."""

    file: Path
    source_id: str  # names the input in the data set: its path below the folder given, without suffix
    person: str
    out: Path
    size: int
    max_frames: int | None
    clip_filter: ClipFilter


@dataclass(frozen=True)
class InputResult:
    """What became of one input: lines of the manifest and lines of the list of rejected clips."""

    job: InputJob
    clips: list[ManifestRow]
    rejected: list[ManifestRow]


def preprocess(
    inputs: list[Path],
    out: Path,
    *,
    size: int = 256,
    workers: int = 1,
    max_frames: int | None = None,
    fps: Fraction | None = None,
    clip_filter: ClipFilter | None = None,
    person: PersonRule = "name",
    shard: tuple[int, int] | None = None,
    face: str = "largest",
    tracker: TrackerName = "landmarker",
    overlay: Path | None = None,
    report: bool = False,
    progress: Progress | None = None,
) -> PreprocessSummary:
    """Track faces; write a Motion file (one input, `out` ending in .motion.npz) or a data set (folder `out`).

    Inputs that are in the data set already are kept, so that a run that was cut off goes on. `fps`, `face` and
    `tracker` are for a Motion file only: clips of data sets have 25 frames/s, the largest face and the landmarker's
    points. A Motion file may also come of a CSV of Live Link Face. Raises `InputError` when there is nothing to read
    and `NoFaceError` when no input has a usable face.
    """
    if out.name.endswith(".npz"):
        return _write_motion_file(
            inputs, out, overlay, progress, max_frames=max_frames, fps=fps, face=face, tracker_name=tracker
        )
    if overlay is not None or fps is not None or face != "largest" or tracker != "landmarker":
        what = "an overlay, a frame rate or a choice of face or tracker"
        raise InputError(f"{out} is a data set: {what} is for one video, with OUT as X.motion.npz")
    every = _find_inputs(inputs, out)
    if not every:
        raise InputError(f"no video or image in {', '.join(map(str, inputs))}")
    clip_filter = clip_filter or ClipFilter()
    if max_frames is not None:  # who wants few frames wants short clips
        clip_filter = replace(clip_filter, min_seconds=min(clip_filter.min_seconds, float(max_frames / CLIP_FPS)))
    mine = every if shard is None else every[shard[0] - 1 :: shard[1]]
    with folder_lock(out, shared=shard is not None):
        lists = DatasetManifest(out, shard)
        jobs = [
            InputJob(file, source, _person_id(file, source, person), out, size, max_frames, clip_filter)
            for file, source in mine
            if source not in lists.finished_sources
        ]
        try:
            (out / "clips").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write to {out} ({error.strerror}): give a folder, or a file X.motion.npz"
            ) from error
        _remove_partial_clips(out / "clips", {job.source_id for job in jobs})
        told: list[str] = []
        with contextlib.closing(_run_jobs(jobs, workers)) as results:
            for count, done in enumerate(results, start=1):
                lists.add(done.clips, done.rejected)
                told += [f"{done.job.file}: {line['reason']}" for line in done.rejected]
                if progress is not None:
                    progress("inputs", count, len(jobs))
        lists.close()
        remove_stale_temporaries(
            out / "clips"
        )  # of workers that outlived a parent that was killed, by the moment they need to notice it
    if not lists.clips and shard is None:
        first = told[0] if told else f"{out / 'rejected.jsonl'} says why"
        raise NoFaceError(f"none of the {len(every)} inputs gave a usable clip; the first: {first}")
    notes = []
    if report and lists.clips:
        notes.append(f"report in {draw_report(out, lists.clips, lists.path('report').with_suffix('.png'))}")
    return PreprocessSummary(len(lists.clips), sum(line["frames"] for line in lists.clips), told, notes)


def _write_motion_file(
    inputs: list[Path], out: Path, overlay: Path | None, progress: Progress | None, **how: Any
) -> PreprocessSummary:
    if len(inputs) != 1:
        raise InputError(f"{out} can hold the motion of one video, got {len(inputs)} inputs: give a folder instead")
    if overlay is not None and is_arkit_csv(inputs[0]):
        raise InputError(f"{inputs[0]} holds no pictures to draw on: leave out --overlay")
    motion, notes = extract_motion(inputs[0], progress=progress, **how)
    motion.save(out)
    if overlay is not None:
        draw_overlay(inputs[0], motion, overlay, progress=progress)
    return PreprocessSummary(1, len(motion), notes=notes)


def _find_inputs(inputs: list[Path], out: Path) -> list[tuple[Path, str]]:
    """Every file to be read, with a name that is unique in the data set; sorted within each folder given."""
    found: dict[Path, str] = {}
    taken: set[str] = set()
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path} does not exist: give a video, a photo or a folder of them")
        if out.resolve() in path.resolve().parents:
            raise InputError(f"{path} lies in the output folder {out}: choose another one")
        files = sorted(p for p in path.rglob("*") if _is_input_file(p, path, out)) if path.is_dir() else [path]
        for file in files:
            if file in found:
                continue
            below = file.relative_to(path).parent.parts if path.is_dir() else ()
            base = "-".join([*below, file.stem]) + ("-still" if has_image_suffix(file) else "")
            base += "-video" if _CLIP_SUFFIX.search(base) else ""  # "a-c01" is the first clip of "a"
            name, k = base, 2
            while name in taken:
                name, k = f"{base}-{k}", k + 1
            taken.add(name)
            found[file] = name
    return list(found.items())


def _remove_partial_clips(clips: Path, todo: set[str]) -> None:
    """Take away what runs that were killed left of inputs that are to be done: others clips may come of them now."""
    with os.scandir(clips) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        clip = re.sub(r"(\.motion\.npz|\.mp4|\.png)$", "", name)
        if clip != name and (clip in todo or _CLIP_SUFFIX.sub("", clip) in todo):
            (clips / name).unlink(missing_ok=True)


def _is_input_file(path: Path, folder: Path, out: Path) -> bool:
    """Whether a file found below a folder is to be read: not what we wrote, nor what is hidden."""
    if any(part.startswith(".") for part in path.relative_to(folder).parts) or out in path.parents:
        return False
    return (path.suffix.lower() in VIDEO_SUFFIXES or has_image_suffix(path)) and path.is_file()


def _person_id(file: Path, source: str, person: PersonRule) -> str:
    """The file name up to its last underscore, or the folder that it lies in."""
    return file.resolve().parent.name or source if person == "folder" else file.stem.rsplit("_", 1)[0]


def _run_jobs(jobs: list[InputJob], workers: int) -> Generator[InputResult, None, None]:
    if workers <= 1 or len(jobs) <= 1:
        yield from map(_process_input, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, _init_worker)
    finished = False
    try:
        for future in concurrent.futures.as_completed([pool.submit(_process_input, job) for job in jobs]):
            yield future.result()
        finished = True
    except concurrent.futures.process.BrokenProcessPool as error:
        hint = "run the same command again, with fewer --workers if memory is short: what is finished is kept"
        raise Export3DError(f"a worker process died: {hint}") from error
    finally:
        if not finished:  # Ctrl-C, or a defect: what is under way is given up
            for worker in multiprocessing.active_children():
                worker.terminate()
        pool.shutdown(cancel_futures=True)


_worker_tracker: LandmarkerTracker | None = None  # of this process
_busy = _stop_requested = False


def _init_worker() -> None:
    """In a worker: Ctrl-C and `terminate` give up the input under way, leaving no half files, and all that follow."""

    def stop(*_: object) -> None:
        global _stop_requested
        again, _stop_requested = _stop_requested, True
        if _busy and not again:  # the parent's signal follows Ctrl-C's, and must not break the clearing away
            raise KeyboardInterrupt

    def dropped() -> None:
        global _stop_requested
        _stop_requested = False

    reraise_dropped_interrupts(dropped)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for its next input for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _process_input(job: InputJob) -> InputResult:
    """One input -> its crops and Motion files; a reason where there is none."""
    global _busy
    if _stop_requested:
        raise KeyboardInterrupt
    _busy = True
    try:
        return _process_with_tracker(job)
    finally:
        _busy = False


def _process_with_tracker(job: InputJob) -> InputResult:
    global _worker_tracker
    _worker_tracker = _worker_tracker or open_landmarker_tracker()
    try:
        return (
            _process_image(job, _worker_tracker) if has_image_suffix(job.file) else _process_video(job, _worker_tracker)
        )
    except Export3DError as error:
        return InputResult(
            job, [], [_rejected_row(job, job.source_id, str(error)) | {"failed": not isinstance(error, NoFaceError)}]
        )


def _process_image(job: InputJob, tracker: LandmarkerTracker) -> InputResult:
    image = read_image(job.file)
    face = tracker.landmarker.find(image)
    if face is None:
        return InputResult(job, [], [_rejected_row(job, job.source_id, "no face found")])
    motion = tracker.make_motion([face], CLIP_FPS, (image.shape[1], image.shape[0]))
    segment = Segment(0, motion, float(np.ptp(face.landmarks[:, :2], axis=0).max()), sharpness(image, face))
    reason = replace(job.clip_filter, min_seconds=0.0).rejection_reason(segment)
    if reason:
        return InputResult(job, [], [_rejected_row(job, job.source_id, reason)])
    write_image(job.out / f"clips/{job.source_id}.png", crop_with_padding(image, motion.crop, job.size))
    motion.save(job.out / f"clips/{job.source_id}.motion.npz")
    return InputResult(job, [_manifest_row(job, job.source_id, 1, ".png")], [])


def _process_video(job: InputJob, tracker: LandmarkerTracker) -> InputResult:
    """First pass: follow faces and judge; only numbers stay. Second pass: cut the crops out."""
    kept: list[tuple[str, int, int, tuple[float, float, float]]] = []  # id, first frame, frames, crop
    rejected, count = [], 0
    clips = job.out / "clips"
    with VideoReader(job.file, fps=CLIP_FPS) as reader:
        size = (reader.info.width, reader.info.height)
        frames = itertools.islice(reader, job.max_frames)
        for count, part in enumerate(
            track_segments(frames, tracker, CLIP_FPS, size, job.clip_filter.max_seconds), start=1
        ):
            name = f"{job.source_id}-c{count:02d}"
            reason = job.clip_filter.rejection_reason(part)
            if reason:
                rejected.append(_rejected_row(job, name, reason, part))
                continue
            part.motion.save(clips / f"{name}.motion.npz")
            kept.append((name, part.start, len(part.motion), part.motion.crop))
    if not count:
        return InputResult(job, [], [_rejected_row(job, job.source_id, "no face found")])
    if count == 1 and kept:  # the whole video is one clip
        (clips / f"{kept[0][0]}.motion.npz").replace(clips / f"{job.source_id}.motion.npz")
        kept = [(job.source_id, *kept[0][1:])]
    if kept:
        _write_crop_videos(job, kept)
    return InputResult(job, [_manifest_row(job, name, length, ".mp4") for name, _, length, _ in kept], rejected)


def _write_crop_videos(job: InputJob, parts: list[tuple[str, int, int, tuple[float, float, float]]]) -> None:
    """Write the crop video of every part (id, first frame, frames, crop), in order, in one pass over the file."""
    tags = {"comment": "face crop made by export3d preprocess"}
    at = 0
    with VideoReader(job.file, fps=CLIP_FPS) as reader:
        frames = iter(reader)
        for name, start, length, crop in parts:
            for _ in itertools.islice(frames, start - at):
                pass
            path = job.out / f"clips/{name}.mp4"
            with VideoWriter(path, size=(job.size, job.size), fps=CLIP_FPS, crf=14, metadata=tags) as writer:
                for frame in itertools.islice(frames, length):
                    writer.write(crop_image(frame, crop, job.size))
            at = start + length


def _manifest_row(job: InputJob, name: str, frames: int, suffix: str) -> ManifestRow:
    return {
        "id": name, "person": job.person, "file": f"clips/{name}{suffix}", "motion": f"clips/{name}.motion.npz",
        "frames": frames, "fps": f"{CLIP_FPS.numerator}/{CLIP_FPS.denominator}", "split": "train", "source": job.source_id,
    }  # fmt: skip


def _rejected_row(job: InputJob, name: str, reason: str, part: Segment | None = None) -> ManifestRow:
    line: ManifestRow = {"id": name, "source": job.source_id, "file": str(job.file), "reason": reason}
    if part is not None:
        line |= {
            "start": round(float(part.start / CLIP_FPS), 3),
            "seconds": round(float(len(part.motion) / CLIP_FPS), 3),
        }
    return line
