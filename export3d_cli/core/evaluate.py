"""How well a model animates the faces of a data set, beside two methods that need no network.

Self-reenactment: the source is a clip's most frontal frame, the driver the clip itself. `model` is the network, `flow`
its basis flow alone (lambda and b_i, no trained network), `repeat` the source as it is. What each makes is compared
with the clip's own frames, and both are tracked by the same landmarker.

Cross-reenactment: another person drives. Where clips `<head>_tNN` of synthetic heads share the track NN, the truth is
known: the same track on the source's own head.
"""

from __future__ import annotations

import csv
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from export3d_cli.core import metrics
from export3d_cli.core.animate import Animator
from export3d_cli.core.camera import Camera
from export3d_cli.core.errors import InputError, NoFaceError
from export3d_cli.core.face.mesh import LEFT_EYE, RIGHT_EYE
from export3d_cli.core.face.motion import BETA_NAMES, Motion, Tracker, head_points
from export3d_cli.core.files import write_atomic
from export3d_cli.core.media.image import is_image, read_image, to_tensor, to_uint8, write_image
from export3d_cli.core.media.video import VideoReader
from export3d_cli.core.model.flow import warp
from export3d_cli.core.model.render import pixel_grid

Progress = Callable[[str, int, "int | None"], None]
Frames = list[np.ndarray]  # uint8 (H, W, 3) each
_Row = dict[str, Any]  # case, method, frames, and the metrics
SHEET_COLUMNS = 6
SETTLE = 3  # times the first frame is tracked before it counts: tracking settles on a region of interest
ARKIT = 52  # the first entries of beta are blendshapes
METRICS = (
    "psnr", "ssim", "akd478", "akd68", "aed", "yaw_error", "pitch_error", "jaw", "blink", "smile", "yaw", "found",
    "identity",
)  # fmt: skip
# What must move in the driver for its correlation to count, and by how much (standard deviation).
SERIES = {
    "jaw": (("jawOpen",), 0.03),
    "blink": (("eyeBlinkLeft", "eyeBlinkRight"), 0.05),
    "smile": (("mouthSmileLeft", "mouthSmileRight"), 0.05),
    "yaw": ((), 0.7),  # degrees
}


@dataclass(frozen=True)
class EvaluateOptions:
    """What is compared."""

    max_frames: int | None = 50  # of each clip, spread evenly; None: all
    cross: bool = False  # another person drives
    pairs: int = 5  # of source and driver, with `cross`
    seed: int = 0  # picks them
    identity: Path | None = None  # TorchScript face embedder of aligned 112 x 112 faces; None: identity is not measured


@dataclass(frozen=True)
class Evaluation:
    """Scores by method and metric (None: not measured); means over clips leave out what is None."""

    dataset: Path
    cases: int
    frames: int
    mean: dict[str, dict[str, float | None]]
    clips: list[dict[str, Any]]  # case, method, frames, and the metrics: a row for each method
    files: list[Path]
    seconds: float  # wall-clock
    device: str


@dataclass(frozen=True)
class _Clip:
    """One line of a data set, with its motion."""

    id: str
    person: str
    file: Path
    motion: Motion

    @property
    def track(self) -> str:
        """NN of `<head>_tNN`, or ''."""
        head, _, tail = self.id.rpartition("_t")
        return tail if head and tail.isdigit() else ""


@dataclass(frozen=True)
class _Case:
    """Who is animated by whom; `target` is what should come out, where that is known."""

    source: _Clip
    driver: _Clip
    target: _Clip | None

    @property
    def name(self) -> str:
        """For tables and file names."""
        return self.driver.id if self.driver is self.source else f"{self.source.id}-by-{self.driver.id}"


@dataclass(frozen=True)
class _Tracked:
    """What the landmarker sees in frames; no motion where it sees no face at all."""

    frames: Frames
    motion: Motion | None
    found: np.ndarray  # (T,) bool


