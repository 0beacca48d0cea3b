"""What the stages `mouth`, `eyes` and `lids` learn from: close-ups of open mouths, open and shut eyes; their holes."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.config.schema import EyesConfig, InpaintConfig, LidsConfig, MouthConfig
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.motion import mirror_camera, mirror_landmarks
from export3d_cli.core.model.inpaint import eyelids as lid_painter
from export3d_cli.core.model.inpaint import eyes as eye_painter
from export3d_cli.core.model.inpaint import mouth as mouth_painter
from export3d_cli.core.model.inpaint.inpainter import CROP_SIZE_PX, AlignedCrop, Hole
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.model.warp.mouth_eye_interior import MAX_OPENING_RATIO
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.train.pair_sampler import PairSampler, apply_color_lut, make_color_lut

PARTIAL_OPENING_RATIO = (1.3, 4.0)  # how much wider than in a photo with lips a little apart
MIN_OPEN_EYE = 0.25  # opening of an eye, in widths of it, from which on it is as open as in most photos
VISIBLE_IRIS_HEIGHT = (0.3, 1.0)  # how much of the height of an iris a photo shows that tells its colour
ConfigT = TypeVar("ConfigT", bound=InpaintConfig)


class InpaintBatch(NamedTuple):
    """Close-ups of mouths or eyes, (B, ., SIDE, SIDE)."""

    crops: Tensor  # (B, 3, ., .) in [-1, 1]
    hole: Hole


class InpaintSampler(Generic[ConfigT]):
    """Draws close-ups: data set by weight, then person, so that nobody fills the training."""

    stage = ""  # of the stage
    requirement = "open as {}.open says: lower it"

    def __init__(self, sampler: PairSampler, config: ConfigT) -> None:
        self.sampler, self.config = sampler, config
        self.frames: list[list[np.ndarray]] = []  # of each data set: of each person the frames that fit
        for data, people in zip(sampler.datasets, sampler.clips_by_person, strict=True):
            fits = self.accepts(torch.from_numpy(data.landmarks)).numpy()
            spans = [np.concatenate([np.arange(c.start, c.start + c.count) for c in own]) for own in people.values()]
            self.frames.append([rows[fits[rows]] for rows in spans if fits[rows].any()])
        weight = np.array(config.weight) if config.weight else sampler.dataset_weights
        weight = weight * [bool(rows) for rows in self.frames]
        if weight.sum() <= 0:
            raise TrainingError("no frame of the data sets is as " + self.requirement.format(self.stage))
        self.set_weights = weight / weight.sum()

    def accepts(self, points: Tensor) -> Tensor:
        """Which frames with landmarks (N, 478, 3) are looked at, (N,)."""
        raise NotImplementedError

    def reference_frames(self, rng: np.random.Generator, d: int, row: int) -> list[int]:
        """Other frames of the data set `d` that tell something of `row`."""
        return []

    def make_hole(
        self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor
    ) -> tuple[AlignedCrop, Hole]:
        """The holes in the first of the K pictures (B, K, 3, H, W): it and those `beside` it.

        Their landmarks are in the head frame (B, K, 478, 3), and where they are seen (B, K, 478, 2).
        """
        raise NotImplementedError

    def draw_batch(self, seed: int, step: int, rank: int, size: int) -> InpaintBatch:
        """The close-ups of one step: a pure function of (seed, step, rank)."""
        rng = np.random.default_rng([seed, step, 6, rank])
        drawn = [self._draw(rng) for _ in range(size)]
        images, marks, points = (torch.from_numpy(np.stack(x).astype(np.float32)) for x in zip(*drawn, strict=True))
        view, hole = self.make_hole(rng, images, points, marks[..., :2])
        return InpaintBatch(warp(images[:, 0], view.pixel_positions(CROP_SIZE_PX)), hole)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures (K, 3, H, W), their landmarks (K, 478, 3), and these in the head frame."""
        s = self.sampler
        d = int(rng.choice(len(s.datasets), p=self.set_weights))
        data, people = s.datasets[d], self.frames[d]
        row = int(rng.choice(people[int(rng.integers(len(people)))]))
        flip = s.config.flip and rng.random() < 0.5
        table = make_color_lut(rng, self.config.jitter)
        rows = [row, *self.reference_frames(rng, d, row)]
        pictures, marks, cameras = np.stack([data.frames[r] for r in rows]), data.landmarks[rows], data.camera[rows]
        if flip:
            pictures, marks, cameras = pictures[:, :, ::-1], mirror_landmarks(marks, s.mirror), mirror_camera(cameras)
        return apply_color_lut(pictures, table), marks, landmarks_to_head_frame(marks, cameras)


