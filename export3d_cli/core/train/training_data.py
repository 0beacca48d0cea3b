"""Training data: datasets, decoded once into a memory-mapped cache, and the pairs and groups of frames drawn from them.

Every draw is a pure function of (seed, step), so that a resumed run sees the same data as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import zipfile
from collections import abc, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from export3d_cli.core.config.schema import BETA_DIM, CAMERA_DIM, DataConfig
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.landmarks import LEFT_EYE_OUTER, NUM_LANDMARKS, RIGHT_EYE_OUTER
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.face.motion import Motion, mirror_beta, mirror_camera, mirror_landmarks
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.model.planedict import FACE_MARGIN, FACE_SIZE_PX
from export3d_cli.core.runtime.errors import InputError, TrainingError
from export3d_cli.core.runtime.files import check_file, driver_track_id, folder_lock, read_manifest, write_folder
from export3d_cli.core.runtime.weights import resolve_weights

MASK_SIZE = 64  # side of the cached person masks and depths
MAX_DEPTH_BYTES = 2**28  # of a file of depths
MAPPED_ARRAYS = ("frames", "person", "depth")  # too large for memory
HARD_PAIR_CANDIDATES = 8  # candidate drivers; the most different one is chosen
FACE_JITTER, FACE_WARP, FACE_SHIFT = 0.4, 0.05, 0.03  # random changes of a driver's face: colours, axes, place
WIDE_VIEW_CLIPS, WIDE_VIEW_FRAMES = 4, 16  # clips, and frames of each, searched for a pair of different views


@dataclass(frozen=True)
class Clip:
    """Rows `start` to `start + count` of a dataset's arrays."""

    id: str
    person: str
    start: int
    count: int
    still: bool


@dataclass(frozen=True)
class FaceDataset:
    """One dataset in memory, with memory-mapped images."""

    frames: np.ndarray  # (F, size, size, 3) uint8
    beta: np.ndarray  # (F, 64)
    camera: np.ndarray  # (F, 25)
    landmarks: np.ndarray  # (F, 478, 3) crop units
    person_mask: np.ndarray  # (F, MASK_SIZE, MASK_SIZE) uint8, the person's coverage of each cell
    depth: np.ndarray  # (F, MASK_SIZE, MASK_SIZE) float16, see `exact_views.crop_depth`; all 0 where it is not known
    frame_index: np.ndarray  # (F,) index of the frame in its clip's video
    clips: tuple[Clip, ...]


def load_datasets(config: DataConfig, size: int, *, progress: Callable[[str], None] | None = None) -> list[FaceDataset]:
    """Open all datasets of `config`; builds missing caches of images of side `size`."""
    if not config.path:
        raise InputError("data.path is empty: name at least one dataset folder written by `export3d preprocess`")
    return [load_dataset(Path(p), size, config.cache_stride, config.cache, progress=progress) for p in config.path]


