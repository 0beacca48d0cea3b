"""Pictures to check tracking by eye: an overlay on the video, and an overview of a data set."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np

from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import contact_sheet, has_image_suffix, read_image, write_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.camera import project_points, yaw_pitch_roll
from export3d_cli.core.runtime.errors import Export3DError, InputError

T = TypeVar("T")
HEAD_AXIS_LENGTH = 0.2  # head-frame units
MAX_THUMBNAILS = 48
THUMBNAIL_PX, GRID_COLUMNS = 160, 12
MAX_MEASURED_CLIPS = 2000  # clips whose pose and expression are measured, spread evenly over the data set
MEASURED_COEFFICIENTS = {"jawOpen": ("jawOpen",), "blink": ("eyeBlinkLeft", "eyeBlinkRight"),
                         "smile": ("mouthSmileLeft", "mouthSmileRight")}  # fmt: skip


def draw_overlay(video: Path, motion: Motion, out: Path, *,
                 progress: Callable[[str, int, int | None], None] | None = None) -> None:  # fmt: skip
    """Write `video` with landmarks (green, grey where held), crop square and head axes (x red, y green, z blue)."""
    comment = "overlay of export3d preprocess"
    if has_image_suffix(video):
        write_image(out, draw_tracking(read_image(video), motion, 0), comment=comment)
        return
    with (
        VideoReader(video, fps=motion.fps) as reader,
        VideoWriter(out, size=motion.size, fps=motion.fps, metadata={"comment": comment}) as writer,
    ):
        for index, frame in enumerate(itertools.islice(reader, len(motion))):
            writer.write(draw_tracking(frame, motion, index))
            if progress is not None:
                progress("overlay", index + 1, len(motion))


def draw_tracking(frame: np.ndarray, motion: Motion, index: int) -> np.ndarray:
    """Return a copy of `frame`, uint8 (H, W, 3) RGB, with the tracking of row `index` drawn on it."""
    out = np.ascontiguousarray(frame).copy()
    x0, y0, side = motion.crop
    thickness = max(1, round(side / 250))
    cv2.rectangle(out, (int(x0), int(y0)), (int(x0 + side), int(y0 + side)), (255, 210, 0), thickness)
    colour = (60, 230, 90) if motion.found[index] else (150, 150, 150)
    for x, y in (motion.landmarks[index, :, :2] * side + [x0, y0]).round().astype(int).tolist():
        cv2.circle(out, (x, y), max(0, thickness - 1), colour, -1)
    axis_tips = HEAD_AXIS_LENGTH * np.diag([1.0, 1.0, -1.0])  # z is drawn towards the camera
    corners = project_points(motion.camera[index], np.concatenate([np.zeros((1, 3)), axis_tips])) * side + [x0, y0]
    origin, *ends = [(int(x), int(y)) for x, y in corners]
    for end, colour in zip(ends, ((235, 50, 50), (50, 200, 50), (70, 110, 255)), strict=True):
        cv2.line(out, origin, end, colour, thickness + 1, cv2.LINE_AA)
    return out


def draw_report(folder: Path, clips: list[dict[str, Any]], out: Path) -> list[str]:
    """Write the middle frames of up to 48 clips of a data set; return percentiles of its poses and expressions."""
    shown = _sample_evenly(clips, MAX_THUMBNAILS)
    frames = [_read_clip(folder, clip, "file", _middle_frame) for clip in shown]
    tiles = [cv2.resize(frame, (THUMBNAIL_PX,) * 2, interpolation=cv2.INTER_AREA) for frame in frames]
    names = [str(clip["id"]).encode("ascii", "replace").decode()[-16:] for clip in shown]
    sheet = contact_sheet(tiles, min(len(tiles), GRID_COLUMNS), names)
    write_image(out, sheet, comment="report of export3d preprocess")
    count, people = sum(int(clip["frames"]) for clip in clips), len({clip.get("person") for clip in clips})
    lines = [f"report in {out}: {len(clips)} clips, {people} persons, {count} frames, {count / 1500:.1f} minutes"]
    motions = (_read_clip(folder, clip, "motion", Motion.load) for clip in _sample_evenly(clips, MAX_MEASURED_CLIPS))
    measured = [(yaw_pitch_roll(motion.camera[motion.found]), motion.beta[motion.found]) for motion in motions]
    pose, beta = (np.concatenate(rows) for rows in zip(*measured, strict=True))
    values = {"yaw, degrees": pose[:, 0], "pitch, degrees": pose[:, 1]}
    for name, coefficients in MEASURED_COEFFICIENTS.items():
        values[name] = beta[:, [ARKIT_NAMES.index(coefficient) for coefficient in coefficients]].mean(1)
    for name, x in values.items():
        p5, p50, p95 = np.percentile(x, [5, 50, 95])
        lines.append(f"{name}: 5 % below {p5:.2f}, median {p50:.2f}, 5 % above {p95:.2f}")
    return lines


def _sample_evenly(clips: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return at most `count` clips, evenly spaced from the first to the last."""
    return [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, count).round().astype(int))]


def _read_clip(folder: Path, clip: dict[str, Any], name: str, read: Callable[[Path], T]) -> T:
    """Read one of a clip's files; raise `InputError` with the remedy for a damaged one."""
    try:
        return read(folder / clip[name])
    except (Export3DError, OSError, StopIteration) as error:
        reason = str(error) or f"{folder / clip[name]} has no frames"
        rows = f"manifest.jsonl and inputs/{clip.get('source', clip['id'])}.jsonl"
        raise InputError(f"{reason}; delete {rows} in {folder} and run again: the clip is rewritten") from error


def _middle_frame(file: Path) -> np.ndarray:
    if has_image_suffix(file):
        return read_image(file)
    with VideoReader(file) as reader:
        info = reader.info
    with VideoReader(file, start=max(0.0, float((info.frame_count // 2) / info.fps) - 0.001)) as reader:
        return next(iter(reader))
