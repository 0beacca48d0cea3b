"""Turns videos and photos into face crops with motion: one motion file, or a training data set.

A data set is `manifest.jsonl` (one row per clip: id, person, file, motion, frames, fps, split, source) and
`clips/<id>.mp4` or `.png` (square face crops) with `clips/<id>.motion.npz`; `rejected.jsonl` says what was left out and
why. Every finished input leaves its rows in `inputs/<id>.jsonl`, and both lists are made from these files, so an
interrupted run loses one input only, and several runs (shards) can fill one data set. A clip that covers its whole
video has the video's id, others `<id>-cNN`. A video is read twice, to track faces and to write the crops, so that
memory never holds more than one frame. A folder with `exact_views` gives a clip of each head that is not held out, with
the key `depth`: `clips/<id>.depth.npz`, see `crop_depth`.
"""

import concurrent.futures
import contextlib
import itertools
import json
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

from export3d_cli.core.dataset.exact_views import crop_depth, has_exact_views, read_labels, split_heads
from export3d_cli.core.dataset.overview import draw_overlay, draw_report
from export3d_cli.core.dataset.segmentation import ClipFilter, Segment, sharpness, track_segments
from export3d_cli.core.face import arkit
from export3d_cli.core.face.crop import crop_image, crop_with_padding
from export3d_cli.core.face.face_track import Face, FaceTrack, TargetFaceTracker, choose_face
from export3d_cli.core.face.motion import Motion, resample_rows
from export3d_cli.core.face.speech import DEFAULT_FPS, read_speech
from export3d_cli.core.face.tracker import LandmarkerTracker, TrackerName, open_landmarker_tracker, open_tracker
from export3d_cli.core.media.image import has_image_suffix, read_image, write_image
from export3d_cli.core.media.probe import DEFAULT_FOLDER_FPS, is_sound
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.errors import Export3DError, InputError, NoFaceError
from export3d_cli.core.runtime.files import folder_lock, read_rows, remove_stale_temporaries, shorten_name, write_atomic

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".mpg", ".mpeg", ".ts", ".mts", ".wmv")
CLIP_FPS = Fraction(25)  # frame rate of the clips in a data set
CLIP_FILTER_OPTIONS = "--min-seconds, --max-seconds, --min-face, --max-yaw"
Progress = Callable[[str, int, "int | None"], None]
PersonRule = Literal["name", "folder"]
ManifestRow = dict[str, Any]


@dataclass(frozen=True)
class PreprocessSummary:
    """The result of a run; `clips` and `frames` count the whole data set."""

    clips: int
    frames: int
    rejected: list[str] = field(default_factory=list)  # "file: reason", of this run only
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class InputJob:
    """One input with everything a worker needs to process it."""

    file: Path
    source_id: str  # unique in the data set: the path below the given folder, without suffix
    person: str
    out: Path
    size: int
    max_frames: int | None
    clip_filter: ClipFilter


