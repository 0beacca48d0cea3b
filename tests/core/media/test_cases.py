"""Formats of input and output: videos with a flash and a beep at one time are read and written reader."""

from __future__ import annotations

import re
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from export3d_cli.core.media.probe import audio_tracks, ffmpeg_path
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter

FLASH_START_S = 0.4  # of the flash and the beep, which last 0.2 s
SAMPLE_RATE = 48000  # Hz
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
X265 = ("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params")
BT2020 = "log-level=none:colorprim=bt2020:colormatrix=bt2020nc:transfer="
HOLES = "select='not(between(n,15,24)*mod(n,3))'"


class Case(NamedTuple):
    name: str  # of the file; its suffix is the container
    rate: str = "25"  # of the source
    args: tuple[str, ...] = X264
    frames: int = 25  # expected
    fps: str = ""  # expected; default: `rate`
    size: tuple[int, int] = (64, 48)  # encoded
    expected_size: tuple[int, int] = (64, 48)
    rotation: int = 0  # degrees, in the file's display matrix
    delays: tuple[float, float] = (0.0, 0.0)  # seconds, of the picture and the audio
    sound: bool = True
    flags: tuple[str, ...] = ()  # fields of VideoInfo that must be set


CASES = [
    Case("r23976.mp4", "24000/1001", frames=24),
    Case("r2997.mov", "30000/1001", frames=30),
    Case("r5994.mkv", "60000/1001", frames=60),
    Case("r125.mp4", "25/2", frames=13),
    Case("r1234.mkv", "1234/100", frames=13),
    Case("r2997.webm", "30000/1001", ("-c:v", "libvpx", "-deadline", "realtime"), 30),
    Case("r5994.avi", "60000/1001", (*X264, "-bf", "0", "-c:a", "pcm_s16le"), 60),
    Case("turn90.mp4", rotation=90, expected_size=(48, 64)),
    Case("turn180.mp4", rotation=180),
    Case("turn270.mov", rotation=270, expected_size=(48, 64)),
    Case("holes.mp4", "30", (*X264, "-vf", HOLES, "-fps_mode", "vfr"), 30, flags=("vfr",)),
    Case("holes.mkv", "30", (*X264, "-vf", HOLES, "-fps_mode", "vfr"), 30, flags=("vfr",)),
    Case("odd.mkv", args=(*X264, "-pix_fmt", "yuv444p"), size=(63, 47), expected_size=(63, 47)),
    Case("wide pixels.mp4", args=(*X264, "-vf", "setsar=4/3"), expected_size=(85, 48)),
    Case("alpha.mov", args=("-c:v", "qtrle", "-pix_fmt", "argb"), flags=("alpha_source",)),
    Case("alpha.webm", args=("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-cpu-used", "8"), flags=("alpha_source",)),
    Case("deep.mp4", args=(*X264, "-pix_fmt", "yuv420p10le")),
    Case("prores.mov", args=("-c:v", "prores_ks", "-pix_fmt", "yuv422p10le")),
    Case("pq.mp4", args=(*X265, BT2020 + "smpte2084"), flags=("hdr_transfer",)),
    Case("hlg.mov", args=(*X265, BT2020 + "arib-std-b67"), flags=("hdr_transfer",)),
    Case(
        "fields.mpg", "50", ("-vf", "tinterlace=interleave_top", "-c:v", "mpeg2video", "-flags", "+ilme+ildct"),
        fps="25", flags=("interlaced",),
    ),
    Case(
        "fields.mkv", "60000/1001",
        ("-vf", "tinterlace=interleave_top", *X264, "-flags", "+ildct", "-x264opts", "tff=1"), 30,
        fps="30000/1001", flags=("interlaced",),
    ),
    Case("stream.ts", args=(*X264, "-muxdelay", "0.7")),
    Case("a.gif", args=(), sound=False, flags=("alpha_source",)),
    Case("still.mp4", args=(*X264, "-frames:v", "1"), frames=1, sound=False),
    Case("late sound.mp4", delays=(0.0, 0.3)),
    Case("late sound.mkv", delays=(0.0, 0.3)),
    Case("late picture.mp4", delays=(0.2, 0.0), frames=30),
    Case("late picture.mkv", delays=(0.2, 0.0), frames=30),
    Case("-Ünï çødé 映像  %03d 'q\".mp4"),
]  # fmt: skip


