"""Move coefficients of a portrait's expression basis (fig. 9): a video, an image, or a contact sheet."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.options import Progress, Summary, check_overwrite
from export3d_cli.core.animation.view_writer import (
    ViewOptions,
    is_image_output,
    load_photo,
    write_sheet,
    write_video,
)
from export3d_cli.core.media.encoder_settings import check_crf
from export3d_cli.core.runtime.errors import InputError

GRID_VALUES = 5  # values of each basis vector in a contact sheet
Range = tuple[float, float]


@dataclass(frozen=True)
class EditOptions(ViewOptions):
    """Basis vectors to move along; the camera stays the photo's. A contact sheet has a row for each edit."""

    edits: tuple[tuple[int, Range], ...] = ((1, (0.0, 1.0)),)  # i of v_i from 1: first and last change of lambda_i


def edit_basis(
    animator: Animator, source: Path, out: Path, options: EditOptions | None = None, *, progress: Progress | None = None
) -> Summary:
    """Change coefficients lambda_i of the portrait's expression; nothing else changes."""
    options = options or EditOptions()
    began = time.monotonic()
    check_overwrite(out, options.overwrite)
    check_crf(out, options.crf)
    n, is_image = animator.model.config.num_coefficients, is_image_output(out, options.grid)
    for v, _ in options.edits:
        if not 1 <= v <= n:
            raise InputError(f"basis vector {v} does not exist: these weights have 1 to {n}")
    if is_image and not options.grid and options.frames > 1:
        raise InputError(f"{out} can hold one frame: give --frames 1, --grid, or a video's name")
    changes, labels = _grid_changes(options, n) if options.grid else (_sweep_changes(options, n), [])
    portrait = load_photo(animator, source, options)
    frames, count, size = animator.edit(portrait, changes), len(changes), portrait.frame_size
    if not is_image:
        return write_video(animator, frames, count, out, options, size, began=began, progress=progress)
    columns = GRID_VALUES if options.grid else 1
    return write_sheet(
        animator, frames, count, out, options, size, columns=columns, labels=labels, began=began, progress=progress
    )


def _grid_changes(options: EditOptions, n: int) -> tuple[np.ndarray, list[str]]:
    """Return changes (T, n) of the cells of a contact sheet, row by row, and their labels."""
    rows, labels = [], []
    for v, (first, last) in options.edits:
        for value in np.linspace(first, last, GRID_VALUES):
            rows.append(value * np.eye(n)[v - 1])
            labels.append(f"v{v} {value:+.3g}")
    return np.stack(rows).astype(np.float32), labels


def _sweep_changes(options: EditOptions, n: int) -> np.ndarray:
    """Return changes (T, n) of the frames of a video; all edits move at once."""
    changes = np.zeros((options.frames, n), dtype=np.float32)
    for v, (first, last) in options.edits:
        changes[:, v - 1] += np.linspace(first, last, options.frames, dtype=np.float32)
    return changes
