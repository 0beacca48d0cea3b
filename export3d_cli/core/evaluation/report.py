"""Writes an evaluation: scores.csv, scores.json, pictures, and a self-contained report.html."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
from html import escape
from pathlib import Path

import cv2
import numpy as np

from export3d_cli import __version__
from export3d_cli.core.evaluation.metrics import METRICS
from export3d_cli.core.evaluation.result import Evaluation
from export3d_cli.core.media.image import write_image
from export3d_cli.core.runtime.files import write_atomic

MAX_PICTURE_WIDTH_PX = 1400  # of the pictures inside the HTML
ARROWS = {"higher": "↑", "lower": "↓", "": ""}
SHEET_TITLES = {
    "best": "Best clip", "median": "Median clip", "worst": "Worst clip",
    "views": "Novel views of the same sources, yaw -30 to 30 degrees",
}  # fmt: skip
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:1100px;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
td small,figcaption{color:#777}figure{margin:1rem 0}img{max-width:100%;height:auto;display:block}dt{font-weight:600}
"""


def write_report(result: Evaluation, pictures: dict[str, np.ndarray], out: Path) -> list[Path]:
    """Write scores.csv (one row per clip and method), scores.json (all), report.html and the pictures as PNG."""
    files = [out / "scores.csv", out / "scores.json", out / "report.html", *(out / f"{n}.png" for n in pictures)]
    with write_atomic(files[0]) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["case", "method", "frames", *METRICS], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "case": escape_csv_cell(str(row["case"]))} for row in result.clips)
    facts = dataclasses.asdict(dataclasses.replace(result, files=files))
    with write_atomic(files[1]) as temporary:
        temporary.write_text(json.dumps(facts, default=str, indent=1) + "\n", encoding="utf-8")
    with write_atomic(files[2]) as temporary:
        temporary.write_text(render_html(result, pictures), encoding="utf-8")
    for path, picture in zip(files[3:], pictures.values(), strict=True):
        write_image(path, picture)
    return files


def escape_csv_cell(text: str) -> str:
    """Quote a name from a data set so that no spreadsheet runs it as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def render_html(result: Evaluation, pictures: dict[str, np.ndarray]) -> str:
    """Return the report as HTML, with the pictures inside."""
    keys = [key for key in METRICS if any(row[key] is not None for row in result.mean.values())]
    options = result.options
    facts = [
        f"{result.protocol}-reenactment", f"{result.cases} {'pairs' if options.cross else 'clips'}",
        f"{result.frames} frames, {options.take}", f"seed {options.seed}",
        *([f"quality {result.quality}, smoothing {options.smooth}"] if options.model else []),
        *([f"identity by {Path(options.identity).name}"] if options.identity else []),
        result.device, f"{result.seconds:.0f} s", f"export3d {__version__}",
    ]  # fmt: skip
    title = escape(f"Evaluation: {result.dataset.resolve().name}")
    means = [[f"{_title(key)} {ARROWS[METRICS[key].better]}", *_mean_cells(result, key)] for key in keys]
    view_keys = [key for key in METRICS if any(view.get(key) is not None for view in result.views)]
    views = [[f"{view['yaw']:+.0f}", *(_format_value(key, view[key]) for key in view_keys)] for view in result.views]
    clips = [
        [escape(row["case"]), escape(row["method"]), str(row["frames"]), *(_format_value(k, row.get(k)) for k in keys)]
        for row in result.clips
    ]
    return "\n".join([
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{title}</h1><p>{escape(' · '.join(facts))}</p>",
        "<p>Mean over clips, with its 95 % interval by bootstrap over clips. ↑ higher is better, ↓ lower is.</p>",
        _table(["", *map(escape, result.mean)], means),
        *(_figure(name, picture) for name, picture in pictures.items()),
        *(["<h2>Novel views</h2>", _table(["yaw (deg)", *map(_title, view_keys)], views)] if views else []),
        "<h2>All clips</h2>", _table(["clip", "method", "frames", *map(_title, keys)], clips),
        "<h2>Metrics</h2><dl>",
        *(f"<dt>{_title(key)}</dt><dd>{escape(METRICS[key].description)}</dd>" for key in keys),
        "</dl></body></html>\n",
    ])  # fmt: skip


def draw_caption(cell: np.ndarray, text: str) -> np.ndarray:
    """Return a copy of a picture with a line of dark text across its middle, as large as fits."""
    cell = cell.copy()
    if text:
        (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 1)
        scale = min(cell.shape[1] / 300, 0.9 * cell.shape[1] / width)
        position = (round((cell.shape[1] - scale * width) / 2), cell.shape[0] // 2)
        cv2.putText(cell, text, position, cv2.FONT_HERSHEY_SIMPLEX, scale, (40, 40, 40), 1, cv2.LINE_AA)
    return cell


def _title(key: str) -> str:
    metric = METRICS[key]
    return " ".join(part for part in (key.replace("_", " "), metric.unit and f"({metric.unit})") if part)


def _format_value(key: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.{METRICS[key].digits}f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table of cells that are HTML already."""
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    header = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><thead><tr>{header}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _mean_cells(result: Evaluation, key: str) -> list[str]:
    """Return a metric's mean and interval for each method, the best of the methods in bold."""
    texts = {method: _format_value(key, row[key]) for method, row in result.mean.items()}
    values = [float(texts[m]) for m, row in result.mean.items() if row[key] is not None and m != "repeat"]
    better = METRICS[key].better
    best = (max if better == "higher" else min)(values) if better and len(values) > 1 else None
    cells = []
    for method, text in texts.items():
        bold = method != "repeat" and result.mean[method][key] is not None and best == float(text)
        cell, bounds = f"<b>{text}</b>" if bold else text, result.interval[method][key]
        cells.append(cell + (f" <small>{' to '.join(_format_value(key, b) for b in bounds)}</small>" if bounds else ""))
    return cells


def _figure(name: str, picture: np.ndarray) -> str:
    place, _, clip = name.partition("-")
    title = SHEET_TITLES.get(place, "Pair")
    caption = f"{title}: {clip}" if clip else title
    if clip:
        caption += ". First the source, to its right the driver; below, the ground truth if known, and the methods."
    data = base64.b64encode(_encode_jpeg(picture)).decode()
    return (
        f'<figure><h2>{escape(title)}</h2><img alt="{escape(caption)}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _encode_jpeg(picture: np.ndarray) -> bytes:
    scale = MAX_PICTURE_WIDTH_PX / picture.shape[1]
    if scale < 1:
        size = (MAX_PICTURE_WIDTH_PX, round(picture.shape[0] * scale))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 88])
    return data.tobytes()
