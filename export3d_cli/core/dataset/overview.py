"""Pictures to check tracking by eye: an overlay on the video, and an overview of a data set."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import has_image_suffix, read_image, write_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.camera import Camera, yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError

HEAD_AXIS_LENGTH = 0.2  # head-frame units
MAX_THUMBNAILS = 48
THUMBNAIL_PX, GRID_COLUMNS = 96, 12
CAPTION_PX, LINE_PX = 14, 24  # heights of the clip's name below its thumbnail, and of a line of text
MAX_MEASURED_CLIPS = 2000  # clips whose pose and expression are measured, spread evenly over the data set
MEASURED_COEFFICIENTS = {
    "jawOpen": ("jawOpen",),
    "blink": ("eyeBlinkLeft", "eyeBlinkRight"),
    "smile": ("mouthSmileLeft", "mouthSmileRight"),
}
DARK_GREY = (40, 40, 40)


def draw_overlay(
    video: Path, motion: Motion, out: Path, *, progress: Callable[[str, int, int | None], None] | None = None
) -> None:
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
    points = motion.landmarks[index, :, :2] * side + [x0, y0]
    for x, y in points.round().astype(int).tolist():
        cv2.circle(out, (x, y), max(0, thickness - 1), colour, -1)
    camera = Camera.from_vector(motion.camera[index])
    axis_tips = HEAD_AXIS_LENGTH * np.diag([1.0, 1.0, -1.0])  # z is drawn towards the camera
    corners = camera.project(np.concatenate([np.zeros((1, 3)), axis_tips])) * side + [x0, y0]
    origin, *ends = [(int(x), int(y)) for x, y in corners]
    for end, colour in zip(ends, ((235, 50, 50), (50, 200, 50), (70, 110, 255)), strict=True):
        cv2.line(out, origin, end, colour, thickness + 1, cv2.LINE_AA)
    return out


def draw_report(folder: Path, clips: list[dict[str, Any]], out: Path) -> Path:
    """Write an overview of a data set: the middle frame of up to 48 clips, percentiles of pose and expression."""
    tiles = [_make_thumbnail(folder, clip) for clip in _sample_evenly(clips, MAX_THUMBNAILS)]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % GRID_COLUMNS)
    rows = [np.hstack(tiles[i : i + GRID_COLUMNS]) for i in range(0, len(tiles), GRID_COLUMNS)]
    frames, people = sum(int(clip["frames"]) for clip in clips), len({clip.get("person") for clip in clips})
    lines = [f"{len(clips)} clips, {people} persons, {frames} frames, {frames / 1500:.1f} minutes"]
    measured = _sample_evenly(clips, MAX_MEASURED_CLIPS)
    pose, beta = _load_poses_and_expressions(folder, measured)
    values = {"yaw, degrees": pose[:, 0], "pitch, degrees": pose[:, 1]}
    for name, coefficients in MEASURED_COEFFICIENTS.items():
        values[name] = beta[:, [ARKIT_NAMES.index(coefficient) for coefficient in coefficients]].mean(1)
    for name, x in values.items():
        p5, p50, p95 = np.percentile(x, [5, 50, 95])
        lines.append(f"{name}: 5 % below {p5:.2f}, median {p50:.2f}, 5 % above {p95:.2f}")
    text = np.full((LINE_PX * (len(lines) + 1), rows[0].shape[1], 3), 255, np.uint8)
    for i, line in enumerate(lines, start=1):
        _put_text(text, line, (12, LINE_PX * i), 0.5)
    write_image(out, np.vstack([*rows, text]), comment="report of export3d preprocess")
    return out


def _sample_evenly(clips: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return at most `count` clips, evenly spaced from the first to the last."""
    return [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, count).round().astype(int))]


def _make_thumbnail(folder: Path, clip: dict[str, Any]) -> np.ndarray:
    """Return the middle frame of a clip with the clip's name below it."""
    file = folder / clip["file"]
    if has_image_suffix(file):
        frame = read_image(file)
    else:
        with VideoReader(file) as reader:
            info = reader.info
        with VideoReader(file, start=max(0.0, float((info.frame_count // 2) / info.fps) - 0.001)) as reader:
            frame = next(iter(reader))
    tile = np.full((THUMBNAIL_PX + CAPTION_PX, THUMBNAIL_PX, 3), 255, np.uint8)
    tile[:THUMBNAIL_PX] = cv2.resize(frame, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    name = str(clip["id"]).encode("ascii", "replace").decode()[-16:]
    _put_text(tile, name, (1, THUMBNAIL_PX + 11), 0.32)
    return tile


def _load_poses_and_expressions(folder: Path, clips: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return yaw, pitch, roll (F, 3) in degrees and beta (F, 64) of all frames with a face, without the landmarks."""
    poses, betas = [], []
    for clip in clips:
        path = folder / clip["motion"]
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                found = data["found"].astype(bool)
                poses.append(yaw_pitch_roll(data["camera"][found]).astype(np.float32))
                betas.append(data["beta"][found].astype(np.float32))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} cannot be read ({error}): remove its row from the manifest and run again"
            ) from error
    return np.concatenate(poses), np.concatenate(betas)


def _put_text(canvas: np.ndarray, text: str, position: tuple[int, int], scale: float) -> None:
    cv2.putText(canvas, text, position, cv2.FONT_HERSHEY_SIMPLEX, scale, DARK_GREY, 1, cv2.LINE_AA)
