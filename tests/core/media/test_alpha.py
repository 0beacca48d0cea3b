"""Transparent videos and image sequences, written and read back."""

from __future__ import annotations

import subprocess
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from export3d_cli.core.media.probe import ffmpeg_path, probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import InputError


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """Three RGBA frames with a moving red square."""
    out = []
    for k in range(3):
        frame = np.zeros((48, 64, 4), np.uint8)
        frame[8:40, 8 + 4 * k : 40 + 4 * k] = (220, 30, 30, 255)
        out.append(frame)
    return out


@pytest.mark.parametrize("name", ["a.webm", "a.mov"])
@pytest.mark.parametrize("sound", [False, True])
def test_video_round_trip_keeps_alpha(frames: list[np.ndarray], tmp_path: Path, name: str, sound: bool) -> None:
    tone = tmp_path / "tone.wav"
    subprocess.run([ffmpeg_path(), "-loglevel", "error", "-f", "lavfi", "-i", "sine=f=400:d=1", str(tone)], check=True)
    audio, crf = tone if sound else None, 4 if name == "a.webm" else None
    with VideoWriter(tmp_path / name, size=(64, 48), fps=Fraction(25), crf=crf, alpha=True, audio=audio) as writer:
        for frame in frames:
            writer.write(frame)
    info = probe(tmp_path / name)
    assert info.alpha_source
    assert info.has_audio is sound
    with VideoReader(tmp_path / name) as reader:
        decoded = list(reader)  # composited on white
    assert len(decoded) == 3
    for image, frame in zip(decoded, frames, strict=True):
        over = frame[..., :3] * (frame[..., 3:] / 255) + 255 - frame[..., 3:]
        inner = cv2.erode((np.abs(cv2.blur(over, (5, 5)) - over).max(-1) < 1).astype(np.uint8), np.ones((5, 5)))
        assert np.abs(image - over)[inner > 0].max() < 14


def test_image_sequence_keeps_alpha_and_other_formats_raise(frames: list[np.ndarray], tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "p" / "%03d.png", size=(64, 48), fps=Fraction(25), alpha=True) as writer:
        writer.write(frames[1])
        with pytest.raises(InputError, match=r"48, 64, 4"):
            writer.write(frames[1][..., :3])
    back = cv2.imread(str(tmp_path / "p" / "000.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(back[..., [2, 1, 0, 3]], frames[1])
    for name in ("a.mp4", "a.gif", "a.mkv"):
        with pytest.raises(InputError, match="transparent"):
            VideoWriter(tmp_path / name, size=(64, 48), fps=Fraction(25), alpha=True)
