"""Pictures of a run's numbers, drawn with OpenCV alone: the curve of the losses, and clouds of points."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.media.image import write_image
from export3d_cli.core.media.plot import draw_text, hue_palette, plot_curves

NOT_LOSSES = {"stage", "step", "minutes", "lr", "grad", "seconds_a_step", "images_a_second", "chance", "accuracy"}
NOT_LOSSES |= {"d_real", "d_fake", "d_sign", "augment"}


def read_loss_log(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """stats.jsonl as stage -> term -> [(step, value)], positive finite losses only."""
    stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError):  # a line cut off by a crash
            line = json.loads(text)
            for key, value in line.items():
                if key not in NOT_LOSSES and not key.startswith("flow_") and np.isfinite(value) and value > 0:
                    stages.setdefault(line["stage"], {}).setdefault(key, []).append((line["step"], value))
    return stages


def plot_losses(log: Path, out: Path) -> bool:
    """Draw a log, a panel a stage, every term a line, values on a logarithmic axis; False where there is none."""
    stages = read_loss_log(log)
    if not stages:
        return False
    panels = [
        plot_curves(stage, terms, x_label="step", log_y=True, bold_line="loss") for stage, terms in stages.items()
    ]
    write_image(out, np.concatenate(panels))
    return True


def scatter(points: np.ndarray, labels: np.ndarray, title: str, side: int = 480) -> np.ndarray:
    """Points (N, 2) coloured by label (N,) -> uint8 (side, side, 3); fewer points are larger."""
    picture = np.full((side, side, 3), 255, np.uint8)
    low, high = np.percentile(points, 1, axis=0), np.percentile(points, 99, axis=0)
    where = (points - low) / np.maximum(high - low, 1e-9) * (side - 80) + 40
    names, index = np.unique(labels, return_inverse=True)
    colours = hue_palette(len(names))
    for (x, y), label in zip(np.clip(where, 0, side - 1).round().astype(int).tolist(), index.tolist(), strict=True):
        cv2.circle(picture, (x, y), 2 if len(points) > 500 else 5, colours[label], -1, cv2.LINE_AA)
    draw_text(picture, title, (12, 22))
    return picture