def evaluate(
    animator: Animator,
    dataset: Path,
    options: EvaluateOptions | None = None,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the model on a data set written by `preprocess`; tables and pictures go to the folder `out`."""
    options = options or EvaluateOptions()
    began = time.monotonic()
    clips = _read_clips(dataset)
    cases = _cross_cases(clips, options) if options.cross else [_Case(c, c, c) for c in clips if len(c.motion) > 1]
    if not cases:
        raise InputError(f"{dataset} has no {'pair of two people' if options.cross else 'video'} to evaluate with")
    embedder = None if options.identity is None else _Embedder(options.identity, animator.device)
    rows: list[_Row] = []
    for count, case in enumerate(cases, start=1):
        rows += _score(animator, case, options, embedder)
        if progress is not None:
            progress("clips", count, len(cases))
    if not rows:
        raise InputError(f"no clip of {dataset} has a frame with a face")
    by_method = {method: [row for row in rows if row["method"] == method] for method in (row["method"] for row in rows)}
    mean = {m: {k: _plain(metrics.mean_of([row[k] for row in r])) for k in METRICS} for m, r in by_method.items()}
    frames = sum(row["frames"] for row in by_method["model"])
    files = [] if out is None else _sheets(animator, cases, rows, out)
    plain = [{k: _plain(v) for k, v in row.items()} for row in rows]
    result = Evaluation(dataset, len(cases), frames, mean, plain, files, time.monotonic() - began, animator.device_name)
    return result if out is None else _write_tables(result, out)


def _read_clips(dataset: Path) -> list[_Clip]:
    path = dataset / "manifest.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        named = [(str(line["id"]), str(line.get("person") or line["id"])) for line in lines]
        paths = [(dataset / line["file"], dataset / line["motion"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{dataset} is not a data set ({error!r}): make one with `export3d preprocess`") from error
    return [_Clip(*names, file, Motion.load(motion)) for names, (file, motion) in zip(named, paths, strict=True)]


def _cross_cases(clips: list[_Clip], options: EvaluateOptions) -> list[_Case]:
    """Fixed pairs: with the truth where heads share tracks, else of any two people; sources differ while they can."""
    rng = np.random.default_rng(options.seed)
    by_head: dict[str, dict[str, _Clip]] = {}
    for clip in clips:
        if clip.track:
            by_head.setdefault(clip.person, {})[clip.track] = clip
    cases = []
    for place in rng.permutation(len(clips)):
        clip = clips[place]
        if by_head:  # the clip is the target
            others = [c for t, c in by_head.get(clip.person, {}).items() if t != clip.track]
            heads = [tracks for person, tracks in by_head.items() if person != clip.person]
            drivers = [tracks[clip.track] for tracks in heads if clip.track in tracks]
        else:  # the clip is the source
            others, drivers = [clip], [c for c in clips if c.person != clip.person and len(c.motion) > 1]
        if others and drivers:
            source, driver = others[rng.integers(len(others))], drivers[rng.integers(len(drivers))]
            cases.append(_Case(source, driver, clip if by_head else None))
    return cases[: options.pairs]


def _frontal(motion: Motion) -> int:
    """The frame that looks most into the camera."""
    yaw, pitch = _angles(motion.camera).T
    score = np.abs(yaw) + np.abs(pitch - np.median(pitch))
    return int(np.where(motion.found, score, np.inf).argmin())


def _angles(camera: np.ndarray) -> np.ndarray:
    """Yaw and pitch in degrees, (T, 2)."""
    return np.array([Camera.from_vector(row).angles()[:2] for row in camera])


def _chosen(case: _Case, most: int | None) -> np.ndarray:
    """Frames of the driver, and alike of the target, in which a face was tracked: at most `most`, spread evenly."""
    found = case.driver.motion.found
    if case.target is not None:
        length = min(len(found), len(case.target.motion))
        found = found[:length] & case.target.motion.found[:length]
    rows = np.flatnonzero(found)
    if most is None or len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]


def _decode(clip: _Clip, rows: np.ndarray, size: int) -> Frames:
    """Frames `rows` (ascending) of a clip at the model's size."""
    if is_image(clip.file):
        image = to_tensor(read_image(clip.file))[None]
        image = image if image.shape[-1] == size else F.interpolate(image, (size, size), mode="area")
        return [to_uint8(image[0])] * len(rows)
    wanted, frames = set(rows.tolist()), []
    with VideoReader(clip.file, size=(size, size)) as reader:
        for index, frame in enumerate(reader):
            if index in wanted:
                frames.append(frame)
            if len(frames) == len(wanted):
                break
    if len(frames) < len(wanted):
        raise InputError(f"{clip.file} has fewer frames than its motion file: preprocess it again")
    return frames


def _make(animator: Animator, case: _Case, rows: np.ndarray, photo: np.ndarray, row: int) -> dict[str, Frames]:
    """What each method makes of the source's frame `row` for the driver's frames `rows`."""
    motion = case.driver.motion
    seen_by = motion if case.target is None else case.target.motion  # crops are framed clip by clip
    parts = {key: getattr(motion, key)[rows] for key in ("beta", "landmarks", "found")}
    driver = replace(motion, camera=seen_by.camera[rows], **parts)
    animator.set_source_motion(photo, case.source.motion, row)
    made = {"model": list(animator.drive([driver]))}
    if animator.model.flow is not None:
        made["flow"] = list(_flow_only(animator, photo, case.source.motion, row, driver))
    return {**made, "repeat": [photo] * len(rows)}


def _flow_only(animator: Animator, photo: np.ndarray, motion: Motion, row: int, driver: Motion) -> Iterator[np.ndarray]:
    """The photo warped by the basis flow, and left as it is away from the face."""
    model, device, side = animator.model, animator.device, animator.model.config.image_size // 2
    assert model.flow is not None

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).float().to(device)

    with torch.inference_mode():
        seen = motion.camera[row : row + 1]
        camera, points = tensor(seen), tensor(head_points(motion.landmarks[row : row + 1], seen))
        lam = model.expression.coefficients(tensor(motion.beta[row : row + 1]))
        image = to_tensor(photo)[None].to(device)
        still = pixel_grid(side, device).T.reshape(1, 2, side, side)
        for at in range(0, len(driver), 8):
            beta, seen_by = tensor(driver.beta[at : at + 8]), tensor(driver.camera[at : at + 8])
            b = len(beta)
            p = points.expand(b, -1, -1)
            target = model.flow.moved(p, model.expression.coefficients(beta) - lam)
            mesh = model.flow(p, camera.expand(b, -1), target, seen_by, side)
            uv = mesh.weight * mesh.uv + (1 - mesh.weight) * still
            uv = F.interpolate(uv, scale_factor=2, mode="bilinear", align_corners=False)
            yield from to_uint8(warp(image.expand(b, -1, -1, -1), uv))


