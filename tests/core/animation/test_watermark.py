"""Watermarks on the bundled examples: visibility and detection."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from export3d_cli.core.animation.watermark import THRESHOLD, find_marks, get_watermarker
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VIDEO_SUFFIXES, VideoWriter
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli

MakeClip = Callable[..., Path]
PLAIN = {"metadata": {"comment": "", "title": "anything"}}  # without the mark


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    with VideoReader(example_path("drive.mp4"), size=(256, 256), duration=0.5) as reader:
        return list(reader)


def write_video(path: Path, frames: list[np.ndarray], crf: int | None = None, **options: object) -> Path:
    height, width = frames[0].shape[:2]
    with VideoWriter(path, size=(width, height), fps=Fraction(25), crf=crf, **options) as writer:  # type: ignore[arg-type]
        for frame in frames:
            writer.write(frame)
    return path


def mark(frame: np.ndarray) -> np.ndarray:
    return get_watermarker("invisible")(frame)


def resize(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)


def test_invisible_mark_is_faint(frames: list[np.ndarray]) -> None:
    for frame in (*frames[:2], read_image(example_path("source.jpg"))):
        change = mark(frame).astype(float) - frame
        assert 10 * np.log10(255**2 / (change**2).mean()) > 42  # dB
        assert np.abs(change).max() <= 12
        assert np.abs(change.mean()) < 0.05


def paste(frame: np.ndarray) -> np.ndarray:
    """Return a larger picture in which a frame has three fifths of the height."""
    canvas = cv2.resize(read_image(example_path("source.jpg")), (768, 432))
    canvas[70:326, 301:557] = frame
    return canvas


@pytest.mark.parametrize(
    ("crf", "edit"),
    [
        (23, lambda frame: mark(frame)),
        (28, lambda frame: mark(frame)),
        (15, lambda frame: resize(mark(frame), 128, 128)),
        (23, lambda frame: resize(mark(frame), 384, 384)),
        (23, lambda frame: mark(frame)[8:-18, 20:-6]),
        (23, lambda frame: mark(frame)[40:220, 40:220]),
        (23, lambda frame: mark(resize(frame, 400, 224))[:, 100:324]),
        (23, lambda frame: mark(resize(frame, 256, 456))),
        (23, lambda frame: paste(mark(frame))),
    ],
    ids=["crf23", "crf28", "half", "larger", "crop", "close-up", "square-of-wide", "tall", "pasted"],
)
def test_invisible_mark_survives(
    frames: list[np.ndarray], tmp_path: Path, crf: int, edit: Callable[[np.ndarray], np.ndarray]
) -> None:
    edited = [np.ascontiguousarray(edit(frame)) for frame in frames]
    marks = find_marks(write_video(tmp_path / "a.mp4", edited, crf, **PLAIN))
    assert (marks.found, marks.invisible, marks.metadata, marks.frames) == (True, True, False, len(frames))
    assert marks.score > THRESHOLD


@pytest.mark.parametrize("name", ["one.jpg", "one.png"])
def test_invisible_mark_survives_a_screenshot(frames: list[np.ndarray], tmp_path: Path, name: str) -> None:
    video = write_video(tmp_path / "a.mp4", [mark(frame) for frame in frames], 23, **PLAIN)
    write_image(tmp_path / name, list(VideoReader(video))[5])
    assert find_marks(tmp_path / name).invisible


def test_unmarked_media_has_no_mark(frames: list[np.ndarray], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_image(tmp_path / "noise.png", rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    write_image(tmp_path / "grey.png", np.full((64, 64, 3), 90, np.uint8))
    for path in (tmp_path / "noise.png", tmp_path / "grey.png", example_path("source.jpg"), example_path("drive.mp4")):
        assert not find_marks(path).found, path
    assert not find_marks(write_video(tmp_path / "a.mp4", frames, 23, **PLAIN)).found


@pytest.mark.parametrize("suffix", [*VIDEO_SUFFIXES, ".png", ".jpg"])
def test_metadata_mark_is_found_in_every_format(frames: list[np.ndarray], tmp_path: Path, suffix: str) -> None:
    from export3d_cli.core.media.writer import SYNTHETIC_COMMENT

    path = tmp_path / f"a{suffix}"
    if suffix in VIDEO_SUFFIXES:
        write_video(path, frames[:2])
    else:
        write_image(path, frames[0], comment=SYNTHETIC_COMMENT)
    marks = find_marks(path)
    assert (marks.found, marks.metadata, marks.invisible) == (True, True, False)


@pytest.mark.parametrize("size", [64, 256, 720])
def test_badge_is_small_in_a_corner_and_legible(size: int) -> None:
    frame = np.full((size, 2 * size, 3), 200, np.uint8)
    badged = get_watermarker("visible")(frame)
    assert (frame == 200).all()
    rows, columns = np.nonzero((badged != frame).any(-1))
    assert rows.min() > 0.88 * size
    assert columns.min() > 1.65 * size
    plate = badged[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1, 0].astype(int)
    assert plate.max() - plate.min() > (100 if size < 256 else 150)  # light letters on dark
    assert 0.02 < (plate > 110).mean() < 0.5


@pytest.mark.parametrize("kind", ["none", "visible", "invisible"])
def test_watermark_keeps_transparency(kind: str) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (96, 128, 4), dtype=np.uint8)
    marked = get_watermarker(kind)(frame)  # type: ignore[arg-type]
    assert (marked[:60, :60, 3] == frame[:60, :60, 3]).all()
    assert (marked[..., :3] != frame[..., :3]).any() == (kind != "none")
    with pytest.raises(InputError, match="none, visible or invisible"):
        get_watermarker("loud")  # type: ignore[arg-type]


def verify(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["verify-mark", *map(str, args)], catch_exceptions=False)
    return result.exit_code, result.stdout + result.stderr


def test_verify_mark_reports_both_marks(tmp_path: Path, frames: list[np.ndarray]) -> None:
    code, output = verify(example_path("source.jpg"))
    assert code == 1
    assert "metadata: none\ninvisible mark: none (score" in output
    write_video(tmp_path / "a.mp4", [mark(frame) for frame in frames])
    code, output = verify(tmp_path / "a.mp4", "--json")
    marks = json.loads(output)
    assert (code, marks["found"], marks["metadata"], marks["invisible"]) == (0, True, True, True)
    (tmp_path / "text.mp4").write_text("no video")
    assert verify(tmp_path / "text.mp4")[0] == 2
    assert verify(tmp_path / "nowhere.mp4")[0] == 2


@pytest.mark.parametrize(
    "command", [["novel-view", "--yaw", "0:20", "--frames", "2"],
                ["novel-view", "--grid", "--frames", "4", "--size", "128"],
                ["edit-basis", "--v", "1", "--scale", "0:1", "--frames", "2"],
                ["reenact", example_path("source.jpg"), example_path("drive.mp4"), "--max-frames", "2"]]
)  # fmt: skip
def test_every_animation_command_marks_its_output(command: list[object], tiny_weights: Path, tmp_path: Path) -> None:
    found = []
    for options in ([], ["--watermark", "none"]):
        out = tmp_path / f"{len(found)}{'.png' if '--grid' in command else '.mkv'}"
        args = [*command, "-o", out, *options, "--weights", tiny_weights, "--device", "cpu"]
        result = CliRunner().invoke(cli, list(map(str, args)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        marks = find_marks(out)
        found.append((marks.metadata, marks.invisible))
    assert found == [(True, True), (True, False)]
