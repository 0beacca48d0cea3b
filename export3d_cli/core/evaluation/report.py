"""The report of an evaluation: tables, pictures, and one HTML file that holds them all and needs nothing else."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from export3d_cli import __version__
from export3d_cli.core.evaluation.metrics import METRICS
from export3d_cli.core.media.image import write_image
from export3d_cli.core.runtime.files import write_atomic

if TYPE_CHECKING:
    from export3d_cli.core.evaluation.evaluate import Evaluation

MAX_PICTURE_WIDTH_PX = 1400  # pixels of a picture inside the HTML, at most
BEST_CLASS = ' class="best"'
ARROWS = {"higher": "↑", "lower": "↓", "": ""}
SHEET_TITLES = {
    "best": "Best clip", "median": "Median clip", "worst": "Worst clip",
    "views": "Novel views of these sources, yaw -30 to 30 degrees",
}  # fmt: skip
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.15rem;margin-top:2.2rem}p.facts{color:#666;margin-top:.2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .7rem;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
thead th{border-bottom:2px solid #888;position:sticky;top:0;background:#fff}
td small{color:#777}td.best{font-weight:600}td small{font-weight:400}div.wide{overflow-x:auto}figure{margin:1rem 0}
img{max-width:100%;height:auto;display:block}
figcaption{color:#555;margin:.3rem 0}dt{font-weight:600}dd{margin:0 0 .4rem 1rem}
@media(prefers-color-scheme:dark){body,thead th{background:#16181b;color:#ddd}th,td{border-color:#3a3d42}
p.facts,figcaption,td small{color:#9aa0a6}}
"""


def write_report(result: Evaluation, pictures: dict[str, np.ndarray], out: Path) -> list[Path]:
    """Write scores.csv (a line for each clip and method), scores.json (all), report.html and the pictures as PNG."""
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
    """A name from a data set as a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def render_html(result: Evaluation, pictures: dict[str, np.ndarray]) -> str:
    """The report as HTML, with the pictures inside."""
    known = [key for key in METRICS if any(row[key] is not None for row in result.mean.values())]
    options = result.options
    facts = [
        f"{result.protocol}-reenactment", f"{result.cases} {'pairs' if options.cross else 'clips'}",
        f"{result.frames} frames, {options.take}", f"seed {options.seed}",
        *([f"identity by {Path(options.identity).name}"] if options.identity else []),
        result.device, f"{result.seconds:.0f} s", f"export3d {__version__}",
    ]  # fmt: skip
    title = escape(f"Evaluation: {result.dataset.resolve().name}")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width"><style>', STYLE, "</style></head><body>",
        f'<h1>{title}</h1><p class="facts">{escape(" · ".join(facts))}</p>',
        "<p>Mean over clips, with its 95 % interval by bootstrap over clips. ↑ higher is better, ↓ lower is.</p>",
        _means_table(result, known), *(_figure(name, picture) for name, picture in pictures.items()),
        _views_table(result), "<h2>Every clip</h2>", _clips_table(result, known), "<h2>What is measured</h2><dl>",
        *(f"<dt>{escape(_title(key))}</dt><dd>{escape(METRICS[key].description)}</dd>" for key in known),
        "</dl></body></html>",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part) + "\n"


def draw_caption(cell: np.ndarray, text: str) -> np.ndarray:
    """A copy of a picture with a line of dark text in its middle, as large as fits."""
    cell = cell.copy()
    if text:
        (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 1)
        scale = min(cell.shape[1] / 300, 0.9 * cell.shape[1] / width)
        at = (round((cell.shape[1] - scale * width) / 2), cell.shape[0] // 2)
        cv2.putText(cell, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (40, 40, 40), 1, cv2.LINE_AA)
    return cell


def _title(key: str) -> str:
    metric = METRICS[key]
    return " ".join(part for part in (key.replace("_", " "), metric.unit and f"({metric.unit})") if part)


def _format_value(key: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.{METRICS[key].digits}f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in r) + "</tr>" for r in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _means_table(result: Evaluation, known: list[str]) -> str:
    rows = []
    for key in known:
        values = {method: row[key] for method, row in result.mean.items()}
        better = METRICS[key].better
        told = {method: _format_value(key, v) for method, v in values.items()}
        there = {float(told[m]) for m, v in values.items() if v is not None and m != "repeat"}
        best = (max if better == "higher" else min)(there) if better and len(there) > 1 else None
        cells = [f"{escape(_title(key))} {ARROWS[better]}"]
        for method, value in values.items():
            bounds = result.interval[method][key]
            spread = "" if bounds is None else f" <small>{' to '.join(_format_value(key, b) for b in bounds)}</small>"
            wins = best is not None and value is not None and method != "repeat" and float(told[method]) == best
            cells.append(f"<td{BEST_CLASS if wins else ''}>{told[method]}{spread}</td>")
        rows.append(cells)
    return _table(["", *(escape(method) for method in result.mean)], rows)


def _views_table(result: Evaluation) -> str:
    if not result.views:
        return ""
    keys = [key for key in result.views[0] if key != "yaw" and any(view[key] is not None for view in result.views)]
    rows = [[f"{view['yaw']:+.0f}", *(_format_value(key, view[key]) for key in keys)] for view in result.views]
    return "<h2>Novel views</h2>" + _table(["yaw (deg)", *(escape(_title(key)) for key in keys)], rows)


def _clips_table(result: Evaluation, known: list[str]) -> str:
    rows = [
        [
            escape(row["case"]),
            escape(row["method"]),
            str(row["frames"]),
            *(_format_value(key, row.get(key)) for key in known),
        ]
        for row in result.clips
    ]
    return _table(["clip", "method", "frames", *(escape(key.replace("_", " ")) for key in known)], rows)


def _figure(name: str, picture: np.ndarray) -> str:
    place, _, clip = name.partition("-")
    title = SHEET_TITLES.get(place, "Pair")
    caption = f"{title}: {clip}" if clip else title
    if clip:
        caption += ". First the source; beside it the driver; below, what should come out where known, and the methods."
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
