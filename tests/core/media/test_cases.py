"""The table of media: inputs made with ffmpeg, with a flash and a beep at one moment, are read and written again."""

from __future__ import annotations

import re
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from export3d_cli.core.media.probe import audio_codec, ffmpeg_path
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter

AT = 0.4  # seconds: when it flashes and beeps, for 0.2 s
SOUND = 48000  # samples a second
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
X265 = ("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params")
BT2020 = "log-level=none:colorprim=bt2020:colormatrix=bt2020nc:transfer="
HOLES = "select='not(between(n,15,24)*mod(n,3))'"


class Case(NamedTuple):
    name: str  # of the file; its suffix is the container
    rate: str = "25"  # of the source
    args: tuple[str, ...] = X264
    frames: int = 25  # expected, exactly
    fps: str = ""  # expected; else `rate`
    size: tuple[int, int] = (64, 48)  # made
    shown: tuple[int, int] = (64, 48)  # expected
    turn: int = 0  # degrees written into the file
    late: tuple[float, float] = (0.0, 0.0)  # seconds by which picture and sound start late
    sound: bool = True
    marks: tuple[str, ...] = ()  # fields of VideoInfo that are set


CASES = [
    Case("r23976.mp4", "24000/1001", frames=24),
    Case("r2997.mov", "30000/1001", frames=30),
    Case("r5994.mkv", "60000/1001", frames=60),
    Case("r125.mp4", "25/2", frames=13),
    Case("r2997.webm", "30000/1001", ("-c:v", "libvpx", "-deadline", "realtime"), 30),
    Case("r5994.avi", "60000/1001", (*X264, "-bf", "0", "-c:a", "pcm_s16le"), 60),
    Case("turn90.mp4", turn=90, shown=(48, 64), marks=("rotation",)),
    Case("turn180.mp4", turn=180, marks=("rotation",)),
    Case("turn270.mov", turn=270, shown=(48, 64), marks=("rotation",)),
    Case("holes.mp4", "30", (*X264, "-vf", HOLES, "-fps_mode", "vfr"), 30, marks=("vfr",)),
    Case("holes.mkv", "30", (*X264, "-vf", HOLES, "-fps_mode", "vfr"), 30, marks=("vfr",)),
    Case("odd.mkv", args=(*X264, "-pix_fmt", "yuv444p"), size=(63, 47), shown=(63, 47)),
    Case("wide pixels.mp4", args=(*X264, "-vf", "setsar=4/3"), shown=(85, 48)),
    Case("alpha.mov", args=("-c:v", "qtrle", "-pix_fmt", "argb"), marks=("alpha_source",)),
    Case("alpha.webm", args=("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-cpu-used", "8"), marks=("alpha_source",)),
    Case("deep.mp4", args=(*X264, "-pix_fmt", "yuv420p10le")),
    Case("prores.mov", args=("-c:v", "prores_ks", "-pix_fmt", "yuv422p10le")),
    Case("pq.mp4", args=(*X265, BT2020 + "smpte2084"), marks=("hdr_transfer",)),
    Case("hlg.mov", args=(*X265, BT2020 + "arib-std-b67"), marks=("hdr_transfer",)),
    Case(
        "fields.mpg", "50", ("-vf", "tinterlace=interleave_top", "-c:v", "mpeg2video", "-flags", "+ilme+ildct"),
        fps="25", marks=("interlaced",),
    ),
    Case(
        "fields.mkv", "60000/1001",
        ("-vf", "tinterlace=interleave_top", *X264, "-flags", "+ildct", "-x264opts", "tff=1"), 30,
        fps="30000/1001", marks=("interlaced",),
    ),
    Case("stream.ts", args=(*X264, "-muxdelay", "0.7")),
    Case("a.gif", args=(), sound=False, marks=("alpha_source",)),
    Case("still.mp4", args=(*X264, "-frames:v", "1"), frames=1, sound=False),
    Case("late sound.mp4", late=(0.0, 0.3)),
    Case("late sound.mkv", late=(0.0, 0.3)),
    Case("late picture.mp4", late=(0.2, 0.0), frames=30),
    Case("late picture.mkv", late=(0.2, 0.0), frames=30),
    Case("-Ünï çødé 映像  %03d 'q\".mp4"),
]  # fmt: skip


