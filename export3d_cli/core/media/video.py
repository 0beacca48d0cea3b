"""Video files as streams of uint8 (H, W, 3) RGB frames, through the ffmpeg binary that imageio-ffmpeg brings.

Frame rates are exact fractions; variable rates are resampled to a constant one; rotation metadata and non-square pixels
are applied. Nothing holds more than a frame at a time. Files are written under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np

from export3d_cli.core.media.encoder_settings import VIDEO_SUFFIXES, check_output_suffix, encoder_arguments
from export3d_cli.core.media.ffmpeg_process import FfmpegProcess
from export3d_cli.core.media.image import check_pixel_count
from export3d_cli.core.media.image_folder import ImageSequenceWriter, list_images, read_images
from export3d_cli.core.media.probe import VideoInfo, audio_codec, ffmpeg_path, file_url, has_tone_mapping, probe
from export3d_cli.core.runtime.errors import InputError, MediaError
from export3d_cli.core.runtime.files import write_atomic, write_folder

SYNTHETIC_COMMENT = "synthetic media: generated with export3d (AI), not a recording"
__all__ = ["VIDEO_SUFFIXES", "VideoInfo", "VideoReader", "VideoWriter", "probe"]
_COPYABLE_AUDIO = {  # codecs each container takes as they are; anything else is encoded anew
    ".mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus"},
    ".mov": {"aac", "mp3", "ac3", "alac", "pcm_s16le", "pcm_s24le"},
    ".mkv": {"aac", "mp3", "ac3", "eac3", "opus", "vorbis", "flac", "pcm_s16le", "pcm_s24le"},
    ".webm": {"opus", "vorbis"},
}
_MISSING_PICTURE_S = 1.0  # seconds by which a picture may end before its file does without a note


# 1 - (1 - c) a: over white, as pictures with alpha are
_ON_WHITE_FILTER = "format=gbrap,negate,premultiply=inplace=1,negate"
_TONE_MAP_FILTER = (  # BT.2408: diffuse white at 203 cd/m2
    "zscale=tin={hdr}:pin=bt2020:min=bt2020nc:t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,"
    "tonemap=tonemap=hable:desat=0,zscale=t=bt709:m=bt709:r=tv,format=yuv444p"
)


class VideoReader:
    """Iterate over the frames of a video, uint8 (H, W, 3) RGB, at a constant rate. A context manager; one pass.

    Interlaced frames become whole ones, high dynamic range is tone-mapped, transparency lies on white.

    Args:
        path: any video (or still image: one frame) that ffmpeg reads, or a folder of pictures of one size.
        fps: resample to this rate; None keeps the video's own. Of a folder: the rate its pictures have, else 25.
        start: seconds to skip.
        duration: seconds to read; None reads to the end.
        size: (width, height) to scale to; None keeps the video's own.

    `info` describes what will be read: its rate, size and expected number of frames; `notes` what the user should know,
    at the end also that it came too early.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: Fraction | None = None,
        start: float = 0.0,
        duration: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.path = Path(path)
        info = probe(self.path)
        self._images = list_images(self.path) if self.path.is_dir() else []
        if fps is not None and fps > 0 and self._images:
            info = replace(info, fps=fps, duration=float(info.frame_count / fps))
        if fps is not None and fps <= 0:
            raise InputError(f"the frame rate must be positive, got {fps}")
        if start < 0 or (duration is not None and duration <= 0):
            raise InputError(f"start must not be negative and duration positive, got {start} and {duration}")
        if info.duration and start >= info.duration:
            raise InputError(f"start {start} s lies behind the end of {path} ({info.duration:.2f} s)")
        rate = fps or info.fps
        width, height = size or (info.width, info.height)
        check_pixel_count(width, height, self.path)
        seconds = max(0.0, info.duration - start)
        if duration is not None:
            seconds = min(seconds, duration) if info.duration else duration
        frames = max(1, round(seconds * rate)) if seconds else info.frame_count
        self.info = replace(info, fps=rate, width=width, height=height, frame_count=frames, duration=seconds)
        self._start, self._duration, self._resized = start, duration, size is not None
        self._header_duration = min(max(0.0, info.header_duration - start), duration or info.header_duration)
        self._process: FfmpegProcess | None = None
        self.notes = [f"{path}: variable frame rate resampled to {rate}"] if info.vfr and fps is None else []
        if info.hdr_transfer:
            what = "tone-mapped" if has_tone_mapping() else "which this ffmpeg cannot tone-map: colours will look flat"
            self.notes.append(f"{path}: high dynamic range, {what}")

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        self.close()
        if self._images:
            yield from self._read_folder()
            return
        width, height = self.info.width, self.info.height
        self._process = process = FfmpegProcess(self._decode_command(), stdout=True)
        count = 0
        try:
            while True:
                frame = np.empty((height, width, 3), dtype=np.uint8)
                got = process.read_into(frame.data.cast("B"))
                if got < frame.nbytes:
                    break
                count += 1
                yield frame
            code = process.wait()
            if count == 0 and not process.stalled:
                raise InputError(f"no frame of {self.path} could be decoded: {process.error_summary()}")
            if code or got:
                raise MediaError(f"reading {self.path} stopped after {count} frames: {process.error_summary()}")
            if self._header_duration - count / self.info.fps > _MISSING_PICTURE_S:
                seconds = f"{float(count / self.info.fps):.1f} s of {self._header_duration:.1f} s"
                self.notes.append(f"{self.path}: its picture ends after {seconds}: cut off, or its sound is longer")
        finally:
            self.close()

    def close(self) -> None:
        """Stop ffmpeg if it is still running."""
        process, self._process = self._process, None  # another thread may do the same
        if process is not None:
            process.kill()

    def _read_folder(self) -> Iterator[np.ndarray]:
        """The pictures of a folder from `start`, for `duration`."""
        import cv2

        first = round(self._start * self.info.fps)
        full = probe(self.path)
        for image in read_images(self._images[first : first + self.info.frame_count], (full.width, full.height)):
            yield cv2.resize(image, (self.info.width, self.info.height)) if self._resized else image

    def _filter_graph(self) -> str:
        info = self.info
        steps = ["yadif=deint=interlaced"] if info.interlaced else []
        steps += [_ON_WHITE_FILTER] if info.alpha_source else []
        steps += [_TONE_MAP_FILTER.format(hdr=info.hdr_transfer)] if info.hdr_transfer and has_tone_mapping() else []
        # start_time=0 repeats the first frame where the picture starts later than the sound: they stay in step
        steps += [f"fps={info.fps}:start_time=0", f"scale={info.width}:{info.height}"]
        return ",".join(steps) + ":flags=bicubic+accurate_rnd+full_chroma_int"

    def _decode_command(self) -> list[str]:
        command = [ffmpeg_path(), "-hide_banner", "-nostdin", "-loglevel", "error", "-protocol_whitelist", "file,pipe"]
        if self.info.alpha_source.startswith("vp"):
            command += ["-c:v", "libvpx" + ("-vp9" if self.info.alpha_source == "vp9" else "")]
        if self._start:
            command += ["-ss", repr(self._start)]
        if self._duration is not None:
            command += ["-t", repr(self._duration)]
        return [
            *command, "-i", file_url(self.path), "-map", "0:V:0", "-vf", self._filter_graph(), "-fps_mode", "passthrough",
            "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1",
        ]  # fmt: skip


