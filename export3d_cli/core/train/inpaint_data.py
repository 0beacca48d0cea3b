"""Training data of the stages `mouth`, `eyes` and `lids`: crops of open mouths, open or shut eyes, and their holes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.config.schema import LidsConfig
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.motion import mirror_camera, mirror_landmarks
from export3d_cli.core.model.inpaint.eyelids import eyelid_hole
from export3d_cli.core.model.inpaint.eyes import CroppedHole, eye_hole, eye_opening, iris_colour
from export3d_cli.core.model.inpaint.inpainter import Hole
from export3d_cli.core.model.inpaint.mouth import mouth_hole, mouth_opening
from export3d_cli.core.model.warp.mouth_eye_interior import MAX_OPENING_RATIO
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.train.pair_sampler import PairSampler, apply_color_lut, make_color_lut

PARTIAL_OPENING_RATIO = (1.3, 4.0)  # range of opening ratios that stand for a photo with slightly parted lips
MIN_OPEN_EYE = 0.25  # opening, in eye widths, from which an eye counts as open
VISIBLE_IRIS_HEIGHT = (0.3, 1.0)  # range of the iris's visible height that the colour is measured on


InpaintBatch = tuple[Tensor, Hole]  # crops (B, 3, INPAINT_SIZE_PX, INPAINT_SIZE_PX) in [-1, 1], and their holes


class InpaintSampler:
    """Draws crops: first the data set by weight, then the person uniformly, then a frame whose opening is accepted."""

    def __init__(self, sampler: PairSampler, config: Any) -> None:
        self.sampler, self.config = sampler, config
        is_lids = isinstance(config, LidsConfig)
        self.openings = [self.opening(torch.from_numpy(data.landmarks)).numpy() for data in sampler.datasets]
        self.frames: list[list[np.ndarray]] = []  # per data set and person: indices of the accepted frames
        for opening, people in zip(self.openings, sampler.clips_by_person, strict=True):
            accepted = opening < config.max_opening if is_lids else opening > config.min_opening
            spans = [
                np.concatenate([np.arange(c.start, c.start + c.count) for c in clips]) for clips in people.values()
            ]
            self.frames.append([rows[accepted[rows]] for rows in spans if accepted[rows].any()])
        weights = np.array(config.weight) if config.weight else sampler.dataset_weights
        weights = weights * [bool(rows) for rows in self.frames]
        if weights.sum() <= 0:
            stage = next(name for name, kind in INPAINT_SAMPLERS.items() if type(self) is kind)
            change = "shut enough: raise" if is_lids else "open enough: lower"
            raise TrainingError(f"no frame of the data sets is {change} {stage}.{'max' if is_lids else 'min'}_opening")
        self.dataset_weights = weights / weights.sum()

    def opening(self, points: Tensor) -> Tensor:
        """Return the opening of frames with landmarks (N, 478, 3), (N,), that `min_opening` or `max_opening` limits."""
        return eye_opening(points, 0)

    def reference_frames(self, rng: np.random.Generator, dataset: int, row: int) -> list[int]:
        """Return other frames of the data set that serve as the photo for frame `row`."""
        return []

    def make_hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> CroppedHole:
        """Return the holes in the first of each K images (B, K, 3, H, W); the others are its reference frames.

        `points` (B, K, 478, 3) are their landmarks in the head frame, `uv` (B, K, 478, 2) in the images.
        """
        raise NotImplementedError

    def draw_batch(self, seed: int, step: int, rank: int, size: int) -> InpaintBatch:
        """Draw the crops of one step: a pure function of (seed, step, rank)."""
        rng = np.random.default_rng([seed, step, 6, rank])
        samples = [self._draw(rng) for _ in range(size)]
        arrays = (np.stack(x).astype(np.float32) for x in zip(*samples, strict=True))
        images, landmarks, points = (torch.from_numpy(array) for array in arrays)
        crop, hole = self.make_hole(rng, images, points, landmarks[..., :2])
        return crop.sample(images[:, 0]), hole

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw images (K, 3, H, W), their landmarks (K, 478, 3), and the same in the head frame."""
        dataset = int(rng.choice(len(self.sampler.datasets), p=self.dataset_weights))
        data, people = self.sampler.datasets[dataset], self.frames[dataset]
        row = int(rng.choice(people[int(rng.integers(len(people)))]))
        flip = self.sampler.config.flip and rng.random() < 0.5
        lut = make_color_lut(rng, self.config.jitter)
        rows = [row, *self.reference_frames(rng, dataset, row)]
        images, landmarks, cameras = np.stack([data.frames[r] for r in rows]), data.landmarks[rows], data.camera[rows]
        if flip:
            images, cameras, landmarks = images[:, :, ::-1], mirror_camera(cameras), mirror_landmarks(landmarks)
        return apply_color_lut(images, lut), landmarks, landmarks_to_head_frame(landmarks, cameras)


class MouthSampler(InpaintSampler):
    """Open mouths."""

    def opening(self, points: Tensor) -> Tensor:
        """See `InpaintSampler.opening`."""
        return mouth_opening(points)

    def make_hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> CroppedHole:
        """Return the whole inside, or the part that a photo with slightly parted lips would not show."""
        points, uv = points[:, 0], uv[:, 0]
        is_partial = rng.random(len(uv)) < self.config.partial_hole_ratio
        ratio = np.where(is_partial, rng.uniform(*PARTIAL_OPENING_RATIO, len(uv)), MAX_OPENING_RATIO)
        ratios = torch.from_numpy(ratio.astype(np.float32))[:, None, None].expand(*uv.shape[:2], 1)
        return mouth_hole(points, uv, ratios)


class EyeSampler(InpaintSampler):
    """Open right eyes of the person, or left ones of mirrored images."""

    def make_hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> CroppedHole:
        """Return the whole inside, with the iris colour measured as in a narrow eye, or none for some of them."""
        images, points, uv = images[:, 0], points[:, 0], uv[:, 0]
        visible_height = rng.uniform(*VISIBLE_IRIS_HEIGHT, len(uv)).astype(np.float32)
        is_visible = rng.random(len(uv)) >= self.config.hidden_iris_ratio
        colour, confidence = iris_colour(images, uv, 0, torch.from_numpy(visible_height))
        return eye_hole(points, uv, 0, colour, confidence * torch.from_numpy(is_visible))


class EyelidSampler(InpaintSampler):
    """Shut right eyes of the person, or left ones of mirrored images."""

    def reference_frames(self, rng: np.random.Generator, dataset: int, row: int) -> list[int]:
        """Return a frame of the same clip with the eye open, as the photo; `row` itself if there is none."""
        clip = next(c for c in self.sampler.datasets[dataset].clips if c.start <= row < c.start + c.count)
        is_open = self.openings[dataset][clip.start : clip.start + clip.count] > MIN_OPEN_EYE
        rows = clip.start + is_open.nonzero()[0]
        return [int(rng.choice(rows)) if len(rows) else row]

    def make_hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> CroppedHole:
        """Return the whole eyelid."""
        visibility = (eye_opening(points[:, 1], 0) > MIN_OPEN_EYE).float()
        return eyelid_hole(uv[:, 0], 0, images[:, 1], uv[:, 1], visibility)


INPAINT_SAMPLERS = {"mouth": MouthSampler, "eyes": EyeSampler, "lids": EyelidSampler}
