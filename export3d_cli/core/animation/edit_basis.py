"""Move coefficients of a portrait's expression basis (fig. 9): a video, image or contact sheet; and what they mean."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.compositor import load_photo
from export3d_cli.core.animation.expression_controls import MIN_BETA_STD, ExpressionEdit, Range, edit_expression
from export3d_cli.core.animation.frame_writer import SHEET_CELL_PX, ViewOptions, is_image_output, write_views
from export3d_cli.core.animation.options import Progress, Summary
from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.model.motion_beyond_lambda import NUM_MEASURES
from export3d_cli.core.runtime.camera import FOCAL, RADIUS
from export3d_cli.core.runtime.errors import InputError

GRID_VALUES = 5  # values of each basis vector or control in a contact sheet
JACOBIAN_SAMPLES = 256  # expressions around the mean over which the Jacobian is averaged
IMAGE_SIZE_PX = 256  # side of the image that motion in pixels refers to
REGIONS: dict[str, tuple[int, ...]] = {
    "lips": mesh.LIPS,
    "eyes": mesh.LEFT_EYE + mesh.RIGHT_EYE + mesh.LEFT_IRIS + mesh.RIGHT_IRIS,
    "brows": mesh.LEFT_BROW + mesh.RIGHT_BROW,
    "jaw": mesh.JAW,
}


@dataclass(frozen=True)
class EditOptions(ViewOptions):
    """Basis vectors to move along; the camera stays the photo's. A contact sheet has a row per vector and control."""

    edits: tuple[tuple[int, Range], ...] = ()  # i of v_i from 1: first and last change of lambda_i

    @property
    def single(self) -> bool:
        """Whether all frames would be the same."""
        return super().single and (self.frames == 1 or all(a == b for _, (a, b) in self.edits))


def edit_basis(animator: Animator, source: Path | Portrait, out: Path, options: EditOptions, *,
               progress: Progress | None = None) -> Summary:  # fmt: skip
    """Change the portrait's expression by basis vectors and by controls; nothing else changes."""
    began, n = time.monotonic(), animator.model.config.num_coefficients
    options.check_outputs(out)
    for v, _ in options.edits:
        if not 1 <= v <= n:
            raise InputError(f"basis vector {v} does not exist: these weights have 1 to {n}")
    if not options.edits and not (options.expression.controls if options.grid else options.expression):
        raise InputError("nothing to edit: give basis vectors or controls")
    portrait = load_photo(animator, source, options, max_side=SHEET_CELL_PX if options.grid else 0)
    rows, labels = list[np.ndarray](), list[str]()
    notes: tuple[str, ...] = ()
    if options.grid:
        for v, ends in options.edits:
            rows.append(np.outer(np.linspace(*ends, GRID_VALUES), np.eye(n, n + NUM_MEASURES)[v - 1]))
            labels += [f"v{v} {value:+.3g}" for value in np.linspace(*ends, GRID_VALUES)]
        for name, (first, last) in options.expression.ranges.items():
            ends = (first, last) if first != last else (0.0, last)
            edit = replace(options.expression, controls={name: ends})
            change, note = _control_changes(animator, portrait, edit, GRID_VALUES)
            rows, notes = [*rows, change], (*notes, *note)
            labels += [f"{name} {value:.2f}" for value in np.linspace(*ends, GRID_VALUES)]
        changes = np.concatenate(rows)
    else:
        count = 1 if is_image_output(out) else options.frames
        changes = np.zeros((count, n + NUM_MEASURES))
        if options.expression:
            changes, notes = _control_changes(animator, portrait, options.expression, count)
        for v, ends in options.edits:
            changes[:, v - 1] += np.linspace(*ends, count)
    return write_views(animator, animator.edit(portrait, changes), len(changes), out, options, portrait.frame_size,
                       columns=GRID_VALUES if options.grid else 1, labels=labels, notes=notes, began=began,
                       progress=progress)  # fmt: skip


def _control_changes(animator: Animator, portrait: Portrait, edit: ExpressionEdit,
                     count: int) -> tuple[np.ndarray, tuple[str, ...]]:  # fmt: skip
    """Return changes of lambda and measures (count, n + m) along the ranges of an edit, and notes."""
    edited = edit_expression(animator, portrait, edit, np.linspace(0, 1, count))
    return animator.expression_change(portrait, edited.beta), edited.notes


@dataclass(frozen=True)
class BasisVector:
    """Meaning of v_i and b_i."""

    v: int  # from 1, as in `--v`
    moved_by: dict[str, float]  # entry of beta -> change of lambda_i for one standard deviation
    moves: dict[str, float]  # region -> mean motion in pixels of a 256 image for lambda_i + 1; {}: no flow


def describe_basis(animator: Animator, *, top: int = 4) -> list[BasisVector]:
    """Return the `top` entries of beta in the mean Jacobian of f_e for each lambda_i, and the regions b_i moves."""
    expression, flow = animator.model.expression, animator.model.flow
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(JACOBIAN_SAMPLES, len(BETA_NAMES), generator=generator).to(animator.device)
    with torch.enable_grad():
        beta = (expression.beta_mean + noise * expression.beta_std).detach().requires_grad_()
        lam = expression.coefficients(beta)  # (SAMPLES, n)
        slopes = [torch.autograd.grad(column.sum(), beta, retain_graph=True)[0] for column in lam.unbind(1)]
    varies = expression.beta_std > MIN_BETA_STD
    jacobian = (torch.stack(slopes).mean(1) * expression.beta_std * varies).detach().cpu().numpy()  # (n, 64)
    pixels_per_unit = FOCAL / RADIUS * IMAGE_SIZE_PX  # pixels per unit of the head frame at the default distance
    vectors = []
    for i, row in enumerate(jacobian):
        strongest = np.argsort(-np.abs(row))[:top]
        moves = {}
        if flow is not None:
            motion = flow.basis[i, :, :2].float().norm(dim=-1).cpu().numpy() * pixels_per_unit  # (478,)
            moves = {name: float(motion[list(points)].mean()) for name, points in REGIONS.items()}
        vectors.append(BasisVector(i + 1, {BETA_NAMES[k]: float(row[k]) for k in strongest}, moves))
    return vectors
