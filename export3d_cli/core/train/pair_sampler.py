"""Draws training pairs and groups of frames from datasets.

Every draw is a pure function of (seed, step), so that a resumed run sees the same data as an uninterrupted one.
"""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from export3d_cli.core.config.schema import DataConfig
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.motion import mirror_beta, mirror_camera, mirror_landmarks
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.runtime.files import driver_track_id
from export3d_cli.core.train.frame_cache import Clip, FaceDataset, resize_square

HARD_PAIR_CANDIDATES = 8  # candidate drivers; the most different one is chosen
WIDE_VIEW_CLIPS, WIDE_VIEW_FRAMES = 4, 16  # clips, and frames of each, searched for a pair of different views


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
        pairs = [self._draw_pair(rng, is_needed=row in rows) for row in range(rows.stop)]
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

    def _draw_pair(self, rng: Generator, *, is_needed: bool = True) -> tuple[np.ndarray, ...]:
        """Draw a row of a `Batch`; if it is not needed, only advance `rng`, so that later pairs do not change."""
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
        lut = make_color_lut(rng, self.config.jitter)
        if not is_needed:
            return ()
        if flip:
            marks, cameras, betas = mirror_landmarks(marks), mirror_camera(cameras), mirror_beta(betas)
        frames, person_mask = np.stack([data.frames[source], data.frames[target]]), data.person_mask[rows][:, None]
        depth = data.depth[target][None]
        if flip:
            frames, person_mask, depth = frames[:, :, ::-1], person_mask[..., ::-1], depth[..., ::-1]
        images, points = apply_color_lut(frames, lut), landmarks_to_head_frame(marks, cameras)
        person_mask = person_mask / np.float32(255)
        source_row = (images[0], betas[0], cameras[0], points[0], person_mask[0])
        return *source_row, images[1], betas[1], cameras[1], marks[1, :, :2], points[1], person_mask[1], depth

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

    def _draw_cross_identity_pair(self, rng: Generator) -> tuple[FaceDataset, int, int, np.ndarray] | None:
        """Return data, source row, target row and the beta of another head on the target's motion track.

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
        beta = data.beta[driver_clip.start + int(driver_rows[index])]
        return data, source, target_clip.start + int(target_rows[index]), beta


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