class MouthSampler(InpaintSampler[MouthConfig]):
    """Open mouths."""

    stage = "mouth"

    def accepts(self, points: Tensor) -> Tensor:
        """Frames with lips that part."""
        return mouth_painter.mouth_opening(points) > self.config.min_opening

    def make_hole(
        self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor
    ) -> tuple[AlignedCrop, Hole]:
        """All between the lips, or what a photo with lips a little apart would not show."""
        points, uv = points[:, 0], uv[:, 0]
        partly = rng.random(len(uv)) < self.config.partial_hole_ratio
        wider = np.where(partly, rng.uniform(*PARTIAL_OPENING_RATIO, len(uv)), MAX_OPENING_RATIO).astype(np.float32)
        return mouth_painter.mouth_hole(points, uv, torch.from_numpy(wider)[:, None, None].expand(-1, uv.shape[1], 1))


class EyeSampler(InpaintSampler[EyesConfig]):
    """Open eyes: the person's right one, or, of mirrored pictures, the left one."""

    stage = "eyes"

    def accepts(self, points: Tensor) -> Tensor:
        """Frames whose right eye is open; mirrored, they stand for left ones."""
        return eye_painter.eye_opening(points, 0) > self.config.min_opening

    def make_hole(
        self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor
    ) -> tuple[AlignedCrop, Hole]:
        """All between the lids, and the iris' colour, as narrow eyes would tell it."""
        images, points, uv = images[:, 0], points[:, 0], uv[:, 0]
        shown, told = rng.uniform(*VISIBLE_IRIS_HEIGHT, len(uv)), rng.random(len(uv)) >= self.config.hidden_iris_ratio
        colour, known = eye_painter.iris_colour(images, uv, 0, torch.from_numpy(shown.astype(np.float32)))
        return eye_painter.eye_hole(points, uv, 0, colour, known * torch.from_numpy(told))


class EyelidSampler(InpaintSampler[LidsConfig]):
    """Shut eyes: the person's right one, or, of mirrored pictures, the left one."""

    stage = "lids"
    requirement = "shut as {}.shut says: raise it"

    def __init__(self, sampler: PairSampler, config: LidsConfig) -> None:
        super().__init__(sampler, config)
        self.open_eye_frames = [
            (eye_painter.eye_opening(torch.from_numpy(s.landmarks), 0) > MIN_OPEN_EYE).numpy() for s in sampler.datasets
        ]

    def accepts(self, points: Tensor) -> Tensor:
        """Frames whose right eye is shut, or nearly; mirrored, they stand for left ones."""
        return eye_painter.eye_opening(points, 0) < self.config.max_opening

    def reference_frames(self, rng: np.random.Generator, d: int, row: int) -> list[int]:
        """A frame of the clip with the eye open, in place of a photo; the same one where none is."""
        clip = next(c for c in self.sampler.datasets[d].clips if c.start <= row < c.start + c.count)
        rows = clip.start + self.open_eye_frames[d][clip.start : clip.start + clip.count].nonzero()[0]
        return [int(rng.choice(rows)) if len(rows) else row]

    def make_hole(
        self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor
    ) -> tuple[AlignedCrop, Hole]:
        """All of the lid."""
        known = (eye_painter.eye_opening(points[:, 1], 0) > MIN_OPEN_EYE).float()
        return lid_painter.eyelid_hole(uv[:, 0], 0, images[:, 1], uv[:, 1], known)


INPAINT_SAMPLERS: dict[
    str, type[InpaintSampler[MouthConfig]] | type[InpaintSampler[EyesConfig]] | type[InpaintSampler[LidsConfig]]
]
INPAINT_SAMPLERS = {"mouth": MouthSampler, "eyes": EyeSampler, "lids": EyelidSampler}