class VideoWriter:
    """Write uint8 (H, W, 3) RGB frames to .mp4, .mov, .mkv (H.264), .webm (VP9), .gif or FOLDER/%05d.png (no sound).

    A context manager. The file appears under its name only when the block ends without an exception. H.264 wants even
    sizes: the last column or row of an odd one is left out.

    Args:
        path: the target; its suffix is the container.
        size: (width, height) of the frames.
        fps: exact frame rate.
        crf: constant rate factor of x264, 0 (lossless) to 51; 18 is visually transparent.
        alpha: frames are RGBA (H, W, 4), for .webm (VP9), .mov (ProRes 4444) and pictures.
        audio: a file whose sound joins the video, cut to its length; copied as it is when the container takes it.
        audio_start: seconds of that sound to skip.
        metadata: more tags beside the comment that the video is synthetic.
    """

    def __init__(
        self,
        path: Path,
        *,
        size: tuple[int, int],
        fps: Fraction,
        crf: int = 18,
        alpha: bool = False,
        audio: Path | None = None,
        audio_start: float = 0.0,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.suffix = self.path.suffix.lower()
        check_output_suffix(self.path, alpha=alpha)
        self._image_sequence = ImageSequenceWriter(self.path) if self.suffix == ".png" else None
        if self.path.is_dir():
            raise InputError(f"{path} is a folder: give the name of a video file")
        if fps <= 0 or min(size) < 2 or not 0 <= crf <= 51:
            raise InputError(f"a video needs a positive rate, sides of 2 or more, crf 0..51; got {fps}, {size}, {crf}")
        self.size, self.fps, self.crf = size, Fraction(fps), crf
        self.alpha = alpha
        self.audio_start = audio_start
        self.metadata = {"comment": SYNTHETIC_COMMENT, **(metadata or {})}
        self._audio_codec = audio_codec(audio) if audio is not None and self.suffix not in (".gif", ".png") else None
        self.audio = Path(audio) if audio is not None and self._audio_codec else None
        self.frame_count = 0
        self._process: FfmpegProcess | None = None

    def __enter__(self) -> VideoWriter:
        with contextlib.ExitStack() as stack:
            if self._image_sequence:
                self._image_sequence.temporary_folder = stack.enter_context(write_folder(self._image_sequence.folder))
                self._exit_stack = stack.pop_all()
                return self
            self._temporary = self._video_only = stack.enter_context(write_atomic(self.path))
            if self.audio:  # the picture alone, to which the sound is added at the end
                self._video_only = self._temporary.with_stem(self._temporary.stem + "-picture")
                stack.callback(self._video_only.unlink, missing_ok=True)
            self._process = FfmpegProcess(self._encode_command(), stdin=True, output_file=self._video_only)
            stack.callback(self._process.kill)
            self._exit_stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._exit_stack.__exit__(kind, value, trace)
            return
        with self._exit_stack:
            self._finish()

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 (H, W, 3) RGB of the writer's size."""
        width, height = self.size
        expected = (height, width, 4 if self.alpha else 3)
        if frame.dtype != np.uint8 or frame.shape != expected:
            raise InputError(f"the writer takes uint8 {expected} frames, got {frame.dtype} {frame.shape}")
        if self._image_sequence:
            self._image_sequence.write(frame, "; ".join(self.metadata.values()))
            self.frame_count += 1
            return
        if self._process is None:
            raise MediaError("the video writer is not open: use it in a `with` block")
        try:
            self._process.write(np.ascontiguousarray(frame).data.cast("B"))
        except OSError as error:
            self._process.wait()
            raise MediaError(f"encoding {self.path} failed: {self._process.error_summary()}") from error
        self.frame_count += 1

    def abort(self) -> None:
        """Have a `write` that goes on in another thread fail, and all that come."""
        process = self._process
        if process is not None:
            process.kill()

    def _finish(self) -> None:
        if self._image_sequence:
            if not self.frame_count:
                raise MediaError(f"encoding {self.path} failed: no frame was written")
            return
        process, self._process = self._process, None
        assert process is not None
        process.close_input()
        if process.wait() or not self.frame_count:
            reason = process.error_summary() if self.frame_count else "no frame was written"
            raise MediaError(f"encoding {self.path} failed: {reason}")
        if self.audio:
            muxer = FfmpegProcess(self._mux_command(), output_file=self._temporary)
            try:
                if muxer.wait():
                    raise MediaError(f"adding the sound of {self.audio} to {self.path} failed: {muxer.error_summary()}")
            finally:
                muxer.kill()
        if self.suffix == ".gif":
            _add_gif_comment(self._temporary, "; ".join(self.metadata.values()))

    def _encode_command(self) -> list[str]:
        width, height = self.size
        command = [ffmpeg_path(), "-hide_banner", "-nostdin", "-loglevel", "error", "-y", "-f", "rawvideo"]
        command += ["-pix_fmt", "rgba" if self.alpha else "rgb24", "-video_size", f"{width}x{height}"]
        command += ["-framerate", str(self.fps), "-i", "pipe:0"]
        if self.suffix == ".gif":  # one palette per frame: a palette of the whole clip would need all of it in memory
            even = "fps=50," if self.fps > 50 else ""  # shorter than 0.02 s a frame, browsers play in slow motion
            palette = even + "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
            return [*command, "-filter_complex", palette, *self._metadata_arguments(), file_url(self._video_only)]
        command += encoder_arguments(self.suffix, self.crf, self.size, alpha=self.alpha)
        return [*command, *self._metadata_arguments(), file_url(self._video_only)]

    def _mux_command(self) -> list[str]:
        """Picture and sound into one file, the sound cut to the picture; the frames are not encoded again."""
        assert self.audio is not None
        assert self._audio_codec is not None
        command = [
            ffmpeg_path(),
            "-hide_banner",
            "-nostdin",
            "-loglevel",
            "error",
            "-y",
            "-protocol_whitelist",
            "file,pipe",
        ]
        command += ["-i", file_url(self._video_only)]
        if self._audio_codec in _COPYABLE_AUDIO[self.suffix] and not self._audio_codec.startswith("pcm_"):
            # a shift, with what falls before 0 dropped, is exact to a packet; a seek is not where there is no index
            command += ["-itsoffset", repr(-self.audio_start)]
            sound = ["copy", *(["-bsf:a", r"noise=drop=lt(pts\,0)"] if self.audio_start else [])]
        else:
            command += ["-ss", repr(self.audio_start)]
            sound = ["libopus", "-b:a", "128k"] if self.suffix == ".webm" else ["aac", "-b:a", "192k"]
            if self._audio_codec in _COPYABLE_AUDIO[self.suffix]:  # PCM: its packets are long; this cuts to the sample
                sound = [self._audio_codec]
        command += ["-protocol_whitelist", "file,pipe", "-i", file_url(self.audio)]
        command += [
            "-map",
            "0:v:0",
            "-map",
            "1:a:0?",
            "-c:v",
            "copy",
            "-t",
            f"{float(self.frame_count / self.fps):.6f}",
        ]
        command += ["-map_metadata", "-1", "-map_chapters", "-1", "-c:a", *sound]
        command += ["-metadata:s:v:0", "alpha_mode=1"] if self.alpha and self.suffix == ".webm" else []
        return [*command, *self._metadata_arguments(), file_url(self._temporary)]

    def _metadata_arguments(self) -> list[str]:
        tags = [part for key, text in self.metadata.items() for part in ("-metadata", f"{key}={text}")]
        if self.suffix in (".mp4", ".mov"):
            tags += ["-movflags", "+faststart"]
        return [*tags, "-fflags", "+bitexact"]  # no random identifiers: same frames, same bytes


def _add_gif_comment(path: Path, text: str) -> None:
    """Put a comment block behind the header, as ffmpeg does not; readers take one at the end for a frame."""
    data = text.encode("ascii", "replace")
    blocks = b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))
    with write_atomic(path) as commented, path.open("rb") as file, commented.open("wb") as out:
        head = file.read(13)
        colours = 3 << ((head[10] & 7) + 1) if head[10] & 0x80 else 0  # bytes of the global palette
        out.write(head + file.read(colours) + b"\x21\xfe" + blocks + b"\x00")
        shutil.copyfileobj(file, out)