def preprocess(inputs: list[Path], out: Path, *, size: int | None = None, workers: int | None = None,
               max_frames: int | None = None, fps: Fraction | None = None, clip_filter: ClipFilter | None = None,
               person: PersonRule | None = None, shard: tuple[int, int] | None = None, face: str | None = None,
               tracker: TrackerName | None = None, overlay: Path | None = None, report: bool = False,
               progress: Progress | None = None) -> PreprocessSummary:  # fmt: skip
    """Track faces and write one motion file (`out` ends in .motion.npz, .csv or .json) or a data set (a folder).

    `inputs` are videos, photos or folders; `max_frames` of each input are used. For a data set only: `size`, the side
    of the crops (256 pixels), number of `workers` (1), `clip_filter`, `person` (the id is the file "name" up to its
    last underscore, or the "folder"), `shard` (i, n) for every n-th input from the i-th, and `report`, which adds
    `report.png`. Inputs that are in it already are kept, so that an interrupted run can be continued. Its clips have 25
    frames/s. For a motion file only: `fps`, `face`, `tracker` (see `extract_motion`), and `overlay`, a video or image
    to write with the tracking drawn on it. Raises `InputError` for an option that does not apply, `NoFaceError` if no
    input has a usable face.
    """
    if out.suffix in (".npz", ".csv", ".json"):
        options: dict[str, Any] = {"--size": size, "--workers": workers, CLIP_FILTER_OPTIONS: clip_filter}
        options |= {"--person": person, "--shard": shard, "--report": report or None}
        _refuse(options, f"{out} is a motion file", "a data set (a folder as OUT)")
        return _write_motion_file(inputs, out, overlay, progress, max_frames=max_frames, fps=fps, face=face,
                                  tracker=tracker)  # fmt: skip
    options = {"--fps": fps, "--face": face, "--tracker": tracker, "--overlay": overlay}
    _refuse(options, f"{out} is a data set", "a motion file (OUT ends in .motion.npz, .csv or .json)")
    all_inputs = _find_inputs(inputs, out)
    if not all_inputs:
        raise InputError(f"no video or image in {', '.join(map(str, inputs))}")
    clip_filter = clip_filter or ClipFilter()
    notes = []
    if max_frames is not None and max_frames / CLIP_FPS < clip_filter.min_seconds:
        clip_filter = replace(clip_filter, min_seconds=float(max_frames / CLIP_FPS))
        notes.append(f"clips from {clip_filter.min_seconds:g} s are kept, because inputs are cut at "
                     f"{max_frames} frames")  # fmt: skip
    shard_inputs = all_inputs if shard is None else all_inputs[shard[0] - 1 :: shard[1]]
    with folder_lock(out, shared=shard is not None):
        finished = DatasetManifest(out).finished_sources
        settings = (out, size or 256, max_frames, clip_filter)
        new = [(file, source_id) for file, source_id in shard_inputs if source_id not in finished]
        jobs = [InputJob(file, source_id, _person_id(file, source_id, person), *settings) for file, source_id in new]
        if len(jobs) < len(shard_inputs):
            notes.append(f"{len(shard_inputs) - len(jobs)} inputs of an earlier run are kept as they are")
        rejected: list[str] = []
        try:
            with contextlib.closing(_run_jobs(jobs, workers or 1)) as results:
                for count, reasons in enumerate(results, start=1):
                    rejected += reasons
                    if progress is not None:
                        progress("inputs", count, len(jobs))
        finally:
            for folder in (out / "clips", out / "inputs"):
                remove_stale_temporaries(folder)  # of workers that were stopped
            manifest = DatasetManifest(out)
            manifest.write()
    if not manifest.clips and shard is None:
        first = rejected[0] if rejected else f"see {out / 'rejected.jsonl'}"
        raise NoFaceError(f"none of the {len(all_inputs)} inputs gave a usable clip; the first: {first}")
    if report and manifest.clips:
        notes += draw_report(out, manifest.clips, out / "report.png")
    return PreprocessSummary(len(manifest.clips), sum(row["frames"] for row in manifest.clips), rejected, notes)


def _refuse(options: dict[str, Any], output: str, applies_to: str) -> None:
    """Raise `InputError` for options, by name, that are not None."""
    unused = ", ".join(name for name, value in options.items() if value is not None)
    if unused:
        raise InputError(f"{output}, and {unused} applies to {applies_to} only: remove it, or change OUT")


def _write_motion_file(inputs: list[Path], out: Path, overlay: Path | None, progress: Progress | None,
                       **options: Any) -> PreprocessSummary:  # fmt: skip
    if len(inputs) != 1:
        raise InputError(f"{out} holds the motion of one input, got {len(inputs)}: give one, or a folder as OUT")
    if has_no_pictures(inputs[0]):
        picture_options = {"--face": options["face"], "--tracker": options["tracker"], "--overlay": overlay}
        _refuse(picture_options, f"{inputs[0]} has no pictures", "videos and photos")
    given = {name: value for name, value in options.items() if value is not None}
    motion, notes = extract_motion(inputs[0], progress=progress, **given)
    if out.suffix in (".csv", ".json"):
        arkit.write_coefficients(out, motion)
    else:
        motion.save(out)
    if overlay is not None:
        draw_overlay(inputs[0], motion, overlay, progress=progress)
    return PreprocessSummary(1, len(motion), notes=notes)


