"""The lists of a data set: `manifest.jsonl`, one row per clip, and `rejected.jsonl`, one row per rejected clip.

Every finished input leaves its rows in `inputs/<id>.jsonl`, and both lists are made from these files. So an interrupted
run loses one input only, and several runs (shards) can fill one data set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import read_rows, write_atomic

ManifestRow = dict[str, Any]


class DatasetManifest:
    """The rows of a data set when this object is made."""

    def __init__(self, out: Path) -> None:
        self.out = out
        paths = [out / "manifest.jsonl", *sorted((out / "inputs").glob("[!.]*.jsonl"))]
        rows = {row["id"]: row for path in paths if path.exists() for row in _read_rows(path)}
        self.clips = [row for _, row in sorted(rows.items()) if "reason" not in row]
        self.rejected = [row for _, row in sorted(rows.items()) if "reason" in row]
        failed = {_source(row) for row in self.rejected if row.get("failed")}  # the next run tries them again
        self.finished_sources = {_source(row) for row in rows.values()} - failed

    def write(self) -> None:
        """Write both lists."""
        write_rows(self.out / "manifest.jsonl", self.clips)
        write_rows(self.out / "rejected.jsonl", self.rejected)


def write_rows(path: Path, rows: list[ManifestRow]) -> None:
    """Write rows, one a line."""
    with write_atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _source(row: ManifestRow) -> str:
    return str(row.get("source", row["id"]))


def _read_rows(path: Path) -> list[ManifestRow]:
    try:
        return read_rows(path)
    except (InputError, ValueError) as error:
        raise InputError(f"{path} is not a manifest ({str(error)[:200]}): choose another output folder") from error
