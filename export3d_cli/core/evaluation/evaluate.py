"""Scores a model on a data set, next to two baselines without a trained network and to results of other tools.

Self-reenactment: the source is a clip's most frontal frame, the driver is the clip itself. `model` is the network,
`flow` its basis flow alone (lambda and b_i), `repeat` the unchanged source. All are compared with the clip's frames,
except the source's own, and tracked with the same landmarker. Finished videos of any tool are scored in the same way.

Cross-reenactment: another person drives. The ground truth is known if clips `<head>_tNN` of synthetic heads share the
track NN: it is the same track on the source's own head.

Novel views: the source with its own expression, yaw -30 to 30 degrees, scored by pose and identity.

What is measured is what `reenact` renders by default, with these differences. Quality is the animator's (`balanced`
unless `Animator.from_weights` is given another), smoothing is `EvaluateOptions.smooth` (`light`). Framing is the data
set's: source and result are the clip's crop at the network's own size, without the photo's margins, its finer detail or
its background outside the crop. Only the scored frames are rendered, and they are scored before video encoding.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.novel_view import NovelViewOptions, orbit_cameras
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
from export3d_cli.core.evaluation.result import DEFAULT_PAIRS, EvaluateOptions, Evaluation
from export3d_cli.core.evaluation.scorer import Frames, FrameSample, MetricSuite, Scores
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.smoothing import smooth_motion
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.image import to_tensor, to_uint8, write_image
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.runtime.device import tracking_thread_count
from export3d_cli.core.runtime.errors import InputError

Progress = Callable[[str, int, "int | None"], None]
NUM_VIEWS = 7  # novel views of each source
MAX_VIEW_YAW = 30.0  # degrees to both sides
SHEET_COLUMNS = 6
MAX_SHEETS = 8  # comparison sheets without a ground truth to rank by
BATCH = 8  # frames of the baseline and of the perceptual distance at once


def evaluate(
    animator: Animator,
    dataset: Path,
    options: EvaluateOptions | None = None,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model on a data set written by `preprocess`; write tables, pictures and a report to the folder `out`."""
    options = (options or EvaluateOptions()).resolve()
    began = time.monotonic()
    cases = find_cases(dataset, options)
    suite = _make_metric_suite(animator, options)
    rows: list[dict[str, Any]] = []
    views: list[list[Scores]] = []
    for count, case in enumerate(cases, start=1):
        case_rows, case_views = _score_case(animator, case, options, suite)
        rows += case_rows
        views += [case_views] if case_views else []
        if progress is not None:
            progress("clips", count, len(cases))
    if not rows:
        raise InputError(f"no clip of {dataset} has a frame with a face")
    result = _summarise(dataset, options, rows, views, animator, time.monotonic() - began)
    if out is None:
        return result
    return replace(result, files=write_report(result, _comparison_sheets(animator, cases, result), out))


def find_cases(dataset: Path, options: EvaluateOptions) -> list[Case]:
    """Return the cases of a data set; raise `InputError` if there is none."""
    clips = read_clips(dataset)
    if options.cross:
        cases = cross_cases(clips, options.pairs or DEFAULT_PAIRS, options.seed)
    else:
        cases = [Case(clip, clip, clip) for clip in clips if len(clip.motion) > 1]
    if not cases:
        missing = "pair of two people" if options.cross else "video"
        raise InputError(f"{dataset} has no {missing} to evaluate with: give a larger data set")
    return cases


def write_inputs(dataset: Path, options: EvaluateOptions, out: Path, size: int) -> list[Path]:
    """Write each case's inputs for another tool: `<case>-source.png` (side `size`) and `<case>-driver.mp4`.

    The tool's results, `<case>.mp4` with one frame per driver frame, can then be given as `options.results`.
    """
    files = []
    for case in find_cases(dataset, options):
        files += [out / f"{case.name}-source.png", out / f"{case.name}-driver{case.driver.file.suffix}"]
        write_image(files[-2], load_source_image(case.source, size))
        shutil.copyfile(case.driver.file, files[-1])
    return files


def _make_metric_suite(animator: Animator, options: EvaluateOptions) -> MetricSuite:
    embedder = None if options.identity is None else load_embedder(options.identity, animator.device)
    tracker = open_landmarker_tracker(threads=tracking_thread_count(animator.device))
    if options.perceptual is None:
        return MetricSuite(tracker, embedder)
    from export3d_cli.core.config.schema import LossConfig
    from export3d_cli.core.train.lpips import load_perceptual_term

    backbone, heads = (str(path or "") for path in (options.perceptual, options.lpips))
    network = load_perceptual_term(LossConfig(backbone=backbone, lpips=heads))
    assert network is not None
    network = network.to(animator.device).eval()

    def distance(a: Frames, b: Frames) -> float:
        total = 0.0
        for start in range(0, len(a), BATCH):
            x, y = (to_tensor(np.stack(frames[start : start + BATCH])).to(animator.device) for frames in (a, b))
            with torch.inference_mode():
                total += float(network(x, y, scales=1)) * len(x)
        return total / len(a)

    return MetricSuite(tracker, embedder, distance, _perceptual_metric_name(network))


