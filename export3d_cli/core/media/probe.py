"""Properties of video files, parsed from ffmpeg's output (imageio-ffmpeg brings no ffprobe)."""

import itertools
import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from export3d_cli.core.media.ffmpeg_process import run_ffmpeg
from export3d_cli.core.media.image import check_pixel_count, list_images, read_image
from export3d_cli.core.runtime.errors import InputError, MediaError
from export3d_cli.core.runtime.files import check_file

DEFAULT_FOLDER_FPS = Fraction(25)  # of image sequences, unless the caller gives a rate
_TIMESTAMP_SCAN_S = 30  # part of the video whose timestamps tell constant from variable rate
_NO_TIMESTAMP = -(2**63)  # AV_NOPTS_VALUE
_MAX_VFR_FPS = 60  # limit of the constant rate chosen for a video of variable rate
_MAX_DURATION_H = 24  # damaged files claim more, which would be filled with repeated frames


# the first video stream that is no cover art, like "-map 0:V:0"
_VIDEO_STREAM = re.compile(r"Stream #0:\d+.*?: Video: ((?!.*\(attached pic\)|.*\(still image\)).*)")


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video as it is displayed: rotated, with square pixels."""

    width: int
    height: int
    fps: Fraction  # exact; for a variable rate, the constant rate to which it is resampled
    frame_count: int  # estimate at `fps`; 0 if unknown
    duration: float  # seconds; 0 if unknown
    has_audio: bool
    vfr: bool = False  # variable frame rate: timestamps are not evenly spaced
    hdr_transfer: str = ""  # "smpte2084" (PQ) or "arib-std-b67" (HLG); empty for standard dynamic range
    interlaced: bool = False  # according to the file's flags
    header_duration: float = 0.0  # seconds in the container's header; 0 for containers that only estimate it
    decode_delay: float = 0.0  # seconds by which decoded frames are stamped late: files without presentation times
    alpha_source: str = ""  # "plain": part of the pixel format; "vp8", "vp9": a side stream that libvpx decodes


def ffmpeg_path() -> str:
    """Return imageio-ffmpeg's binary, or IMAGEIO_FFMPEG_EXE; raise `MediaError` if none runs or it is too old."""
    import imageio_ffmpeg

    try:
        path = str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise MediaError("no ffmpeg found: run `pip install --force-reinstall imageio-ffmpeg`") from error
    if Path(imageio_ffmpeg.__file__).parent not in Path(path).parents:  # imageio-ffmpeg checks its own binary only
        _check_ffmpeg(path)
    return path


@lru_cache(maxsize=4)
def _check_ffmpeg(program: str) -> None:
    remedy = "unset IMAGEIO_FFMPEG_EXE, or run `pip install --force-reinstall imageio-ffmpeg`"
    try:
        done = run_ffmpeg([program, "-hide_banner", "-h", "long"])
        done.check_returncode()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "strerror", None) or "it fails"
        raise MediaError(f"the ffmpeg {program} cannot be run ({reason}): {remedy}") from error
    if b"-fps_mode" not in done.stdout:
        raise MediaError(f"the ffmpeg {program} is too old, 5.1 or later is needed: {remedy}")


def probe(path: Path) -> VideoInfo:
    """Return the properties of a video file or folder of images; raise `InputError` if there is no video in it."""
    if Path(path).is_dir():
        images = list_images(path)
        height, width = read_image(images[0]).shape[:2]
        return VideoInfo(width, height, DEFAULT_FOLDER_FPS, len(images), float(len(images) / DEFAULT_FOLDER_FPS), False)
    path = _check_video_file(Path(path))
    stat = path.stat()
    return _probe(path.resolve(), stat.st_mtime_ns, stat.st_size)


@dataclass(frozen=True)
class AudioTrack:
    """An audio track of a file."""

    codec: str  # "none" if ffmpeg does not know it
    layout: str  # of the channels: "stereo", "5.1(side)", "16 channels", ...


def audio_tracks(path: Path) -> list[AudioTrack]:
    """Return the audio tracks of a file in its order; none for a folder of images."""
    if Path(path).is_dir():
        return []
    header = _read_header(_check_video_file(Path(path)))
    streams = re.findall(r"Stream #0:\d+.*?: Audio: (\w+)(?:.*? Hz, ([^,\n]+))?", header)
    return [AudioTrack(codec, layout) for codec, layout in streams]


def is_sound(path: Path) -> bool:
    """Return whether a file has sound and no video; cover art is none."""
    return bool(audio_tracks(path)) and not _VIDEO_STREAM.search(_read_header(path))


