"""Move coefficients of a portrait's expression basis (fig. 9): a video, an image, or a contact sheet."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.compositor import load_photo
from export3d_cli.core.animation.expression_controls import ExpressionEdit, Range, edit_expression
from export3d_cli.core.animation.frame_writer import SHEET_CELL_PX, ViewOptions, is_image_output, write_views
from export3d_cli.core.animation.options import Progress, Summary
from export3d_cli.core.model.measured_motion import NUM_MEASURES
from export3d_cli.core.runtime.errors import InputError

GRID_VALUES = 5  # values of each basis vector or control in a contact sheet


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
    """Return changes of lambda and measures (count, n + 4) along the ranges of an edit, and notes."""
    edited = edit_expression(animator, portrait, edit, np.linspace(0, 1, count))
    return animator.expression_change(portrait, edited.beta), edited.notes
