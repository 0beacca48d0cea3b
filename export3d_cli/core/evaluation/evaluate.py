"""How well a model animates the faces of a data set, beside two methods that need no network, and beside other tools.

Self-reenactment: the source is a clip's most frontal frame, the driver the clip itself. `model` is the network, `flow`
its basis flow alone (lambda and b_i, no trained network), `repeat` the source as it is. What each makes is compared
with the clip's own frames, the source's left out, and both are tracked by the same landmarker. Finished videos of any
tool are scored alike.

Cross-reenactment: another person drives. Where clips `<head>_tNN` of synthetic heads share the track NN, the truth is
known: the same track on the source's own head.

Novel views: the source from its own expression, yaw -30 to 30 degrees; is it the same person, turned as asked?
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.views import NovelViewOptions, orbit_cameras
from export3d_cli.core.evaluation import metrics
from export3d_cli.core.evaluation.face_embedding import load_embedder
from export3d_cli.core.evaluation.protocol import (
    Case,
    consecutive_frames,
    cross_cases,
    decode_frames,
    load_result_frames,
    load_source_image,
    most_frontal_frame,
    read_clips,
    select_frames,
)
from export3d_cli.core.evaluation.report import draw_caption, write_report
from export3d_cli.core.evaluation.scorer import Frames, FrameSample, MetricSuite, Scores
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import to_tensor, to_uint8, write_image
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.runtime.errors import InputError

Progress = Callable[[str, int, "int | None"], None]
NUM_VIEWS = 7  # novel views of each source
MAX_VIEW_YAW = 30.0  # degrees to both sides
SHEET_COLUMNS = 6
MAX_SHEETS = 8  # at most, where there is no truth to rank by


@dataclass(frozen=True)
class EvaluateOptions:
    """What is compared, and by what it is measured."""

    max_frames: int | None = 50  # of each clip; None: all
    take: Literal["spread", "first"] = "spread"  # which: spread evenly, or the first
    cross: bool = False  # another person drives
    pairs: int = 5  # of source and driver, with `cross`
    seed: int = 0  # picks them, and the resamples of the intervals
    identity: str | None = None  # `dlib` or a TorchScript file (see `core.identity`); None: identity is not measured
    perceptual: Path | None = None  # a backbone's file (VGG16, MobileNetV2); None: perceptual distance is not measured
    lpips: Path | None = None  # LPIPS' learned weights for it, where they are a file of their own
    results: tuple[Path, ...] = ()  # folders of finished videos, `<case>.mp4` or `<case>/` with pictures in each
    model: bool = True  # False: only `results`, and `repeat`
    views: bool = True  # novel views too, of self-reenactment's sources


@dataclass(frozen=True)
class Evaluation:
    """Scores by method and metric (None: not measured); means over clips leave out what is None."""

    dataset: Path
    protocol: Literal["self", "cross"]
    cases: int
    frames: int
    mean: dict[str, dict[str, float | None]]
    interval: dict[str, dict[str, tuple[float, float] | None]]  # of the mean: 95 %, by bootstrap over clips
    clips: list[dict[str, Any]]  # case, method, frames, and the metrics: a row for each method
    views: list[dict[str, float | None]]  # yaw asked for, and what `view_*` is there; empty: not measured
    options: EvaluateOptions
    seconds: float  # wall-clock
    device: str
    files: list[Path] = field(default_factory=list)  # what was written


def evaluate(
    animator: Animator,
    dataset: Path,
    options: EvaluateOptions | None = None,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the model on a data set written by `preprocess`; tables, pictures and a report go to the folder `out`."""
    options = options or EvaluateOptions()
    began = time.monotonic()
    cases = find_cases(dataset, options)
    ruler = _make_metric_suite(animator, options)
    rows: list[dict[str, Any]] = []
    views: list[list[Scores]] = []
    for count, case in enumerate(cases, start=1):
        scored, seen = _score_case(animator, case, options, ruler)
        rows += scored
        views += [seen] if seen else []
        if progress is not None:
            progress("clips", count, len(cases))
    if not rows:
        raise InputError(f"no clip of {dataset} has a frame with a face")
    result = _summarise(dataset, options, rows, views, animator.device_name, began)
    if out is None:
        return result
    return replace(result, files=write_report(result, _comparison_sheets(animator, cases, result), out))


def find_cases(dataset: Path, options: EvaluateOptions) -> list[Case]:
    """Who is animated by whom; raises `InputError` where there is nobody."""
    clips = read_clips(dataset)
    if options.cross:
        cases = cross_cases(clips, options.pairs, options.seed)
    else:
        cases = [Case(clip, clip, clip) for clip in clips if len(clip.motion) > 1]
    if not cases:
        raise InputError(f"{dataset} has no {'pair of two people' if options.cross else 'video'} to evaluate with")
    return cases


def write_inputs(dataset: Path, options: EvaluateOptions, out: Path, size: int) -> list[Path]:
    """What another tool needs to be scored alike: `<case>-source.png` (of side `size`) and the driving clip.

    Its results, `<case>.mp4` with a frame for each of the driver's, are then `options.results`.
    """
    files = []
    for case in find_cases(dataset, options):
        files += [out / f"{case.name}-source.png", out / f"{case.name}-driver{case.driver.file.suffix}"]
        write_image(files[-2], load_source_image(case.source, size))
        shutil.copyfile(case.driver.file, files[-1])
    return files


