"""Benchmark of `reenact` on this machine: time per stage, and frames/s from file to file.

The stages of the network are timed where they are called: while a clip is animated, each method in `STAGES` is wrapped
with a clock. Frames/s are measured separately, without clocks.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.compositor import Compositor
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.diagnostics.measurement import process_peak_memory, synchronize
from export3d_cli.core.face.face_track import FaceTrack
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image, to_uint8
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

Progress = Callable[[str, int, "int | None"], None]
WARMUP_BATCHES = 2  # before the clocks run
ENCODE_REPEATS = 3  # times the source and the video are encoded
STEPS = 6  # calls of `progress`
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
class StageTiming:
    """Milliseconds per frame; per photo for `encode source`, per computed tri-plane for `tri-plane`."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    count: int  # measurements


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured."""

    device: str  # and precision
    threads: int
    batch: int  # frames at once
    frames: int
    stages: dict[str, StageTiming]
    fps: float  # frames/s of `reenact` from file to file, including tracking and encoding
    seconds: float  # duration of that run
    peak_memory: int | None  # bytes of the process; None: unknown on this system
    peak_gpu: int | None  # bytes on the GPU; None: no GPU
    tri_planes: float  # tri-planes computed per frame; below 1 if others are interpolated


def run_benchmark(
    animator: Animator,
    source: Path | None = None,
    driver: Path | None = None,
    *,
    frames: int = 30,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Time the stages on `frames` frames of the driver, then all of `reenact`; default: the bundled example."""
    source, driver = source or example_path("source.jpg"), driver or example_path("drive.mp4")
    is_cuda = animator.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(animator.device)
    steps = itertools.count(1)

    def step() -> None:
        if progress is not None:
            progress("stages", next(steps), STEPS)

    clock = _StageClock(animator.device)
    images, fps = _time_decoding(driver, frames, clock)
    step()
    faces = []
    with animator.borrow_landmarker() as tracker:
        track = FaceTrack(tracker.landmarker)
        for image in images:
            with clock("track"):
                faces.append(track.track(image))
        motion = tracker.make_motion(faces, fps, (images[0].shape[1], images[0].shape[0]))
    step()
    portrait = animator.portrait(read_image(source), name=str(source))
    for _ in range(ENCODE_REPEATS):
        with clock("encode source"):
            animator.portrait_from_motion(portrait.crop, portrait.motion)
    step()
    results = _time_network(animator, portrait, motion, clock)
    step()
    with tempfile.TemporaryDirectory() as folder:
        _time_encoding(results, fps, Path(folder) / "stage.mp4", clock)
        step()
        began = time.perf_counter()
        options = ReenactOptions(max_frames=len(images), audio="none")
        summary = reenact(animator, source, driver, Path(folder) / "all.mp4", options)
        seconds = time.perf_counter() - began
        step()
    return BenchmarkResult(
        device=animator.device_name,
        threads=torch.get_num_threads(),
        batch=animator.batch,
        frames=len(images),
        stages={name: _summarise_times(values) for name, values in clock.times.items()},
        fps=summary.frames / seconds,
        seconds=seconds,
        peak_memory=process_peak_memory(),
        peak_gpu=torch.cuda.max_memory_allocated(animator.device) if is_cuda else None,
        tri_planes=min(clock.counts.get("tri-plane", 0) / len(images), 1.0),
    )


class _StageClock:
    """Collects milliseconds per stage; waits for the GPU before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {}  # items that each stage processed

    @contextlib.contextmanager
    def __call__(self, stage: str, items: int = 1) -> Iterator[None]:
        synchronize(self.device)
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.times.setdefault(stage, []).append(1000 * (time.perf_counter() - began) / items)
        self.counts[stage] = self.counts.get(stage, 0) + items


def _summarise_times(values: list[float]) -> StageTiming:
    low, median, high = np.percentile(values, [10, 50, 90])
    return StageTiming(round(float(median), 3), round(float(low), 3), round(float(high), 3), len(values))


def _time_decoding(driver: Path, frames: int, clock: _StageClock) -> tuple[list[np.ndarray], Fraction]:
    images = []
    with VideoReader(driver) as reader:
        stream = iter(reader)
        next(stream, None)  # includes the start of ffmpeg
        for _ in range(frames):
            with clock("decode"):
                image = next(stream, None)
            if image is None:
                break
            images.append(image)
        if not images:
            raise InputError(f"{driver} has fewer than two frames: give a longer video")
        return images, reader.info.fps


def _time_network(animator: Animator, portrait: Portrait, motion: Motion, clock: _StageClock) -> list[np.ndarray]:
    """Animate the source with clocks in the network, time the conversion to uint8 alone, then the composition."""
    for _ in itertools.islice(animator.animate(portrait, [motion]), WARMUP_BATCHES * animator.batch):
        pass
    batch = animator.batch
    with _timed_stages(animator, clock):
        rendered = list(animator.animate(portrait, [motion], layers=True))
    images = torch.zeros(batch, 3, *portrait.crop.shape[:2], device=animator.device)
    for _ in range(max(1, len(rendered) // batch)):
        with clock("convert", batch):
            to_uint8(images)
    compositor, frames = Compositor(portrait), []
    for layers in rendered:
        with clock("compose"):
            frames.append(compositor(layers))
    return frames


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


def _time_encoding(frames: list[np.ndarray], fps: Fraction, out: Path, clock: _StageClock) -> None:
    """Time whole files, because ffmpeg runs behind a pipe and single frames cannot be timed."""
    height, width = frames[0].shape[:2]
    for _ in range(ENCODE_REPEATS):
        with clock("encode video", len(frames)), VideoWriter(out, size=(width, height), fps=fps) as writer:
            for frame in frames:
                writer.write(frame)