def can_seek(path: Path) -> bool:
    """Return whether ffmpeg finds any time in a file: in AVI it fails before the first key frame, without an error."""
    return not re.search(r"^Input #0, avi", _read_header(path), flags=re.MULTILINE)


@lru_cache(maxsize=64)
def _probe(path: Path, _mtime: int, _size: int) -> VideoInfo:
    header = _read_header(path)
    stream = _VIDEO_STREAM.search(header)
    has_audio = bool(re.search(r"Stream #0:\d+.*?: Audio:", header))
    if stream is None and has_audio:
        raise InputError(f"{path} has audio but no video: give a video file")
    size = stream and re.search(r", ([1-9]\d*)x([1-9]\d*)\b", stream[1])
    if stream is None or size is None:
        raise InputError(f"{path} is not a video that can be read: give a video file, for example .mp4")
    width, height = int(size[1]), int(size[2])
    aspect = re.search(r"SAR ([1-9]\d*):([1-9]\d*)", stream[1])
    if aspect:
        width = max(1, round(width * int(aspect[1]) / int(aspect[2])))
    rotation = re.search(r"rotation of (-?[\d.]+) degrees", header)
    if rotation and round(float(rotation[1])) % 180 == 90:
        width, height = height, width
    check_pixel_count(width, height, path)
    alpha_source = _find_alpha(header, stream[1])
    if "_pipe" in header.partition(" from ")[0] or "Input #0, image2" in header:  # a still image
        return VideoInfo(width, height, Fraction(25), 1, 0.0, has_audio, alpha_source=alpha_source)
    time = re.search(r"Duration: (\d+):(\d+):([\d.]+)", header)
    duration = int(time[1]) * 3600 + int(time[2]) * 60 + float(time[3]) if time else 0.0
    header_duration = duration if re.search(r"Input #0, (mov|matroska)", header) else 0.0  # others estimate it
    stamps = _read_timestamps(path, _TIMESTAMP_SCAN_S if duration else _MAX_DURATION_H * 3600 + 1)
    times = stamps.times
    if start := re.search(r"Input #0, mov.*? start: (-?[\d.]+)", header, flags=re.DOTALL):
        times = [t for t in times if t >= Fraction(start[1]) - stamps.tick]  # an edit list hides earlier frames
    fps, vfr = _estimate_rate(stamps.tick, times, _parse_rate(stream[1], "fps"), _parse_rate(stream[1], "tbr"))
    if len(times) > 2 and (not duration or duration < _TIMESTAMP_SCAN_S / 2):  # all timestamps known: exact duration
        duration = float(times[-1] - min(times[0], Fraction(0)) + 1 / fps)  # a late first frame is shown from 0 s
    duration = duration or float(stamps.packet_count / fps)
    if duration > _MAX_DURATION_H * 3600:
        raise InputError(f"{path} claims to last {duration / 3600:.0f} hours, over {_MAX_DURATION_H}: cut it first")
    hdr = re.search(r"smpte2084|arib-std-b67", stream[1])
    return VideoInfo(width, height, fps, max(1, round(duration * fps)), duration, has_audio, vfr,
                     hdr_transfer=hdr[0] if hdr else "", header_duration=header_duration,
                     interlaced=bool(re.search(r"\b(top|bottom) (coded )?first", stream[1])),
                     decode_delay=0.0 if stamps.are_presentation_times else _measure_decode_delay(path, times),
                     alpha_source=alpha_source)  # fmt: skip


def _find_alpha(header: str, stream: str) -> str:
    codec = re.match(r"vp[89]\b", stream)
    if codec and re.search(r"alpha_mode\s*: 1", header, flags=re.IGNORECASE):
        return codec.group()
    return "plain" if re.search(r", (yuva|rgba|bgra|argb|abgr|gbrap|ya8|ya16)", stream) else ""


