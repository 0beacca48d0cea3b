"""Pictures of a run's numbers, drawn with OpenCV alone: the curve of the losses, and clouds of points."""

from __future__ import annotations

import colorsys
import contextlib
import json
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.media.image import write_image

WIDTH, HEIGHT, MARGIN = 900, 320, 60  # of one panel
WHITE, GREY, BLACK = (255, 255, 255), (200, 200, 200), (40, 40, 40)
NOT_LOSSES = {"stage", "step", "minutes", "lr", "grad", "seconds_a_step", "chance", "accuracy", "d_real", "d_fake"}


def palette(count: int) -> list[tuple[int, int, int]]:
    """`count` colours that differ in hue."""
    shades = [colorsys.hsv_to_rgb(i / max(count, 1), 0.9, 0.75) for i in range(count)]
    return [(int(r * 255), int(g * 255), int(b * 255)) for r, g, b in shades]


def read_log(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
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
    stages = read_log(log)
    if not stages:
        return False
    write_image(out, np.concatenate([_curves(stage, terms) for stage, terms in stages.items()]))
    return True


def _curves(title: str, terms: dict[str, list[tuple[int, float]]]) -> np.ndarray:
    picture = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    every = np.array([point for line in terms.values() for point in line], np.float64)
    first, last = every[:, 0].min(), max(every[:, 0].max(), every[:, 0].min() + 1)
    low, high = np.floor(np.log10(every[:, 1].min())), np.ceil(np.log10(every[:, 1].max()) + 1e-9)
    right, bottom = WIDTH - 3 * MARGIN, HEIGHT - MARGIN

    def place(step: float, power: float) -> tuple[int, int]:
        x = MARGIN + (step - first) / (last - first) * (right - MARGIN)
        return round(x), round(bottom - (power - low) / max(high - low, 1) * (bottom - MARGIN))

    for power in np.arange(low, high + 1):
        cv2.line(picture, place(first, power), place(last, power), GREY, 1)
        _write(picture, f"1e{power:.0f}", (8, place(first, power)[1] + 4))
    _write(picture, title, (MARGIN, MARGIN - 24), 0.6)
    _write(picture, f"step {first:.0f}", (MARGIN, bottom + 24))
    _write(picture, f"{last:.0f}", (right - 20, bottom + 24))
    for row, (colour, (name, line)) in enumerate(zip(palette(len(terms)), terms.items(), strict=True)):
        points = np.array([place(step, np.log10(value)) for step, value in line], np.int32)
        cv2.polylines(picture, [points], False, colour, 2 if name == "loss" else 1, cv2.LINE_AA)
        if len(points) == 1:
            cv2.circle(picture, points[0].tolist(), 3, colour, -1, cv2.LINE_AA)
        _write(picture, name, (right + 16, MARGIN + 18 * row), colour=colour)
    return picture


def scatter(points: np.ndarray, labels: np.ndarray, title: str, side: int = 480) -> np.ndarray:
    """Points (N, 2) coloured by label (N,) -> uint8 (side, side, 3)."""
    picture = np.full((side, side, 3), 255, np.uint8)
    low, high = np.percentile(points, 1, axis=0), np.percentile(points, 99, axis=0)
    where = (points - low) / np.maximum(high - low, 1e-9) * (side - 80) + 40
    names, index = np.unique(labels, return_inverse=True)
    colours = palette(len(names))
    for (x, y), label in zip(np.clip(where, 0, side - 1).round().astype(int).tolist(), index.tolist(), strict=True):
        cv2.circle(picture, (x, y), 2, colours[label], -1, cv2.LINE_AA)
    _write(picture, title, (12, 22), 0.5)
    return picture


def _write(
    picture: np.ndarray, text: str, at: tuple[int, int], size: float = 0.42, colour: tuple[int, int, int] = BLACK
) -> None:
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)