def run(*args: str) -> bytes:
    done = subprocess.run(
        [ffmpeg_path(), "-hide_banner", "-loglevel", "error", *args], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def make(folder: Path, case: Case) -> Path:
    """Encode one black second with a white flash and a beep."""
    width, height = case.size
    flash = f"color=black:s={width}x{height}:r={case.rate}:d=1,"
    flash += f"drawbox=c=white:t=fill:enable='between(t,{FLASH_START_S - 0.002},{FLASH_START_S + 0.2})'"
    beep = f"aevalsrc=0.5*sin(6283*t)*between(t\\,{FLASH_START_S}\\,{FLASH_START_S + 0.2}):d=1:s={SAMPLE_RATE}"
    inputs = ["-itsoffset", str(case.delays[0]), "-f", "lavfi", "-i", flash]
    if case.sound:
        inputs += ["-itsoffset", str(case.delays[1]), "-f", "lavfi", "-i", beep]
    plain = folder / ("plain" + Path(case.name).suffix)
    run(*inputs, *case.args, "-y", f"file:{plain}")
    path = folder / case.name
    if case.rotation:
        run("-display_rotation", str(case.rotation), "-i", f"file:{plain}", "-c", "copy", "-y", f"file:{path}")
    else:
        plain.rename(path)
    return path


def beep_of(path: Path) -> float:
    """Return the start of the beep in seconds."""
    align = f"aresample={SAMPLE_RATE}:async=1:first_pts=0"
    wave = run("-i", f"file:{path}", "-map", "0:a:0", "-af", align, "-ac", "1", "-f", "s16le", "-")
    loud = np.flatnonzero(np.abs(np.frombuffer(wave, np.int16).astype(int)) > 2000)
    return float(loud[0] / SAMPLE_RATE)


def copy(path: Path, out: Path, audio: Path | None) -> tuple[VideoReader, int, float]:
    """Copy a video with audio; return the reader, the frame count and the time of the first bright frame."""
    with VideoReader(path) as reader:
        width, height = reader.info.width, reader.info.height
        is_bright = []
        with VideoWriter(out, size=(width, height), fps=reader.info.fps, audio=audio) as writer:
            for frame in reader:
                assert frame.shape == (height, width, 3)
                is_bright.append(frame.mean() > 100)
                writer.write(frame)
    return reader, len(is_bright), float(is_bright.index(True) / reader.info.fps) if any(is_bright) else np.nan


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reader_keeps_rate_duration_and_sync(tmp_path: Path, case: Case) -> None:
    path = make(tmp_path, case)
    reader, frames, flash = copy(path, tmp_path / "out.mkv", path)
    info, fps = reader.info, Fraction(case.fps or case.rate)
    assert (info.fps, frames, info.frame_count, info.width, info.height) == (
        fps,
        case.frames,
        case.frames,
        *case.expected_size,
    )
    assert abs(info.duration - case.frames / fps) < 1 / fps
    assert {flag for flag in ("vfr", "hdr_transfer", "interlaced", "alpha_source") if getattr(info, flag)} == set(
        case.flags
    )
    assert {"vfr": "variable", "hdr_transfer": "tone-mapped"}.keys() & set(case.flags) == {
        mark
        for mark, word in {"vfr": "variable", "hdr_transfer": "tone-mapped"}.items()
        if any(word in n for n in reader.notes)
    }
    assert info.has_audio is case.sound
    if case.sound:
        offset = beep_of(tmp_path / "out.mkv") - flash
        assert abs(offset - (case.delays[1] - case.delays[0])) < 1 / fps


class Sound(NamedTuple):
    """Audio added to a container, and the expected codec in it."""

    out: str
    encoder: tuple[str, ...]  # ffmpeg's arguments
    source: str  # suffix of the audio file
    codec: str | None


SOUNDS = [
    Sound(".mp4", ("-c:a", "aac"), ".m4a", "aac"),
    Sound(".mp4", ("-c:a", "libmp3lame"), ".mp3", "mp3"),
    Sound(".mp4", ("-c:a", "pcm_s16le"), ".wav", "aac"),
    Sound(".mp4", ("-c:a", "libvorbis"), ".ogg", "aac"),
    Sound(".mov", ("-c:a", "aac"), ".mkv", "aac"),
    Sound(".mov", ("-c:a", "pcm_s16le"), ".wav", "pcm_s16le"),
    Sound(".mov", ("-c:a", "libopus"), ".webm", "aac"),
    Sound(".webm", ("-c:a", "libopus"), ".webm", "opus"),
    Sound(".webm", ("-c:a", "libvorbis"), ".ogg", "vorbis"),
    Sound(".webm", ("-c:a", "aac"), ".m4a", "opus"),
    Sound(".mkv", ("-c:a", "flac"), ".flac", "flac"),
    Sound(".mkv", ("-c:a", "wmav2"), ".wma", "aac"),
    Sound(".gif", ("-c:a", "aac"), ".m4a", None),
    Sound(".png", ("-c:a", "aac"), ".m4a", None),
]


@pytest.mark.parametrize("case", SOUNDS, ids=lambda case: f"{case.encoder[1]} into {case.out}")
def test_writer_keeps_rate_duration_and_sync(tmp_path: Path, case: Sound) -> None:
    path = make(tmp_path, Case("in.mkv", "30000/1001"))
    sound = tmp_path / f"sound{case.source}"
    run("-i", str(path), "-vn", *case.encoder, str(sound))
    out = tmp_path / "new folder" / ("%05d.png" if case.out == ".png" else f"out{case.out}")
    _, frames, flash = copy(path, out, sound)
    assert frames == 30
    if case.out == ".png":
        assert len(list(out.parent.iterdir())) == 30
        return
    reader = VideoReader(out)
    is_bright = [frame.mean() > 100 for frame in reader]
    assert len(is_bright) == reader.info.frame_count == 30
    assert is_bright.index(True) == round(flash * Fraction(30000, 1001))
    if case.out == ".gif":  # timestamps in units of 10 ms
        assert abs(reader.info.fps - Fraction(30000, 1001)) < 0.5
    else:
        assert reader.info.fps == Fraction(30000, 1001)
    assert abs(reader.info.duration - 1.001) < 0.035
    assert [track.codec for track in audio_tracks(out)] == ([case.codec] if case.codec else [])
    if case.codec:
        assert abs(beep_of(out) - beep_of(sound)) < 1001 / 30000


@pytest.mark.slow
def test_ten_minutes_stay_in_sync(tmp_path: Path) -> None:
    """Flashes and beeps at 29.97 frames/s, with copied and with re-encoded audio."""
    fps, first = Fraction(30000, 1001), np.array([15, 8991, 17952])  # first frames of the flashes
    starts = first / float(fps) - 0.002
    moments = "+".join(f"between(t\\,{t}\\,{t + 0.2})" for t in starts)
    path = tmp_path / "long.mkv"
    flash = f"color=black:s=16x16:r={fps}:d=600,drawbox=c=white:t=fill:enable={moments}"
    beep = f"aevalsrc=0.5*sin(6283*t)*({moments}):d=600:s=8000"
    run("-f", "lavfi", "-i", flash, "-f", "lavfi", "-i", beep, *X264, "-c:a", "libvorbis", str(path))
    with VideoReader(path) as reader:
        is_bright = np.array([frame[0, 0, 0] > 100 for frame in reader])
    assert (reader.info.fps, len(is_bright)) == (fps, reader.info.frame_count)
    np.testing.assert_array_equal(np.flatnonzero(is_bright[1:] & ~is_bright[:-1]) + 1, first)
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[1] = 255
    for suffix in (".mkv", ".mp4"):
        out = tmp_path / f"out{suffix}"
        with VideoWriter(out, size=(16, 16), fps=fps, audio=path) as writer:
            for bright in is_bright:
                writer.write(frames[int(bright)])
        stamps = presented(out)
        assert len(stamps) == len(is_bright)
        align = "aresample=8000:async=1:first_pts=0"
        wave = np.frombuffer(run("-i", str(out), "-af", align, "-ac", "1", "-f", "s16le", "-"), np.int16)
        loud = np.flatnonzero(np.abs(wave.astype(int)) > 2000) / 8000
        beeps = [loud[loud > t - 0.2][0] for t in starts]
        assert np.abs(stamps[first] - beeps).max() < 0.5 / fps


def presented(path: Path) -> np.ndarray:
    """Return the presentation times of the frames in seconds."""
    text = run("-i", str(path), "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-").decode()
    base = Fraction(re.search(r"#tb 0: (\d+/\d+)", text)[1])  # type: ignore[index]
    return np.sort([int(stamp) for stamp in re.findall(r"^0,\s*[^,]+,\s*(\d+),", text, flags=re.M)]) * float(base)