def _find_inputs(inputs: list[Path], out: Path) -> list[tuple[Path, str]]:
    """Return every input file with an id that is unique in the data set, sorted within each folder."""
    ids: dict[Path, str] = {}
    taken: set[str] = set()
    for path in inputs:
        if not path.exists():
            raise InputError(f"{path} does not exist: give a video, a photo or a folder")
        if out.resolve() in path.resolve().parents:
            raise InputError(f"{path} lies in the output folder {out}: choose another output folder")
        if has_exact_views(path):
            files = [path / f"clips/{name}.mp4" for name in split_heads(path)[0]]
        else:
            files = sorted(p for p in path.rglob("*") if _is_input_file(p, path, out)) if path.is_dir() else [path]
        for file in files:
            if file in ids:
                continue
            folders = file.relative_to(path).parent.parts if path.is_dir() else ()
            base = "-".join([*folders, file.stem.lstrip(".")]) + ("-still" if has_image_suffix(file) else "")
            base = shorten_name(base, 200)  # the names of its files are longer
            base += "-video" if re.search(r"-c\d{2,}$", base) else ""  # "a-c01" is the id of the first clip of "a"
            name, k = base, 2
            while name in taken:
                name, k = f"{base}-{k}", k + 1
            taken.add(name)
            ids[file] = name
    return list(ids.items())


def _is_input_file(path: Path, folder: Path, out: Path) -> bool:
    """Return whether a file in an input folder is a visible video or image outside the output folder."""
    if any(part.startswith(".") for part in path.relative_to(folder).parts) or out in path.parents:
        return False
    return (path.suffix.lower() in VIDEO_SUFFIXES or has_image_suffix(path)) and path.is_file()


def _person_id(file: Path, source_id: str, rule: PersonRule | None) -> str:
    """Return the file name up to its last underscore, or the name of the folder it lies in."""
    return file.resolve().parent.name or source_id if rule == "folder" else file.stem.rsplit("_", 1)[0]


def _run_jobs(jobs: list[InputJob], workers: int) -> Generator[list[str], None, None]:
    """Process the inputs; yield the reasons of the rejected clips of each."""
    if workers <= 1 or len(jobs) <= 1:
        yield from map(_process_input, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, _init_worker)
    futures = [pool.submit(_process_input, job) for job in jobs]
    processes = list((pool._processes or {}).values())
    finished = False
    try:
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
        finished = True
    except concurrent.futures.process.BrokenProcessPool as error:
        raise Export3DError("a worker process died: run the same command again, with fewer --workers if memory is "
                            "short (finished inputs are kept)") from error  # fmt: skip
    finally:
        if not finished:  # interrupted: abandon the inputs in progress
            for process in processes:
                process.terminate()
        pool.shutdown(cancel_futures=True)


_worker_tracker: LandmarkerTracker | None = None  # one per process