def _make_metric_suite(animator: Animator, options: EvaluateOptions) -> MetricSuite:
    embedder = None if options.identity is None else load_embedder(options.identity, animator.device)
    if options.perceptual is None and options.lpips is not None:
        raise InputError(f"{options.lpips} holds LPIPS' linear weights alone: give its VGG16 as --perceptual")
    if options.perceptual is None:
        return MetricSuite(animator.tracker, embedder)
    from export3d_cli.core.config.schema import LossConfig
    from export3d_cli.core.train.lpips import load_perceptual_term

    backbone, heads = (str(path or "") for path in (options.perceptual, options.lpips))
    network = load_perceptual_term(LossConfig(backbone=backbone, lpips=heads))
    assert network is not None
    network = network.to(animator.device).eval()

    def distance(a: Frames, b: Frames) -> float:
        parts = []
        for at in range(0, len(a), 8):
            x, y = (to_tensor(np.stack(frames[at : at + 8])).to(animator.device) for frames in (a, b))
            with torch.inference_mode():
                parts.append(float(network(x, y, scales=1)) * len(x))
        return sum(parts) / len(a)

    return MetricSuite(animator.tracker, embedder, distance, _perceptual_metric_name(network))


def _perceptual_metric_name(network: Any) -> str:
    """The column of a perceptual distance: only the official weights make it LPIPS."""
    if network.name == "lpips":
        return "lpips"
    with torch.inference_mode():
        first = network.features(torch.zeros(1, 3, 32, 32, device=network.mean.device))[0]
    return "vgg16" if first.shape[1] == 64 else "mobilenetv2"  # VGG16's first stage has 64 channels


def _score_case(
    animator: Animator, case: Case, options: EvaluateOptions, ruler: MetricSuite
) -> tuple[list[dict[str, Any]], list[Scores]]:
    """One row of metrics for each method, and those of each novel view."""
    size = animator.model.config.image_size
    rows = select_frames(case, options.max_frames, options.take)
    if not len(rows):
        return [], []
    run = consecutive_frames(case, len(rows))
    union = np.union1d(rows, run)
    sample = FrameSample(np.searchsorted(union, rows), np.searchsorted(union, run))
    photo = load_source_image(case.source, size)
    made = render_methods(animator, case, photo, union, options)
    truth = ruler.track(decode_frames(case.target or case.driver, union, size))
    face = ruler.embed(ruler.track([photo]), np.array([0]))
    scored: list[dict[str, Any]] = []
    for method, frames in made.items():
        scores = ruler.score(
            ruler.track(frames), truth, sample, has_ground_truth=case.target is not None, source_embedding=face
        )
        scored.append({"case": case.name, "method": method, "frames": len(rows), **scores})
    seen: list[Scores] = []
    if options.views and options.model and not options.cross:
        pictures, cameras = render_novel_views(animator, case, photo)
        seen = ruler.score_views(ruler.track(pictures, independent=True), cameras, face)
        scored[0] |= {key: metrics.finite_mean([view[key] for view in seen]) for key in seen[0]}
    return scored, seen


def render_methods(
    animator: Animator, case: Case, photo: np.ndarray, rows: np.ndarray, options: EvaluateOptions
) -> dict[str, Frames]:
    """What each method makes of the source's photo for the driver's frames `rows`."""
    size, row = animator.model.config.image_size, most_frontal_frame(case.source.motion)
    made: dict[str, Frames] = {}
    if options.model:
        motion = case.driver.motion
        seen_by = motion if case.target is None else case.target.motion  # crops are framed clip by clip
        parts = {key: getattr(motion, key)[rows] for key in ("beta", "landmarks", "found")}
        driver = replace(motion, camera=seen_by.camera[rows], **parts)
        animator.set_source_motion(photo, case.source.motion, row)
        made["model"] = list(animator.drive([driver]))
        if animator.model.flow is not None:
            made["flow"] = list(_render_flow_baseline(animator, photo, case.source.motion, row, driver))
    for folder in options.results:
        name = folder.resolve().name
        made[name if name not in made else str(folder)] = load_result_frames(folder, case, rows, size)
    return {**made, "repeat": [photo] * len(rows)}


def render_novel_views(animator: Animator, case: Case, photo: np.ndarray) -> tuple[Frames, np.ndarray]:
    """The source's photo seen from `VIEWS` sides -> pictures and cameras (V, 25)."""
    animator.set_source_motion(photo, case.source.motion, most_frontal_frame(case.source.motion))
    options = NovelViewOptions(yaw=(-MAX_VIEW_YAW, MAX_VIEW_YAW), frames=NUM_VIEWS, loop="once")
    cameras = orbit_cameras(animator.source_camera(), options)
    return list(animator.view(cameras)), cameras