def load_dataset(folder: Path, size: int, stride: int = 1, cache: str = "", *,
                 progress: Callable[[str], None] | None = None) -> FaceDataset:  # fmt: skip
    """Open one dataset folder; decodes it into its cache first if that is missing or stale."""
    entries = [row for row in read_manifest(folder) if row.get("split", "train") in ("train", "", None)]
    if not entries:
        raise InputError(f"{folder / 'manifest.jsonl'} lists no clip of the split 'train'")
    name = f"cache-{size}" + (f"-every{stride}" if stride > 1 else "")
    cache_folder = folder / name
    if cache:  # datasets may share a folder name, not a path
        path_hash = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        cache_folder = Path(cache) / f"{folder.name}-{path_hash}-{name}"
    stamp = hashlib.sha256(json.dumps([entries, size, stride, [*_shapes(size)]], sort_keys=True).encode()).hexdigest()
    if _read_stamp(cache_folder) != stamp:
        with folder_lock(cache_folder.parent, wait=True):
            if _read_stamp(cache_folder) != stamp:  # no other process has built it meanwhile
                shutil.rmtree(cache_folder, ignore_errors=True)
                with write_folder(cache_folder) as temporary:
                    _build_cache(folder, entries, temporary, size, stride, stamp, progress)
    try:
        index = json.loads((cache_folder / "index.json").read_text(encoding="utf-8"))
        arrays = {name: _load_array(cache_folder, name, index["count"], row) for name, row in _shapes(size).items()}
        clips = tuple(Clip(**clip) for clip in index["clips"])
        for clip in clips:
            if not (0 <= clip.start < clip.start + clip.count <= index["count"]):
                raise ValueError(f"clip {clip.id!s:.60} lies outside the frames")
        return FaceDataset(person_mask=arrays.pop("person"), frame_index=arrays.pop("number"), clips=clips, **arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(f"the cache {cache_folder} is damaged ({error}): remove it, it will be built again") from error


def _shapes(size: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return the shape of a row and the data type of each array of a cache of images of side `size`."""
    return {
        "frames": ((size, size, 3), np.uint8), "beta": ((BETA_DIM,), np.float32), "camera": ((CAMERA_DIM,), np.float32),
        "landmarks": ((NUM_LANDMARKS, 3), np.float32), "person": ((MASK_SIZE, MASK_SIZE), np.uint8),
        "number": ((), np.int32), "depth": ((MASK_SIZE, MASK_SIZE), np.float16),
    }  # fmt: skip


def _load_array(folder: Path, name: str, count: int, expected: tuple[tuple[int, ...], type]) -> np.ndarray:
    """Load an array of a cache; raise `ValueError` unless it is as expected, since a dataset may come from anyone."""
    array = np.load(folder / f"{name}.npy", mmap_mode="r" if name in MAPPED_ARRAYS else None)[:count]
    shape, dtype = expected
    if array.shape != (count, *shape) or array.dtype != dtype:
        raise ValueError(f"{name} are {array.dtype} {array.shape}, not {np.dtype(dtype)} {(count, *shape)}")
    if dtype is np.float32 and not np.isfinite(array).all():
        raise ValueError(f"{name} are not finite")
    return array


def _read_stamp(cache_folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((cache_folder / "index.json").read_text(encoding="utf-8"))["stamp"])
    return ""


def _build_cache(folder: Path, entries: list[dict[str, Any]], cache_folder: Path, size: int, stride: int, stamp: str,
                 progress: Callable[[str], None] | None) -> None:  # fmt: skip
    """Decode the frames with a face of all clips."""
    motions = [Motion.load(folder / e["motion"]) for e in entries]
    capacity = max(sum(int(np.asarray(m.found)[::stride].sum()) for m in motions), 1)
    arrays = {
        name: np.lib.format.open_memmap(cache_folder / f"{name}.npy", "w+", dtype=dtype, shape=(capacity, *shape))
        for name, (shape, dtype) in _shapes(size).items()
    }
    matting = PersonMatting(resolve_weights("selfie_segmentation"))
    clips: list[Clip] = []
    row = 0
    for i, (entry, motion) in enumerate(zip(entries, motions, strict=True), start=1):
        still = Path(entry["file"]).suffix.lower() != ".mp4"
        usable = np.asarray(motion.found, bool) & np.isfinite(motion.landmarks).all((1, 2))
        numbers: list[int] = []
        for number, image in _decode_frames(folder / entry["file"], still, stride):
            if number < len(usable) and usable[number]:
                arrays["frames"][row + len(numbers)] = resize_square(image, size)
                numbers.append(number)
        if not numbers:
            continue
        rows = slice(row, row + len(numbers))
        arrays["number"][rows] = numbers
        for name in ("beta", "camera", "landmarks"):
            arrays[name][rows] = np.asarray(getattr(motion, name))[numbers]
        if entry.get("depth"):
            arrays["depth"][rows], arrays["person"][rows] = _read_depth(folder / entry["depth"], numbers)
        else:
            alphas = (matting.alpha(image, hair_strands=True) for image in arrays["frames"][rows])
            masks = [cv2.resize(alpha, (MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_AREA) for alpha in alphas]
            arrays["person"][rows] = np.rint(255 * np.stack(masks))
        clips.append(Clip(entry["id"], str(entry.get("person") or entry["id"]), row, len(numbers), still))
        row += len(numbers)
        if progress is not None and (i % 20 == 0 or i == len(entries)):
            progress(f"{folder.name}: {i} of {len(entries)} clips decoded, {row} frames")
    if not clips:
        raise InputError(f"dataset {folder} has no frame with a detected face")
    for array in arrays.values():
        array.flush()
    index = {"stamp": stamp, "count": row, "clips": [vars(clip) for clip in clips]}
    (cache_folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _read_depth(path: Path, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return `FaceDataset.depth` and `person_mask` of some frames of a clip with exact views."""
    try:
        check_file(path, MAX_DEPTH_BYTES)
        with np.load(path) as file:
            pictures = (file[key][numbers].astype(np.float32) for key in ("depth", "person"))
            resize = partial(cv2.resize, dsize=(MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_NEAREST)
            depth, person = (np.stack([*map(resize, array)]) for array in pictures)
    except (OSError, KeyError, ValueError, IndexError, cv2.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}): run `export3d preprocess` again") from error
    return np.nan_to_num(depth).astype(np.float16), person.astype(np.uint8)


def _decode_frames(path: Path, still: bool, stride: int) -> Iterator[tuple[int, np.ndarray]]:
    if still:
        yield 0, read_image(path)
        return
    with VideoReader(path) as reader:
        for number, image in enumerate(reader):
            if number % stride == 0:
                yield number, image


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize a square image (., ., 3) to (size, size, 3), uint8."""
    if image.shape[:2] == (size, size):
        return image
    shrinks = image.shape[0] > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


class Batch(NamedTuple):
    """Pairs of frames, each pair from one clip; all float32, images in [-1, 1]."""

    source: Tensor  # (B, 3, H, W)
    source_beta: Tensor  # (B, 64)
    source_camera: Tensor  # (B, 25)
    source_points: Tensor  # (B, 478, 3) head frame
    source_person_mask: Tensor  # (B, 1, m, m) in 0..1, the person's coverage of each cell
    target: Tensor  # (B, 3, H, W)
    target_beta: Tensor  # (B, 64)
    target_camera: Tensor  # (B, 25)
    target_landmarks: Tensor  # (B, 478, 2) crop units
    target_points: Tensor  # (B, 478, 3) head frame
    target_person_mask: Tensor  # (B, 1, m, m)
    target_depth: Tensor  # (B, 1, m, m) of the head's surface along the camera's axis; 0 elsewhere or if not known
    driver: Tensor  # (B, 3, 64, 64) face that shows the target's motion, recoloured and warped, see `PlaneDict`
    target_own_beta: Tensor  # (B, 64) of the target, where `target_beta` is another head's

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`."""
        return Batch(*(x.to(device, non_blocking=True) for x in self))

    def split(self, rows: int) -> list[Batch]:
        """Split the batch into parts of `rows` pairs."""
        return [Batch(*parts) for parts in zip(*(x.split(rows) for x in self), strict=True)]


class PairSampler:
    """Draws a dataset by weight, then a person, then a clip, so that no person dominates the training."""

    def __init__(self, datasets: list[FaceDataset], config: DataConfig) -> None:
        self.datasets, self.config = datasets, config
        weight = np.array(config.weight or [1.0] * len(datasets), np.float64)
        self.dataset_weights = weight / weight.sum()
        self.clips_by_person = [_group_by_person(s) for s in datasets]
        self.video_clips_by_person = [_group_by_person(s, min_frames=2) for s in datasets]
        self.clips_by_track = [_group_by_track(s) for s in datasets]
        betas = np.concatenate([s.beta[:: max(len(s.beta) // 5000, 1)] for s in datasets])
        self.beta_scale = np.maximum(betas.std(0), 0.02)

    def draw_pairs(self, seed: int, step: int, size: int, rows: range | None = None) -> Batch:
        """Return the pairs of one training step, or only its `rows`."""
        rng = np.random.default_rng([seed, step, 1])
        rows = range(size) if rows is None else rows
        pairs = [
            self._draw_pair(rng, np.random.default_rng([seed, step, 9, row]), is_needed=row in rows)
            for row in range(rows.stop)
        ]
        return Batch(*(_to_tensor(np.stack(rows)) for rows in zip(*filter(None, pairs), strict=True)))

    def draw_clip_group(self, seed: int, step: int, size: int, image_size: int, min_frames: int = 8,
                        group_index: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return `min_frames` to `size` frames of a clip for eq. 1: images (N, 3, s, s) and beta (N, 64)."""
        rng = np.random.default_rng([seed, step, 2] + [group_index] * (group_index > 0))
        for _ in range(1000):
            data, clip = self._draw_clip(rng, self.video_clips_by_person)
            if clip.count < min_frames:
                continue
            rows = clip.start + np.sort(rng.permutation(clip.count)[:size])
            flip = self.config.flip and rng.random() < 0.5
            beta = mirror_beta(data.beta[rows]) if flip else data.beta[rows]
            frames = np.stack([resize_square(data.frames[r], image_size) for r in rows])
            frames = frames[:, :, ::-1] if flip else frames
            return torch.from_numpy(apply_color_lut(frames, make_color_lut(rng, self.config.jitter))), _to_tensor(beta)
        raise TrainingError(f"no clip with {min_frames} frames or more: contrastive training needs longer clips")

    def draw_landmark_pairs(self, seed: int, step: int, size: int) -> tuple[Tensor, ...]:
        """Return pairs of frames without images: `(beta_k, beta_j, points_k, points_j, camera_j)`.

        beta (N, 64) and points (N, 478, 3) in the head frame are of both frames, the camera (N, 25) of one.
        """
        rng = np.random.default_rng([seed, step, 3])
        pairs = []
        for _ in range(size):
            data, clip = self._draw_clip(rng, self.video_clips_by_person)
            k = clip.start + int(rng.integers(clip.count))
            rows = [k, self._draw_driver(rng, data, clip, k)]
            beta, camera, marks = data.beta[rows], data.camera[rows], data.landmarks[rows]
            if self.config.flip and rng.random() < 0.5:
                beta, camera, marks = mirror_beta(beta), mirror_camera(camera), mirror_landmarks(marks)
            pairs.append((*beta, *marks, *camera))
        beta_k, beta_j, marks_k, marks_j, camera_k, camera_j = map(np.stack, zip(*pairs, strict=True))
        points = (landmarks_to_head_frame(marks_k, camera_k), landmarks_to_head_frame(marks_j, camera_j))
        return tuple(map(_to_tensor, (beta_k, beta_j, *points, camera_j)))

    def draw_person_betas(self, seed: int, step: int, count: int, frames: int) -> Tensor:
        """Return the expressions of random frames of people with video, beta (count, frames, 64)."""
        rng = np.random.default_rng([seed, step, 5])
        rows = []
        for _ in range(count):
            data, clips = self._draw_person(rng, self.video_clips_by_person)
            all_rows = np.concatenate([np.arange(c.start, c.start + c.count) for c in clips])
            rows.append(data.beta[rng.choice(all_rows, frames)])
        return _to_tensor(np.stack(rows))

    def _draw_clip(self, rng: Generator, people: list[dict[str, list[Clip]]]) -> tuple[FaceDataset, Clip]:
        data, clips = self._draw_person(rng, people)
        return data, clips[int(rng.integers(len(clips)))]

    def _draw_person(self, rng: Generator, people: list[dict[str, list[Clip]]]) -> tuple[FaceDataset, list[Clip]]:
        """Return the clips of a random person; still images are drawn at the rate `still_image_ratio`."""
        usable = np.array([bool(p) for p in people])
        if not usable.any():
            raise TrainingError("the datasets hold no clip of two frames or more")
        weight = self.dataset_weights * usable
        d = int(rng.choice(len(self.datasets), p=weight / weight.sum()))
        names = list(people[d])
        for _ in range(1000):
            clips = people[d][names[int(rng.integers(len(names)))]]
            has_only_stills = all(c.still for c in clips)
            if not has_only_stills or rng.random() < self.config.still_image_ratio:
                break
        videos = [c for c in clips if not c.still]
        if videos and len(videos) < len(clips) and rng.random() >= self.config.still_image_ratio:
            clips = videos
        return self.datasets[d], clips

    def _draw_driver(self, rng: Generator, data: FaceDataset, clip: Clip, source: int) -> int:
        """Return another row of the clip: any, or the most different in pose and expression of a few."""
        if clip.count < 2:
            return source
        candidates = clip.start + rng.integers(clip.count - 1, size=HARD_PAIR_CANDIDATES)
        candidates = candidates + (candidates >= source)
        if rng.random() >= self.config.hard_pair_ratio:
            return int(candidates[0])
        return int(candidates[np.argmax(self.pose_expression_distance(data, source, candidates))])

    def pose_expression_distance(self, data: FaceDataset, row: int, others: np.ndarray) -> np.ndarray:
        """Return the distance of `others` from `row`: 1 is 10 degrees, or one deviation of every coefficient."""
        rotation = data.camera[np.append(others, row), :16].reshape(-1, 4, 4)[:, :3, :3]
        cos = (np.einsum("nij,ij->n", rotation[:-1], rotation[-1]) - 1) / 2
        angle = np.degrees(np.arccos(np.clip(cos, -1, 1)))
        beta = (data.beta[others] - data.beta[row]) / self.beta_scale
        return angle / 10 + np.sqrt((beta**2).mean(1))

    def _draw_pair(self, rng: Generator, face_rng: Generator, *, is_needed: bool = True) -> tuple[np.ndarray, ...]:
        """Draw a row of a `Batch`; if it is not needed, only advance `rng`, so that later pairs do not change.

        The driver's face is changed by `face_rng`.
        """
        if self.config.wide_view_ratio > 0 and rng.random() < self.config.wide_view_ratio:
            data, source, target = self._draw_wide_view_pair(rng)
        else:
            data, clip = self._draw_clip(rng, self.clips_by_person)
            source = clip.start + int(rng.integers(clip.count))
            target = self._draw_driver(rng, data, clip, source)
        driver = target
        if self.config.cross_identity_ratio > 0 and rng.random() < self.config.cross_identity_ratio:
            crossed = self._draw_cross_identity_pair(rng)
            if crossed is not None:
                data, source, target, driver = crossed
        rows = np.array([source, target])
        marks, cameras, betas = data.landmarks[rows], data.camera[rows], data.beta[[source, driver, target]]
        flip = self.config.flip and rng.random() < 0.5
        lut = make_color_lut(rng, self.config.jitter)
        if not is_needed:
            return ()
        if flip:
            marks, cameras, betas = mirror_landmarks(marks), mirror_camera(cameras), mirror_beta(betas)
        frames, person_mask = np.stack([data.frames[source], data.frames[target]]), data.person_mask[rows][:, None]
        depth = data.depth[target][None]
        if flip:
            frames, person_mask, depth = frames[:, :, ::-1], person_mask[..., ::-1], depth[..., ::-1]
        face = cut_driver_face(data.frames[driver], data.landmarks[driver], face_rng, flip=flip)
        face = apply_color_lut(face[None], make_color_lut(face_rng, FACE_JITTER))[0]
        images, points = apply_color_lut(frames, lut), landmarks_to_head_frame(marks, cameras)
        person_mask = person_mask / np.float32(255)
        source_row = (images[0], betas[0], cameras[0], points[0], person_mask[0])
        target_row = (images[1], betas[1], cameras[1], marks[1, :, :2], points[1], person_mask[1], depth)
        return *source_row, *target_row, face, betas[2]

    def _draw_wide_view_pair(self, rng: Generator) -> tuple[FaceDataset, int, int]:
        """Return the two most different views of one clip among a few frames of a few clips: wide views are rare."""
        data, clip = self._draw_clip(rng, self.video_clips_by_person)
        people = zip(self.datasets, self.video_clips_by_person, strict=True)
        same = [clips if other is data else {} for other, clips in people]
        clips = [clip, *(self._draw_clip(rng, same)[1] for _ in range(WIDE_VIEW_CLIPS - 1))]
        smallest_cos, pair = 2.0, (0, 0)
        for clip in clips:
            rows = clip.start + rng.permutation(clip.count)[:WIDE_VIEW_FRAMES]  # random order: either may be the source
            axes = data.camera[rows][:, 2:11:4]  # viewing direction, head frame
            cos = axes @ axes.T
            np.fill_diagonal(cos, 2.0)  # no frame with itself
            k, j = np.unravel_index(cos.argmin(), cos.shape)
            if cos[k, j] < smallest_cos:
                smallest_cos, pair = float(cos[k, j]), (int(rows[k]), int(rows[j]))
        return data, *pair

    def _draw_cross_identity_pair(self, rng: Generator) -> tuple[FaceDataset, int, int, int] | None:
        """Return data, source row, target row and the row of another head on the target's motion track.

        The camera is the target's, since every head has its own crop. None if no such pair is found.
        """
        weight = self.dataset_weights * np.array([bool(s) for s in self.clips_by_track])
        if weight.sum() <= 0:
            return None
        d = int(rng.choice(len(self.datasets), p=weight / weight.sum()))
        data, tracks = self.datasets[d], self.clips_by_track[d]
        clips = tracks[list(tracks)[int(rng.integers(len(tracks)))]]
        first, second = rng.choice(len(clips), 2, replace=False)
        target_clip, driver_clip = clips[int(first)], clips[int(second)]
        person_clips = self.clips_by_person[d][target_clip.person]
        source_clip = person_clips[int(rng.integers(len(person_clips)))]
        target_frames = data.frame_index[target_clip.start : target_clip.start + target_clip.count]
        driver_frames = data.frame_index[driver_clip.start : driver_clip.start + driver_clip.count]
        common, target_rows, driver_rows = np.intersect1d(target_frames, driver_frames, return_indices=True)
        if len(common) == 0:
            return None
        index = int(rng.integers(len(common)))
        source = source_clip.start + int(rng.integers(source_clip.count))
        driver = driver_clip.start + int(driver_rows[index])
        return data, source, target_clip.start + int(target_rows[index]), driver


def prefetch(make: Callable[[int], Any], steps: range, workers: int = 1) -> abc.Generator[Any, None, None]:
    """Yield `make(step)` for every step, computed in threads, a few results ahead."""
    pool, pending = ThreadPoolExecutor(workers, thread_name_prefix="loader"), deque[Future[Any]]()
    try:
        for step in steps:
            pending.append(pool.submit(make, step))
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _group_by_person(data: FaceDataset, min_frames: int = 1) -> dict[str, list[Clip]]:
    people: dict[str, list[Clip]] = {}
    for clip in data.clips:
        if clip.count >= min_frames and not (clip.still and min_frames > 1):
            people.setdefault(clip.person, []).append(clip)
    return people


def _group_by_track(data: FaceDataset) -> dict[str, list[Clip]]:
    tracks: dict[str, list[Clip]] = {}
    for clip in data.clips:
        if track := driver_track_id(clip.id):
            tracks.setdefault(track, []).append(clip)
    return {track: clips for track, clips in tracks.items() if len({c.person for c in clips}) == len(clips) > 1}


def cut_driver_face(frame: np.ndarray, landmarks: np.ndarray, rng: Generator, *, flip: bool) -> np.ndarray:
    """Cut a face out as `planedict.cut_faces`, but warped at random, so that its shape tells little: (64, 64, 3)."""
    points = landmarks[:, :2] * frame.shape[0]
    right = points[LEFT_EYE_OUTER] - points[RIGHT_EYE_OUTER]
    right = right / np.linalg.norm(right)
    low, high = points.min(0), points.max(0)
    axes = np.stack([right, (-right[1], right[0])], axis=1)  # columns: right and down in the image
    change = np.eye(2) + rng.normal(0, FACE_WARP, (2, 2))
    matrix = axes @ change * (FACE_MARGIN * (high - low).max() / FACE_SIZE_PX) @ np.diag([-1.0 if flip else 1.0, 1.0])
    centre = (low + high) / 2 + rng.normal(0, FACE_SHIFT, 2) * (high - low).max() - 0.5
    offset = centre - matrix @ np.full(2, (FACE_SIZE_PX - 1) / 2)
    return cv2.warpAffine(frame, np.c_[matrix, offset], (FACE_SIZE_PX,) * 2,
                          flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)  # fmt: skip


def make_color_lut(rng: Generator, jitter: float) -> np.ndarray:
    """Return a random lookup table (256, 3), uint8 -> [-1, 1]: gamma, brightness and a gain per channel."""
    x = np.linspace(0, 1, 256, dtype=np.float32)[:, None].repeat(3, 1)
    if jitter > 0:
        gamma, gain = np.exp(rng.uniform(-jitter, jitter)), np.exp(rng.uniform(-jitter, jitter, 3) / 2)
        x = np.clip(x**gamma * gain + rng.uniform(-jitter, jitter) / 4, 0, 1)
    return (x * 2 - 1).astype(np.float32)


def apply_color_lut(frames: np.ndarray, lut: np.ndarray) -> np.ndarray:
    """Map uint8 (N, H, W, 3) through a lookup table to float32 (N, 3, H, W)."""
    out = np.empty((len(frames), 3, *frames.shape[1:3]), np.float32)
    for frame, planes in zip(frames, out, strict=True):
        for c in range(3):  # six times as fast as indexing the table
            planes[c] = cv2.LUT(np.ascontiguousarray(frame[..., c]), np.ascontiguousarray(lut[:, c]))
    return out


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