def _init_worker() -> None:
    """Leave Ctrl-C to the parent, which ends the workers; without it a worker would wait for an input forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _process_input(job: InputJob) -> list[str]:
    """Write the crops, motion files and rows of one input; return the reasons of its rejected clips."""
    global _worker_tracker
    _worker_tracker = _worker_tracker or open_landmarker_tracker()
    clips: list[ManifestRow] = []
    try:
        process = _process_image if has_image_suffix(job.file) else _process_video
        if has_exact_views(job.file.absolute().parent.parent):
            process = _process_exact_views
        clips, rejected = process(job, _worker_tracker)
    except Export3DError as error:
        rejected = [_rejected_row(job, job.source_id, str(error)) | {"failed": not isinstance(error, NoFaceError)}]
    write_rows(job.out / f"inputs/{job.source_id}.jsonl", clips + rejected)
    return [f"{job.file}: {row['reason']}" for row in rejected]


def _process_image(job: InputJob, tracker: LandmarkerTracker) -> tuple[list[ManifestRow], list[ManifestRow]]:
    image = read_image(job.file)
    face = tracker.find(image)
    if face is None:
        return [], [_rejected_row(job, job.source_id, "no face found")]
    motion = tracker.make_motion([face], CLIP_FPS, (image.shape[1], image.shape[0]))
    segment = Segment(0, motion, float(np.ptp(face.landmarks[:, :2], axis=0).max()), sharpness(image, face))
    reason = replace(job.clip_filter, min_seconds=0.0).rejection_reason(segment)
    if reason:
        return [], [_rejected_row(job, job.source_id, reason)]
    write_image(job.out / f"clips/{job.source_id}.png", crop_with_padding(image, motion.crop, job.size))
    motion.save(job.out / f"clips/{job.source_id}.motion.npz")
    return [_manifest_row(job, job.source_id, 1, ".png")], []


def _process_video(job: InputJob, tracker: LandmarkerTracker) -> tuple[list[ManifestRow], list[ManifestRow]]:
    """First pass: track faces, filter the segments, write their motion. Second pass: write the crop videos."""
    kept: list[tuple[str, int, int, tuple[float, float, float]]] = []  # id, first frame, frames, crop
    rejected, count = [], 0
    folder = job.out / "clips"
    with VideoReader(job.file, fps=CLIP_FPS) as reader:
        size = (reader.info.width, reader.info.height)
        frames = itertools.islice(reader, job.max_frames)
        segments = track_segments(frames, tracker, CLIP_FPS, size, job.clip_filter.max_seconds)
        for count, segment in enumerate(segments, start=1):
            name = f"{job.source_id}-c{count:02d}"
            reason = job.clip_filter.rejection_reason(segment)
            if reason:
                rejected.append(_rejected_row(job, name, reason, segment))
                continue
            segment.motion.save(folder / f"{name}.motion.npz")
            kept.append((name, segment.start, len(segment.motion), segment.motion.crop))
    if not count:
        return [], [_rejected_row(job, job.source_id, "no face found")]
    if count == 1 and kept:  # the whole video is one clip
        (folder / f"{kept[0][0]}.motion.npz").replace(folder / f"{job.source_id}.motion.npz")
        kept = [(job.source_id, *kept[0][1:])]
    if kept:
        _write_crop_videos(job, kept)
    return [_manifest_row(job, name, length, ".mp4") for name, _, length, _ in kept], rejected


def _process_exact_views(job: InputJob, tracker: LandmarkerTracker) -> tuple[list[ManifestRow], list[ManifestRow]]:
    """Write one clip of all pictures of a rendered head, which do not follow each other in time, and its depth."""
    labels, name = read_labels(job.file.parents[1], job.file.stem), f"clips/{job.source_id}"
    with VideoReader(job.file, fps=CLIP_FPS) as reader:
        size = (reader.info.width, reader.info.height)
        faces = [FaceTrack(tracker).settle(picture) for picture in itertools.islice(reader, job.max_frames)]
    if size[0] != size[1] or len(faces) > len(labels.depth):
        raise InputError(f"{job.file} must have {len(labels.depth)} square pictures like its depth, "
                         f"got {len(faces)} of {size}")  # fmt: skip
    motion = tracker.make_motion(faces, CLIP_FPS, size)
    motion.save(job.out / f"{name}.motion.npz")
    depth, person = crop_depth(labels, motion)
    with write_atomic(job.out / f"{name}.depth.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, depth=depth, person=person)
    _write_crop_videos(job, [(job.source_id, 0, len(faces), motion.crop)])
    return [_manifest_row(job, job.source_id, len(faces), ".mp4") | {"depth": f"{name}.depth.npz"}], []


def _write_crop_videos(job: InputJob, segments: list[tuple[str, int, int, tuple[float, float, float]]]) -> None:
    """Write the crop video of every segment (id, first frame, frames, crop), in order, in one pass over the file."""
    tags = {"comment": "face crop made by export3d preprocess"}
    position = 0
    with VideoReader(job.file, fps=CLIP_FPS) as reader:
        frames = iter(reader)
        for name, start, length, crop in segments:
            for _ in itertools.islice(frames, start - position):
                pass
            path = job.out / f"clips/{name}.mp4"
            with VideoWriter(path, size=(job.size, job.size), fps=CLIP_FPS, crf=14, metadata=tags) as writer:
                for frame in itertools.islice(frames, length):
                    writer.write(crop_image(frame, crop, job.size))
            position = start + length


def _manifest_row(job: InputJob, name: str, frames: int, suffix: str) -> ManifestRow:
    return {
        "id": name, "person": job.person, "file": f"clips/{name}{suffix}", "motion": f"clips/{name}.motion.npz",
        "frames": frames, "fps": f"{CLIP_FPS.numerator}/{CLIP_FPS.denominator}", "split": "train",
        "source": job.source_id,
    }  # fmt: skip


def _rejected_row(job: InputJob, name: str, reason: str, segment: Segment | None = None) -> ManifestRow:
    row: ManifestRow = {"id": name, "source": job.source_id, "file": str(job.file), "reason": reason}
    if segment is not None:
        seconds = float(len(segment.motion) / CLIP_FPS)
        row |= {"start": round(float(segment.start / CLIP_FPS), 3), "seconds": round(seconds, 3)}
    return row


class DatasetManifest:
    """The rows of a data set when this object is made."""

    def __init__(self, out: Path) -> None:
        self.out = out
        paths = [out / "manifest.jsonl", *sorted((out / "inputs").glob("[!.]*.jsonl"))]
        rows = {row["id"]: row for path in paths if path.exists() for row in _read_rows(path)}
        self.clips = [row for _, row in sorted(rows.items()) if "reason" not in row]
        self.rejected = [row for _, row in sorted(rows.items()) if "reason" in row]
        failed = {_source(row) for row in self.rejected if row.get("failed")}  # the next run tries them again
        self.finished_sources = {_source(row) for row in rows.values()} - failed

    def write(self) -> None:
        """Write both lists."""
        write_rows(self.out / "manifest.jsonl", self.clips)
        write_rows(self.out / "rejected.jsonl", self.rejected)


def write_rows(path: Path, rows: list[ManifestRow]) -> None:
    """Write rows, one a line."""
    with write_atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _source(row: ManifestRow) -> str:
    return str(row.get("source", row["id"]))


def _read_rows(path: Path) -> list[ManifestRow]:
    try:
        return read_rows(path)
    except (InputError, ValueError) as error:
        raise InputError(f"{path} is not a manifest ({str(error)[:200]}): choose another output folder") from error


def has_no_pictures(path: Path) -> bool:
    """Return whether a file is an ARKit CSV, which holds coefficients, or a sound."""
    return path.suffix.lower() == ".csv" or (not path.is_dir() and not has_image_suffix(path) and is_sound(path))


def extract_motion(
    path: Path, *, fps: Fraction | None = None, max_frames: int | None = None, face: str = "largest",
    tracker: TrackerName = "landmarker", progress: Callable[[str, int, int | None], None] | None = None,
) -> tuple[Motion, list[str]]:  # fmt: skip
    """Track one face of a video or photo, or read a CSV or sound, at EG3D's radius; return motion and notes.

    `fps` None is the video's rate, 25 for pictures and sounds; for `face` see `choose_face`. Raises `NoFaceError`.
    """
    if path.suffix.lower() == ".csv":
        motion, notes = arkit.read_csv(path, orbit_camera(0))
        fps = fps or motion.fps
        rows = resample_rows(len(motion), motion.fps, fps, 0.0, None)[:max_frames]
        return replace(motion.select(rows), fps=fps), notes
    if has_no_pictures(path):
        fps = fps or DEFAULT_FPS
        duration = None if max_frames is None else float(max_frames / fps)
        return read_speech(path, orbit_camera(0), fps=fps, duration=duration)
    face_tracker = open_tracker(tracker)
    faces: list[Face | None] = []
    if has_image_suffix(path):
        image = read_image(path)
        candidates = face_tracker.find_all(image)
        faces += [choose_face(candidates, face, str(path))] if candidates else []
        fps, size, notes = fps or DEFAULT_FOLDER_FPS, (image.shape[1], image.shape[0]), []
    else:
        with VideoReader(path, fps=fps) as reader:
            fps, size, notes = reader.info.fps, (reader.info.width, reader.info.height), reader.notes
            total = min(reader.info.frame_count, max_frames or reader.info.frame_count)
            track = TargetFaceTracker(face_tracker, fps, choice=face, name=str(path))
            for frame in itertools.islice(reader, max_frames):
                faces.append(track(frame))
                if progress is not None:
                    progress("tracking", len(faces), total)
            notes = [*notes, *track.notes]
    if all(candidate is None for candidate in faces):
        raise NoFaceError(f"no face found in {path}: use a file where a face is large, upright and facing the camera")
    return face_tracker.make_motion(faces, fps, size), notes
