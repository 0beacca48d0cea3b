"""Writing videos from uint8 (H, W, 3) RGB frames, one frame in memory at a time."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np

from export3d_cli.core.media.ffmpeg_process import FfmpegProcess
from export3d_cli.core.media.image import write_image
from export3d_cli.core.media.probe import can_seek, ffmpeg_path, file_url, read_command
from export3d_cli.core.media.soundtrack import Soundtrack, choose_soundtrack
from export3d_cli.core.runtime.errors import Export3DWarning, InputError, MediaError
from export3d_cli.core.runtime.files import write_atomic, write_folder

SYNTHETIC_COMMENT = "synthetic media: generated with export3d (AI), not a recording"
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif")  # formats that can be written
ALPHA_SUFFIXES = (".webm", ".mov")  # formats with an alpha channel
DEFAULT_CRF = 18  # visually transparent
_BT709_FILTERS = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
_BT709_TAGS = "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"


class VideoWriter:
    """Writes frames of `size` (width, height) to .mp4, .mov, .mkv (H.264), .webm (VP9), .gif or FOLDER/%05d.png.

    A context manager. The file appears under its name only if the block ends without an exception. Odd sizes lose their
    last column or row, because H.264 and VP9 need even ones. `crf` is on x264's scale, 0 (lossless) to 51, None: 18,
    which is visually transparent; GIF, ProRes and images have none. With `alpha`, frames are RGBA (H, W, 4), for .webm
    (VP9), .mov (ProRes 4444) and images.

    The first decodable track of the file `audio` is added from `audio_start` seconds on, cut to the video's length, and
    copied if the container takes it, but not to .gif and images. Without such a track, or if adding it fails, the video
    is silent, with an `Export3DWarning`. `metadata` are tags besides the comment that the video is synthetic.
    """

    def __init__(self, path: Path, *, size: tuple[int, int], fps: Fraction, crf: int | None = None, alpha: bool = False,
                 audio: Path | None = None, audio_start: float = 0.0,
                 metadata: Mapping[str, str] | None = None) -> None:  # fmt: skip
        self.path = Path(path)
        self.suffix = self.path.suffix.lower()
        check_output_suffix(self.path, alpha=alpha)
        check_crf(self.path, crf, alpha=alpha)
        crf = DEFAULT_CRF if crf is None else crf
        self._image_name = _check_image_names(self.path) if self.suffix == ".png" else None
        if self.path.is_dir():
            raise InputError(f"{path} is a folder: give the name of a video file")
        if fps <= 0 or min(size) < 2 or not 0 <= crf <= 51:
            raise InputError(f"a video must have a positive rate, sides >= 2 and crf 0 to 51; got {fps}, {size}, {crf}")
        self.size, self.fps, self.crf = size, Fraction(fps), crf
        self.alpha = alpha
        self.audio_start = audio_start
        self.metadata = {"comment": SYNTHETIC_COMMENT, **(metadata or {})}
        has_sound = audio is not None and self.suffix not in (".gif", ".png")
        self._soundtrack = choose_soundtrack(audio, self.suffix) if audio is not None and has_sound else None
        self.frame_count = 0
        self._process: FfmpegProcess | None = None
        self._exit_stack: contextlib.ExitStack | None = None

    def __enter__(self) -> VideoWriter:
        with contextlib.ExitStack() as stack:
            target = write_folder(self.path.parent) if self._image_name else write_atomic(self.path)
            self._temporary = self._video_only = stack.enter_context(target)
            if self._soundtrack:  # encode the picture alone; the audio is added at the end
                self._video_only = self._temporary.with_stem(self._temporary.stem + "-picture")
                stack.callback(self._video_only.unlink, missing_ok=True)
            if not self._image_name:
                self._process = FfmpegProcess(self._encode_command(), stdin=True, output_file=self._video_only)
                stack.callback(self._process.kill)
            self._exit_stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        stack, self._exit_stack = self._exit_stack, None
        assert stack is not None
        if kind is not None:
            stack.__exit__(kind, value, trace)
            return
        with stack:
            self._finish()

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 (H, W, 3) RGB or, with `alpha`, (H, W, 4) RGBA, of the writer's size."""
        width, height = self.size
        expected = (height, width, 4 if self.alpha else 3)
        if frame.dtype != np.uint8 or frame.shape != expected:
            raise InputError(f"frames must be uint8 {expected}, got {frame.dtype} {frame.shape}")
        if self._exit_stack is None:
            raise MediaError("the video writer is not open: use it in a `with` block")
        if self._image_name:
            name = self._image_name % self.frame_count
            write_image(self._temporary / name, frame, comment="; ".join(self.metadata.values()))
        elif self._process is not None:
            try:
                self._process.write(np.ascontiguousarray(frame).data.cast("B"))
            except OSError as error:
                self._process.wait()
                raise MediaError(f"encoding {self.path} failed: {self._process.error_summary()}") from error
        self.frame_count += 1

    def abort(self) -> None:
        """Make a running `write` in another thread, and all later ones, fail."""
        if (process := self._process) is not None:
            process.kill()

    def _finish(self) -> None:
        process, self._process = self._process, None
        reason = "" if self.frame_count else "no frame was written"
        if process is not None:
            process.close_input()
            if process.wait():
                reason = reason or process.error_summary()
        if reason:
            raise MediaError(f"encoding {self.path} failed: {reason}")
        if self._soundtrack:
            self._add_audio(self._soundtrack)
        if self.suffix == ".gif":
            _add_gif_comment(self._temporary, "; ".join(self.metadata.values()))

    def _add_audio(self, soundtrack: Soundtrack) -> None:
        muxer = FfmpegProcess(self._mux_command(soundtrack), output_file=self._temporary)
        try:
            if muxer.wait():  # keep the picture, which can be hours of work
                reason = f"{self.path} is silent, because adding the sound of {soundtrack.path} failed"
                warnings.warn(f"{reason}: {muxer.error_summary()}", Export3DWarning, stacklevel=4)
                self._video_only.replace(self._temporary)
        finally:
            muxer.kill()

    def _encode_command(self) -> list[str]:
        width, height = self.size
        command = [ffmpeg_path(), "-hide_banner", "-nostdin", "-loglevel", "error", "-y", "-f", "rawvideo"]
        command += ["-pix_fmt", "rgba" if self.alpha else "rgb24", "-video_size", f"{width}x{height}"]
        command += ["-framerate", str(self.fps), "-i", "pipe:0"]
        if self.suffix == ".gif":  # a palette per frame: one for the whole clip would need all frames in memory
            limit = "fps=50," if self.fps > 50 else ""  # browsers slow down frames shorter than 0.02 s
            palette = limit + "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
            command += ["-filter_complex", palette]
        else:
            command += encoder_arguments(self.suffix, self.crf, self.size, alpha=self.alpha)
        return [*command, *self._metadata_arguments(), file_url(self._video_only)]

    def _mux_command(self, soundtrack: Soundtrack) -> list[str]:
        """Return the command that joins the encoded picture with the audio, cut to the picture's length."""
        command = read_command(self._video_only, "-loglevel", "error", "-y")
        encoder = list(soundtrack.encoder)
        if encoder == ["copy"]:
            # shifting the audio and dropping packets before 0 is exact to a packet; seeking needs an index for that
            command += ["-itsoffset", repr(-self.audio_start)]
            encoder += ["-bsf:a", r"noise=drop=lt(pts\,0)"] if self.audio_start else []
        elif can_seek(soundtrack.path):
            command += ["-ss", repr(self.audio_start)]
        else:
            skip = f"atrim=start={self.audio_start!r},asetpts=PTS-{self.audio_start!r}/TB"
            encoder[-1:] = [f"{skip},{encoder[-1]}"] if "-af" in encoder else [encoder[-1], "-af", skip]
        command += ["-protocol_whitelist", "file,pipe", "-i", file_url(soundtrack.path)]
        command += ["-map", "0:v:0", "-map", f"1:a:{soundtrack.index}", "-c:v", "copy"]
        command += ["-t", f"{float(self.frame_count / self.fps):.6f}"]
        command += ["-map_metadata", "-1", "-map_chapters", "-1", "-c:a", *encoder]
        command += ["-metadata:s:v:0", "alpha_mode=1"] if self.alpha and self.suffix == ".webm" else []
        return [*command, *self._metadata_arguments(), file_url(self._temporary)]

    def _metadata_arguments(self) -> list[str]:
        arguments = [part for key, text in self.metadata.items() for part in ("-metadata", f"{key}={text}")]
        if self.suffix in (".mp4", ".mov"):
            arguments += ["-movflags", "+faststart"]
        return [*arguments, "-fflags", "+bitexact"]  # no random identifiers: same frames, same bytes