def _perceptual_metric_name(network: Any) -> str:
    """Return the column of a perceptual distance; it is `lpips` only with the official weights."""
    if network.name == "lpips":
        return "lpips"
    with torch.inference_mode():
        first = network.features(torch.zeros(1, 3, 32, 32, device=network.mean.device))[0]
    return "vgg16" if first.shape[1] == 64 else "mobilenetv2"  # VGG16's first stage has 64 channels


def _score_case(
    animator: Animator, case: Case, options: EvaluateOptions, suite: MetricSuite
) -> tuple[list[dict[str, Any]], list[Scores]]:
    """Return a row of metrics for each method, and the metrics of each novel view."""
    size = animator.model.config.image_size
    scored_rows = select_frames(case, options.max_frames, options.take)
    if not len(scored_rows):
        return [], []
    consecutive = consecutive_frames(case, len(scored_rows))
    rows = np.union1d(scored_rows, consecutive)
    sample = FrameSample(np.searchsorted(rows, scored_rows), np.searchsorted(rows, consecutive))
    photo = load_source_image(case.source, size)
    results = render_methods(animator, case, photo, rows, options)
    truth = suite.track(decode_frames(case.target or case.driver, rows, size))
    embedding = suite.embed(suite.track([photo]), np.array([0]))
    has_truth = case.target is not None
    scores: list[dict[str, Any]] = []
    for method, frames in results.items():
        metric = suite.score(suite.track(frames), truth, sample, has_ground_truth=has_truth, source_embedding=embedding)
        scores.append({"case": case.name, "method": method, "frames": len(scored_rows), **metric})
    views: list[Scores] = []
    if options.views:
        pictures, cameras = render_novel_views(animator, case, photo)
        views = suite.score_views(suite.track(pictures, independent=True), cameras, embedding)
        scores[0] |= {key: metrics.finite_mean([view[key] for view in views]) for key in views[0]}
    return scores, views


def render_methods(
    animator: Animator, case: Case, photo: np.ndarray, rows: np.ndarray, options: EvaluateOptions
) -> dict[str, Frames]:
    """Return each method's frames for the source `photo` and the driver's frames `rows`."""
    size, source_row = animator.model.config.image_size, most_frontal_frame(case.source.motion)
    results: dict[str, Frames] = {}
    if options.model:
        motion = case.driver.motion
        if case.target is not None:  # the result is framed as the target's crop
            length = min(len(motion), len(case.target.motion))
            motion = replace(motion.select(np.arange(length)), camera=case.target.motion.camera[:length])
        motion = smooth_motion(motion, options.smooth or "light").select(rows)
        portrait = animator.portrait_from_motion(photo, case.source.motion, source_row)
        results["model"] = list(animator.animate(portrait, [motion]))
        if animator.model.flow is not None:
            results["flow"] = list(_render_flow_baseline(animator, photo, case.source.motion, source_row, motion))
    for folder in options.results:
        name = folder.resolve().name
        results[name if name not in results else str(folder)] = load_result_frames(folder, case, rows, size)
    return {**results, "repeat": [photo] * len(rows)}


def render_novel_views(animator: Animator, case: Case, photo: np.ndarray) -> tuple[Frames, np.ndarray]:
    """Return the source seen from `NUM_VIEWS` sides, and the cameras (V, 25)."""
    portrait = animator.portrait_from_motion(photo, case.source.motion, most_frontal_frame(case.source.motion))
    options = NovelViewOptions(yaw=(-MAX_VIEW_YAW, MAX_VIEW_YAW), frames=NUM_VIEWS, loop="once")
    cameras = orbit_cameras(portrait.camera, options)
    return list(animator.view(portrait, cameras)), cameras


def _render_flow_baseline(
    animator: Animator, photo: np.ndarray, motion: Motion, row: int, driver: Motion
) -> Iterator[np.ndarray]:
    """Yield the photo warped by the basis flow and unchanged away from the face."""
    model, device, side = animator.model, animator.device, animator.model.config.image_size // 2
    assert model.flow is not None

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).float().to(device)

    with torch.inference_mode():
        source = motion.select(np.array([row]))
        camera, points = tensor(source.camera), tensor(landmarks_to_head_frame(source.landmarks, source.camera))
        lam = model.expression.coefficients(tensor(source.beta))
        image = to_tensor(photo)[None].to(device)
        identity_grid = pixel_grid(side, device).T.reshape(1, 2, side, side)
        for start in range(0, len(driver), BATCH):
            beta, target_camera = (tensor(x[start : start + BATCH]) for x in (driver.beta, driver.camera))
            b = len(beta)
            p = points.expand(b, -1, -1)
            target = model.flow.deform_landmarks(p, model.expression.coefficients(beta) - lam)
            mesh = model.flow(p, camera.expand(b, -1), target, target_camera, side)
            uv = mesh.weight * mesh.uv + (1 - mesh.weight) * identity_grid
            uv = F.interpolate(uv, scale_factor=2, mode="bilinear", align_corners=False)
            yield from to_uint8(warp(image.expand(b, -1, -1, -1), uv))