def _track(tracker: Tracker, frames: Frames) -> _Tracked:
    size = frames[0].shape[0]
    faces = tracker.follow([*frames[:1] * SETTLE, *frames])[SETTLE:]
    found = np.array([face is not None for face in faces])
    try:
        motion = tracker.motion(faces, Fraction(25), (size, size), crop=(0.0, 0.0, float(size)))
    except NoFaceError:
        return _Tracked(frames, None, found)
    return _Tracked(frames, motion, found)


def _score(animator: Animator, case: _Case, options: EvaluateOptions, embedder: _Embedder | None) -> list[_Row]:
    """One row of metrics for each method."""
    size, tracker = animator.model.config.image_size, animator.tracker
    row, rows = _frontal(case.source.motion), _chosen(case, options.max_frames)
    if not len(rows):
        return []
    photo = _decode(case.source, np.array([row]), size)[0]
    made = _make(animator, case, rows, photo, row)
    truth = _track(tracker, _decode(case.target or case.driver, rows, size))
    face = None if embedder is None else embedder(_track(tracker, [photo]))
    scores = []
    for method, frames in made.items():
        result = _track(tracker, frames)
        score = {"case": case.name, "method": method, "frames": len(rows), **dict.fromkeys(METRICS, float("nan"))}
        score["found"] = float(result.found.mean())
        if case.target is not None:
            for name, measure in (("psnr", metrics.psnr), ("ssim", metrics.ssim)):
                score[name] = float(np.mean([measure(a, b) for a, b in zip(frames, truth.frames, strict=True)]))
        score |= _compare_faces(truth, result, same_head=case.target is not None)
        if embedder is not None and face is not None and len(face):
            others = embedder(result)
            score["identity"] = float((others @ face[0]).mean()) if len(others) else float("nan")
        scores.append(score)
    return scores


