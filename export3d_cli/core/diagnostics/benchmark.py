"""Benchmark of `reenact` on this machine: time per stage, frames/s from file to file, and another tool's time.

The stages of the network are timed where they are called: while a clip is animated, each method in `STAGES` is wrapped
with a clock. Frames/s are measured separately, without clocks.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.compositor import Compositor
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.face_track import FaceTrack
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.device import peak_memory
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

STAGES = (  # stage, part of the model, method
    ("expression", "expression", "coefficients"),  # beta to lambda; beta' is computed within the tri-plane
    ("tri-plane", "", "generate_planes"),
    ("render", "", "render"),
    ("flow", "", "_prepare_photo_detail"),
    ("super-resolution", "superres", "forward"),
    ("mouth", "inpainters.mouth", "inpaint"),  # for frames with parted lips, if the weights have it
    ("eyes", "inpainters.eyes", "inpaint"),  # for frames with eyes wider open than in the photo
    ("lids", "inpainters.lids", "inpaint"),  # for frames with (nearly) closed eyes
)


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured."""

    device: str  # and precision
    threads: int
    batch: int  # frames at once
    frames: int
    # median milliseconds per frame; per photo for `encode source`, per computed tri-plane for `tri-plane`
    stages: dict[str, float]
    fps: float  # frames/s of `reenact` from file to file, including tracking and encoding
    seconds: float  # duration of that run
    peak_memory: int | None  # bytes of this process without ffmpeg; None: unknown on this system
    peak_gpu: int | None  # bytes on the GPU; None: no GPU
    tri_planes: float  # tri-planes computed per frame; below 1 if others are interpolated


def run_benchmark(
    animator: Animator, source: Path | None = None, driver: Path | None = None, *, frames: int = 30
) -> BenchmarkResult:
    """Time the stages on `frames` frames of the driver, then all of `reenact`; default: the bundled example."""
    source, driver = source or example_path("source.jpg"), driver or example_path("drive.mp4")
    is_cuda = animator.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(animator.device)
    clock = _StageClock(animator.device)
    images: list[np.ndarray] = []
    with VideoReader(driver) as reader:
        fps, stream = reader.info.fps, iter(reader)
        for _ in range(frames):
            with clock("decode"):
                image = next(stream, None)
            if image is None:
                break
            images.append(image)
    if len(images) < 2:
        raise InputError(f"{driver} has fewer than two frames: give a longer video")
    faces = []
    tracker = animator.tracker()
    track = FaceTrack(tracker.landmarker)
    for image in images:
        with clock("track"):
            faces.append(track.track(image))
    motion = tracker.make_motion(faces, fps, (images[0].shape[1], images[0].shape[0]))
    portrait = animator.portrait(read_image(source), name=str(source))
    with clock("encode source"):
        animator.portrait_from_motion(portrait.crop, portrait.motion)
    next(animator.animate(portrait, [motion]))  # warm up
    with _timed_stages(animator, clock):
        rendered = list(animator.animate(portrait, [motion], layers=True))
    options = ReenactOptions(max_frames=len(images), audio="none")
    compositor, add_watermark, results = Compositor(portrait), get_watermarker(options.watermark), []
    for layers in rendered:
        with clock("compose"):
            results.append(add_watermark(compositor(layers)))
    with tempfile.TemporaryDirectory() as folder:
        size = results[0].shape[1::-1]
        # a whole file, because ffmpeg runs behind a pipe and single frames cannot be timed
        with clock("encode video", len(results)), VideoWriter(Path(folder) / "a.mp4", size=size, fps=fps) as writer:
            for frame in results:
                writer.write(frame)
        began = time.perf_counter()
        summary = reenact(animator, source, driver, Path(folder) / "b.mp4", options)
        seconds = time.perf_counter() - began
    return BenchmarkResult(
        device=animator.device_name,
        threads=torch.get_num_threads(),
        batch=animator.batch,
        frames=len(images),
        stages={name: round(float(np.median(values)), 3) for name, values in clock.times.items()},
        fps=summary.frames / seconds,
        seconds=seconds,
        peak_memory=peak_memory(),
        peak_gpu=torch.cuda.max_memory_allocated(animator.device) if is_cuda else None,
        tri_planes=min(clock.counts.get("tri-plane", 0) / len(images), 1.0),
    )


@dataclass(frozen=True)
class SpeedComparison:
    """Seconds from file to file, start of the program included."""

    seconds: tuple[float, ...]  # of each run of `export3d reenact`
    other_seconds: tuple[float, ...]  # of each run of the other tool
    ratio: float  # the other tool's median over that of export3d: above 1 export3d is faster


def compare_speed(
    command: str, source: Path | None = None, driver: Path | None = None, *, rounds: int = 5,
    arguments: Sequence[str] = (),
) -> SpeedComparison:  # fmt: skip
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
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run ({error.strerror}): give the path of a program") from error
    seconds = time.perf_counter() - began
    if done.returncode or not out.is_file():
        reason = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        problem = f"ended with exit code {done.returncode}" if done.returncode else "did not write {out}"
        raise InputError(f"{command[0]} {problem}: run it alone first ({reason or 'it printed nothing'})")
    out.unlink()
    return seconds


class _StageClock:
    """Collects milliseconds per stage; waits for the GPU before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {}  # items that each stage processed

    @contextlib.contextmanager
    def __call__(self, stage: str, items: int = 1) -> Iterator[None]:
        self._synchronize()
        began = time.perf_counter()
        yield
        self._synchronize()
        self.times.setdefault(stage, []).append(1000 * (time.perf_counter() - began) / items)
        self.counts[stage] = self.counts.get(stage, 0) + items

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


@contextlib.contextmanager
def _timed_stages(animator: Animator, clock: _StageClock) -> Iterator[None]:
    """Wrap the methods of `STAGES` with a clock, for a while."""
    wrapped = []
    modules = dict(animator.model.named_modules())
    for stage, part, method in STAGES:
        owner = modules.get(part)
        if owner is not None:
            setattr(owner, method, _with_clock(getattr(owner, method), stage, clock))
            wrapped.append((owner, method))
    try:
        yield
    finally:
        for owner, method in wrapped:
            delattr(owner, method)


def _with_clock(function: Callable[..., Any], stage: str, clock: _StageClock) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        batch = next((len(arg) for arg in reversed(args) if isinstance(arg, torch.Tensor)), 1)
        with clock(stage, batch):
            return function(*args, **kwargs)

    return timed
