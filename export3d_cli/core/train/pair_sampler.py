"""Training data: the pairs and groups of frames drawn from data sets.

Every draw is a pure function of (seed, step), so that a resumed run sees what the unbroken run would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from export3d_cli.core.config.schema import DataConfig
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.motion import mirror_beta, mirror_camera, mirror_landmarks
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.train.frame_cache import Clip, FaceDataset, resize_square

HARD_PAIR_CANDIDATES = 8  # drivers looked at when one is picked for being different
WIDE_VIEW_CLIPS, WIDE_VIEW_FRAMES = (
    4,
    16,
)  # clips of one data set, and frames of each, among which a pair far apart in view is looked for


@dataclass(frozen=True)
class Batch:
    """Pairs of frames of one clip each: images (B, 3, H, W) float32 in [-1, 1], numbers float32."""

    source: Tensor  # (B, 3, H, W)
    source_beta: Tensor  # (B, 64)
    source_camera: Tensor  # (B, 25)
    source_points: Tensor  # (B, 478, 3) head frame
    source_person_mask: Tensor  # (B, 1, m, m) in 0..1, how much of each cell is the person's
    target: Tensor  # (B, 3, H, W)
    target_beta: Tensor  # (B, 64)
    target_camera: Tensor  # (B, 25)
    target_landmarks: Tensor  # (B, 478, 2) crop units
    target_points: Tensor  # (B, 478, 3) head frame
    target_person_mask: Tensor  # (B, 1, m, m)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def split(self, rows: int) -> list[Batch]:
        """The batch in parts of `rows` pairs."""
        if rows == len(self.source):
            return [self]
        parts = zip(*(getattr(self, f.name).split(rows) for f in fields(self)), strict=True)
        return [Batch(*tensors) for tensors in parts]


class PairSampler:
    """Draws pairs and groups: data set by weight, then person, then clip, so that nobody fills the training."""

    def __init__(self, datasets: list[FaceDataset], config: DataConfig, mirror: np.ndarray) -> None:
        self.datasets, self.config, self.mirror = datasets, config, mirror  # mirror: `CanonicalFace.mirror`, (478,)
        weight = np.array(config.weight or [1.0] * len(datasets), np.float64)
        self.dataset_weights = weight / weight.sum()
        self.clips_by_person = [_group_by_person(s) for s in datasets]
        self.video_clips_by_person = [_group_by_person(s, min_frames=2) for s in datasets]
        self.clips_by_track = [_group_by_track(s) for s in datasets]
        seen = np.concatenate([s.beta[:: max(len(s.beta) // 5000, 1)] for s in datasets])
        self.beta_scale = np.maximum(seen.std(0), 0.02)

    def draw_pairs(self, seed: int, step: int, size: int, rows: range | None = None) -> Batch:
        """The pairs of one training step, or those `rows` of them that a process needs."""
        rng = np.random.default_rng([seed, step, 1])
        wanted = range(size) if rows is None else rows
        pairs = [self._draw_pair(rng, is_needed=row in wanted) for row in range(wanted.stop)]
        return _collate([pair for pair in pairs if pair])

    def draw_clip_group(
        self, seed: int, step: int, size: int, image_size: int, min_frames: int = 8, group_index: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Frames of one clip for eq. 1: images (N, 3, side, side) and beta (N, 64), least <= N <= size.

        `number` tells the groups of one step apart.
        """
        rng = np.random.default_rng([seed, step, 2] + [group_index] * (group_index > 0))
        for _ in range(1000):
            data, clip = self._draw_clip(rng, self.video_clips_by_person)
            if clip.count < min_frames:
                continue
            rows = clip.start + np.sort(rng.permutation(clip.count)[:size])
            flip = self.config.flip and rng.random() < 0.5
            beta = mirror_beta(data.beta[rows]) if flip else data.beta[rows]
            pictures = np.stack([resize_square(data.frames[r], image_size) for r in rows])
            pictures = pictures[:, :, ::-1] if flip else pictures
            table = make_color_lut(rng, self.config.jitter)
            return torch.from_numpy(apply_color_lut(pictures, table)), _to_tensor(beta)
        raise TrainingError(f"no clip with {min_frames} frames or more: contrastive training needs longer clips")

    def draw_landmark_pairs(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Pairs of frames without pictures: beta (N, 64), head-frame points (N, 478, 3) of both, camera of the second.

        Returns `(beta_k, beta_j, points_k, points_j, camera_j)`.
        """
        rng = np.random.default_rng([seed, step, 3])
        parts: list[list[np.ndarray]] = [[], [], [], [], []]
        for _ in range(size):
            data, clip = self._draw_clip(rng, self.video_clips_by_person)
            k = clip.start + int(rng.integers(clip.count))
            j = self._draw_driver(rng, data, clip, k)
            beta, camera = data.beta[[k, j]], data.camera[[k, j]]
            marks = data.landmarks[[k, j]]
            if self.config.flip and rng.random() < 0.5:
                beta, camera, marks = mirror_beta(beta), mirror_camera(camera), mirror_landmarks(marks, self.mirror)
            for part, value in zip(parts, (beta[0], beta[1], marks[0], marks[1], camera), strict=True):
                part.append(value)
        beta_k, beta_j, marks_k, marks_j, cameras = (np.stack(p) for p in parts)
        points_k, points_j = (
            landmarks_to_head_frame(marks_k, cameras[:, 0]),
            landmarks_to_head_frame(marks_j, cameras[:, 1]),
        )
        return (
            _to_tensor(beta_k),
            _to_tensor(beta_j),
            _to_tensor(points_k),
            _to_tensor(points_j),
            _to_tensor(cameras[:, 1]),
        )

    def draw_person_betas(self, seed: int, step: int, count: int, frames: int) -> Tensor:
        """Expressions of people who were filmed, beta (count, frames, 64), any of their frames each."""
        rng = np.random.default_rng([seed, step, 5])
        rows = []
        for _ in range(count):
            data, clips = self._draw_person(rng, self.video_clips_by_person)
            every = np.concatenate([np.arange(c.start, c.start + c.count) for c in clips])
            rows.append(data.beta[rng.choice(every, frames)])
        return _to_tensor(np.stack(rows))

    def _draw_clip(self, rng: Generator, people: list[dict[str, list[Clip]]]) -> tuple[FaceDataset, Clip]:
        data, clips = self._draw_person(rng, people)
        return data, clips[int(rng.integers(len(clips)))]

    def _draw_person(self, rng: Generator, people: list[dict[str, list[Clip]]]) -> tuple[FaceDataset, list[Clip]]:
        """Somebody's clips; stills among them as seldom as `config.stills` says."""
        usable = np.array([bool(p) for p in people])
        if not usable.any():
            raise TrainingError("the data sets hold no clip of two frames or more")
        share = self.dataset_weights * usable
        d = int(rng.choice(len(self.datasets), p=share / share.sum()))
        names = list(people[d])
        for _ in range(1000):
            clips = people[d][names[int(rng.integers(len(names)))]]
            only_stills = all(c.still for c in clips)
            if not only_stills or rng.random() < self.config.still_image_ratio:
                break
        moving = [c for c in clips if not c.still]
        if moving and len(moving) < len(clips) and rng.random() >= self.config.still_image_ratio:
            clips = moving
        return self.datasets[d], clips

    def _draw_driver(self, rng: Generator, data: FaceDataset, clip: Clip, source: int) -> int:
        """Another frame of the clip: any, or the most different of a few in head pose and expression."""
        if clip.count < 2:
            return source
        picks = clip.start + rng.integers(clip.count - 1, size=HARD_PAIR_CANDIDATES)
        picks = picks + (picks >= source)
        if rng.random() >= self.config.hard_pair_ratio:
            return int(picks[0])
        return int(picks[np.argmax(self.pose_expression_distance(data, source, picks))])

    def pose_expression_distance(self, data: FaceDataset, row: int, others: np.ndarray) -> np.ndarray:
        """How far `others` are from `row`: 1 is about 10 degrees of rotation, or one deviation of every coefficient."""
        turn = data.camera[np.append(others, row), :16].reshape(-1, 4, 4)[:, :3, :3]
        cos = (np.einsum("nij,ij->n", turn[:-1], turn[-1]) - 1) / 2
        angle = np.degrees(np.arccos(np.clip(cos, -1, 1)))
        beta = (data.beta[others] - data.beta[row]) / self.beta_scale
        return angle / 10 + np.sqrt((beta**2).mean(1))

    def _draw_pair(self, rng: Generator, *, is_needed: bool = True) -> dict[str, np.ndarray]:
        """One pair; one that is not wanted is drawn all the same, so that those after it stay what they are."""
        if self.config.wide_view_ratio > 0 and rng.random() < self.config.wide_view_ratio:
            data, source, target = self._draw_wide_view_pair(rng)
        else:
            data, clip = self._draw_clip(rng, self.clips_by_person)
            source = clip.start + int(rng.integers(clip.count))
            target = self._draw_driver(rng, data, clip, source)
        beta = data.beta[target]
        if self.config.cross_identity_ratio > 0 and rng.random() < self.config.cross_identity_ratio:
            crossed = self._draw_cross_identity_pair(rng)
            if crossed is not None:
                data, source, target, beta = crossed
        rows = np.array([source, target])
        marks, cameras = data.landmarks[rows], data.camera[rows]
        betas = np.stack([data.beta[source], beta])
        flip = self.config.flip and rng.random() < 0.5
        table = make_color_lut(rng, self.config.jitter)
        if not is_needed:
            return {}
        if flip:
            marks, cameras, betas = mirror_landmarks(marks, self.mirror), mirror_camera(cameras), mirror_beta(betas)
        pictures, person = np.stack([data.frames[source], data.frames[target]]), data.person_mask[rows][:, None]
        if flip:
            pictures, person = pictures[:, :, ::-1], person[..., ::-1]
        images, points = apply_color_lut(pictures, table), landmarks_to_head_frame(marks, cameras)
        person = person / np.float32(255)
        return {
            "source": images[0], "source_beta": betas[0], "source_camera": cameras[0],
            "source_points": points[0], "source_person_mask": person[0],
            "target": images[1], "target_beta": betas[1], "target_camera": cameras[1],
            "target_landmarks": marks[1, :, :2], "target_points": points[1], "target_person_mask": person[1],
        }  # fmt: skip

    def _draw_wide_view_pair(self, rng: Generator) -> tuple[FaceDataset, int, int]:
        """Two frames of a clip, the furthest apart in view among a few of a few clips: few who are filmed turn far."""
        data, clip = self._draw_clip(rng, self.video_clips_by_person)
        same = [
            people if s is data else {} for s, people in zip(self.datasets, self.video_clips_by_person, strict=True)
        ]
        clips = [clip, *(self._draw_clip(rng, same)[1] for _ in range(WIDE_VIEW_CLIPS - 1))]
        best, found = 2.0, (0, 0)
        for clip in clips:
            rows = clip.start + rng.permutation(clip.count)[:WIDE_VIEW_FRAMES]  # so either of two frames may come first
            axes = data.camera[rows][:, 2:11:4]  # where the camera looks, head frame
            cos = axes @ axes.T
            np.fill_diagonal(cos, 2.0)  # never a frame with itself
            k, j = np.unravel_index(cos.argmin(), cos.shape)
            if cos[k, j] < best:
                best, found = float(cos[k, j]), (int(rows[k]), int(rows[j]))
        return data, *found

    def _draw_cross_identity_pair(self, rng: Generator) -> tuple[FaceDataset, int, int, np.ndarray] | None:
        """A pair whose expression comes from another head on the same track; the camera is that of the target's own
        crop, since crops are framed head by head."""
        share = self.dataset_weights * np.array([bool(s) for s in self.clips_by_track])
        if share.sum() <= 0:
            return None
        d = int(rng.choice(len(self.datasets), p=share / share.sum()))
        data, tracks = self.datasets[d], self.clips_by_track[d]
        clips = tracks[list(tracks)[int(rng.integers(len(tracks)))]]
        first, second = rng.choice(len(clips), 2, replace=False)
        target_clip, driver_clip = clips[int(first)], clips[int(second)]
        own = self.clips_by_person[d][target_clip.person]
        source_clip = own[int(rng.integers(len(own)))]
        numbers = data.frame_index[target_clip.start : target_clip.start + target_clip.count]
        theirs = data.frame_index[driver_clip.start : driver_clip.start + driver_clip.count]
        both, at, there = np.intersect1d(numbers, theirs, return_indices=True)
        if len(both) == 0:
            return None
        pick = int(rng.integers(len(both)))
        source = source_clip.start + int(rng.integers(source_clip.count))
        return data, source, target_clip.start + int(at[pick]), data.beta[driver_clip.start + int(there[pick])]


class Prefetcher:
    """Runs `make(step)` for start, start + 1, ... in threads, some results ahead; use as a context manager."""

    def __init__(self, make: Callable[[int], Any], start: int, stop: int, workers: int = 1) -> None:
        self._make, self._steps = make, iter(range(start, stop))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self._pending: deque[Future[Any]] = deque()
        for _ in range(workers + 2):
            self._submit_next()

    def _submit_next(self) -> None:
        for step in self._steps:
            self._pending.append(self._pool.submit(self._make, step))
            return

    def next(self) -> Any:
        """The next step's result, or its error raised."""
        result = self._pending.popleft().result()
        self._submit_next()
        return result

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def num_loader_threads(config: DataConfig, device: torch.device) -> int:
    """How many threads draw batches ahead."""
    return config.workers or (1 if device.type == "cpu" else 4)


def _group_by_person(data: FaceDataset, min_frames: int = 1) -> dict[str, list[Clip]]:
    people: dict[str, list[Clip]] = {}
    for clip in data.clips:
        if clip.count >= min_frames and not (clip.still and min_frames > 1):
            people.setdefault(clip.person, []).append(clip)
    return people


def _group_by_track(data: FaceDataset) -> dict[str, list[Clip]]:
    tracks: dict[str, list[Clip]] = {}
    for clip in data.clips:
        if clip.track:
            tracks.setdefault(clip.track, []).append(clip)
    return {track: clips for track, clips in tracks.items() if len({c.person for c in clips}) == len(clips) > 1}


def make_color_lut(rng: Generator, jitter: float) -> np.ndarray:
    """A lookup table (256, 3) from uint8 to [-1, 1]: gamma, gain of every channel and brightness, once per pair."""
    x = np.linspace(0, 1, 256, dtype=np.float32)[:, None].repeat(3, 1)
    if jitter > 0:
        gamma, gain = np.exp(rng.uniform(-jitter, jitter)), np.exp(rng.uniform(-jitter, jitter, 3) / 2)
        x = np.clip(x**gamma * gain + rng.uniform(-jitter, jitter) / 4, 0, 1)
    return (x * 2 - 1).astype(np.float32)


def apply_color_lut(pictures: np.ndarray, table: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) through the table."""
    out = np.empty((len(pictures), 3, *pictures.shape[1:3]), np.float32)
    for picture, planes in zip(pictures, out, strict=True):
        for c in range(3):  # six times as fast as indexing the table, which every pixel of the training passes through
            planes[c] = cv2.LUT(np.ascontiguousarray(picture[..., c]), np.ascontiguousarray(table[:, c]))
    return out


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _collate(pairs: list[dict[str, np.ndarray]]) -> Batch:
    return Batch(**{f.name: _to_tensor(np.stack([p[f.name] for p in pairs])) for f in fields(Batch)})
