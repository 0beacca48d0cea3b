"""What was tracked, to be looked at: marks drawn over a video, and a sheet of pictures and histograms of a data set."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from export3d_cli.core.dataset.segmentation import yaw_pitch_roll
from export3d_cli.core.face.beta import ARKIT_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import has_image_suffix, read_image, write_image
from export3d_cli.core.media.video import VideoReader, VideoWriter
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.errors import InputError

HEAD_AXIS_LENGTH = 0.2  # length of the head axes, in the head frame's unit
MAX_THUMBNAILS = 48  # clips on a sheet at most
MAX_MEASURED_CLIPS = 2000  # clips at most, spread over the data set, of which histograms are made
THUMBNAIL_PX, GRID_COLUMNS = 96, 12  # pixels; clips in a row
HISTOGRAM_SIZE_PX = (384, 200)  # width, height of a histogram
HISTOGRAM_COEFFICIENTS = {"jawOpen": ("jawOpen",), "blink": ("eyeBlinkLeft", "eyeBlinkRight"),
                "smile": ("mouthSmileLeft", "mouthSmileRight")}  # fmt: skip


def draw_overlay(
    video: Path, motion: Motion, out: Path, *, progress: Callable[[str, int, int | None], None] | None = None
) -> None:
    """Write `video` with its landmarks (green, grey where held), crop square and head axes (x red, y green, z blue)."""
    if has_image_suffix(video):
        write_image(out, draw_tracking(read_image(video), motion, 0), comment="overlay of export3d preprocess")
        return
    with (
        VideoReader(video, fps=motion.fps) as reader,
        VideoWriter(out, size=motion.size, fps=motion.fps, metadata={"comment": "overlay of export3d preprocess"})
        as writer,
    ):  # fmt: skip
        for index, frame in enumerate(itertools.islice(reader, len(motion))):
            writer.write(draw_tracking(frame, motion, index))
            if progress is not None:
                progress("overlay", index + 1, len(motion))


def draw_tracking(frame: np.ndarray, motion: Motion, index: int) -> np.ndarray:
    """A copy of uint8 (H, W, 3) RGB `frame` with what `motion` says about it drawn in."""
    out = np.ascontiguousarray(frame).copy()
    x0, y0, side = motion.crop
    thick = max(1, round(side / 250))
    low, high = (int(x0), int(y0)), (int(x0 + side), int(y0 + side))
    cv2.rectangle(out, low, high, (255, 210, 0), thick)
    colour = (60, 230, 90) if motion.found[index] else (150, 150, 150)
    points = motion.landmarks[index, :, :2] * side + [x0, y0]
    for x, y in points.round().astype(int).tolist():
        cv2.circle(out, (x, y), max(0, thick - 1), colour, -1)
    camera = Camera.from_vector(motion.camera[index])
    tips = np.concatenate(
        [np.zeros((1, 3)), HEAD_AXIS_LENGTH * np.diag([1.0, 1.0, -1.0])]
    )  # z drawn towards the camera
    start, *ends = [(int(x), int(y)) for x, y in camera.project(tips) * side + [x0, y0]]
    for end, hue in zip(ends, ((235, 50, 50), (50, 200, 50), (70, 110, 255)), strict=True):
        cv2.line(out, start, end, hue, thick + 1, cv2.LINE_AA)
    return out


def draw_report(folder: Path, lines: list[dict[str, Any]], out: Path) -> Path:
    """Write a sheet of a data set: the middle frame of up to 48 clips, histograms of pose and expression."""
    tiles = [_make_thumbnail(folder, line) for line in _sample_evenly(lines, MAX_THUMBNAILS)]
    tiles += [np.full((THUMBNAIL_PX + 14, THUMBNAIL_PX, 3), 255, np.uint8)] * (-len(tiles) % GRID_COLUMNS)
    rows = [np.hstack(tiles[i : i + GRID_COLUMNS]) for i in range(0, len(tiles), GRID_COLUMNS)]
    measured = _sample_evenly(lines, MAX_MEASURED_CLIPS)
    pose, beta = _load_poses_and_expressions(folder, measured)
    plots = [
        _draw_histogram("yaw, degrees", pose[:, 0], -60, 60),
        _draw_histogram("pitch, degrees", pose[:, 1], -60, 60),
    ]
    for name, parts in HISTOGRAM_COEFFICIENTS.items():
        plots.append(_draw_histogram(name, beta[:, [ARKIT_NAMES.index(part) for part in parts]].mean(1), 0, 1))
    frames = sum(int(line["frames"]) for line in lines)
    people = len({line.get("person") for line in lines})
    told = [f"{len(lines)} clips", f"{people} persons", f"{frames} frames", f"{frames / 1500:.1f} minutes"]
    told += [f"measured: {len(measured)} clips"] if len(measured) < len(lines) else []
    plots.append(_draw_text(*told))
    plots_rows = [np.hstack(plots[:3]), np.hstack(plots[3:])]
    write_image(out, np.vstack([*rows, *plots_rows]), comment="report of export3d preprocess")
    return out


def _sample_evenly(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most so many of the lines, from the first to the last."""
    return [lines[i] for i in np.unique(np.linspace(0, len(lines) - 1, count).round().astype(int))]


