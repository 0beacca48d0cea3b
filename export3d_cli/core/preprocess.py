"""Videos and photos -> face crops with Motion: one file, or a folder into a training data set.

A data set is `manifest.jsonl` (one line a clip: id, person, file, motion, frames, fps, split) and `clips/<id>.mp4` or
`.png` (square face crops) with `clips/<id>.motion.npz`. The person is the file name up to its last underscore.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli.core.errors import Export3DError, InputError, NoFaceError
from export3d_cli.core.face.motion import CROP_SCALE, Motion, Tracker, crop_image
from export3d_cli.core.files import write_atomic
from export3d_cli.core.media.image import is_image, read_image, write_image
from export3d_cli.core.media.video import VideoReader, VideoWriter
from export3d_cli.core.weights import resolve

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
RATE = Fraction(25)
LEAST_FOUND = 0.9  # share of frames with a face that a training clip needs
Progress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True)
class PreprocessSummary:
    """What became of the inputs."""

    clips: int
    frames: int
    rejected: list[str] = field(default_factory=list)  # "file: reason"


def preprocess(
    inputs: list[Path],
    out: Path,
    *,
    size: int = 256,
    workers: int = 1,
    max_frames: int | None = None,
    progress: Progress | None = None,
) -> PreprocessSummary:
    """Track faces; write a Motion file (one input, `out` ending in .motion.npz) or a data set (folder `out`).

    Clips already in the data set are kept, so that a run that was cut off goes on. Raises `InputError` when there is
    nothing to read and `NoFaceError` when no input has a face.
    """
    if out.name.endswith(".npz"):
        if len(inputs) != 1 or inputs[0].is_dir():
            raise InputError(f"{out} can hold the motion of one video, got {len(inputs)} inputs: give a folder instead")
        motion = track_video(inputs[0], Tracker(resolve("face_landmarker")), max_frames=max_frames, progress=progress)
        motion.save(out)
        return PreprocessSummary(1, len(motion))
    files = list(dict.fromkeys(file for path in inputs for file in _media_files(path)))
    if not files:
        raise InputError(f"no video or image in {', '.join(map(str, inputs))}")
    ids = _ids(files)
    done = {line["id"]: line for line in _read_manifest(out / "manifest.jsonl")}
    todo = [(file, clip, out, size, max_frames) for file, clip in zip(files, ids, strict=True) if clip not in done]
    (out / "clips").mkdir(parents=True, exist_ok=True)
    lines, rejected = list(done.values()), []
    for count, (file, line, reason) in enumerate(_map(todo, workers), start=1):
        if progress is not None:
            progress("clips", count, len(todo))
        if line is None:
            rejected.append(f"{file}: {reason}")
            continue
        lines.append(line)
        _write_manifest(out / "manifest.jsonl", lines)
    if not lines:
        raise NoFaceError(f"none of the {len(files)} inputs gave a usable clip; the first: {rejected[0]}")
    return PreprocessSummary(len(lines), sum(line["frames"] for line in lines), rejected)


def track_video(
    path: Path,
    tracker: Tracker,
    *,
    fps: Fraction | None = None,
    start: float = 0.0,
    duration: float | None = None,
    max_frames: int | None = None,
    scale: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> Motion:
    """Motion of the largest face of a video (or of a photo: one frame), read in a stream.

    `scale` is the crop's side in face boxes, wanted and least; None takes the usual one.
    """
    if is_image(path):
        image = read_image(path)
        faces, rate = [tracker.landmarker.find(image)], RATE
        size = (image.shape[1], image.shape[0])
    else:
        with VideoReader(path, fps=fps, start=start, duration=duration) as reader:
            rate, size = reader.info.fps, (reader.info.width, reader.info.height)
            total = min(reader.info.frames, max_frames or reader.info.frames)

            def frames() -> Iterator[np.ndarray]:
                for index, frame in enumerate(reader):
                    if max_frames is not None and index >= max_frames:
                        return
                    if progress is not None:
                        progress("tracking", index + 1, total)
                    yield frame

            faces = tracker.follow(frames())
    if not any(face is not None for face in faces):
        raise NoFaceError(f"no face found in {path}: use one where a face is large, upright and turned to the camera")
    return tracker.motion(faces, rate, size, scale=scale or CROP_SCALE)


def _media_files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path} does not exist: give a video, a photo or a folder of them")
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES or is_image(p))
    return [path]


def _ids(files: list[Path]) -> list[str]:
    """A name for each clip, unique in the data set."""
    ids: list[str] = []
    for file in files:
        base = file.stem if not is_image(file) else f"{file.stem}-still"
        name, k = base, 2
        while name in ids:
            name, k = f"{base}-{k}", k + 1
        ids.append(name)
    return ids


def _read_manifest(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a manifest ({error}): choose another output folder") from error


def _write_manifest(path: Path, lines: list[dict]) -> None:
    with write_atomic(path) as temporary:
        text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["id"]))
        temporary.write_text(text, encoding="utf-8")


Job = tuple[Path, str, Path, int, "int | None"]
Result = tuple[Path, "dict | None", str]
_tracker: Tracker | None = None


def _map(jobs: list[Job], workers: int) -> Iterator[Result]:
    if workers <= 1:
        yield from map(_make_clip, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_make_clip, jobs)


def _make_clip(job: Job) -> Result:
    """One input -> crop video (or PNG) and Motion file; a reason instead of a line when it cannot be used."""
    global _tracker
    file, clip, out, size, max_frames = job
    try:
        _tracker = _tracker or Tracker(resolve("face_landmarker"))
        motion = track_video(file, _tracker, fps=None if is_image(file) else RATE, max_frames=max_frames)
        if motion.found.mean() < LEAST_FOUND:
            return file, None, f"a face in only {motion.found.mean():.0%} of the frames"
        still = is_image(file)
        name = f"clips/{clip}{'.png' if still else '.mp4'}"
        if still:
            write_image(out / name, crop_image(read_image(file), motion.crop, size))
        else:
            tags = {"comment": "face crop made by export3d preprocess"}
            with (
                VideoReader(file, fps=RATE) as reader,
                VideoWriter(out / name, size=(size, size), fps=RATE, crf=14, metadata=tags) as writer,
            ):
                for frame, _ in zip(reader, range(len(motion)), strict=False):
                    writer.write(crop_image(frame, motion.crop, size))
        motion.save(out / "clips" / f"{clip}.motion.npz")
    except Export3DError as error:
        return file, None, str(error)
    person = file.stem.rsplit("_", 1)[0]
    rate = f"{motion.fps.numerator}/{motion.fps.denominator}"
    line = {
        "id": clip, "person": person, "file": name, "motion": f"clips/{clip}.motion.npz", "frames": len(motion),
        "fps": rate, "split": "train",
    }  # fmt: skip
    return file, line, ""
