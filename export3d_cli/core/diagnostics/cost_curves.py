"""How cost grows: time and peak memory against frames, sources, resolution, samples and batch; and a picture of it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator, ReenactOptions, reenact
from export3d_cli.core.animation.batch import reenact_all
from export3d_cli.core.diagnostics.machine import PeakMemory, synchronize
from export3d_cli.core.face.crop import crop_image
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media import plot
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.weights import example_path

Progress = Callable[[str, int, "int | None"], None]
SIZES = {  # what is measured; resolution in percent of the weights' own, samples in all on a ray
    "frames": (8, 16, 32, 64),
    "sources": (1, 2, 4, 8),
    "resolution": (50, 100, 200),
    "samples": (8, 16, 32, 64, 96),
    "batch": (1, 2, 4, 8),
}
TIMED_QUANTITY = {
    "frames": "s for a clip, files to file", "sources": "s for all, one driver of 8 frames", "resolution": "s a frame",
    "samples": "s a frame", "batch": "s a batch",
}  # fmt: skip
AXIS_LABELS = {
    "frames": "frames", "sources": "sources", "resolution": "side in pixels", "samples": "samples a ray",
    "batch": "frames at once",
}  # fmt: skip
ROW = 250  # pixels of a curve's height
CLIP_FRAMES = 8  # frames that drive each of several sources
REPEATS = 3  # of a batch, after one that warms up
SIDES = ("image_size", "raw_size", "plane_size", "mesh_size", "flow_size")  # of the configuration, that grow together


@dataclass(frozen=True)
class Point:
    """One measurement."""

    x: float
    seconds: float  # median
    memory: int | None  # bytes at most meanwhile, of the GPU or else the process; None: cannot be told


@dataclass(frozen=True)
class Curve:
    """Cost against one thing; seconds are about `fixed + each * x`, for `resolution` `fixed + each * x^2`."""

    name: str
    what: str  # is timed
    points: tuple[Point, ...]
    fixed: float
    each: float
    r2: float  # share of the variance that this explains: 1 is exactly linear


@dataclass(frozen=True)
class CostCurves:
    """All of them, and where they were drawn."""

    device: str  # and precision
    threads: int
    curves: tuple[Curve, ...]
    out: Path


def cost_curves(
    animator: Animator,
    out: Path,
    *,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
    progress: Progress | None = None,
) -> CostCurves:
    """Measure on the bundled example and draw into the picture `out`; `sizes` (default `SIZES`) have to ascend."""
    sizes = sizes or SIZES
    bench = _CurveRunner(animator)
    total, done = sum(map(len, sizes.values())), 0
    found = []
    with tempfile.TemporaryDirectory() as folder:
        bench.prepare(Path(folder), sizes)
        for name, xs in sizes.items():
            points = []
            for x in xs:
                points.append(bench.measure(name, x))
                done += 1
                if progress is not None:
                    progress("points", done, total)
            found.append(fit_line(name, tuple(points)))
    write_image(out, picture(found))
    return CostCurves(animator.device_name, torch.get_num_threads(), tuple(found), out)


def fit_line(name: str, points: tuple[Point, ...]) -> Curve:
    """Points with the line through them in least squares."""
    x = np.array([point.x for point in points], dtype=np.float64) ** (2 if name == "resolution" else 1)
    y = np.array([point.seconds for point in points])
    (fixed, each), *_ = np.linalg.lstsq(np.stack([np.ones_like(x), x], axis=1), y, rcond=None)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - fixed - each * x) ** 2).sum())
    return Curve(name, TIMED_QUANTITY[name], points, float(fixed), float(each), 1 - left / spread if spread else 1.0)


def formula(curve: Curve) -> str:
    """The line through the points, in words."""
    power = "^2" if curve.name == "resolution" else ""
    return f"{curve.fixed:.3g} + {curve.each:.3g} x{power}, R2 {curve.r2:.3f}"


def picture(curves: list[Curve]) -> np.ndarray:
    """A row for each curve: time, with the line that fits it in words, and memory where it is known."""
    rows = []
    for curve in curves:
        title, half = f"{curve.name}: {curve.what}", plot.WIDTH // 2
        seconds = {"s": [(p.x, p.seconds) for p in curve.points]}
        fit = f"{AXIS_LABELS[curve.name]}; {formula(curve)}"
        panel = plot.plot_curves(title, seconds, x_label=fit, width=half, height=ROW, markers=True)
        mib = {"MiB": [(p.x, p.memory / 2**20) for p in curve.points if p.memory is not None]}
        beside = np.full_like(panel, 255)
        if mib["MiB"]:
            beside = plot.plot_curves(
                "MiB at most", mib, x_label=AXIS_LABELS[curve.name], width=half, height=ROW, markers=True
            )
        rows.append(np.concatenate([panel, beside], axis=1))
    return np.concatenate(rows)


class _CurveRunner:
    """The example's photo and driver, and how each curve's points are run."""

    def __init__(self, animator: Animator) -> None:
        self.animator, self.peak = animator, PeakMemory(animator.device)
        self.source = example_path("source.jpg")
        self.photo = read_image(self.source)

    def prepare(self, folder: Path, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Files as long and as many as will be needed, and the motion of a few frames."""
        self.folder, self.driver = folder, folder / "driver.mp4"
        with VideoReader(example_path("drive.mp4")) as reader:
            frames = [frame for frame, _ in zip(reader, range(CLIP_FRAMES), strict=False)]
            rate = reader.info.fps
        height, width = frames[0].shape[:2]
        with VideoWriter(self.driver, size=(width, height), fps=rate) as writer:
            for index in range(max(CLIP_FRAMES, *sizes.get("frames", (0,)))):
                writer.write(frames[index % len(frames)])
        self.sources = []
        for index in range(max(sizes.get("sources", (1,)))):
            self.sources.append(folder / f"source{index}{self.source.suffix}")
            shutil.copyfile(self.source, self.sources[-1])
        tracker = self.animator.tracker
        self.motion = tracker.make_motion(tracker.track_frames(frames), rate, (width, height))
        self.seen = self.animator.set_source(self.photo)

    def measure(self, name: str, x: int) -> Point:
        """One point of one curve."""
        if name in ("frames", "sources"):
            seconds, memory = self._run(self._files(name, x), 1)
            return Point(x, seconds, memory)
        side, batch, changes = self.animator.model.config.image_size, 1, {}
        if name == "resolution":
            changes = {key: getattr(self.animator.model.config, key) * x // 100 for key in SIDES}
            x = side = changes["image_size"]
        elif name == "samples":
            changes = {"coarse_samples": x // 2, "fine_samples": x - x // 2}
        else:
            batch = x
        animator = variant(self.animator, batch, changes)
        animator.set_source_motion(crop_image(self.photo, self.seen.crop, side), self.seen)
        part: Motion = self.motion.select(np.arange(batch) % len(self.motion))
        list(animator.drive([part]))
        return Point(x, *self._run(lambda: list(animator.drive([part])), REPEATS))

    def _files(self, name: str, x: int) -> Callable[[], object]:
        out = str(self.folder / "{src}-out.mp4")
        length, size = x if name == "frames" else CLIP_FRAMES, self.animator.model.config.image_size
        options = ReenactOptions(max_frames=length, audio="none", overwrite=True, size=size)
        if name == "frames":
            return lambda: reenact(self.animator, self.source, self.driver, self.folder / "out.mp4", options)
        return lambda: reenact_all(self.animator, self.sources[:x], self.driver, out, options)

    def _run(self, run: Callable[[], object], repeats: int) -> tuple[float, int | None]:
        self.peak.start()
        seconds = []
        for _ in range(repeats):
            synchronize(self.animator.device)
            began = time.perf_counter()
            run()
            synchronize(self.animator.device)
            seconds.append(time.perf_counter() - began)
        return float(np.median(seconds)), self.peak.bytes()


def variant(animator: Animator, batch: int, changes: Mapping[str, int]) -> Animator:
    """The same model with another batch and configuration; what no longer fits of its weights is as it is at first."""
    model = Export3D(replace(animator.model.config, **changes))  # type: ignore[arg-type]
    own = model.state_dict()
    same = {name: value for name, value in animator.model.state_dict().items() if own[name].shape == value.shape}
    model.load_state_dict({**own, **same})
    return Animator(model, animator.tracker, device=animator.device, precision=animator.precision, batch=batch)
