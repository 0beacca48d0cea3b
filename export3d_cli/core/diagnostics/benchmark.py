"""How long each stage of `reenact` takes on this machine, on the bundled example or the user's own files.

The stages of the network are timed where they are called, in the real pipeline: each function of `STAGES` is replaced
by one that keeps the time. Frames/s are measured apart, without clocks inside. A last batch is counted: the FLOPs a
stage does and the bytes its operations touch. The machine's own rates then say how fast it could have been.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator, ReenactOptions, reenact
from export3d_cli.core.diagnostics.machine import (
    Machine,
    OpCounter,
    OpCounts,
    measure_machine,
    process_peak_memory,
    synchronize,
)
from export3d_cli.core.face.crop import crop_image
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image, to_uint8
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

Progress = Callable[[str, int, "int | None"], None]
StageHook = Callable[[str, int], contextlib.AbstractContextManager[None]]  # stage, frames in the batch
WARMUP_BATCHES = 2  # batches before the clocks run
ENCODE_REPEATS = 3  # times the source and the video are encoded
STAGES = (  # what is told -> part of the model and its method
    ("expression", "expression", "coefficients"),  # beta to lambda; beta' is one product more, within the tri-plane
    ("tri-plane", "", "generate_planes"),
    ("render", "", "render"),
    ("flow", "", "_prepare_photo_detail"),
    ("super-resolution", "superres", "forward"),
    ("mouth", "inpainters.mouth", "inpaint"),  # of frames with lips that part, where the weights have it
    ("eyes", "inpainters.eyes", "inpaint"),  # of frames with eyes wider open than in the photo
    ("lids", "inpainters.lids", "inpaint"),  # and with eyes that are shut, or nearly
)


@dataclass(frozen=True)
class StageTiming:
    """Milliseconds a frame; of `encode source` a photo, of `tri-plane` each that is made, see `Bench.tri_planes`.

    `limit` is what the work would take at the machine's measured rates, the slower of its FLOPs and its bytes; `share`
    is how much of them was reached. Work that stays in caches can pass 1. None: not counted (other programs' work).
    """

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    count: int  # measurements
    gflops: float | None = None  # products, convolutions and attention, two a multiply-add
    megabytes: float | None = None  # read and written by its operations, one by one
    limit: float | None = None  # milliseconds
    matrix_share: float | None = None  # of the matrix rate, 0..1
    bandwidth_share: float | None = None  # of the bandwidth, 0..1
    share: float | None = None  # of the limit: the larger of the two


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured."""

    device: str  # and precision
    threads: int
    batch: int  # frames at once
    frames: int
    stages: dict[str, StageTiming]
    machine: Machine
    fps: float  # frames/s of `reenact` from files to file, tracking and encoding included
    seconds: float  # of that
    peak_memory: int | None  # bytes of the process; None: not told by this system
    peak_gpu: int | None  # bytes on the GPU; None: no GPU
    tri_planes: float  # made for a frame; below 1 where others are blended


def run_benchmark(
    animator: Animator,
    source: Path | None = None,
    driver: Path | None = None,
    *,
    frames: int = 30,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Time the stages on `frames` frames of the driver, then the whole of `reenact`."""
    source, driver = source or example_path("source.jpg"), driver or example_path("drive.mp4")
    cuda = animator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(animator.device)
    told = itertools.count(1)

    def step() -> None:
        if progress is not None:
            progress("stages", next(told), 7)

    machine = measure_machine(animator.device, animator.precision)
    step()
    clock = _StageClock(animator.device)
    images, rate = _time_decoding(driver, frames, clock)
    step()
    faces = []
    animator.tracker.landmarker.reset()
    for image in images:
        with clock("track"):
            faces.append(animator.tracker.landmarker.track(image))
    motion = animator.tracker.make_motion(faces, rate, (images[0].shape[1], images[0].shape[0]))
    step()
    photo = read_image(source)
    seen = animator.set_source(photo, name=str(source))
    crop = crop_image(photo, seen.crop, animator.model.config.image_size)
    for _ in range(ENCODE_REPEATS):
        with clock("encode source"):
            animator.set_source_motion(crop, seen)
    step()
    made = _time_network(animator, motion, crop, seen, clock)
    step()
    work = _count_work(animator, motion, crop, seen)
    step()
    with tempfile.TemporaryDirectory() as folder:
        _time_encoding(made, rate, Path(folder) / "stage.mp4", clock)
        step()
        began = time.perf_counter()
        options = ReenactOptions(max_frames=len(images), audio="none", size=animator.model.config.image_size)
        summary = reenact(animator, source, driver, Path(folder) / "all.mp4", options)
        seconds = time.perf_counter() - began
    return BenchmarkResult(
        animator.device_name, torch.get_num_threads(), animator.batch, len(images),
        {name: add_roofline(stage, work.get(name), machine) for name, stage in clock.stages().items()}, machine,
        summary.frames / seconds, seconds, process_peak_memory(),
        torch.cuda.max_memory_allocated(animator.device) if cuda else None,
        min(clock.counts.get("tri-plane", 0) / len(images), 1.0),
    )  # fmt: skip


class _StageClock:
    """Milliseconds by stage; waits for the GPU before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {}  # how many of what each stage makes

    @contextlib.contextmanager
    def __call__(self, stage: str, per: int = 1) -> Iterator[None]:
        synchronize(self.device)
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.times.setdefault(stage, []).append(1000 * (time.perf_counter() - began) / per)
        self.counts[stage] = self.counts.get(stage, 0) + per

    def stages(self) -> dict[str, StageTiming]:
        """What was timed, in that order."""
        return {name: _summarise_times(values) for name, values in self.times.items()}


def _summarise_times(values: list[float]) -> StageTiming:
    low, median, high = np.percentile(values, [10, 50, 90])
    return StageTiming(round(float(median), 3), round(float(low), 3), round(float(high), 3), len(values))


def _time_decoding(driver: Path, frames: int, clock: _StageClock) -> tuple[list[np.ndarray], Any]:
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


def _time_network(
    animator: Animator, motion: Motion, crop: np.ndarray, seen: Motion, clock: _StageClock
) -> list[np.ndarray]:
    """Drive the source by the motion with clocks in the network; then time the conversion alone."""
    for part in itertools.islice(animator.drive([motion]), WARMUP_BATCHES * animator.batch):
        assert part.dtype == np.uint8
    batch = animator.batch
    animator.set_source_motion(crop, seen)  # the tri-planes of the frames that warmed up are forgotten
    with _hook_stages(animator, clock):
        made = list(animator.drive([motion]))
    picture = torch.zeros(batch, 3, *made[0].shape[:2], device=animator.device)
    for _ in range(max(1, len(made) // batch)):
        with clock("convert", batch):
            to_uint8(picture)
    return made


def _count_work(animator: Animator, motion: Motion, crop: np.ndarray, seen: Motion) -> dict[str, OpCounts]:
    """The work of each stage for one frame, counted over one batch; of `encode source` for the photo."""
    work: dict[str, OpCounts] = {}

    @contextlib.contextmanager
    def counting(stage: str, per: int = 1) -> Iterator[None]:
        with OpCounter() as counter:
            yield
        flops = {name: count / per for name, count in counter.work.flops.items()}
        work[stage] = OpCounts(flops, counter.work.bytes / per)

    with counting("encode source"):
        animator.set_source_motion(crop, seen)
    with _hook_stages(animator, counting):
        list(animator.drive([motion.select(np.arange(min(animator.batch, len(motion))))]))
    size = animator.model.config.image_size
    picture = torch.zeros(1, 3, size, size, device=animator.device)
    with counting("convert"):
        to_uint8(picture)
    return work


def add_roofline(stage: StageTiming, work: OpCounts | None, machine: Machine) -> StageTiming:
    """The stage with its work and how near the machine's limit it came."""
    if work is None:
        return stage
    rates = {name: machine.matrix.get(name, machine.matrix["fp32"]) for name in work.flops}
    at_matrix = sum(count / rates[name] for name, count in work.flops.items()) / 1e6  # ms
    at_memory = work.bytes / machine.bandwidth / 1e6
    share = (at_matrix / stage.median, at_memory / stage.median)
    return replace(
        stage, gflops=sum(work.flops.values()) / 1e9, megabytes=work.bytes / 1e6, limit=max(at_matrix, at_memory),
        matrix_share=share[0], bandwidth_share=share[1], share=max(share),
    )  # fmt: skip


@contextlib.contextmanager
def _hook_stages(animator: Animator, guard: StageHook) -> Iterator[None]:
    """A guard, such as a clock, around the methods of `STAGES`, for a while."""
    placed = []
    modules = dict(animator.model.named_modules())
    for stage, part, method in STAGES:
        owner = modules.get(part)
        if owner is None:
            continue
        setattr(owner, method, _with_hook(getattr(owner, method), stage, guard))
        placed.append((owner, method))
    try:
        yield
    finally:
        for owner, method in placed:
            delattr(owner, method)


def _with_hook(function: Callable[..., Any], stage: str, guard: StageHook) -> Callable[..., Any]:
    def guarded(*args: Any, **kwargs: Any) -> Any:
        tensors = (a for a in reversed(args) if isinstance(a, torch.Tensor))
        first = next(tensors, None)
        with guard(stage, 1 if first is None else len(first)):
            return function(*args, **kwargs)

    return guarded


def _time_encoding(frames: list[np.ndarray], rate: Any, out: Path, clock: _StageClock) -> None:
    """The whole file each time: ffmpeg works behind a pipe, so single frames cannot be timed."""
    height, width = frames[0].shape[:2]
    for _ in range(ENCODE_REPEATS):
        with clock("encode video", len(frames)), VideoWriter(out, size=(width, height), fps=rate) as writer:
            for frame in frames:
                writer.write(frame)
