"""Plots of a training run, drawn by matplotlib: the loss curves, and a scatter plot of expression codes.

matplotlib and scikit-learn come with `pip install "export3d-cli[train]"`; without them training runs without plots.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

INSTALL_HINT = 'plots and probes are skipped: pip install "export3d-cli[train]" adds matplotlib and scikit-learn'
NON_LOSS_KEYS = {"stage", "step", "minutes", "lr", "grad", "seconds_a_step", "images_a_second", "chance", "accuracy"}
NON_LOSS_KEYS |= {"d_real", "d_fake"}


def has_plot_libraries() -> bool:
    """Whether matplotlib and scikit-learn are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("matplotlib", "sklearn"))


def read_loss_log(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Read stats.jsonl as stage -> term -> [(step, value)], positive finite losses only."""
    stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError):  # a line truncated by a crash
            line = json.loads(text)
            for key, value in line.items():
                if key not in NON_LOSS_KEYS and not key.startswith("flow_") and math.isfinite(value) and value > 0:
                    stages.setdefault(line["stage"], {}).setdefault(key, []).append((line["step"], value))
    return stages


def plot_losses(log: Path, path: Path) -> None:
    """Plot a log to a PNG, one panel per stage and one line per term; does nothing without a log or matplotlib."""
    stages = read_loss_log(log)
    if not stages or not has_plot_libraries():
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(stages)), layout="constrained")
    panels = figure.subplots(len(stages), squeeze=False)[:, 0]
    for panel, (stage, terms) in zip(panels, stages.items(), strict=True):
        for term, points in terms.items():
            panel.plot(*zip(*points, strict=True), label=term, linewidth=2 if term == "loss" else 1)
        panel.set(title=stage, xlabel="step", yscale="log")
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path)


def plot_scatter(panel: Any, points: np.ndarray, labels: np.ndarray, title: str) -> None:
    """Draw points (N, 2) into a matplotlib panel, coloured by label (N,)."""
    _, index = np.unique(labels, return_inverse=True)
    panel.scatter(points[:, 0], points[:, 1], c=index, cmap="hsv", s=12)
    panel.set(xticks=[], yticks=[])
    panel.set_title(title, fontsize="small")
