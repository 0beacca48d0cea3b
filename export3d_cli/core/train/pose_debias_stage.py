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
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.media.image import to_uint8
from export3d_cli.core.model.checkpoint import load_into
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import head_pose, rotation_log
from export3d_cli.core.runtime.weights import resolve_weights
from export3d_cli.core.train.image_stage import tensors_with_prefix
from export3d_cli.core.train.pair_sampler import Batch, PairSampler
from export3d_cli.core.train.training_run import TrainingRun

STAGE = "pose_debias"
STAGE_SEED = 5  # the number of the stage in `Run.seed`
FILMED_EXPRESSIONS, SINGLE_COEFFICIENT_EXPRESSIONS = (
    9,
    2,
)  # of a source: such of people who were filmed, and single coefficients that change
MAX_COEFFICIENT_CHANGE = (
    8.0  # by which a single coefficient changes at most: 99 % of filmed frames are as near to their clip's median
)
CORRECTION_ROUNDS = (
    2  # times it is measured and turned back: what is turned by an angle is not read as turned by all of it
)
OUTLIER_MEDIANS, REFIT_ITERATIONS = (
    2.0,
    8,
)  # of medians: readings that miss by more count less, and how often that is reckoned anew


def sampling_config(config: TrainConfig) -> DataConfig:
    """How sources are drawn: people known from stills as often as others."""
    weight = config.pose_debias.weight or config.data.weight
    return replace(config.data, weight=weight, still_image_ratio=1.0, wide_view_ratio=0.0, cross_identity_ratio=0.0)


