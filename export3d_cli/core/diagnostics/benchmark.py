"""Speed of `reenact` on this machine: time per stage, frames/s from file to file, and another tool's time."""

import itertools
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.compositor import Compositor, read_portrait
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.face_track import FaceTrack
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.device import peak_memory
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

T = TypeVar("T")


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured."""

    device: str  # and precision
    threads: int
    batch: int  # frames at once
    frames: int
    stages: dict[str, float]  # milliseconds per frame; per photo for `encode source`
    fps: float  # frames/s of `reenact` from file to file, including tracking and encoding
    seconds: float  # duration of that run
    peak_memory: int | None  # bytes of this process without ffmpeg; None: unknown on this system
    peak_gpu: int | None  # bytes on the GPU; None: no GPU


def run_benchmark(animator: Animator, source: Path | None = None, driver: Path | None = None, *,
                  frames: int = 30) -> BenchmarkResult:  # fmt: skip
    """Time the stages on `frames` frames of the driver, then all of `reenact`; default: the bundled example."""
    source, driver = source or example_path("source.jpg"), driver or example_path("drive.mp4")
    is_cuda = animator.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(animator.device)
    stages: dict[str, float] = {}

    def timed(stage: str, items: Iterable[T]) -> list[T]:
        began = time.perf_counter()
        made = list(items)
        if is_cuda:
            torch.cuda.synchronize(animator.device)
        stages[stage] = round(1000 * (time.perf_counter() - began) / max(len(made), 1), 3)
        return made

    with VideoReader(driver) as reader:
        images = timed("decode", itertools.islice(reader, frames))
    if len(images) < 2:
        raise InputError(f"{driver} has fewer than two frames: give a longer video")
    tracker = animator.tracker()
    faces = timed("track", map(FaceTrack(tracker).track, images))
    motion = tracker.make_motion(faces, reader.info.fps, (images[0].shape[1], images[0].shape[0]))
    photo = read_portrait(source)
    next(animator.animate(animator.portrait(photo, name=str(source)), [motion]))  # warm up
    (portrait,) = timed("encode source", map(animator.portrait, [photo]))
    rendered = timed("render", animator.animate(portrait, [motion], layers=True))
    options = ReenactOptions(max_frames=len(images), audio="none")
    results = timed("compose", map(get_watermarker(options.watermark), map(Compositor([portrait]), rendered)))
    with tempfile.TemporaryDirectory() as folder:
        writer = VideoWriter(Path(folder) / "a.mp4", size=results[0].shape[1::-1], fps=reader.info.fps)

        def encode() -> Iterator[None]:  # a whole file, because ffmpeg runs behind a pipe
            with writer:
                yield from map(writer.write, results)

        timed("encode video", encode())
        summary = reenact(animator, source, driver, Path(folder) / "b.mp4", options)
    peak_gpu = torch.cuda.max_memory_allocated(animator.device) if is_cuda else None
    return BenchmarkResult(animator.device_name, torch.get_num_threads(), animator.batch, len(images), stages,
                           summary.frames / summary.seconds, summary.seconds, peak_memory(), peak_gpu)  # fmt: skip


@dataclass(frozen=True)
class SpeedComparison:
    """Seconds from file to file, start of the program included."""

    seconds: tuple[float, ...]  # of each run of `export3d reenact`
    other_seconds: tuple[float, ...]  # of each run of the other tool
    ratio: float  # the other tool's median over that of export3d: above 1 export3d is faster


def compare_speed(command: str, source: Path | None = None, driver: Path | None = None, *, rounds: int = 5,
                  arguments: Sequence[str] = ()) -> SpeedComparison:  # fmt: skip
    """Run `export3d reenact` and another tool in turn on the same files, `rounds` times each.

    `command` is the other tool's, with {src}, {drv} and {out} for photo, driver and result; no shell reads it.
    `arguments` are further options of `reenact`. Raises `InputError` for a command that cannot be run or fails.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"{command!r} is no command ({error}): quote it as a shell does") from error
    if missing := [name for name in ("{src}", "{drv}", "{out}") if name not in command]:
        raise InputError(f"{command!r} lacks {' and '.join(missing)}: put each where the tool expects that file")
    own_words = [sys.executable, "-m", "export3d_cli", "reenact", "{src}", "{drv}", "-o", "{out}", "-q", *arguments]
    seconds: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.mp4"
        source, driver = source or example_path("source.jpg"), driver or example_path("drive.mp4")
        files = {"{src}": source, "{drv}": driver, "{out}": out}
        for _ in range(rounds):
            for times, tool in zip(seconds, (words, own_words), strict=True):  # the other first: it may fail
                for name, path in files.items():
                    tool = [word.replace(name, str(path.absolute())) for word in tool]
                times.append(_time_tool(tool, out))
    other, own = seconds
    return SpeedComparison(tuple(own), tuple(other), float(np.median(other) / np.median(own)))


def _time_tool(command: list[str], out: Path) -> float:
    """Return the seconds of a program that writes `out`, which is removed; raise `InputError` if it does not."""
    began = time.perf_counter()
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run ({error.strerror}): give the path of a program") from error
    seconds = time.perf_counter() - began
    if done.returncode or not out.is_file():
        reason = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        problem = f"ended with exit code {done.returncode}" if done.returncode else "did not write {out}"
        raise InputError(f"{command[0]} {problem}: run it alone first ({reason or 'it printed nothing'})")
    out.unlink()
    return seconds