def _compare_faces(truth: _Tracked, result: _Tracked, *, same_head: bool) -> dict[str, float]:
    """Metrics of the landmarks, where both have a face; of another head only what can be expected to agree."""
    both = truth.found & result.found
    if truth.motion is None or result.motion is None or not both.any():
        return {}
    beta, other = truth.motion.beta[both], result.motion.beta[both]
    angles, other_angles = _angles(truth.motion.camera[both]), _angles(result.motion.camera[both])
    scores = {
        "aed": metrics.mean_difference(beta[:, :ARKIT], other[:, :ARKIT]),
        "yaw_error": metrics.mean_difference(angles[:, 0], other_angles[:, 0]),
        "pitch_error": metrics.mean_difference(angles[:, 1], other_angles[:, 1]),
    }
    if same_head:
        a, b = truth.motion.landmarks[both], result.motion.landmarks[both]
        scores["akd478"] = metrics.landmark_distance(a, b)
        scores["akd68"] = metrics.landmark_distance(a, b, metrics.IBUG68)
    for key, (names, least) in SERIES.items():
        columns = [BETA_NAMES.index(name) for name in names]
        a, b = (beta[:, columns].mean(1), other[:, columns].mean(1)) if names else (angles[:, 0], other_angles[:, 0])
        scores[key] = metrics.correlation(a, b, least)
    return scores


class _Embedder:
    """A TorchScript network of aligned faces (B, 3, 112, 112), RGB with ImageNet's mean and deviation."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.device = device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} is not a TorchScript face embedder ({reason})") from error
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def __call__(self, tracked: _Tracked) -> torch.Tensor:
        """Unit vectors (F, D) of the frames that show a face."""
        if tracked.motion is None:
            return torch.zeros(0, 1)
        points = tracked.motion.landmarks[..., :2] * tracked.frames[0].shape[0]
        eyes = [points[:, list(eye)].mean(1) for eye in (RIGHT_EYE, LEFT_EYE)]  # in the image's order
        five = np.stack([*eyes, points[:, 1], points[:, 61], points[:, 291]], axis=1)
        crops = [metrics.arcface_crop(tracked.frames[i], five[i]) for i in np.flatnonzero(tracked.found)]
        batch = (to_tensor(np.stack(crops)).to(self.device) * 0.5 + 0.5 - self.mean) / self.std
        with torch.inference_mode():
            vectors = torch.cat([self.network(part) for part in batch.split(32)])
        return F.normalize(vectors.float(), dim=1).cpu()


def _sheets(animator: Animator, cases: list[_Case], rows: list[_Row], out: Path) -> list[Path]:
    """Pictures of the best, the median and the worst clip: source, then driver, target, model and flow over time."""
    key = "akd478" if any(np.isfinite(row["akd478"]) for row in rows) else "aed"
    score = {row["case"]: row[key] for row in rows if row["method"] == "model"}
    known = {case.name: case for case in cases if case.name in score}
    ranked = sorted(known, key=lambda name: np.inf if np.isnan(score[name]) else score[name])
    names = {"best": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[-1]}
    if key == "aed":  # no truth: few pairs, all worth looking at
        names = {f"{i:02d}": name for i, name in enumerate(ranked)}
    files = []
    for place, name in names.items():
        files.append(out / f"{place}-{name}.png")
        write_image(files[-1], _sheet(animator, known[name]))
    return files


def _sheet(animator: Animator, case: _Case) -> np.ndarray:
    size = animator.model.config.image_size
    row, rows = _frontal(case.source.motion), _chosen(case, SHEET_COLUMNS)
    photo = _decode(case.source, np.array([row]), size)[0]
    made = _make(animator, case, rows, photo, row)
    lines = [_decode(case.driver, rows, size)]
    if case.target is not None and case.target is not case.driver:
        lines.append(_decode(case.target, rows, size))
    lines += [frames for method, frames in made.items() if method != "repeat"]
    blank = np.full_like(photo, 255)
    return np.concatenate([np.concatenate([blank if i else photo, *line], axis=1) for i, line in enumerate(lines)])


def _write_tables(result: Evaluation, out: Path) -> Evaluation:
    """`scores.csv`, one line for each clip and method, and `scores.json`, all of the result."""
    result = replace(result, files=[out / "scores.csv", out / "scores.json", *result.files])
    with write_atomic(result.files[0]) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["case", "method", "frames", *METRICS])
        writer.writeheader()
        writer.writerows(result.clips)
    with write_atomic(result.files[1]) as temporary:
        temporary.write_text(json.dumps(vars(result), default=str, indent=1) + "\n", encoding="utf-8")
    return result


def _plain(value: Any) -> Any:
    """NaN becomes None: JSON has no other word for it."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