class PoseDebiasStage:
    """Measures and turns back, `steady.steps` steps in all."""

    def __init__(self, run: TrainingRun, model: Export3D, sampler: PairSampler) -> None:
        assert model.flow is not None  # a rule of the configuration
        self.run, self.model, self.flow, self.sampler, self.config = (
            run,
            model,
            model.flow,
            sampler,
            run.config.pose_debias,
        )
        self.tracker = LandmarkerTracker(resolve_weights("face_landmarker"))
        self.step, self.values = 0, dict[str, float]()  # the last log line
        n = run.config.model.num_coefficients
        self.lam_deltas, self.rotations = (
            torch.zeros(0, n),
            torch.zeros(0, 3),
        )  # changes of lambda and rotation vectors so far
        self.source_points = torch.zeros(0, *model.flow.basis.shape[1:])  # landmarks of the sources so far
        if run.resumed_state is not None and run.resumed_state[1]["stage"] == STAGE:
            tensors, info = run.resumed_state
            load_into(model, tensors_with_prefix(tensors, "model."), "the training state")
            self.lam_deltas, self.rotations, self.source_points = (
                tensors[f"seen.{k}"].cpu() for k in ("asked", "turned", "middle")
            )
            self.step = int(info["step"])

    def train(self) -> int:
        """Take the steps that are left, which changes `flow.basis` of the model; the steps done."""
        run, steps = self.run, self.config.steps
        self.model.eval()
        ends = {round(steps * (k + 1) / CORRECTION_ROUNDS) for k in range(CORRECTION_ROUNDS)}
        clock = run.elapsed_minutes()
        while self.step < steps and not run.out_of_time():
            run.seed_step(STAGE_SEED, self.step)
            if run.world.is_main:
                self.measure()
            self.step += 1
            values = {"turn": mean_abs_angle(self.rotations)}  # of all frames since the basis changed
            if self.step in ends:
                values["left"] = self.correct_basis()
            values["seconds_a_step"] = (run.elapsed_minutes() - clock) * 60
            clock = run.elapsed_minutes()
            if self.step % run.config.log_every == 0 or self.step in ends:
                self.values = values
                run.log(STAGE, self.step, steps, values)
            if self.step % run.config.checkpoint_every == 0:
                self.save()
        self.save()
        run.world.broadcast_module(self.model)
        return self.step

    def save(self) -> None:
        """Write the training state."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        seen = {"seen.asked": self.lam_deltas, "seen.turned": self.rotations, "seen.middle": self.source_points}
        self.run.save(STAGE, self.step, tensors | seen)

    def measure(self) -> None:
        """Make results of a few sources, each with several expressions before its own camera, and read their poses."""
        seed, size = self.run.config.seed, self.config.batch
        batch = self.sampler.draw_pairs(seed, self.step, size)
        betas = self.sampler.draw_person_betas(seed, self.step, size, FILMED_EXPRESSIONS).to(self.run.device)
        batch = batch.to(self.run.device)
        for row in range(size):
            with torch.inference_mode(), self.run.autocast():
                own, asked, frames = self.render_expressions(batch, row, betas[row])
            found, rotation = self.track_rotations(frames)
            if not found[0]:
                continue
            away = torch.from_numpy(rotation_log(rotation[0].T @ rotation[found])).float()[1:]
            self.lam_deltas = torch.cat([self.lam_deltas, (asked - own).cpu()[torch.from_numpy(found)[1:]]])
            self.rotations = torch.cat([self.rotations, away])
            self.source_points = torch.cat([self.source_points, batch.source_points[row : row + 1].cpu()])

    def render_expressions(self, batch: Batch, row: int, beta: Tensor) -> tuple[Tensor, Tensor, list[np.ndarray]]:
        """A source's lambda (1, n), those asked for (K, n), and frames: with its own, then with each of them."""
        photo, camera, points, person = (
            x[row : row + 1] for x in (batch.source, batch.source_camera, batch.source_points, batch.source_person_mask)
        )
        source = self.model.encode_source(photo, batch.source_beta[row : row + 1], camera, points, person)
        own, n = source.lam, source.lam.shape[1]
        alone = (
            torch.eye(n)[torch.randint(n, (SINGLE_COEFFICIENT_EXPRESSIONS,))]
            * (2 * torch.rand(SINGLE_COEFFICIENT_EXPRESSIONS, 1) - 1)
            * MAX_COEFFICIENT_CHANGE
        )
        asked = torch.cat([self.model.expression.coefficients(beta), own + alone.to(own)])
        lam = torch.cat([own, asked])
        out = self.model.drive(source.expand(len(lam)), None, camera.expand(len(lam), -1), lam=lam)
        return own, asked, [to_uint8(image) for image in out.image.float().cpu()]

    def track_rotations(self, frames: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Which frames show a face, (F,), and the head's rotations in them (F, 3, 3)."""
        motion = self.tracker.track_crops(frames, independent=True)
        if motion is None:
            return np.zeros(len(frames), bool), np.zeros((len(frames), 3, 3))
        return motion.found, head_pose(motion.camera)[0]

    def correct_basis(self) -> float:
        """Change the basis by what was seen, and forget that; the mean angle which is not explained, degrees."""
        if not len(self.rotations):
            if self.run.world.is_main:
                self.run.report_progress(
                    STAGE, self.step, self.config.steps, message="no face is found in results: nothing to do"
                )
            return 0.0
        turns = fit_rotations(self.lam_deltas, self.rotations, self.config.ridge)  # (n, 3)
        left = mean_abs_angle(self.rotations - self.lam_deltas @ turns)
        middle = self.source_points.mean(0)
        about = middle - middle.mean(0)  # (478, 3)
        field = torch.linalg.cross(turns[:, None].expand(-1, len(about), -1), about.expand(len(turns), -1, -1))
        self.flow.basis.sub_(field.to(self.flow.basis))
        self.lam_deltas, self.rotations, self.source_points = (
            self.lam_deltas[:0],
            self.rotations[:0],
            self.source_points[:0],
        )
        return left


def mean_abs_angle(rotations: Tensor) -> float:
    """Mean size of the entries of rotation vectors (N, 3), degrees; 0 of none."""
    return math.degrees(float(rotations.abs().mean())) if len(rotations) else 0.0


def fit_rotations(lam_deltas: Tensor, rotations: Tensor, ridge: float) -> Tensor:
    """Rotation vector by unit of each coefficient, (n, 3): what brings `asked` (N, n) nearest to `turned` (N, 3).

    A robust regression; `ridge` is its strength, in frames with coefficients of deviation 1.
    """
    x, y = lam_deltas.double(), rotations.double()
    weight = torch.ones(len(x), 1, dtype=x.dtype)
    found = torch.zeros(x.shape[1], 3, dtype=x.dtype)
    for _ in range(REFIT_ITERATIONS):
        weighted = x * weight
        found = torch.linalg.solve(weighted.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), weighted.T @ y)
        miss = (y - x @ found).norm(dim=1, keepdim=True)
        weight = (OUTLIER_MEDIANS * miss.median() / miss.clamp_min(1e-9)).clamp_max(1)
    return found.float()
