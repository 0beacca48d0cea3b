"""Scores a model on a data set, next to baselines without a network and to results of other tools.

Self-reenactment: a clip's most frontal frame is the photo, the clip is the driver. `model` is what `reenact` writes
before encoding, with its defaults unless `EvaluateOptions` says otherwise, but relative to the photo's own frame. `raw`
is the volume's render alone, enlarged and pasted over the photo. `pwa` is the photo warped by the true landmarks,
`repeat` the unchanged photo. All are compared with the clip's other frames, in the frame that users get. `view N` is
the source with its own expression, turned by N degrees. Finished videos of any tool can be scored in the same way.

Cross-reenactment: another person drives. The truth is known if clips `<head>_tNN` of rendered heads share the track NN:
then it is the source head's own clip. A data set with `exact_views` is scored against those.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.options import Progress, ReenactOptions
from export3d_cli.core.animation.photo_canvas import FrameLayers
from export3d_cli.core.animation.reenact import open_driver
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.config.schema import LossConfig
from export3d_cli.core.dataset.exact_views import has_exact_views, split_heads
from export3d_cli.core.evaluation import metrics, protocol, views
from export3d_cli.core.evaluation.report import draw_sheet, write_report
from export3d_cli.core.evaluation.scorer import Frames, MetricSuite, Scores, load_embedder
from export3d_cli.core.face.landmarks import NUM_MESH_VERTICES
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.image import to_tensor, write_image
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.weights import resolve_weights
from export3d_cli.core.train.perceptual import load_perceptual

DEFAULT_PAIRS = 5
# options by which papers compare: VFHQ's 50 test clips as GAGAvatar uses them, TalkingHead-1KH as face-vid2vid does
PROTOCOLS: dict[str, dict[str, Any]] = {
    "vfhq": {"photo": "first", "size": 512, "background": "black", "cases": 50, "max_frames": 50},
    "talkinghead": {"photo": "first", "size": 512, "max_frames": None},
}
SHEET_COLUMNS = 8
BORDER_POINTS = 9  # pinned points on each side of the picture


@dataclass(frozen=True)
class EvaluateOptions:
    """What is compared and how it is measured."""

    max_frames: int | None = 50  # frames of each clip; None: all
    take: Literal["spread", "first"] = "spread"  # which frames: spread evenly, or the first
    cross: bool = False  # another person drives
    cases: int | None = None  # at most so many clips, pairs or heads; None: all, with `cross` 5 pairs
    photo: protocol.Photo = "frontal"  # which frame of a clip is animated: the most frontal, or the first
    size: int | None = None  # side to which photos and truth are resized, pixels; None: their own
    background: Literal["source", "black"] = "source"  # black: of photos and truth, behind the matted person
    seed: int = 0  # of the pairs and of the bootstrap
    identity: str | None = None  # `dlib` or a TorchScript file, see `load_embedder`; None: not measured
    # VGG16 or MobileNetV2, a file or hf:owner/repo:file; None: perceptual distance is not measured
    perceptual: str | Path | None = None
    lpips: str | Path | None = None  # LPIPS' learned weights for that VGG16, if they are a file of their own
    results: tuple[Path, ...] = ()  # folders of finished videos: `<case>.mp4`, or pictures in `<case>/`
    model: bool = True  # False: score only `results` and the baselines
    reenact: ReenactOptions = field(default_factory=ReenactOptions)  # framing, pose, smoothing and watermark are used

    def __post_init__(self) -> None:
        """Refuse options without effect."""
        if self.lpips is not None and self.perceptual is None:
            raise InputError(f"{self.lpips} has only LPIPS' linear weights: give the VGG16 file with --perceptual")
        if not (self.model or self.results):
            raise InputError("--no-model leaves nothing to score: add --results FOLDER")


@dataclass(frozen=True)
class Evaluation:
    """Scores by method and metric; None means not measured, and means over cases ignore it."""

    dataset: Path
    protocol: str  # self-reenactment, cross-reenactment or exact views
    cases: int
    frames: int
    skipped: tuple[str, ...]  # cases without a frame in which source and driver have a face
    mean: dict[str, dict[str, float | None]]
    interval: dict[str, dict[str, tuple[float, float] | None]]  # 95 % interval of the mean, by bootstrap over cases
    clips: list[dict[str, Any]]  # case, method, frames and metrics: one row per case and method
    options: EvaluateOptions
    quality: str | None  # of the rendering; None without a model
    seconds: float  # wall-clock
    device: str
    files: list[Path] = field(default_factory=list)  # written files


def evaluate(animator: Animator, dataset: Path, options: EvaluateOptions | None = None, *, out: Path | None = None,
             progress: Progress | None = None) -> Evaluation:  # fmt: skip
    """Score a model on a data set (`preprocess`) or exact views; write tables, a report and pictures to `out`."""
    options, began = options or EvaluateOptions(), time.monotonic()
    exact = has_exact_views(dataset)
    if exact and (options.cross or options.results or not options.model or options.size):
        raise InputError(f"{dataset} has exact views: --cross, --protocol, --results and --no-model do not apply, "
                         "leave them out")  # fmt: skip
    suite = _make_metric_suite(animator, options)
    score: dict[str, Callable[[], tuple[dict[str, Scores], dict[str, Frames]]]]
    if exact:
        heads = split_heads(dataset)[1][: options.cases]
        score = {head: partial(views.score_head, animator, dataset, head, suite) for head in heads}
    else:
        cases = find_cases(dataset, options)
        score = {case.name: partial(_score_case, animator, case, options, suite) for case in cases}
    rows: list[dict[str, Any]] = []
    pictures: list[Path] = []
    skipped: list[str] = []
    frames = 0
    for count, name in enumerate(score, start=1):
        try:
            scores, lines = score[name]()
        except NoFaceError:
            scores, lines = {}, {}
        if scores:
            length = len(next(iter(lines.values())))
            frames += length
            rows += [{"case": name, "method": method, "frames": length, **found} for method, found in scores.items()]
            if out is not None:
                pictures.append(out / f"{name}.jpg")
                write_image(pictures[-1], draw_sheet(lines, SHEET_COLUMNS))
        else:
            skipped.append(name)
        if progress is not None:
            progress("cases", count, len(score))
    if not rows:
        raise InputError(f"no clip of {dataset} has a frame with a face")
    mean, interval = _summarise(rows, options.seed)
    keys = ("case", "method", "frames", *metrics.METRICS)
    result = Evaluation(
        dataset, "exact views" if exact else "cross-reenactment" if options.cross else "self-reenactment",
        len(score) - len(skipped), frames, tuple(skipped), mean, interval,
        [{key: _nan_to_none(row.get(key, np.nan)) for key in keys} for row in rows],
        options, animator.quality if options.model else None, time.monotonic() - began, animator.device_name, pictures,
    )  # fmt: skip
    if out is not None:
        result.files[:0] = write_report(result, out)
    return result


def find_cases(dataset: Path, options: EvaluateOptions) -> list[protocol.Case]:
    """Return the cases of a data set; raise `InputError` if there is none."""
    clips = protocol.read_clips(dataset)
    if options.cross:
        cases = protocol.cross_cases(clips, options.cases or DEFAULT_PAIRS, options.seed, options.photo)
    else:
        videos = [clip for clip in clips if len(clip.motion) > 1]
        cases = [protocol.Case(clip, clip, options.photo) for clip in videos][: options.cases]
    if not cases:
        missing = "pair of two people" if options.cross else "video"
        raise InputError(f"{dataset} has no {missing} to evaluate with: give a larger data set")
    return cases


def write_inputs(dataset: Path, options: EvaluateOptions, out: Path) -> list[Path]:
    """Write each case's source and driver; a tool's `<case>.mp4`, frame by frame, can be given as `options.results`."""
    files = []
    for case in find_cases(dataset, options):
        files += [out / f"{case.name}-source.png", out / f"{case.name}-driver{case.driver.file.suffix}"]
        write_image(files[-2], _read_photo(case, options))
        shutil.copyfile(case.driver.file, files[-1])
    return files


def _make_metric_suite(animator: Animator, options: EvaluateOptions) -> MetricSuite:
    embedder = None if options.identity is None else load_embedder(options.identity, animator.device)
    tracker = open_landmarker_tracker()
    if options.perceptual is None:
        return MetricSuite(tracker, embedder)
    backbone, heads = (str(path or "") for path in (options.perceptual, options.lpips))
    network = load_perceptual(LossConfig(backbone=backbone, lpips=heads), animator.device)
    assert network is not None

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        with torch.inference_mode():
            return float(network(*(to_tensor(x)[None].to(animator.device) for x in (a, b)), scales=1))

    return MetricSuite(tracker, embedder, distance, network.name)


def _score_case(animator: Animator, case: protocol.Case, options: EvaluateOptions,
                suite: MetricSuite) -> tuple[dict[str, Scores], dict[str, Frames]]:  # fmt: skip
    """Return the metrics of each method, and the pictures of a sheet; both are empty without a frame to score."""
    scored_rows = protocol.select_frames(case, options.max_frames, options.take)
    if not len(scored_rows):
        return {}, {}
    consecutive_rows = protocol.consecutive_frames(case, len(scored_rows))
    rows = np.union1d(scored_rows, consecutive_rows)
    scored, consecutive = np.searchsorted(rows, scored_rows), np.searchsorted(rows, consecutive_rows)
    photo, portrait = _read_photo(case, options), None
    if options.model:
        portrait = animator.portrait(photo, framing=options.reenact.framing, name=case.name)
    source = suite.track(_show([photo], portrait))
    truth_frames = protocol.decode_frames(case.source if case.has_truth else case.driver, rows)
    truth = suite.track(_show(_prepare(truth_frames, options), portrait))
    scores: dict[str, Scores] = {}
    lines: dict[str, Frames] = {"truth" if case.has_truth else "driver": [truth.frames[k] for k in scored]}

    def add(method: str, frames: Frames) -> None:
        tracked = suite.track(frames)
        scores[method] = suite.score(
            tracked, truth, scored, consecutive, has_ground_truth=case.has_truth, source=source
        )
        lines[method] = [frames[k] for k in scored]

    if portrait is not None:
        settings = options.reenact
        if case.has_truth:  # the photo is a frame of the track: relative to another one, the head would be displaced
            settings = replace(settings, reference_frame=case.photo_row)
        layers = list(render_layers(animator, portrait, case.driver.file, rows, settings))
        mark = get_watermarker(settings.watermark)
        add("model", [mark(portrait.canvas.compose(layer)) for layer in layers])
        scores["model"]["copied"] = views.copied_fraction(portrait, layers)
        square = portrait.square
        add("raw", [views.paste_crop(portrait.canvas.photo, square, layer.volume.colours) for layer in layers])
    for folder in options.results:
        name = folder.resolve().name
        frames = protocol.load_result_frames(folder, case, rows, photo.shape[1::-1])
        add(name if name not in scores else str(folder), _show(frames, portrait))
    if source.motion is not None and truth.motion is not None:
        points, targets = source.motion.landmarks[0], truth.motion.landmarks
        add("pwa", [warp_piecewise(source.frames[0], points, target) for target in targets])
    add("repeat", source.frames * len(rows))
    del lines["repeat"]
    if portrait is not None and not options.cross:
        view_scores, lines["views"] = views.score_novel_views(animator, portrait, suite, source)
        scores |= view_scores
    return scores, lines


def _read_photo(case: protocol.Case, options: EvaluateOptions) -> np.ndarray:
    return _prepare(protocol.decode_frames(case.source, np.array([case.photo_row])), options)[0]


def _prepare(frames: Frames, options: EvaluateOptions) -> Frames:
    """Return a clip's frames at the options' size, in front of their background."""
    if options.background == "black":
        matting = PersonMatting(resolve_weights("selfie_segmentation"))
        frames = [np.rint(frame * matting.alpha(frame)[..., None]).astype(np.uint8) for frame in frames]
    if options.size is None:
        return frames
    return [cv2.resize(frame, (options.size, options.size), interpolation=cv2.INTER_AREA) for frame in frames]


def _show(frames: Frames, portrait: Portrait | None) -> Frames:
    """Return the part of frames that a portrait's frames show, at their size; all of it without a portrait."""
    if portrait is None:
        return frames
    x0, y0, x1, y1 = portrait.shown
    cut = [frame[y0:y1, x0:x1] for frame in frames]
    return [cv2.resize(frame, portrait.frame_size, interpolation=cv2.INTER_AREA) for frame in cut]