def _add_gif_comment(path: Path, text: str) -> None:
    """Insert a comment block after the header; ffmpeg writes none, and readers take one at the end for a frame."""
    data, comment = path.read_bytes(), text.encode("ascii", "replace")[:255]
    start = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)  # behind the global palette
    path.write_bytes(data[:start] + b"\x21\xfe" + bytes([len(comment)]) + comment + b"\0" + data[start:])


def _check_image_names(path: Path) -> str:
    """Return the name of an image sequence as a format of numbers; raise `InputError` if it is none, or is taken."""
    match = re.fullmatch(r"([^%]*)%0?([1-9]?)d([^%]*)", path.name)
    if not match:
        raise InputError(f"{path} names a single image: name one image per frame, for example %05d.png")
    prefix, digits, suffix = match.groups()
    numbered = re.compile(rf"{re.escape(prefix)}\d+{re.escape(suffix)}")
    if path.parent.is_dir() and any(numbered.fullmatch(image.name) for image in path.parent.iterdir()):
        raise InputError(f"{path.parent} already contains images of that name: choose another folder")
    return f"{prefix}%0{digits or 1}d{suffix}"


def check_output_suffix(path: Path, *, alpha: bool = False) -> None:
    """Raise `InputError` if the suffix is no output format, or has no alpha channel where `alpha` needs one."""
    suffix = path.suffix.lower()
    if suffix not in (*VIDEO_SUFFIXES, ".png"):
        usual = ", ".join(VIDEO_SUFFIXES)
        raise InputError(f"cannot write videos of type {suffix!r}: use {usual} or FOLDER/%05d.png")
    if alpha and suffix not in (*ALPHA_SUFFIXES, ".png"):
        raise InputError(f"{path} cannot be transparent: use .webm, .mov or FOLDER/%05d.png")


