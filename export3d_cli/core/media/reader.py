"""Reading videos and cameras as streams of uint8 (H, W, 3) RGB frames, one frame in memory at a time."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from export3d_cli.core.media.ffmpeg_process import FfmpegProcess
from export3d_cli.core.media.image import check_pixel_count, list_images, read_image
from export3d_cli.core.media.probe import probe, read_command
from export3d_cli.core.runtime.errors import InputError, MediaError

CameraFrame = tuple[np.ndarray, float]  # uint8 (H, W, 3) RGB, and the time of its arrival by `time.monotonic`
_CAMERA_FPS = Fraction(30)  # of cameras that do not report their rate
_MISSING_PICTURE_S = 1.0  # a video that ends earlier than its header says, by more than this, gets a note
_ON_WHITE_FILTER = "format=gbrap,negate,premultiply=inplace=1,negate"  # 1 - (1 - colour) alpha
_TONE_MAP_FILTER = (  # BT.2408: diffuse white at 203 cd/m2
    "zscale=tin={hdr}:pin=bt2020:min=bt2020nc:t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,"
    "tonemap=tonemap=hable:desat=0,zscale=t=bt709:m=bt709:r=tv,format=yuv444p"
)


class VideoReader(contextlib.AbstractContextManager["VideoReader"]):
    """Iterates over the frames of a video, uint8 (H, W, 3) RGB, at a constant rate. A context manager.

    Rotation and pixel aspect are applied, interlaced frames are deinterlaced, high dynamic range is tone-mapped,
    transparency is composited on white, and a variable rate is resampled to a constant one.

    `path` is any video or image (one frame) that ffmpeg reads, or a folder of images of one size. `fps` None is the
    video's rate, 25 for a folder. `start` and `duration` are in seconds; `size` (width, height) scales the frames.
    `info` describes the stream: rate, size and expected number of frames. `notes` are warnings for the user; one about
    a truncated video is added when the iteration ends.
    """

    def __init__(self, path: Path, *, fps: Fraction | None = None, start: float = 0.0, duration: float | None = None,
                 size: tuple[int, int] | None = None) -> None:  # fmt: skip
        self.path = Path(path)
        if start < 0 or (duration is not None and duration <= 0) or (fps is not None and fps <= 0):
            raise InputError(f"start must be >= 0, duration and fps must be positive, got {start}, {duration}, {fps}")
        info = probe(self.path)
        self._images = list_images(self.path) if self.path.is_dir() else []
        if fps is not None and self._images:
            info = replace(info, fps=fps, duration=float(info.frame_count / fps))
        if info.duration and start >= info.duration:
            raise InputError(f"start {start} s is past the end of {path} ({info.duration:.2f} s)")
        rate = fps or info.fps
        width, height = size or (info.width, info.height)
        check_pixel_count(width, height, self.path)
        seconds = max(0.0, info.duration - start)
        if duration is not None:
            seconds = min(seconds, duration) if info.duration else duration
        frame_count = max(1, round(seconds * rate)) if seconds else info.frame_count
        self.info = replace(info, fps=rate, width=width, height=height, frame_count=frame_count, duration=seconds)
        self._start, self._duration, self._resized = start, duration, size is not None
        self._header_duration = min(max(0.0, info.header_duration - start), duration or info.header_duration)
        self._process: FfmpegProcess | None = None
        self.notes = [f"{path}: variable frame rate resampled to {rate}"] if info.vfr and fps is None else []
        if info.hdr_transfer:
            self.notes.append(f"{path}: high dynamic range, tone-mapped")

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
                byte_count = process.read_into(frame.data.cast("B"))
                if byte_count < frame.nbytes:
                    break
                count += 1
                yield frame
            exit_code = process.wait()
            if count == 0 and not process.stalled:
                raise InputError(f"no frame of {self.path} could be decoded: {process.error_summary()}")
            if exit_code or byte_count:
                raise MediaError(f"reading {self.path} stopped after {count} frames: {process.error_summary()}")
            if self._header_duration - count / self.info.fps > _MISSING_PICTURE_S:
                seconds = f"{float(count / self.info.fps):.1f} s of {self._header_duration:.1f} s"
                self.notes.append(f"{self.path}: the picture ends after {seconds}: truncated, or the audio is longer")
        finally:
            self.close()

    def close(self) -> None:
        """Stop ffmpeg if it is still running."""
        process, self._process = self._process, None  # another thread may call this, too
        if process is not None:
            process.kill()

    def _read_folder(self) -> Iterator[np.ndarray]:
        """Yield the images of a folder from `start`, for `duration`."""
        import cv2

        first = round(self._start * self.info.fps)
        full = probe(self.path)
        for path in self._images[first : first + self.info.frame_count]:
            image = read_image(path)
            if image.shape[:2] != (full.height, full.width):
                sizes = f"{image.shape[1]}x{image.shape[0]}, the first image {full.width}x{full.height}"
                raise InputError(f"{path} is {sizes}: use one size in a folder")
            yield cv2.resize(image, (self.info.width, self.info.height)) if self._resized else image

    def _filter_graph(self) -> str:
        info = self.info
        steps = ["yadif=deint=interlaced"] if info.interlaced else []
        steps += [_ON_WHITE_FILTER] if info.alpha_source else []
        steps += [_TONE_MAP_FILTER.format(hdr=info.hdr_transfer)] if info.hdr_transfer else []
        if info.decode_delay:  # of AVI, in which ffmpeg does not find every time: decode it from the beginning
            skipped = info.decode_delay + self._start
            limit = "" if self._duration is None else f":duration={self._duration!r}"
            steps.append(f"trim=start={skipped - 1e-4:.6f}{limit},setpts=PTS-{skipped!r}/TB")
        # start_time=0 repeats the first frame if the picture starts later than the audio, so that they stay in sync
        steps += [f"fps={info.fps}:start_time=0", f"scale={info.width}:{info.height}"]
        return ",".join(steps) + ":flags=bicubic+accurate_rnd+full_chroma_int"

    def _decode_command(self) -> list[str]:
        options = ["-loglevel", "error"]
        if self.info.alpha_source.startswith("vp"):
            options += ["-c:v", "libvpx" + ("-vp9" if self.info.alpha_source == "vp9" else "")]
        if self._start and not self.info.decode_delay:
            options += ["-ss", repr(self._start)]
        if self._duration is not None and not self.info.decode_delay:
            options += ["-t", repr(self._duration)]
        output = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
        return [*read_command(self.path, *options), "-map", "0:V:0", "-vf", self._filter_graph(), *output]


def open_camera(camera: int | Path, stopped: threading.Event) -> tuple[Fraction, Iterator[CameraFrame]]:
    """Return a camera's rate, and its frames until `stopped` is set or it is disconnected.

    `camera` is its number, from 0, or a video file, which is repeated at its rate. Raises `InputError`.
    """
    if isinstance(camera, Path):
        reader = VideoReader(camera)
        return reader.info.fps, _play_file(reader, stopped)
    import cv2

    capture = cv2.VideoCapture(camera)
    if not capture.isOpened():
        raise InputError(f"camera {camera} cannot be opened: connect it, close programs that use it, or use a file")
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # frames that wait in the driver would be late
    rate = capture.get(cv2.CAP_PROP_FPS)
    fps = Fraction(rate).limit_denominator(1001) if 1 <= rate <= 240 else _CAMERA_FPS
    return fps, _read_camera(capture, stopped)


def _read_camera(capture: Any, stopped: threading.Event) -> Iterator[CameraFrame]:
    try:
        while not stopped.is_set():
            ok, image = capture.read()
            if not ok:  # it was disconnected
                return
            yield np.ascontiguousarray(image[..., ::-1]), time.monotonic()
    finally:
        capture.release()


def _play_file(reader: VideoReader, stopped: threading.Event) -> Iterator[CameraFrame]:
    due = time.monotonic()
    while True:
        with reader:
            for image in reader:
                due = max(due + float(1 / reader.info.fps), time.monotonic() - 1)  # catches up at most a second
                if stopped.wait(max(0.0, due - time.monotonic())):
                    return
                yield image, time.monotonic()
