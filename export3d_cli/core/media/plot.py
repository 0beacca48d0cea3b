"""Curves drawn with OpenCV alone: nothing else is needed for a picture of some numbers."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

WIDTH, HEIGHT, MARGIN = 900, 320, 60  # of one panel
GREY, BLACK = (200, 200, 200), (40, 40, 40)
Colour = tuple[int, int, int]
Lines = Mapping[str, Sequence[tuple[float, float]]]  # name -> points (x, y)


def hue_palette(count: int) -> list[Colour]:
    """`count` colours that differ in hue."""
    shades = [colorsys.hsv_to_rgb(i / max(count, 1), 0.9, 0.75) for i in range(count)]
    return [(int(r * 255), int(g * 255), int(b * 255)) for r, g, b in shades]


def draw_text(picture: np.ndarray, text: str, at: tuple[int, int], size: float = 0.42, colour: Colour = BLACK) -> None:
    """Text with its lower left corner at a pixel (x, y)."""
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def plot_curves(
    title: str, lines: Lines, *, x_label: str, log_y: bool = False, width: int = WIDTH, height: int = HEIGHT,
    bold_line: str = "", markers: bool = False,
) -> np.ndarray:  # fmt: skip
    """A panel, uint8 (height, width, 3): every line in its colour, named at the right where there are several.

    `log`: y on a logarithmic axis, positive values only; else from 0. `dots`: each point is marked, and told on x.
    """
    picture = np.full((height, width, 3), 255, np.uint8)
    every = np.array([point for line in lines.values() for point in line], np.float64)
    first, last = every[:, 0].min(), every[:, 0].max()
    ticks, names = _ticks(every[:, 1], log_y)
    right = width - (3 * MARGIN if len(lines) > 1 else MARGIN // 2)
    bottom = height - MARGIN

    def place(x: float, y: float) -> tuple[int, int]:
        across = MARGIN + (x - first) / max(last - first, 1e-12) * (right - MARGIN)
        return round(across), round(bottom - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - MARGIN))

    for tick, name in zip(ticks, names, strict=True):
        cv2.line(picture, (MARGIN, place(first, tick)[1]), (right, place(first, tick)[1]), GREY, 1)
        draw_text(picture, name, (8, place(first, tick)[1] + 4))
    draw_text(picture, title, (MARGIN, MARGIN - 24), 0.6)
    draw_text(picture, x_label, (MARGIN, bottom + 40))
    told = sorted({x for x, _ in every}) if markers else [first, last]
    free = 0  # no number is written over another
    for x in told:
        at = place(x, ticks[0])[0] - 8
        if at >= free:
            draw_text(picture, f"{x:g}", (at, bottom + 20))
            free = at + 10 * (len(f"{x:g}") + 1)
    for row, (colour, (name, line)) in enumerate(zip(hue_palette(len(lines)), lines.items(), strict=True)):
        points = np.array([place(x, np.log10(y) if log_y else y) for x, y in line], np.int32)
        cv2.polylines(picture, [points], False, colour, 2 if name == bold_line else 1, cv2.LINE_AA)
        for point in points if markers or len(points) == 1 else []:
            cv2.circle(picture, point.tolist(), 3, colour, -1, cv2.LINE_AA)
        if len(lines) > 1:
            draw_text(picture, name, (right + 16, MARGIN + 18 * row), colour=colour)
    return picture


def _ticks(values: np.ndarray, log: bool) -> tuple[np.ndarray, list[str]]:
    """Where the y axis is marked, ascending, and how: powers of ten, or from 0 to above the largest in round steps."""
    if log:
        low, high = np.floor(np.log10(values.min())), np.ceil(np.log10(values.max()) + 1e-9)
        ticks = np.arange(low, max(high, low + 1) + 1)
        return ticks, [f"1e{tick:.0f}" for tick in ticks]
    top = float(values.max()) or 1.0
    unit = 10 ** np.floor(np.log10(top / 3))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= top / 5)
    ticks = step * np.arange(np.ceil(top / step - 1e-9) + 1)
    return ticks, [f"{tick:.6g}" for tick in ticks]