def check_crf(path: Path, crf: int | None, *, alpha: bool = False) -> None:
    """Raise `InputError` if a constant rate factor is given for an output without one (GIF, ProRes, images)."""
    suffix = path.suffix.lower()
    if crf is not None and (suffix not in VIDEO_SUFFIXES or suffix == ".gif" or (alpha and suffix == ".mov")):
        kind = "transparent .mov" if suffix == ".mov" else suffix or "this output"
        raise InputError(f"crf does not apply to {kind} ({path}): omit it, or write .mp4, .mkv or .webm")


def encoder_arguments(suffix: str, crf: int, size: tuple[int, int], *, alpha: bool) -> list[str]:
    """Return ffmpeg's arguments, with even sides: VP9 for .webm, ProRes 4444 for .mov with alpha, else H.264."""
    width, height = size
    layout = "yuva420p" if alpha else "yuv420p"
    if suffix == ".webm":  # VP9's CRF scale ends at 63, x264's at 51
        codec = ["libvpx-vp9", "-crf", str(round(crf * 63 / 51)), "-b:v", "0", "-row-mt", "1"]
        codec += ["-deadline", "good", "-cpu-used", "4", *(["-auto-alt-ref", "0"] if alpha else [])]
    elif alpha:
        layout, codec = "yuva444p10le", ["prores_ks", "-profile:v", "4444", "-alpha_bits", "16", "-vendor", "apl0"]
    else:
        codec = ["libx264", "-preset", "medium", "-crf", str(crf)]
    filters = f"crop={width // 2 * 2}:{height // 2 * 2}:0:0,{_BT709_FILTERS},format={layout},{_BT709_TAGS}"
    return ["-vf", filters, "-c:v", *codec]
