"""Cost curves: time and peak memory of `reenact` against frames, portraits and batch size, plotted with matplotlib."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.batch import reenact_all
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.diagnostics.measurement import measure
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import write_atomic
from export3d_cli.core.runtime.weights import example_path

Progress = Callable[[str, int, "int | None"], None]
SIZES = {"frames": (8, 16, 32, 64), "sources": (1, 2, 4, 8), "batch": (1, 2, 4, 8)}  # what is measured
DESCRIPTIONS = {
    "frames": "s for one video, file to file",
    "sources": "s for all portraits, one driver of 8 frames",
    "batch": "s for 16 frames, file to file",
}
SOURCES_FRAMES, BATCH_FRAMES = 8, 16


@dataclass(frozen=True)
class Point:
    """One measurement."""

    x: float
    seconds: float
    memory: int | None  # peak in bytes, of the GPU or else of the process; None: unknown


@dataclass(frozen=True)
class Curve:
    """Cost against one size; seconds are about `fixed + each * x`."""

    name: str
    what: str  # the time that is measured
    points: tuple[Point, ...]
    fixed: float
    each: float
    r2: float  # fraction of the variance that the line explains


@dataclass(frozen=True)
class CostCurves:
    """All curves, and the picture they were plotted to."""

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
    """Measure on the bundled example and plot to `out`, an image that matplotlib can write; `sizes` must ascend."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--curves needs matplotlib: pip install 'export3d-cli[plots]'")
    sizes = sizes or SIZES
    total, done = sum(map(len, sizes.values())), 0
    curves = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = example_path("source.jpg")
        driver = folder / "driver.mp4"
        _write_driver(driver, max(SOURCES_FRAMES, BATCH_FRAMES, *sizes.get("frames", ())))
        sources = [folder / f"source{index}{source.suffix}" for index in range(max(sizes.get("sources", (1,))))]
        for path in sources:
            shutil.copyfile(source, path)
        options = ReenactOptions(audio="none", overwrite=True)

        def run(curve: str, x: int) -> object:
            runner = animator.with_batch(x) if curve == "batch" else animator
            if curve == "sources":
                job = replace(options, max_frames=SOURCES_FRAMES)
                return reenact_all(runner, sources[:x], driver, str(folder / "{src}-out.mp4"), job)
            job = replace(options, max_frames=x if curve == "frames" else BATCH_FRAMES)
            return reenact(runner, source, driver, folder / "out.mp4", job)

        run("frames", 1)  # warm up
        for curve, xs in sizes.items():
            points = []
            for x in xs:
                points.append(Point(x, *measure(functools.partial(run, curve, x), animator.device)))
                done += 1
                if progress is not None:
                    progress("points", done, total)
            curves.append(fit_line(curve, tuple(points)))
    plot(curves, out)
    return CostCurves(animator.device_name, torch.get_num_threads(), tuple(curves), out)


def fit_line(name: str, points: tuple[Point, ...]) -> Curve:
    """Return the points with their least-squares line."""
    x = np.array([point.x for point in points], dtype=np.float64)
    y = np.array([point.seconds for point in points])
    (fixed, each), *_ = np.linalg.lstsq(np.stack([np.ones_like(x), x], axis=1), y, rcond=None)
    variance, residual = float(((y - y.mean()) ** 2).sum()), float(((y - fixed - each * x) ** 2).sum())
    r2 = 1 - residual / variance if variance else 1.0
    return Curve(name, DESCRIPTIONS[name], points, float(fixed), float(each), r2)


def plot(curves: list[Curve], out: Path) -> None:
    """Plot a row per curve: seconds with their line, and peak memory if it is known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6 * len(curves)), layout="constrained")
    for (time_axes, memory_axes), curve in zip(figure.subplots(len(curves), 2, squeeze=False), curves, strict=True):
        x = [point.x for point in curve.points]
        time_axes.margins(y=0.2)
        memory_axes.margins(y=0.2)
        line = f"{curve.fixed:.3g} + {curve.each:.3g} x, R2 {curve.r2:.3f}"
        time_axes.plot(x, [point.seconds for point in curve.points], "o")
        time_axes.axline((0, curve.fixed), slope=curve.each, label=line)
        time_axes.set(title=curve.what, xlabel=curve.name, ylabel="s", ylim=(0, None))
        time_axes.legend()
        if all(point.memory is not None for point in curve.points):
            memory_axes.plot(x, [(point.memory or 0) / 2**20 for point in curve.points], "o-")
            memory_axes.set(title="peak memory", xlabel=curve.name, ylabel="MiB", ylim=(0, None))
    with write_atomic(out) as temporary:
        figure.savefig(temporary, dpi=100)


def _write_driver(out: Path, count: int) -> None:
    """Write the first frames of the bundled driver, repeated to `count` frames."""
    with VideoReader(example_path("drive.mp4")) as reader:
        frames = [frame for frame, _ in zip(reader, range(SOURCES_FRAMES), strict=False)]
        fps = reader.info.fps
    height, width = frames[0].shape[:2]
    with VideoWriter(out, size=(width, height), fps=fps) as writer:
        for index in range(count):
            writer.write(frames[index % len(frames)])