def _comparison_sheets(animator: Animator, cases: list[Case], result: Evaluation) -> dict[str, np.ndarray]:
    """Return sheets of the best, the median and the worst clip of the first method, or of up to 8 pairs without truth.

    Each shows the source, then driver, ground truth and the methods over time; one more sheet has the novel views.
    """
    first = next(iter(result.mean))
    has_truth = result.mean[first]["akd478"] is not None
    score = {row["case"]: row["akd478" if has_truth else "aed"] for row in result.clips if row["method"] == first}
    by_name = {case.name: case for case in cases if case.name in score}
    ranked = sorted(by_name, key=lambda name: np.inf if score[name] is None else score[name])
    if has_truth:
        names = {"best": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[-1]}
    else:
        places = np.unique(np.linspace(0, len(ranked) - 1, min(MAX_SHEETS, len(ranked))).round().astype(int))
        names = {f"{place:02d}": ranked[place] for place in places.tolist()}
    options = result.options
    sheets = {f"{place}-{name}": _comparison_sheet(animator, by_name[name], options) for place, name in names.items()}
    if result.views:
        size = animator.model.config.image_size
        rows = []
        for case in (by_name[name] for name in dict.fromkeys(names.values())):
            pictures, _ = render_novel_views(animator, case, load_source_image(case.source, size))
            rows.append(np.concatenate(pictures, axis=1))
        sheets["views"] = np.concatenate(rows)
    return sheets


def _comparison_sheet(animator: Animator, case: Case, options: EvaluateOptions) -> np.ndarray:
    size = animator.model.config.image_size
    rows = select_frames(case, SHEET_COLUMNS)
    photo = load_source_image(case.source, size)
    lines = {"driver": decode_frames(case.driver, rows, size)}
    if case.target is not None and case.target is not case.driver:
        lines["truth"] = decode_frames(case.target, rows, size)
    results = render_methods(animator, case, photo, rows, options)
    lines |= {method: frames for method, frames in results.items() if method != "repeat"}
    blank = np.full_like(photo, 255)
    return np.concatenate([
        np.concatenate([draw_caption(blank if i else photo, name if i else ""), *frames], axis=1)
        for i, (name, frames) in enumerate(lines.items())
    ])  # fmt: skip


def _summarise(
    dataset: Path,
    options: EvaluateOptions,
    rows: list[dict[str, Any]],
    views: list[list[Scores]],
    animator: Animator,
    seconds: float,
) -> Evaluation:
    """Compute means and intervals over clips; NaN becomes None, because JSON has no NaN."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    mean: dict[str, dict[str, float | None]] = {}
    interval: dict[str, dict[str, tuple[float, float] | None]] = {}
    for method in methods:
        values = {key: [row[key] for row in rows if row["method"] == method] for key in metrics.METRICS}
        mean[method] = {key: _nan_to_none(metrics.finite_mean(column)) for key, column in values.items()}
        bounds = {key: metrics.bootstrap_interval(column, seed=options.seed) for key, column in values.items()}
        interval[method] = {key: pair if np.isfinite(pair[0]) else None for key, pair in bounds.items()}
    by_yaw: list[dict[str, float | None]] = []
    for number, yaw in enumerate(np.linspace(-MAX_VIEW_YAW, MAX_VIEW_YAW, NUM_VIEWS)) if views else []:
        means = {key: metrics.finite_mean([clip[number][key] for clip in views]) for key in views[0][0]}
        by_yaw.append({"yaw": float(yaw), **{key: _nan_to_none(value) for key, value in means.items()}})
    frame_counts = [row["frames"] for row in rows if row["method"] == methods[0]]
    return Evaluation(
        dataset=dataset,
        protocol="cross" if options.cross else "self",
        cases=len(frame_counts),
        frames=sum(frame_counts),
        mean=mean,
        interval=interval,
        clips=[{key: _nan_to_none(value) for key, value in row.items()} for row in rows],
        views=by_yaw,
        options=options,
        quality=animator.quality if options.model else None,
        seconds=seconds,
        device=animator.device_name,
    )


def _nan_to_none(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
