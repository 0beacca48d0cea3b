"""The stage `steady` (beyond the paper): an expression must not be read as a turn of the head.

A tracker reads pose from landmarks, and where an expression comes out it sees the head turn by half a degree, though
the camera rests: its reading of depth goes by what a face looks like. That is nearly linear in lambda, and the same
for people never seen. So it is measured on results, and the fields b_i (docs of `export3d_cli.core.model.warp.mesh_flow`) turn
the face back by as much about its middle, which moves hardly any landmark in the picture. Hair and outline stay.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.config.schema import DataConfig, TrainConfig
from export3d_cli.core.face.motion import Tracker
from export3d_cli.core.media.image import to_uint8
from export3d_cli.core.model.checkpoint import load_into
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import head_pose, rotation_log
from export3d_cli.core.runtime.weights import resolve
from export3d_cli.core.train.image_stage import part
from export3d_cli.core.train.pair_sampler import Batch, Sampler
from export3d_cli.core.train.training_run import Run

NAME = "steady"
SEED = 5  # the number of the stage in `Run.seed`
EXPRESSIONS, ALONE = 9, 2  # of a source: such of people who were filmed, and single coefficients that change
REACH = 8.0  # by which a single coefficient changes at most: 99 % of filmed frames are as near to their clip's median
ROUNDS = 2  # times it is measured and turned back: what is turned by an angle is not read as turned by all of it
OUTLIER, REFITS = 2.0, 8  # of medians: readings that miss by more count less, and how often that is reckoned anew


def draws(config: TrainConfig) -> DataConfig:
    """How sources are drawn: people known from stills as often as others."""
    weight = config.steady.weight or config.data.weight
    return replace(config.data, weight=weight, stills=1.0, turn=0.0, cross=0.0)


class SteadyStage:
    """Measures and turns back, `steady.steps` steps in all."""

    def __init__(self, run: Run, model: Export3D, sampler: Sampler) -> None:
        assert model.flow is not None  # a rule of the configuration
        self.run, self.model, self.flow, self.sampler, self.config = run, model, model.flow, sampler, run.config.steady
        self.tracker = Tracker(resolve("face_landmarker"))
        self.step, self.values = 0, dict[str, float]()  # the last log line
        n = run.config.model.coefficients
        self.asked, self.turned = torch.zeros(0, n), torch.zeros(0, 3)  # changes of lambda and rotation vectors so far
        self.middle = torch.zeros(0, *model.flow.basis.shape[1:])  # landmarks of the sources so far
        if run.resumed is not None and run.resumed[1]["stage"] == NAME:
            tensors, info = run.resumed
            load_into(model, part(tensors, "model."), "the training state")
            self.asked, self.turned, self.middle = (tensors[f"seen.{k}"].cpu() for k in ("asked", "turned", "middle"))
            self.step = int(info["step"])

    def train(self) -> int:
        """Take the steps that are left, which changes `flow.basis` of the model; the steps done."""
        run, steps = self.run, self.config.steps
        self.model.eval()
        ends = {round(steps * (k + 1) / ROUNDS) for k in range(ROUNDS)}
        clock = run.minutes()
        while self.step < steps and not run.out_of_time():
            run.seed(SEED, self.step)
            if run.world.main:
                self.look()
            self.step += 1
            values = {"turn": mean_angle(self.turned)}  # of all frames since the basis changed
            if self.step in ends:
                values["left"] = self.turn_back()
            values["seconds_a_step"] = (run.minutes() - clock) * 60
            clock = run.minutes()
            if self.step % run.config.log_every == 0 or self.step in ends:
                self.values = values
                run.log(NAME, self.step, steps, values)
            if self.step % run.config.checkpoint_every == 0:
                self.save()
        self.save()
        run.world.copy_first(self.model)
        return self.step

    def save(self) -> None:
        """Write the training state."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        seen = {"seen.asked": self.asked, "seen.turned": self.turned, "seen.middle": self.middle}
        self.run.save(NAME, self.step, tensors | seen)

    def look(self) -> None:
        """Make results of a few sources, each with several expressions before its own camera, and read their poses."""
        seed, size = self.run.config.seed, self.config.batch
        batch = self.sampler.batch(seed, self.step, size)
        betas = self.sampler.persons(seed, self.step, size, EXPRESSIONS).to(self.run.device)
        batch = batch.to(self.run.device)
        for row in range(size):
            with torch.inference_mode(), self.run.autocast():
                own, asked, frames = self.results(batch, row, betas[row])
            found, rotation = self.read(frames)
            if not found[0]:
                continue
            away = torch.from_numpy(rotation_log(rotation[0].T @ rotation[found])).float()[1:]
            self.asked = torch.cat([self.asked, (asked - own).cpu()[torch.from_numpy(found)[1:]]])
            self.turned = torch.cat([self.turned, away])
            self.middle = torch.cat([self.middle, batch.source_points[row : row + 1].cpu()])

    def results(self, batch: Batch, row: int, beta: Tensor) -> tuple[Tensor, Tensor, list[np.ndarray]]:
        """A source's lambda (1, n), those asked for (K, n), and frames: with its own, then with each of them."""
        photo, camera, points, person = (
            x[row : row + 1] for x in (batch.source, batch.source_camera, batch.source_points, batch.source_person)
        )
        source = self.model.encode_source(photo, batch.source_beta[row : row + 1], camera, points, person)
        own, n = source.lam, source.lam.shape[1]
        alone = torch.eye(n)[torch.randint(n, (ALONE,))] * (2 * torch.rand(ALONE, 1) - 1) * REACH
        asked = torch.cat([self.model.expression.coefficients(beta), own + alone.to(own)])
        lam = torch.cat([own, asked])
        out = self.model.drive(source.expand(len(lam)), None, camera.expand(len(lam), -1), lam=lam)
        return own, asked, [to_uint8(image) for image in out.image.float().cpu()]

    def read(self, frames: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Which frames show a face, (F,), and the head's rotations in them (F, 3, 3)."""
        motion = self.tracker.read(frames, apart=True)
        if motion is None:
            return np.zeros(len(frames), bool), np.zeros((len(frames), 3, 3))
        return motion.found, head_pose(motion.camera)[0]

    def turn_back(self) -> float:
        """Change the basis by what was seen, and forget that; the mean angle which is not explained, degrees."""
        if not len(self.turned):
            if self.run.world.main:
                self.run.tell(NAME, self.step, self.config.steps, message="no face is found in results: nothing to do")
            return 0.0
        turns = fit_turns(self.asked, self.turned, self.config.ridge)  # (n, 3)
        left = mean_angle(self.turned - self.asked @ turns)
        middle = self.middle.mean(0)
        about = middle - middle.mean(0)  # (478, 3)
        field = torch.linalg.cross(turns[:, None].expand(-1, len(about), -1), about.expand(len(turns), -1, -1))
        self.flow.basis.sub_(field.to(self.flow.basis))
        self.asked, self.turned, self.middle = self.asked[:0], self.turned[:0], self.middle[:0]
        return left


def mean_angle(turned: Tensor) -> float:
    """Mean size of the entries of rotation vectors (N, 3), degrees; 0 of none."""
    return math.degrees(float(turned.abs().mean())) if len(turned) else 0.0


def fit_turns(asked: Tensor, turned: Tensor, ridge: float) -> Tensor:
    """Rotation vector by unit of each coefficient, (n, 3): what brings `asked` (N, n) nearest to `turned` (N, 3).

    A robust regression; `ridge` is its strength, in frames with coefficients of deviation 1.
    """
    x, y = asked.double(), turned.double()
    weight = torch.ones(len(x), 1, dtype=x.dtype)
    found = torch.zeros(x.shape[1], 3, dtype=x.dtype)
    for _ in range(REFITS):
        weighted = x * weight
        found = torch.linalg.solve(weighted.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), weighted.T @ y)
        miss = (y - x @ found).norm(dim=1, keepdim=True)
        weight = (OUTLIER * miss.median() / miss.clamp_min(1e-9)).clamp_max(1)
    return found.float()
