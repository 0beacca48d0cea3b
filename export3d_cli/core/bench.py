"""How long each stage of `reenact` takes on this machine, on the bundled example or the user's own files.

The stages of the network are timed where they are called, in the real pipeline: each function of `STAGES` is replaced
by one that keeps the time. Frames/s are measured apart, without clocks inside.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export3d_cli.core.animate import Animator, ReenactOptions, reenact
from export3d_cli.core.errors import InputError
from export3d_cli.core.face.motion import crop_image
from export3d_cli.core.media.image import read_image, to_uint8
from export3d_cli.core.media.video import VideoReader, VideoWriter
from export3d_cli.core.weights import example

Progress = Callable[[str, int, "int | None"], None]
WARM = 2  # batches before the clocks run
ENCODES = 3  # times the source and the video are encoded
STAGES = (  # what is told -> part of the model and its method
    ("lambda", "expression", "coefficients"),
    ("tri-plane", "", "planes"),
    ("render", "", "render"),
    ("flow", "", "_photo_detail"),
    ("super-resolution", "superres", "forward"),
)


@dataclass(frozen=True)
class Stage:
    """Milliseconds a frame; `encode source` a photo."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    count: int  # measurements


@dataclass(frozen=True)
class Bench:
    """What was measured."""

    device: str  # and precision
    threads: int
    batch: int  # frames at once
    frames: int
    stages: dict[str, Stage]
    fps: float  # frames/s of `reenact` from files to file, tracking and encoding included
    seconds: float  # of that
    peak_memory: int | None  # bytes of the process; None: not told by this system
    peak_gpu: int | None  # bytes on the GPU; None: no GPU


def bench(
    animator: Animator,
    source: Path | None = None,
    driver: Path | None = None,
    *,
    frames: int = 30,
    progress: Progress | None = None,
) -> Bench:
    """Time the stages on `frames` frames of the driver, then the whole of `reenact`."""
    source, driver = source or example("source.jpg"), driver or example("drive.mp4")
    cuda = animator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(animator.device)
    told = itertools.count(1)

    def step() -> None:
        if progress is not None:
            progress("stages", next(told), 5)

    clock = _Clock(animator.device)
    images, rate = _decode(driver, frames, clock)
    step()
    faces = []
    animator.tracker.landmarker.reset()
    for image in images:
        with clock("track"):
            faces.append(animator.tracker.landmarker.track(image))
    motion = animator.tracker.motion(faces, rate, (images[0].shape[1], images[0].shape[0]))
    step()
    photo = read_image(source)
    seen = animator.set_source(photo, name=str(source))
    crop = crop_image(photo, seen.crop, animator.model.config.image_size)
    for _ in range(ENCODES):
        with clock("encode source"):
            animator.set_source_motion(crop, seen)
    step()
    made = _drive(animator, motion, clock)
    step()
    with tempfile.TemporaryDirectory() as folder:
        _encode(made, rate, Path(folder) / "stage.mp4", clock)
        step()
        began = time.perf_counter()
        options = ReenactOptions(max_frames=len(images), audio="none")
        summary = reenact(animator, source, driver, Path(folder) / "all.mp4", options)
        seconds = time.perf_counter() - began
    return Bench(
        animator.device_name, torch.get_num_threads(), animator.batch, len(images), clock.stages(),
        summary.frames / seconds, seconds, _peak_memory(),
        torch.cuda.max_memory_allocated(animator.device) if cuda else None,
    )  # fmt: skip


class _Clock:
    """Milliseconds by stage; waits for the GPU before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str, per: int = 1) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.times.setdefault(stage, []).append(1000 * (time.perf_counter() - began) / per)

    def stages(self) -> dict[str, Stage]:
        """What was timed, in that order."""
        return {name: _stage(values) for name, values in self.times.items()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def _stage(values: list[float]) -> Stage:
    low, median, high = np.percentile(values, [10, 50, 90])
    return Stage(round(float(median), 3), round(float(low), 3), round(float(high), 3), len(values))


def _decode(driver: Path, frames: int, clock: _Clock) -> tuple[list[np.ndarray], Any]:
    images = []
    with VideoReader(driver) as reader:
        stream = iter(reader)
        next(stream, None)  # starting ffmpeg is no decoding
        for _ in range(frames):
            with clock("decode"):
                image = next(stream, None)
            if image is None:
                break
            images.append(image)
        if not images:
            raise InputError(f"{driver} has too few frames to measure: give a video of two frames or more")
        return images, reader.info.fps


def _drive(animator: Animator, motion: Any, clock: _Clock) -> list[np.ndarray]:
    """Drive the source by the motion with clocks in the network; then time the conversion alone."""
    for part in itertools.islice(animator.drive([motion]), WARM * animator.batch):
        assert part.dtype == np.uint8
    batch = animator.batch
    with _timed(animator, clock):
        made = list(animator.drive([motion]))
    picture = torch.zeros(batch, 3, *made[0].shape[:2], device=animator.device)
    for _ in range(max(1, len(made) // batch)):
        with clock("convert", batch):
            to_uint8(picture)
    return made


@contextlib.contextmanager
def _timed(animator: Animator, clock: _Clock) -> Iterator[None]:
    """Clocks around the methods of `STAGES`, for a while."""
    placed = []
    for stage, part, method in STAGES:
        owner = getattr(animator.model, part) if part else animator.model
        setattr(owner, method, _with_clock(getattr(owner, method), stage, clock))
        placed.append((owner, method))
    try:
        yield
    finally:
        for owner, method in placed:
            delattr(owner, method)


def _with_clock(function: Callable[..., Any], stage: str, clock: _Clock) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        tensors = (a for a in reversed(args) if isinstance(a, torch.Tensor))
        first = next(tensors, None)
        with clock(stage, 1 if first is None else len(first)):
            return function(*args, **kwargs)

    return timed


def _encode(frames: list[np.ndarray], rate: Any, out: Path, clock: _Clock) -> None:
    """The whole file each time: ffmpeg works behind a pipe, so single frames cannot be timed."""
    height, width = frames[0].shape[:2]
    for _ in range(ENCODES):
        with clock("encode video", len(frames)), VideoWriter(out, size=(width, height), fps=rate) as writer:
            for frame in frames:
                writer.write(frame)


def _peak_memory() -> int | None:
    """Most memory the process ever held, bytes; a subprocess such as ffmpeg is not part of it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
