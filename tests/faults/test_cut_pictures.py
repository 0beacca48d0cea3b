"""Truncated images are refused, because decoders fill them with grey; truncated videos get a note."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from bad_media import with_exif
from faultkit import check_error, list_names, run

from export3d_cli.core.animation.driver_stream import DriverStream
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

END = b"\xff\xd9"
JPEG = {
    "baseline": [],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 4],
    "full colour": [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
    "optimised": [cv2.IMWRITE_JPEG_OPTIMIZE, 1],
    "grey": [],
}


def jpeg(kind: str) -> bytes:
    picture = cv2.resize(cv2.imread(str(example_path("source.jpg"))), (237, 189))
    picture = picture[..., 0] if kind == "grey" else picture
    return cv2.imencode(".jpg", picture, JPEG[kind])[1].tobytes()


def read(data: bytes, folder: Path) -> np.ndarray:
    path = folder / "picture"
    path.write_bytes(data)
    return read_image(path)


@pytest.mark.parametrize("kind", JPEG)
def test_read_image_of_complete_jpeg(kind: str, tmp_path: Path) -> None:
    """Without an end marker, with trailing data, or as the first of several images in a file."""
    data = jpeg(kind)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    for more in (
        data,
        data[:-2],
        data + bytes(999),
        data + b"\xff\xff\xda junk",
        data[:-2] + bytes(40) + END,
        data * 2,
    ):
        assert np.array_equal(read(more, tmp_path), expected)


@pytest.mark.parametrize("kind", JPEG)
def test_read_image_of_truncated_jpeg_raises(kind: str, tmp_path: Path) -> None:
    """Also if a program has appended an end marker."""
    data = jpeg(kind)
    start = data.index(b"\xff\xda") + 14
    for at in np.linspace(start, len(data) - 100, 25).astype(int):
        for tail in (b"", END, b"\xff"):
            with pytest.raises(InputError, match=r"is truncated|is damaged|not an image that can be read"):
                read(data[:at] + tail, tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif"])
def test_read_image_of_other_truncated_formats_raises(suffix: str, tmp_path: Path) -> None:
    picture = cv2.resize(cv2.imread(str(example_path("source.jpg"))), (96, 64))
    for layers in (picture, np.dstack([picture, picture[..., :1]])):
        data = cv2.imencode(suffix, layers)[1].tobytes()
        assert read(data + b"junk" * 9, tmp_path).shape == (64, 96, 3)
        for at in np.linspace(30, len(data) - 13, 25).astype(int):
            with pytest.raises(InputError, match=r"is truncated|is damaged|not an image that can be read"):
                read(data[:at], tmp_path)


def test_read_image_of_png_with_huge_chunk_raises(tmp_path: Path) -> None:
    data = bytearray(cv2.imencode(".png", np.zeros((64, 64, 3), np.uint8))[1].tobytes())
    data[33:37] = b"\x7f\xff\xff\x00"
    with pytest.raises(InputError, match="is truncated"):
        read(bytes(data), tmp_path)


def test_read_image_ignores_markers_in_exif_thumbnail(tmp_path: Path) -> None:
    """The EXIF data contains a thumbnail with an end marker."""
    inner = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    assert np.array_equal(read(with_exif(inner), tmp_path), read_image(example_path("source.jpg")))


def test_reenact_of_truncated_photo_fails(good: SimpleNamespace, tmp_path: Path) -> None:
    data = good.source.read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2] + END)
    ended = run("reenact", tmp_path / "half.jpg", good.motion, "-o", tmp_path / "out.mp4", "--weights", good.weights)
    check_error(ended, {2})
    assert "half.jpg is truncated: copy or download it again" in ended.stderr
    assert list_names(tmp_path) == ["half.jpg"]


def video(path: Path, *args: object) -> Path:
    """Encode three seconds of the bundled driver with two seconds of audio."""
    inputs = ["-i", example_path("drive.mp4"), "-f", "lavfi", "-i", "sine=d=2", "-map", "0:v", "-map", "1:a", *args]
    options = ["-frames:v", "75", "-vf", "scale=128:128", "-c:v", "libx264", "-preset", "ultrafast", "-c:a", "aac"]
    subprocess.run([ffmpeg_path(), "-loglevel", "error", *map(str, inputs), *options, str(path)], check=True)
    return path


@pytest.mark.parametrize(("suffix", "args"), [(".mp4", ["-movflags", "+faststart"]), (".mkv", [])])
def test_reader_notes_truncated_video(suffix: str, args: list[str], good: SimpleNamespace, tmp_path: Path) -> None:
    whole = video(tmp_path / f"whole{suffix}", *args)
    cut = tmp_path / f"cut{suffix}"
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    for path, more, short in ((whole, {}, False), (cut, {"duration": 0.5}, False), (cut, {}, True)):
        reader = VideoReader(path, **more)
        assert 0 < len(list(reader)) <= 75
        assert any("the picture ends after" in note for note in reader.notes) == short
    stream = DriverStream(cut, open_landmarker_tracker(), ReenactOptions(pose="absolute"), batch=8, crop_scale=2.2)
    assert 0 < sum(len(motion) for motion, _, _ in stream) < 50
    assert [note for note in stream.notes if " s of 3.0 s: truncated" in note]
