"""The stage `pose_debias` (beyond the paper): removes the head rotation that a tracker reads from expressions.

A tracker estimates pose from landmarks, and in results with an expression it sees the head rotated by half a degree,
although the camera is fixed: its depth estimate follows the looks of a face. The error is nearly linear in lambda and
the same for held-out people. So it is measured on results, and the fields b_i (`model.warp.mesh_flow`) rotate the face
back around its centre by as much, which hardly moves any landmark in the image. Hair and outline stay.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.config.schema import DataConfig, TrainConfig
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.image import to_uint8
from export3d_cli.core.model.encoded_source import take_row
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import head_pose, rotation_log
from export3d_cli.core.train.stage import Stage, TrainingRun
from export3d_cli.core.train.training_data import Batch, PairSampler

FILMED_EXPRESSIONS = 9  # per source: expressions of filmed people
SINGLE_COEFFICIENT_EXPRESSIONS = 2  # per source: changes of one coefficient
MAX_COEFFICIENT_CHANGE = 8.0  # of one coefficient; 99 % of filmed frames are as close to their clip's median
CORRECTION_ROUNDS = 2  # rounds of measuring and correcting: a correction by an angle changes the estimate by less
OUTLIER_MEDIANS = 2.0  # residuals beyond this many medians get a lower weight
REFIT_ITERATIONS = 8  # of the reweighted regression


def sampling_config(config: TrainConfig) -> DataConfig:
    """Return how sources are drawn: people known from still images as often as others."""
    weight = config.pose_debias.weight or config.data.weight
    return replace(config.data, weight=weight, still_image_ratio=1.0, wide_view_ratio=0.0, cross_identity_ratio=0.0)


class PoseDebiasStage(Stage):
    """Measures the rotations and corrects the basis, `pose_debias.steps` steps in all."""

    def __init__(self, run: TrainingRun, model: Export3D, sampler: PairSampler) -> None:
        super().__init__(run, "pose_debias")
        assert model.flow is not None  # the config's validation ensures it
        self.model, self.flow, self.sampler, self.config = model.eval(), model.flow, sampler, run.config.pose_debias
        self.tracker = open_landmarker_tracker()
        # measured since the basis last changed, of N frames: changes of lambda (N, n) and rotation vectors (N, 3)
        self.measured = {
            "lam_deltas": torch.zeros(0, run.config.model.num_coefficients),
            "rotations": torch.zeros(0, 3),
            "source_points": torch.zeros(0, *model.flow.basis.shape[1:]),  # landmarks of their sources
        }
        self.saved_parts = {"model.": model, "measured.": self.measured}
        self.correction_steps = {round(self.steps * (k + 1) / CORRECTION_ROUNDS) for k in range(CORRECTION_ROUNDS)}

    def draw(self, step: int) -> tuple[Batch, Tensor]:
        """Draw sources and the expressions of filmed people for each of them."""
        seed, size = self.run.config.seed, self.config.batch
        betas = self.sampler.draw_person_betas(seed, step, size, FILMED_EXPRESSIONS)
        return self.sampler.draw_pairs(seed, step, size), betas

    def take_step(self, batch: tuple[Batch, Tensor]) -> dict[str, float]:
        """Measure on the first process; after a round, correct the basis."""
        if self.run.world.is_main:
            self.measure(*batch)
        values = {"turn": mean_abs_angle(self.measured["rotations"])}  # of all frames since the basis last changed
        if self.step + 1 in self.correction_steps:
            values["left"] = self.correct_basis()
        return values

    def finish(self) -> None:
        """Note the steps in the training record."""
        self.run.record["pose_debias_steps"] = self.steps

    def measure(self, batch: Batch, betas: Tensor) -> None:
        """Render a few sources with several expressions each, seen by the source's camera, and track their poses."""
        batch, betas = batch.to(self.run.device), betas.to(self.run.device)
        for row in range(len(betas)):
            with torch.inference_mode(), self.run.autocast():
                source_lam, lam, frames = self.render_expressions(batch, row, betas[row])
            has_face, rotations = self.track_rotations(frames)
            if not has_face[0]:
                continue
            relative = torch.from_numpy(rotation_log(rotations[0].T @ rotations[has_face])).float()[1:]
            lam_deltas = (lam - source_lam).cpu()[torch.from_numpy(has_face)[1:]]
            new = (lam_deltas, relative, batch.source_points[row : row + 1].cpu())
            rows = zip(self.measured.items(), new, strict=True)
            self.measured.update({name: torch.cat([old, added]) for (name, old), added in rows})

    def render_expressions(self, batch: Batch, row: int, beta: Tensor) -> tuple[Tensor, Tensor, list[np.ndarray]]:
        """Render a source with its own lambda, then with K others; return both, (1, n) and (K, n), and the frames."""
        photo, photo_beta, camera, points, person = take_row(batch[:5], row)
        source = self.model.encode_source(photo, photo_beta, camera, points, person)
        n, count = source.lam.shape[1], SINGLE_COEFFICIENT_EXPRESSIONS
        change = torch.eye(n)[torch.randint(n, (count,))] * (2 * torch.rand(count, 1) - 1) * MAX_COEFFICIENT_CHANGE
        lam = torch.cat([self.model.expression.coefficients(beta), source.lam + change.to(source.lam)])
        all_lam = torch.cat([source.lam, lam])
        out = self.model.drive(source.expand(len(all_lam)), all_lam, camera.expand(len(all_lam), -1))
        return source.lam, lam, [to_uint8(image) for image in out.image.float().cpu()]

    def track_rotations(self, frames: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return which frames show a face, (F,), and the head's rotations in them, (F, 3, 3)."""
        motion = self.tracker.track_crops(frames, independent=True)
        if motion is None:
            return np.zeros(len(frames), bool), np.zeros((len(frames), 3, 3))
        return motion.found, head_pose(motion.camera)[0]

    def correct_basis(self) -> float:
        """Correct the basis by the measurements and clear them; return the mean angle left unexplained, degrees."""
        lam_deltas, rotations, source_points = self.measured.values()
        if not len(rotations):
            message = "no face is found in results: the basis stays as it is"
            self.run.report_progress(self.name, self.step, self.steps, message=message)
            return 0.0
        per_coefficient = fit_rotations(lam_deltas, rotations, self.config.ridge)  # (n, 3)
        face = source_points.mean(0)
        face = face - face.mean(0)  # (478, 3)
        axes = per_coefficient[:, None].expand(-1, len(face), -1)
        self.flow.basis.sub_(torch.linalg.cross(axes, face.expand(len(axes), -1, -1)).to(self.flow.basis))
        self.measured.update({name: rows[:0] for name, rows in self.measured.items()})
        return mean_abs_angle(rotations - lam_deltas @ per_coefficient)


def mean_abs_angle(rotations: Tensor) -> float:
    """Return the mean absolute component of rotation vectors (N, 3), degrees; 0 without any."""
    return math.degrees(float(rotations.abs().mean())) if len(rotations) else 0.0


def fit_rotations(lam_deltas: Tensor, rotations: Tensor, ridge: float) -> Tensor:
    """Fit rotations (n, 3) per unit of lambda to `lam_deltas` (N, n), `rotations` (N, 3), by a robust ridge fit."""
    x, y = lam_deltas.double(), rotations.double()
    weight = torch.ones(len(x), 1, dtype=x.dtype)
    solution = torch.zeros(x.shape[1], 3, dtype=x.dtype)
    for _ in range(REFIT_ITERATIONS):
        weighted = x * weight
        solution = torch.linalg.solve(weighted.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), weighted.T @ y)
        residual = (y - x @ solution).norm(dim=1, keepdim=True)
        weight = (OUTLIER_MEDIANS * residual.median() / residual.clamp_min(1e-9)).clamp_max(1)
    return solution.float()