def _make_thumbnail(folder: Path, line: dict[str, Any]) -> np.ndarray:
    """The middle frame of a clip, its name under it."""
    file = folder / line["file"]
    if has_image_suffix(file):
        picture = read_image(file)
    else:
        with VideoReader(file) as reader:
            info = reader.info
        with VideoReader(file, start=max(0.0, float((info.frame_count // 2) / info.fps) - 0.001)) as reader:
            picture = next(iter(reader))
    tile = np.full((THUMBNAIL_PX + 14, THUMBNAIL_PX, 3), 255, np.uint8)
    tile[:THUMBNAIL_PX] = cv2.resize(picture, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    name = str(line["id"]).encode("ascii", "replace").decode()[-16:]
    cv2.putText(tile, name, (1, THUMBNAIL_PX + 11), cv2.FONT_HERSHEY_SIMPLEX, 0.32, (40, 40, 40), 1, cv2.LINE_AA)
    return tile


def _load_poses_and_expressions(folder: Path, lines: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Yaw, pitch, roll (F, 3) and beta (F, 64) of all frames with a face; landmarks are not even read."""
    pose, beta = [], []
    for line in lines:
        path = folder / line["motion"]
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                found = data["found"].astype(bool)
                pose.append(yaw_pitch_roll(data["camera"][found]).astype(np.float32))
                beta.append(data["beta"][found].astype(np.float32))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} cannot be read ({error}): take its line out of the manifest, run again"
            ) from error
    return np.concatenate(pose), np.concatenate(beta)


def _draw_histogram(title: str, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Shares of `values` in 48 bins between `low` and `high`; what lies outside is counted at the ends."""
    width, height = HISTOGRAM_SIZE_PX
    canvas = np.full((height, width, 3), 255, np.uint8)
    counts, _ = np.histogram(values.clip(low, high), bins=48, range=(low, high))
    top, bottom, left = 26, height - 20, 12
    step = (width - 2 * left) / len(counts)
    for i, count in enumerate(counts / max(1, counts.max())):
        corner = (int(left + i * step), round(bottom - count * (bottom - top)))
        cv2.rectangle(canvas, corner, (int(left + (i + 1) * step) - 1, bottom), (70, 120, 190), -1)
    cv2.line(canvas, (left, bottom), (width - left, bottom), (40, 40, 40), 1)
    p5, p50, p95 = np.percentile(values, [5, 50, 95])
    head = f"{title}   5%: {p5:.2f}  median: {p50:.2f}  95%: {p95:.2f}"
    for text, at in ((head, (left, 16)), (f"{low:g}", (left, height - 6)), (f"{high:g}", (width - 40, height - 6))):
        cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (40, 40, 40), 1, cv2.LINE_AA)
    return canvas


def _draw_text(*rows: str) -> np.ndarray:
    canvas = np.full((HISTOGRAM_SIZE_PX[1], HISTOGRAM_SIZE_PX[0], 3), 255, np.uint8)
    for i, row in enumerate(rows):
        cv2.putText(canvas, row, (24, 50 + 34 * i), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (40, 40, 40), 1, cv2.LINE_AA)
    return canvas