def _render_flow_baseline(
    animator: Animator, photo: np.ndarray, motion: Motion, row: int, driver: Motion
) -> Iterator[np.ndarray]:
    """The photo warped by the basis flow, and left as it is away from the face."""
    model, device, side = animator.model, animator.device, animator.model.config.image_size // 2
    assert model.flow is not None

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).float().to(device)

    with torch.inference_mode():
        seen = motion.camera[row : row + 1]
        camera, points = tensor(seen), tensor(landmarks_to_head_frame(motion.landmarks[row : row + 1], seen))
        lam = model.expression.coefficients(tensor(motion.beta[row : row + 1]))
        image = to_tensor(photo)[None].to(device)
        still = pixel_grid(side, device).T.reshape(1, 2, side, side)
        for at in range(0, len(driver), 8):
            beta, seen_by = tensor(driver.beta[at : at + 8]), tensor(driver.camera[at : at + 8])
            b = len(beta)
            p = points.expand(b, -1, -1)
            target = model.flow.deform_landmarks(p, model.expression.coefficients(beta) - lam)
            mesh = model.flow(p, camera.expand(b, -1), target, seen_by, side)
            uv = mesh.weight * mesh.uv + (1 - mesh.weight) * still
            uv = F.interpolate(uv, scale_factor=2, mode="bilinear", align_corners=False)
            yield from to_uint8(warp(image.expand(b, -1, -1, -1), uv))


def _comparison_sheets(animator: Animator, cases: list[Case], result: Evaluation) -> dict[str, np.ndarray]:
    """Pictures of the best, the median and the worst clip, of the first method; of some pairs where there is no truth.

    Each shows the source, then driver, target and the methods over time; and novel views beneath each other.
    """
    first = next(iter(result.mean))
    key = "aed" if result.mean[first]["akd478"] is None else "akd478"
    score = {row["case"]: row[key] for row in result.clips if row["method"] == first}
    known = {case.name: case for case in cases if case.name in score}
    ranked = sorted(known, key=lambda name: np.inf if score[name] is None else score[name])
    if key == "aed":
        some = dict.fromkeys(np.linspace(0, len(ranked) - 1, min(MAX_SHEETS, len(ranked))).round().astype(int).tolist())
        names = {f"{place:02d}": ranked[place] for place in some}
    else:
        names = {"best": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[-1]}
    sheets = {
        f"{place}-{name}": _comparison_sheet(animator, known[name], result.options) for place, name in names.items()
    }
    if result.views:
        chosen = [known[name] for name in dict.fromkeys(names.values())]
        size = animator.model.config.image_size
        seen = [render_novel_views(animator, case, load_source_image(case.source, size))[0] for case in chosen]
        sheets["views"] = np.concatenate([np.concatenate(pictures, axis=1) for pictures in seen])
    return sheets


def _comparison_sheet(animator: Animator, case: Case, options: EvaluateOptions) -> np.ndarray:
    size = animator.model.config.image_size
    rows = select_frames(case, SHEET_COLUMNS)
    photo = load_source_image(case.source, size)
    lines = {"driver": decode_frames(case.driver, rows, size)}
    if case.target is not None and case.target is not case.driver:
        lines["truth"] = decode_frames(case.target, rows, size)
    made = render_methods(animator, case, photo, rows, options)
    lines |= {method: frames for method, frames in made.items() if method != "repeat"}
    blank = np.full_like(photo, 255)
    return np.concatenate([
        np.concatenate([draw_caption(blank if i else photo, name if i else ""), *line], axis=1)
        for i, (name, line) in enumerate(lines.items())
    ])  # fmt: skip


def _summarise(
    dataset: Path, options: EvaluateOptions, rows: list[dict[str, Any]], views: list[list[Scores]], device: str,
    began: float,
) -> Evaluation:  # fmt: skip
    """Means and intervals over clips; NaN becomes None, since JSON has no other word for it."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    mean: dict[str, dict[str, float | None]] = {}
    interval: dict[str, dict[str, tuple[float, float] | None]] = {}
    for method in methods:
        values = {key: [row[key] for row in rows if row["method"] == method] for key in metrics.METRICS}
        mean[method] = {key: _nan_to_none(metrics.finite_mean(of)) for key, of in values.items()}
        bounds = {key: metrics.bootstrap_interval(of, seed=options.seed) for key, of in values.items()}
        interval[method] = {key: pair if np.isfinite(pair[0]) else None for key, pair in bounds.items()}
    counted = [row for row in rows if row["method"] == methods[0]]
    told: list[dict[str, float | None]] = []
    for number, yaw in enumerate(np.linspace(-MAX_VIEW_YAW, MAX_VIEW_YAW, NUM_VIEWS)) if views else []:
        seen = {key: metrics.finite_mean([clip[number][key] for clip in views]) for key in views[0][0]}
        told.append({"yaw": float(yaw), **{key: _nan_to_none(value) for key, value in seen.items()}})
    return Evaluation(
        dataset, "cross" if options.cross else "self", len(counted), sum(row["frames"] for row in counted), mean,
        interval, [{key: _nan_to_none(value) for key, value in row.items()} for row in rows], told, options,
        time.monotonic() - began, device,
    )  # fmt: skip


def _nan_to_none(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
