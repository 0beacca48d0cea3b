"""Writes an evaluation: scores.csv, scores.json, report.md, and a sheet of pictures for each case."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from export3d_cli import __version__
from export3d_cli.core.evaluation.metrics import METRICS
from export3d_cli.core.runtime.files import write_atomic, write_text

if TYPE_CHECKING:
    from export3d_cli.core.evaluation.evaluate import Evaluation

CELL_PX = 192  # side of a picture in a sheet
ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def write_report(result: Evaluation, out: Path) -> list[Path]:
    """Write scores.csv (one row per case and method), scores.json (all) and report.md (means); return the files."""
    files = [out / "scores.csv", out / "scores.json", out / "report.md"]
    with write_atomic(files[0]) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["case", "method", "frames", *METRICS], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "case": escape_csv_cell(str(row["case"]))} for row in result.clips)
    facts = dataclasses.asdict(dataclasses.replace(result, files=[*files, *result.files]))
    write_text(files[1], json.dumps(facts, default=str, indent=1) + "\n")
    write_text(files[2], render_markdown(result))
    return files


def escape_csv_cell(text: str) -> str:
    """Quote a name from a data set so that no spreadsheet runs it as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def describe(result: Evaluation) -> str:
    """Return in one line what was measured, and with which options."""
    options = result.options
    how = options.reenact
    facts = [
        result.protocol, f"{result.cases} cases", f"{result.frames} frames, {options.take}",
        f"photo: {options.photo} frame, size {options.size or 'own'}, background {options.background}",
        *([f"frame {how.framing}, motion {how.motion}, pose {how.pose}, smooth {how.smooth}, "
           f"watermark {how.watermark}, quality {result.quality}"] * options.model),
        *([f"seed {options.seed}"] * options.cross),
        *([f"identity by {Path(options.identity).name}"] if options.identity else []),
        result.device, f"{result.seconds:.0f} s", f"export3d {__version__}",
    ]  # fmt: skip
    return " · ".join(facts)


def mean_table(result: Evaluation) -> list[str]:
    """Return the means over cases as lines of a Markdown table: a row for each metric, a column for each method."""
    rows = [["", *result.mean], ["---", *["--:"] * len(result.mean)]]
    for key, metric in METRICS.items():
        values = [scores[key] for scores in result.mean.values()]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:.{metric.digits}f}" for value in values]
            rows.append([f"{key.replace('_', ' ')} {metric.unit}".strip() + ARROWS[metric.better], *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"| {row[0]:{widths[0]}} | {' | '.join(map(str.rjust, row[1:], widths[1:]))} |" for row in rows]


def render_markdown(result: Evaluation) -> str:
    """Return the report: means over cases, what the metrics mean, and the sheets."""
    measured = [key for key in METRICS if any(row[key] is not None for row in result.mean.values())]
    return "\n".join([
        f"# Evaluation: {result.dataset.resolve().name}", "", describe(result), "",
        "Mean over cases; scores.json has 95 % intervals by bootstrap over cases. ↑ higher is better, ↓ lower is.", "",
        *mean_table(result), "",
        *(f"- {key.replace('_', ' ')}: {METRICS[key].description}" for key in measured), "",
        *(f"![{path.stem}]({path.name})" for path in result.files if path.suffix == ".jpg"), "",
    ])  # fmt: skip


def draw_sheet(lines: dict[str, list[np.ndarray]], columns: int) -> np.ndarray:
    """Return a contact sheet: a line for each name with up to `columns` of its pictures, spread evenly."""
    rows = []
    for name, pictures in lines.items():
        caption = np.full((CELL_PX, CELL_PX, 3), 255, np.uint8)
        cv2.putText(caption, name, (8, CELL_PX // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (40, 40, 40), 1, cv2.LINE_AA)
        chosen = np.linspace(0, len(pictures) - 1, columns).round().astype(int)
        cells = [cv2.resize(pictures[k], (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA) for k in chosen]
        rows.append(np.concatenate([caption, *cells], axis=1))
    return np.concatenate(rows)