def render_layers(animator: Animator, portrait: Portrait, driver: Path, rows: np.ndarray,
                  options: ReenactOptions) -> Iterator[FrameLayers]:  # fmt: skip
    """Render the frames `rows` (ascending) that `reenact` would write for a portrait and a driver."""
    with open_driver(animator, portrait, driver, options) as stream:
        first = 0
        for reference, shot in groupby(stream, key=lambda batch: batch.reference):
            motion = Motion.concatenate([batch.motion for batch in shot])
            chosen = rows[(rows >= first) & (rows < first + len(motion))] - first
            first += len(motion)
            if len(chosen):
                motions = [motion.select(chosen)]
                yield from animator.animate(portrait, motions, control=options, reference=reference, layers=True)


def _summarise(rows: list[dict[str, Any]], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return means and intervals over cases, by method and metric; see `Evaluation`."""
    mean: dict[str, Any] = {}
    interval: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        values = {key: [r.get(key, np.nan) for r in rows if r["method"] == method] for key in metrics.METRICS}
        mean[method] = {key: _nan_to_none(metrics.finite_mean(column)) for key, column in values.items()}
        bounds = {key: metrics.bootstrap_interval(column, seed=seed) for key, column in values.items()}
        interval[method] = {key: pair if np.isfinite(pair[0]) else None for key, pair in bounds.items()}
    return mean, interval


def _nan_to_none(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value  # JSON has no NaN


def warp_piecewise(photo: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Warp a photo, uint8 (H, W, 3), by the Delaunay triangles of its target points; the border stays.

    `source` (478, 2 or more) are its landmarks, `target` their places in the result, fractions of width and height.
    """
    height, width = photo.shape[:2]
    to_pixels = np.array([width, height])
    moved = (target[:NUM_MESH_VERTICES, :2] * to_pixels).astype(np.float32)
    inside = ((moved > 1) & (moved < to_pixels - 1)).all(1)
    side = np.linspace(0, 1, BORDER_POINTS)
    edge = np.concatenate([[(t, 0), (t, 1), (0, t), (1, t)] for t in side]) * to_pixels
    edge = np.unique(edge, axis=0).astype(np.float32)
    points = np.concatenate([moved[inside], edge])
    origins = np.concatenate([source[:NUM_MESH_VERTICES, :2][inside] * to_pixels, edge])
    triangles = _delaunay(points, width, height)
    # (T, 3, 3) @ (T, 3, 2): the affine map of each triangle from the result to the photo
    corners = np.concatenate([points[triangles], np.ones((len(triangles), 3, 1))], axis=2)
    solid = np.abs(np.linalg.det(corners)) > 1e-3  # twice the area, pixels
    maps = np.linalg.solve(corners[solid], origins[triangles[solid]])
    label = np.zeros((height, width), np.int32)
    for number, triangle in enumerate(points[triangles[solid]]):  # 4 fractional bits; pixel centres are at + 0.5
        cv2.fillConvexPoly(label, np.int32((triangle - 0.5) * 16), number, shift=4)  # type: ignore[call-overload]
    y, x = np.mgrid[:height, :width] + 0.5
    xy = np.einsum("hwk,hwkc->hwc", np.stack([x, y, np.ones_like(x)], axis=-1), maps[label]) - 0.5
    return cv2.remap(photo, xy[..., 0].astype(np.float32), xy[..., 1].astype(np.float32), cv2.INTER_CUBIC,
                     borderMode=cv2.BORDER_REPLICATE)  # fmt: skip


def _delaunay(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the Delaunay triangles (T, 3) of points (N, 2) float32 in pixels, as their indices."""
    subdivision = cv2.Subdiv2D((-1, -1, width + 2, height + 2))
    subdivision.insert(points)  # type: ignore[call-overload]
    index = {tuple(point): number for number, point in enumerate(points.tolist())}
    corners = np.asarray(subdivision.getTriangleList()).reshape(-1, 3, 2)
    rows = [[index.get(tuple(corner), -1) for corner in triangle] for triangle in corners.tolist()]
    return np.array([row for row in rows if min(row) >= 0])