def _estimate_rate(tick: Fraction, times: list[Fraction], mean: Fraction | None,
                   base: Fraction | None) -> tuple[Fraction, bool]:  # fmt: skip
    """Return the frame rate and whether it varies: by timestamps, else ffmpeg's fps (`mean`) and tbr (`base`)."""
    steps = [b - a for a, b in itertools.pairwise(times) if b > a]
    if not steps:
        return min((rate for rate in (mean, base) if rate), default=Fraction(25)), False
    average = (times[-1] - times[0]) / len(steps)
    reported = [rate for rate in (mean, base) if rate]
    spread = max(abs(t - times[0] - i * average) for i, t in enumerate(sorted(set(times))))
    rounding = max(2 * tick, Fraction(2, 1000)) if spread else tick  # containers count in milliseconds, GIF in 10 ms
    if spread < min(rounding, average / 2):  # constant up to rounding
        near = [rate for rate in reported if abs(rate * average - 1) <= rounding * rate / len(steps)]
        return near[0] if near else _nearest_standard_rate(1 / average), False
    common = 1 / sorted(steps)[len(steps) // 2]
    near = [rate for rate in reversed(reported) if abs(rate / common - 1) < Fraction(1, 10)]
    return min(near[0] if near else _nearest_standard_rate(common), Fraction(_MAX_VFR_FPS)), True


def _nearest_standard_rate(rate: Fraction) -> Fraction:
    """Return the standard rate nearest to a rounded one (29.97 -> 30000/1001), or the rate itself if none is near."""
    integer = round(rate)
    standard_rates = [Fraction(integer), Fraction(integer * 1000, 1001), Fraction(round(rate * 2), 2)]
    nearest = min(standard_rates, key=lambda standard: abs(standard - rate))
    if nearest > 0 and abs(nearest / rate - 1) < Fraction(3, 10_000):
        return nearest
    return rate.limit_denominator(100_000)


def _parse_rate(text: str, unit: str) -> Fraction | None:
    found = re.search(rf"([\d.]+)(k?) {unit}\b", text)
    rate = Fraction(found[1]) * (1000 if found[2] else 1) if found else Fraction(0)
    return _nearest_standard_rate(rate) if rate else None


class _Timestamps(NamedTuple):
    tick: Fraction  # seconds, unit of the container's clock
    times: list[Fraction]  # seconds, sorted; empty if the container has none
    packet_count: int
    are_presentation_times: bool  # else decoding times, the only ones of AVI and raw streams with B-frames


def _read_timestamps(path: Path, seconds: float) -> _Timestamps:
    """Read the timestamps of the first packets, without decoding."""
    command = [*read_command(path, "-loglevel", "error"), "-map", "0:V:0", "-c", "copy", "-t", str(seconds)]
    text = run_ffmpeg([*command, "-f", "framecrc", "pipe:1"]).stdout.decode()
    clock = re.search(r"#tb 0: (\d+)/(\d+)", text)
    packets = re.findall(r"^0,\s*(-?\d+),\s*(-?\d+),", text, flags=re.MULTILINE)
    columns = [[int(stamp) for stamp in column] for column in zip(*packets, strict=True)] or [[], []]
    stamps = next((column for column in reversed(columns) if _NO_TIMESTAMP not in column), [])
    tick = Fraction(int(clock[1]), int(clock[2])) if clock else Fraction(0)
    times = sorted(stamp * tick for stamp in stamps)
    if times and times[-1] - times[0] > _TIMESTAMP_SCAN_S * 0.8 and seconds == _TIMESTAMP_SCAN_S:
        del times[-16:]  # frames are stored out of order: some near the end of the scan may be missing
    return _Timestamps(tick, times, len(packets), stamps is columns[1])


def _measure_decode_delay(path: Path, times: list[Fraction]) -> float:
    """Return how much later than its first packet the first decoded frame of a video is stamped, in seconds."""
    command = [*read_command(path), "-map", "0:V:0", "-frames:v", "1"]
    text = run_ffmpeg([*command, "-vf", "showinfo=checksum=0", "-f", "null", "-"]).stderr.decode("utf-8", "replace")
    clock, stamp = re.search(r"config in time_base: (\d+)/(\d+)", text), re.search(r"\bn: *0 pts: *(\d+)", text)
    if not clock or not stamp or not times:
        return 0.0
    first = Fraction(int(stamp[1]) * int(clock[1]), int(clock[2]))
    return max(0.0, float(first - max(times[0], Fraction(0))))


def _read_header(path: Path) -> str:
    return run_ffmpeg(read_command(path)).stderr.decode("utf-8", "replace")


def _check_video_file(path: Path) -> Path:
    check_file(path)
    if not path.stat().st_size:
        raise InputError(f"{path} is empty")
    return path


def read_command(path: Path, *options: str) -> list[str]:
    """Return the beginning of every command that reads a file: ffmpeg, with options of its own, and the input."""
    safe = ("-hide_banner", "-nostdin", "-protocol_whitelist", "file,pipe")
    return [ffmpeg_path(), *safe, *options, "-i", file_url(path)]


def file_url(path: Path) -> str:
    """Return a name that ffmpeg treats as a file, even if it looks like an option or URL (`-x.mp4`, `http:.mp4`)."""
    return f"file:{path}"