def run(*args: str) -> bytes:
    done = subprocess.run(
        [ffmpeg_path(), "-hide_banner", "-loglevel", "error", *args], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def make(folder: Path, case: Case) -> Path:
    """A black second with a white flash and a beep."""
    width, height = case.size
    flash = f"color=black:s={width}x{height}:r={case.rate}:d=1,"
    flash += f"drawbox=c=white:t=fill:enable='between(t,{AT - 0.002},{AT + 0.2})'"
    beep = f"aevalsrc=0.5*sin(6283*t)*between(t\\,{AT}\\,{AT + 0.2}):d=1:s={SOUND}"
    inputs = ["-itsoffset", str(case.late[0]), "-f", "lavfi", "-i", flash]
    if case.sound:
        inputs += ["-itsoffset", str(case.late[1]), "-f", "lavfi", "-i", beep]
    plain = folder / ("plain" + Path(case.name).suffix)
    run(*inputs, *case.args, "-y", f"file:{plain}")
    path = folder / case.name
    if case.turn:
        run("-display_rotation", str(case.turn), "-i", f"file:{plain}", "-c", "copy", "-y", f"file:{path}")
    else:
        plain.rename(path)
    return path


def beep_of(path: Path) -> float:
    """When the sound begins, in seconds from the file's first moment; what is not there is silent."""
    align = f"aresample={SOUND}:async=1:first_pts=0"
    wave = run("-i", f"file:{path}", "-map", "0:a:0", "-af", align, "-ac", "1", "-f", "s16le", "-")
    loud = np.flatnonzero(np.abs(np.frombuffer(wave, np.int16).astype(int)) > 2000)
    return float(loud[0] / SOUND)


def copy(path: Path, out: Path, audio: Path | None) -> tuple[VideoReader, int, float]:
    """Read a video and write it again with a sound: the reader, how many frames came, when the first bright one did."""
    with VideoReader(path) as reader:
        width, height = reader.info.width, reader.info.height
        light = []
        with VideoWriter(out, size=(width, height), fps=reader.info.fps, audio=audio) as writer:
            for frame in reader:
                assert frame.shape == (height, width, 3)
                light.append(frame.mean() > 100)
                writer.write(frame)
    return reader, len(light), float(light.index(True) / reader.info.fps) if any(light) else np.nan


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_read_keeps_rate_length_and_step(tmp_path: Path, case: Case) -> None:
    path = make(tmp_path, case)
    reader, frames, flash = copy(path, tmp_path / "out.mkv", path)
    info, fps = reader.info, Fraction(case.fps or case.rate)
    assert (info.fps, frames, info.frame_count, info.width, info.height) == (fps, case.frames, case.frames, *case.shown)
    assert abs(info.duration - case.frames / fps) < 1 / fps
    assert {
        mark for mark in ("rotation", "vfr", "hdr_transfer", "interlaced", "alpha_source") if getattr(info, mark)
    } == set(case.marks)
    assert {"vfr": "variable", "hdr_transfer": "tone-mapped"}.keys() & set(case.marks) == {
        mark
        for mark, word in {"vfr": "variable", "hdr_transfer": "tone-mapped"}.items()
        if any(word in n for n in reader.notes)
    }
    assert info.has_audio is case.sound
    if case.sound:
        apart = beep_of(tmp_path / "out.mkv") - flash
        assert abs(apart - (case.late[1] - case.late[0])) < 1 / fps


class Sound(NamedTuple):
    """A sound put into a container, and the codec that is then in it."""

    out: str
    given: tuple[str, ...]  # for ffmpeg
    source: str  # suffix of the file with the sound
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


@pytest.mark.parametrize("case", SOUNDS, ids=lambda case: f"{case.given[1]} into {case.out}")
def test_what_is_written_keeps_rate_length_and_step(tmp_path: Path, case: Sound) -> None:
    path = make(tmp_path, Case("in.mkv", "30000/1001"))
    sound = tmp_path / f"sound{case.source}"
    run("-i", str(path), "-vn", *case.given, str(sound))
    out = tmp_path / "new folder" / ("%05d.png" if case.out == ".png" else f"out{case.out}")
    _, frames, flash = copy(path, out, sound)
    assert frames == 30
    if case.out == ".png":
        assert len(list(out.parent.iterdir())) == 30
        return
    again = VideoReader(out)
    light = [frame.mean() > 100 for frame in again]
    assert len(light) == again.info.frame_count == 30
    assert light.index(True) == round(flash * Fraction(30000, 1001))
    if case.out == ".gif":  # counts hundredths of a second
        assert abs(again.info.fps - Fraction(30000, 1001)) < 0.5
    else:
        assert again.info.fps == Fraction(30000, 1001)
    assert abs(again.info.duration - 1.001) < 0.035
    assert audio_codec(out) == case.codec
    if case.codec:
        assert abs(beep_of(out) - beep_of(sound)) < 1001 / 30000


@pytest.mark.slow
def test_ten_minutes_stay_in_step(tmp_path: Path) -> None:
    """Flashes and beeps up to the end of a film of a rate that is no whole number; its sound copied, and encoded."""
    fps, first = Fraction(30000, 1001), np.array([15, 8991, 17952])  # frames that flash
    at = first / float(fps) - 0.002
    moments = "+".join(f"between(t\\,{t}\\,{t + 0.2})" for t in at)
    path = tmp_path / "long.mkv"
    flash = f"color=black:s=16x16:r={fps}:d=600,drawbox=c=white:t=fill:enable={moments}"
    beep = f"aevalsrc=0.5*sin(6283*t)*({moments}):d=600:s=8000"
    run("-f", "lavfi", "-i", flash, "-f", "lavfi", "-i", beep, *X264, "-c:a", "libvorbis", str(path))
    with VideoReader(path) as reader:
        light = np.array([frame[0, 0, 0] > 100 for frame in reader])
    assert (reader.info.fps, len(light)) == (fps, reader.info.frame_count)
    np.testing.assert_array_equal(np.flatnonzero(light[1:] & ~light[:-1]) + 1, first)
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    frames[1] = 255
    for suffix in (".mkv", ".mp4"):
        out = tmp_path / f"out{suffix}"
        with VideoWriter(out, size=(16, 16), fps=fps, audio=path) as writer:
            for bright in light:
                writer.write(frames[int(bright)])
        stamps = presented(out)
        assert len(stamps) == len(light)
        align = "aresample=8000:async=1:first_pts=0"
        wave = np.frombuffer(run("-i", str(out), "-af", align, "-ac", "1", "-f", "s16le", "-"), np.int16)
        loud = np.flatnonzero(np.abs(wave.astype(int)) > 2000) / 8000
        heard = [loud[loud > t - 0.2][0] for t in at]
        assert np.abs(stamps[first] - heard).max() < 0.5 / fps


def presented(path: Path) -> np.ndarray:
    """When each picture of a file is to be shown, in seconds."""
    text = run("-i", str(path), "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-").decode()
    base = Fraction(re.search(r"#tb 0: (\d+/\d+)", text)[1])  # type: ignore[index]
    return np.sort([int(stamp) for stamp in re.findall(r"^0,\s*[^,]+,\s*(\d+),", text, flags=re.M)]) * float(base)
