"""What the stages `mouth` and `eyes` learn from: close-ups of open mouths and of open eyes, and the holes in them."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.config import EyesConfig, HoleConfig, MouthConfig
from export3d_cli.core.errors import TrainingError
from export3d_cli.core.face.motion import head_points, mirror_camera, mirror_landmarks
from export3d_cli.core.model import eye_painter, mouth_painter
from export3d_cli.core.model.flow import warp
from export3d_cli.core.model.mouth import WIDEST
from export3d_cli.core.model.painter import SIDE, CloseUp, Hole
from export3d_cli.core.train.data import Sampler, colour_table, recolour

SLIGHTLY = (1.3, 4.0)  # how much wider than in a photo with lips a little apart
NARROW = (0.3, 1.0)  # how much of the height of an iris a photo shows that tells its colour
C = TypeVar("C", bound=HoleConfig)


class Drawn(NamedTuple):
    """Close-ups of open mouths or eyes, (B, ., SIDE, SIDE)."""

    picture: Tensor  # (B, 3, ., .) in [-1, 1]
    hole: Hole


class _Drawer(Generic[C]):
    """Draws close-ups: data set by weight, then person, so that nobody fills the training."""

    name = ""  # of the stage

    def __init__(self, sampler: Sampler, config: C) -> None:
        self.sampler, self.config = sampler, config
        self.rows: list[list[np.ndarray]] = []  # of each data set: of each person the frames that are open
        for data, people in zip(sampler.sets, sampler.people, strict=True):
            open_ = self.open(torch.from_numpy(data.landmarks)).numpy()
            spans = [np.concatenate([np.arange(c.start, c.start + c.count) for c in own]) for own in people.values()]
            self.rows.append([rows[open_[rows]] for rows in spans if open_[rows].any()])
        weight = np.array(config.weight) if config.weight else sampler.weight
        weight = weight * [bool(rows) for rows in self.rows]
        if weight.sum() <= 0:
            raise TrainingError(f"no frame of the data sets is as open as {self.name}.open says: lower it")
        self.weight = weight / weight.sum()

    def open(self, points: Tensor) -> Tensor:
        """Which frames with landmarks (N, 478, 3) are wide enough open, (N,)."""
        raise NotImplementedError

    def hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> tuple[CloseUp, Hole]:
        """The holes in pictures (B, 3, H, W) with landmarks in the head frame and where they are seen."""
        raise NotImplementedError

    def batch(self, seed: int, step: int, rank: int, size: int) -> Drawn:
        """The close-ups of one step: a pure function of (seed, step, rank)."""
        rng = np.random.default_rng([seed, step, 6, rank])
        drawn = [self._draw(rng) for _ in range(size)]
        images, marks, cameras = (np.stack(x).astype(np.float32) for x in zip(*drawn, strict=True))
        points = torch.from_numpy(head_points(marks, cameras).astype(np.float32))
        pictures = torch.from_numpy(images)
        view, hole = self.hole(rng, pictures, points, torch.from_numpy(marks[..., :2]))
        return Drawn(warp(pictures, view.positions(SIDE)), hole)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A picture (3, H, W), its landmarks and camera."""
        s = self.sampler
        d = int(rng.choice(len(s.sets), p=self.weight))
        data, people = s.sets[d], self.rows[d]
        row = int(rng.choice(people[int(rng.integers(len(people)))]))
        flip = s.config.flip and rng.random() < 0.5
        table = colour_table(rng, self.config.jitter)
        picture, marks, camera = data.frames[row], data.landmarks[row : row + 1], data.camera[row : row + 1]
        if flip:
            picture, marks, camera = picture[:, ::-1], mirror_landmarks(marks, s.mirror), mirror_camera(camera)
        return recolour(picture[None], table)[0], marks[0], camera[0]


class Mouths(_Drawer[MouthConfig]):
    """Open mouths."""

    name = "mouth"

    def open(self, points: Tensor) -> Tensor:
        """Frames with lips that part."""
        return mouth_painter.opening(points) > self.config.open

    def hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> tuple[CloseUp, Hole]:
        """All between the lips, or what a photo with lips a little apart would not show."""
        partly = rng.random(len(uv)) < self.config.partly
        wider = np.where(partly, rng.uniform(*SLIGHTLY, len(uv)), WIDEST).astype(np.float32)
        return mouth_painter.mouth_hole(points, uv, torch.from_numpy(wider)[:, None, None].expand(-1, uv.shape[1], 1))


class Eyes(_Drawer[EyesConfig]):
    """Open eyes: the person's right one, or, of mirrored pictures, the left one."""

    name = "eyes"

    def open(self, points: Tensor) -> Tensor:
        """Frames whose right eye is open; mirrored, they stand for left ones."""
        return eye_painter.opening(points, 0) > self.config.open

    def hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> tuple[CloseUp, Hole]:
        """All between the lids, and the iris' colour, as narrow eyes would tell it."""
        shown, told = rng.uniform(*NARROW, len(uv)), rng.random(len(uv)) >= self.config.guess
        colour, known = eye_painter.iris_colour(images, uv, 0, torch.from_numpy(shown.astype(np.float32)))
        return eye_painter.eye_hole(points, uv, 0, colour, known * torch.from_numpy(told))


DRAWERS: dict[str, type[_Drawer[MouthConfig]] | type[_Drawer[EyesConfig]]] = {"mouth": Mouths, "eyes": Eyes}
