"""Evaluation cases: source, driver and frame indices from the clips of a data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from export3d_cli.core.evaluation.scorer import Frames
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VIDEO_SUFFIXES
from export3d_cli.core.runtime.camera import yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import driver_track_id, read_manifest

Photo = Literal["frontal", "first"]  # which frame of a clip: the most frontal, or the first with a face
MAX_RUN_FRAMES = 12  # longest run of consecutive frames for flicker and jitter
ASPECT_TOLERANCE = 0.02  # allowed |width - height| / longer side of a result video


@dataclass(frozen=True)
class Clip:
    """One row of the manifest with its motion."""

    id: str
    person: str
    file: Path
    motion: Motion


@dataclass(frozen=True)
class Case:
    """A source clip and a driver clip; the driver animates the source's frame `photo`."""

    source: Clip
    driver: Clip
    photo: Photo = "frontal"

    @property
    def name(self) -> str:
        """Return the name for tables and files: the clip's id, or `<source>-by-<driver>`."""
        return self.driver.id if self.driver is self.source else f"{self.source.id}-by-{self.driver.id}"

    @property
    def photo_row(self) -> int:
        """Return the index of the source's frame that is the photo."""
        motion = self.source.motion
        return most_frontal_frame(motion) if self.photo == "frontal" else int(motion.found.argmax())

    @property
    def has_truth(self) -> bool:
        """Whether the source clip is what the result should look like: by itself, or by a head with the same track."""
        track = driver_track_id(self.source.id)
        return self.driver is self.source or (track != "" and track == driver_track_id(self.driver.id))


def read_clips(dataset: Path) -> list[Clip]:
    """Return the clips of a folder written by `preprocess`; raise `InputError` for any other folder."""
    return [Clip(row["id"], str(row.get("person") or row["id"]), dataset / row["file"],
                 Motion.load(dataset / row["motion"])) for row in read_manifest(dataset)]  # fmt: skip


def cross_cases(clips: list[Clip], pairs: int, seed: int, photo: Photo = "frontal") -> list[Case]:
    """Return up to `pairs` cases of different sources, fixed by the seed; with ground truth if heads share tracks."""
    cases = [Case(a, b, photo) for a in clips for b in clips if a.person != b.person and len(b.motion) > 1]
    cases = [case for case in cases if case.has_truth] or cases
    chosen: dict[str, Case] = {}
    for index in np.random.default_rng(seed).permutation(len(cases)):
        chosen.setdefault(cases[index].source.id, cases[index])
    return list(chosen.values())[:pairs]


def most_frontal_frame(motion: Motion) -> int:
    """Return the index of the frame whose head faces the camera most directly."""
    yaw, pitch, _ = yaw_pitch_roll(motion.camera).T
    score = np.abs(yaw) + np.abs(pitch - np.median(pitch))
    return int(np.where(motion.found, score, np.inf).argmin())


def select_frames(case: Case, max_frames: int | None, take: str = "spread") -> np.ndarray:
    """Return the indices of up to `max_frames` frames in which driver and truth have a face, spread evenly or first.

    The frame that is the photo is left out: a repeated photo would be perfect there and count as 100 dB.
    """
    rows = np.flatnonzero(_tracked_frames(case))
    if case.has_truth:
        rows = rows[rows != case.photo_row]
    if max_frames is None or len(rows) <= max_frames:
        return rows
    return rows[:max_frames] if take == "first" else rows[np.linspace(0, len(rows) - 1, max_frames).round().astype(int)]


def consecutive_frames(case: Case, frames: int) -> np.ndarray:
    """Return indices of frames / 4 (3 to 12) consecutive tracked frames near the clip's middle; empty if none."""
    tracked, length = _tracked_frames(case), min(MAX_RUN_FRAMES, max(3, frames // 4))
    starts = [s for s in range(len(tracked) - length + 1) if tracked[s : s + length].all()]
    if not starts:
        return np.zeros(0, dtype=np.int64)
    first = min(starts, key=lambda s: abs(2 * s + length - len(tracked)))
    return np.arange(first, first + length)


def _tracked_frames(case: Case) -> np.ndarray:
    motions = [case.driver.motion, case.source.motion] if case.has_truth else [case.driver.motion]
    length = min(map(len, motions))
    return np.all([motion.found[:length] for motion in motions], axis=0)


def decode_frames(clip: Clip, rows: np.ndarray) -> Frames:
    """Decode frames `rows` (ascending) of a clip."""
    if has_image_suffix(clip.file):
        return [read_image(clip.file)] * len(rows)
    frames = read_rows(clip.file, rows)
    if len(frames) < len(rows):
        raise InputError(f"{clip.file} has fewer frames than its motion file: run preprocess again")
    return frames


def load_result_frames(folder: Path, case: Case, rows: np.ndarray, size: tuple[int, int]) -> Frames:
    """Load frames `rows` of a tool's `<case>.mp4`, or folder `<case>` of pictures, at `size` (width, height)."""
    files = (folder / f"{case.name}{suffix}" for suffix in (*VIDEO_SUFFIXES, ""))
    path = next((file for file in files if file.exists()), None)
    if path is None:
        raise InputError(f"{folder} has no result for {case.name}: give {case.name}.mp4 or a folder {case.name}")
    with VideoReader(path) as reader:
        width, height = reader.info.width, reader.info.height
    if abs(width - height) > ASPECT_TOLERANCE * max(width, height):
        raise InputError(f"{path} is {width}x{height}, must be square: frame it as the clip {case.driver.id}")
    frames = read_rows(path, rows, size)
    if len(frames) < len(rows):
        raise InputError(f"{path} is too short: it must have {len(case.driver.motion)} frames, "
                         "one for each of its driver")  # fmt: skip
    return frames


def read_rows(path: Path, rows: np.ndarray, size: tuple[int, int] | None = None) -> Frames:
    """Decode those of the frames `rows` that a video has, resized to `size` (width, height) if it is given."""
    wanted, frames = set(rows.tolist()), []
    with VideoReader(path, size=size) as reader:
        for index, frame in enumerate(reader):
            if index in wanted:
                frames.append(frame)
            if len(frames) == len(wanted):
                break
    return frames
