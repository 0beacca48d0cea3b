"""What the stages `mouth`, `eyes` and `lids` learn from: close-ups of open mouths, open and shut eyes; their holes."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.config.schema import EyesConfig, HoleConfig, LidsConfig, MouthConfig
from export3d_cli.core.face.motion import head_points, mirror_camera, mirror_landmarks
from export3d_cli.core.model.inpaint import eyelids as lid_painter
from export3d_cli.core.model.inpaint import eyes as eye_painter
from export3d_cli.core.model.inpaint import mouth as mouth_painter
from export3d_cli.core.model.inpaint.inpainter import SIDE, CloseUp, Hole
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.model.warp.mouth_eye_interior import WIDEST
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.train.pair_sampler import Sampler, colour_table, recolour

SLIGHTLY = (1.3, 4.0)  # how much wider than in a photo with lips a little apart
OPEN = 0.25  # opening of an eye, in widths of it, from which on it is as open as in most photos
NARROW = (0.3, 1.0)  # how much of the height of an iris a photo shows that tells its colour
C = TypeVar("C", bound=HoleConfig)


class Drawn(NamedTuple):
    """Close-ups of mouths or eyes, (B, ., SIDE, SIDE)."""

    picture: Tensor  # (B, 3, ., .) in [-1, 1]
    hole: Hole


class _Drawer(Generic[C]):
    """Draws close-ups: data set by weight, then person, so that nobody fills the training."""

    name = ""  # of the stage
    wanted = "open as {}.open says: lower it"

    def __init__(self, sampler: Sampler, config: C) -> None:
        self.sampler, self.config = sampler, config
        self.rows: list[list[np.ndarray]] = []  # of each data set: of each person the frames that fit
        for data, people in zip(sampler.sets, sampler.people, strict=True):
            fits = self.fits(torch.from_numpy(data.landmarks)).numpy()
            spans = [np.concatenate([np.arange(c.start, c.start + c.count) for c in own]) for own in people.values()]
            self.rows.append([rows[fits[rows]] for rows in spans if fits[rows].any()])
        weight = np.array(config.weight) if config.weight else sampler.weight
        weight = weight * [bool(rows) for rows in self.rows]
        if weight.sum() <= 0:
            raise TrainingError("no frame of the data sets is as " + self.wanted.format(self.name))
        self.weight = weight / weight.sum()

    def fits(self, points: Tensor) -> Tensor:
        """Which frames with landmarks (N, 478, 3) are looked at, (N,)."""
        raise NotImplementedError

    def beside(self, rng: np.random.Generator, d: int, row: int) -> list[int]:
        """Other frames of the data set `d` that tell something of `row`."""
        return []

    def hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> tuple[CloseUp, Hole]:
        """The holes in the first of the K pictures (B, K, 3, H, W): it and those `beside` it.

        Their landmarks are in the head frame (B, K, 478, 3), and where they are seen (B, K, 478, 2).
        """
        raise NotImplementedError

    def batch(self, seed: int, step: int, rank: int, size: int) -> Drawn:
        """The close-ups of one step: a pure function of (seed, step, rank)."""
        rng = np.random.default_rng([seed, step, 6, rank])
        drawn = [self._draw(rng) for _ in range(size)]
        images, marks, points = (torch.from_numpy(np.stack(x).astype(np.float32)) for x in zip(*drawn, strict=True))
        view, hole = self.hole(rng, images, points, marks[..., :2])
        return Drawn(warp(images[:, 0], view.positions(SIDE)), hole)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures (K, 3, H, W), their landmarks (K, 478, 3), and these in the head frame."""
        s = self.sampler
        d = int(rng.choice(len(s.sets), p=self.weight))
        data, people = s.sets[d], self.rows[d]
        row = int(rng.choice(people[int(rng.integers(len(people)))]))
        flip = s.config.flip and rng.random() < 0.5
        table = colour_table(rng, self.config.jitter)
        rows = [row, *self.beside(rng, d, row)]
        pictures, marks, cameras = np.stack([data.frames[r] for r in rows]), data.landmarks[rows], data.camera[rows]
        if flip:
            pictures, marks, cameras = pictures[:, :, ::-1], mirror_landmarks(marks, s.mirror), mirror_camera(cameras)
        return recolour(pictures, table), marks, head_points(marks, cameras)


class Mouths(_Drawer[MouthConfig]):
    """Open mouths."""

    name = "mouth"

    def fits(self, points: Tensor) -> Tensor:
        """Frames with lips that part."""
        return mouth_painter.opening(points) > self.config.open

    def hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> tuple[CloseUp, Hole]:
        """All between the lips, or what a photo with lips a little apart would not show."""
        points, uv = points[:, 0], uv[:, 0]
        partly = rng.random(len(uv)) < self.config.partly
        wider = np.where(partly, rng.uniform(*SLIGHTLY, len(uv)), WIDEST).astype(np.float32)
        return mouth_painter.mouth_hole(points, uv, torch.from_numpy(wider)[:, None, None].expand(-1, uv.shape[1], 1))


class Eyes(_Drawer[EyesConfig]):
    """Open eyes: the person's right one, or, of mirrored pictures, the left one."""

    name = "eyes"

    def fits(self, points: Tensor) -> Tensor:
        """Frames whose right eye is open; mirrored, they stand for left ones."""
        return eye_painter.opening(points, 0) > self.config.open

    def hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> tuple[CloseUp, Hole]:
        """All between the lids, and the iris' colour, as narrow eyes would tell it."""
        images, points, uv = images[:, 0], points[:, 0], uv[:, 0]
        shown, told = rng.uniform(*NARROW, len(uv)), rng.random(len(uv)) >= self.config.guess
        colour, known = eye_painter.iris_colour(images, uv, 0, torch.from_numpy(shown.astype(np.float32)))
        return eye_painter.eye_hole(points, uv, 0, colour, known * torch.from_numpy(told))


class Lids(_Drawer[LidsConfig]):
    """Shut eyes: the person's right one, or, of mirrored pictures, the left one."""

    name = "lids"
    wanted = "shut as {}.shut says: raise it"

    def __init__(self, sampler: Sampler, config: LidsConfig) -> None:
        super().__init__(sampler, config)
        self.open = [(eye_painter.opening(torch.from_numpy(s.landmarks), 0) > OPEN).numpy() for s in sampler.sets]

    def fits(self, points: Tensor) -> Tensor:
        """Frames whose right eye is shut, or nearly; mirrored, they stand for left ones."""
        return eye_painter.opening(points, 0) < self.config.shut

    def beside(self, rng: np.random.Generator, d: int, row: int) -> list[int]:
        """A frame of the clip with the eye open, in place of a photo; the same one where none is."""
        clip = next(c for c in self.sampler.sets[d].clips if c.start <= row < c.start + c.count)
        rows = clip.start + self.open[d][clip.start : clip.start + clip.count].nonzero()[0]
        return [int(rng.choice(rows)) if len(rows) else row]

    def hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> tuple[CloseUp, Hole]:
        """All of the lid."""
        known = (eye_painter.opening(points[:, 1], 0) > OPEN).float()
        return lid_painter.lid_hole(uv[:, 0], 0, images[:, 1], uv[:, 1], known)


DRAWERS: dict[str, type[_Drawer[MouthConfig]] | type[_Drawer[EyesConfig]] | type[_Drawer[LidsConfig]]]
DRAWERS = {"mouth": Mouths, "eyes": Eyes, "lids": Lids}
