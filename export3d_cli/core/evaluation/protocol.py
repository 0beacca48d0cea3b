"""Who is animated by whom, and by which frames: the clips of a data set as the cases that `evaluate` scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.evaluation.scorer import Frames, yaw_pitch
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.encoder_settings import VIDEO_SUFFIXES
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import MAX_MANIFEST_BYTES, check_file, driver_track_id, ensure_relative

MAX_RUN_FRAMES = 12  # consecutive frames, at most, that steadiness is measured on
ASPECT_TOLERANCE = 0.02  # how far from square a finished video may be


@dataclass(frozen=True)
class Clip:
    """One line of a data set, with its motion."""

    id: str
    person: str
    file: Path
    motion: Motion

    @property
    def track(self) -> str:
        """See `shared_track`."""
        return driver_track_id(self.id)


@dataclass(frozen=True)
class Case:
    """Who is animated by whom; `target` is what should come out, where that is known."""

    source: Clip
    driver: Clip
    target: Clip | None

    @property
    def name(self) -> str:
        """For tables and file names: the clip's id, or `<source>-by-<driver>`."""
        return self.driver.id if self.driver is self.source else f"{self.source.id}-by-{self.driver.id}"


def read_clips(dataset: Path) -> list[Clip]:
    """The clips of a folder written by `preprocess`; raises `InputError` for any other."""
    path = dataset / "manifest.jsonl"
    if not path.is_file():
        raise InputError(f"{dataset} is not a data set (it has no {path.name}): make one with `export3d preprocess`")
    try:
        check_file(path, MAX_MANIFEST_BYTES)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        named = [(str(line["id"]), str(line.get("person") or line["id"])) for line in lines]
        for line in lines:
            ensure_relative(line["file"])
            ensure_relative(line["motion"])
            if Path(str(line["id"])).name != str(line["id"]):  # files are named after it
                raise ValueError(f"{str(line['id'])[:80]!r} is no name of a clip")
        paths = [(dataset / line["file"], dataset / line["motion"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise InputError(f"{dataset} is not a data set ({why}): make one with `export3d preprocess`") from error
    return [Clip(*names, file, Motion.load(motion)) for names, (file, motion) in zip(named, paths, strict=True)]


def cross_cases(clips: list[Clip], pairs: int, seed: int) -> list[Case]:
    """Fixed pairs: with the truth where heads share tracks, else of any two people; sources differ while they can."""
    rng = np.random.default_rng(seed)
    by_head: dict[str, dict[str, Clip]] = {}
    for clip in clips:
        if clip.track:
            by_head.setdefault(clip.person, {})[clip.track] = clip
    cases = []
    for place in rng.permutation(len(clips)):
        clip = clips[place]
        if by_head:  # the clip is the target
            others = [c for t, c in by_head.get(clip.person, {}).items() if t != clip.track]
            heads = [tracks for person, tracks in by_head.items() if person != clip.person]
            drivers = [tracks[clip.track] for tracks in heads if clip.track in tracks]
        else:  # the clip is the source
            others, drivers = [clip], [c for c in clips if c.person != clip.person and len(c.motion) > 1]
        if others and drivers:
            source, driver = others[rng.integers(len(others))], drivers[rng.integers(len(drivers))]
            cases.append(Case(source, driver, clip if by_head else None))
    return cases[:pairs]


def most_frontal_frame(motion: Motion) -> int:
    """The frame that looks most into the camera."""
    yaw, pitch = yaw_pitch(motion.camera).T
    score = np.abs(yaw) + np.abs(pitch - np.median(pitch))
    return int(np.where(motion.found, score, np.inf).argmin())


def load_source_image(clip: Clip, size: int) -> np.ndarray:
    """The source's picture: its most frontal frame, uint8 (size, size, 3)."""
    return decode_frames(clip, np.array([most_frontal_frame(clip.motion)]), size)[0]


def select_frames(case: Case, max_frames: int | None, take: str = "spread") -> np.ndarray:
    """Frames of the driver, and alike of the target, in which a face was tracked: at most `most`, spread or first.

    The source's own frame is none of them: repeating it there would be perfect, and count as 100 dB.
    """
    rows = np.flatnonzero(_tracked_frames(case))
    if case.driver is case.source:
        rows = rows[rows != most_frontal_frame(case.source.motion)]
    if max_frames is None or len(rows) <= max_frames:
        return rows
    return rows[:max_frames] if take == "first" else rows[np.linspace(0, len(rows) - 1, max_frames).round().astype(int)]


def consecutive_frames(case: Case, frames: int) -> np.ndarray:
    """Consecutive tracked frames about the clip's middle, a quarter of `frames` but 3 to 12; none: an empty array."""
    tracked, length = _tracked_frames(case), min(MAX_RUN_FRAMES, max(3, frames // 4))
    starts = [s for s in range(len(tracked) - length + 1) if tracked[s : s + length].all()]
    if not starts:
        return np.zeros(0, dtype=np.int64)
    first = min(starts, key=lambda s: abs(2 * s + length - len(tracked)))
    return np.arange(first, first + length)


def _tracked_frames(case: Case) -> np.ndarray:
    found = case.driver.motion.found
    if case.target is None:
        return found
    length = min(len(found), len(case.target.motion))
    both: np.ndarray = found[:length] & case.target.motion.found[:length]
    return both


def decode_frames(clip: Clip, rows: np.ndarray, size: int) -> Frames:
    """Frames `rows` (ascending) of a clip as squares of side `size`."""
    if has_image_suffix(clip.file):
        image = read_image(clip.file)
        if image.shape[0] != size:
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        return [image] * len(rows)
    frames = _decode_rows(clip.file, rows, size)
    if len(frames) < len(rows):
        raise InputError(f"{clip.file} has fewer frames than its motion file: preprocess it again")
    return frames


def load_result_frames(folder: Path, case: Case, rows: np.ndarray, size: int) -> Frames:
    """Frames `rows` of another tool's result for a case: `<case>.mp4` (or alike) or the folder `<case>` of pictures."""
    files = (folder / f"{case.name}{suffix}" for suffix in VIDEO_SUFFIXES)
    path = next((file for file in files if file.is_file()), None)
    if path is None and (folder / case.name).is_dir():
        path = folder / case.name
    if path is None:
        raise InputError(f"{folder} has no result for {case.name}: give {case.name}.mp4 or a folder {case.name}")
    with VideoReader(path) as reader:
        width, height = reader.info.width, reader.info.height
    if abs(width - height) > ASPECT_TOLERANCE * max(width, height):
        raise InputError(f"{path} is {width}x{height}: results have to be square, framed as the clip {case.driver.id}")
    frames = _decode_rows(path, rows, size)
    if len(frames) < len(rows):
        raise InputError(
            f"{path} is too short: it needs a frame for each of the {len(case.driver.motion)} of its driver"
        )
    return frames


def _decode_rows(path: Path, rows: np.ndarray, size: int) -> Frames:
    wanted, frames = set(rows.tolist()), []
    with VideoReader(path, size=(size, size)) as reader:
        for index, frame in enumerate(reader):
            if index in wanted:
                frames.append(frame)
            if len(frames) == len(wanted):
                break
    return frames
