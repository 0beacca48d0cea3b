"""The lists of a data set: `manifest.jsonl`, one row per clip, and `rejected.jsonl`, one row per rejected clip.

Each shard writes `manifest-<i>of<n>.jsonl` and `rejected-<i>of<n>.jsonl`; a run without a shard merges them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import MAX_MANIFEST_BYTES, check_file, write_atomic

ManifestRow = dict[str, Any]


class DatasetManifest:
    """The lists of a data set or of one shard: rows are appended after every input and sorted at the end."""

    def __init__(self, out: Path, shard: tuple[int, int] | None) -> None:
        self.out, self.shard = out, shard
        shard_files = {kind: sorted(out.glob(f"{kind}-*of*.jsonl")) for kind in ("manifest", "rejected")}
        self._shard_files = [] if shard else [path for paths in shard_files.values() for path in paths]
        all_rows: dict[str, list[ManifestRow]] = {}
        torn_sources: set[str] = set()
        for kind, paths in shard_files.items():
            all_rows[kind] = []
            for path in (out / f"{kind}.jsonl", *paths):
                rows, torn = _read_rows(path)
                all_rows[kind] += rows
                torn_sources |= torn
        for kind, rows in all_rows.items():  # the last input of a run that was killed while writing is done again
            all_rows[kind] = [row for row in rows if _source_of(row) not in torn_sources]
        self.finished_sources = {_source_of(row) for row in all_rows["manifest"]}
        self.finished_sources |= {_source_of(row) for row in all_rows["rejected"] if not row.get("failed")}
        if shard is not None:
            for kind in shard_files:
                rows, _ = _read_rows(self.path(kind))
                all_rows[kind] = [row for row in rows if _source_of(row) not in torn_sources]
        self.clips = list({str(row["id"]): row for row in all_rows["manifest"]}.values())
        self.rejected = [row for row in all_rows["rejected"] if not row.get("failed")]  # failed inputs are tried again
        self._cleaned = False

    def path(self, kind: str) -> Path:
        """Return the file of the list `kind`, "manifest" or "rejected"."""
        return self.out / (f"{kind}-{self.shard[0]}of{self.shard[1]}.jsonl" if self.shard else f"{kind}.jsonl")

    def add(self, clips: list[ManifestRow], rejected: list[ManifestRow]) -> None:
        """Append the rows of one input; the rejected ones last, because they mark the input as finished."""
        if not self._cleaned:  # drop the incomplete row of an interrupted run
            self._write_all()
            self._cleaned = True
        self.clips += clips
        self.rejected += rejected
        for kind, rows in (("manifest", clips), ("rejected", rejected)):
            if rows:
                with self.path(kind).open("ab") as file:
                    file.write(_to_jsonl(rows).encode())

    def close(self) -> None:
        """Write the sorted lists and delete the shard files that were merged into them."""
        self._write_all()
        for path in self._shard_files:
            path.unlink(missing_ok=True)

    def _write_all(self) -> None:
        for kind, rows in (("manifest", self.clips), ("rejected", self.rejected)):
            rows.sort(key=lambda row: str(row["id"]))
            if rows or kind == "manifest" or self.path(kind).exists():
                with write_atomic(self.path(kind)) as temporary:
                    temporary.write_text(_to_jsonl(rows), encoding="utf-8")


def _to_jsonl(rows: list[ManifestRow]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _source_of(row: ManifestRow) -> str:
    return str(row.get("source", row.get("id")))


def _read_rows(path: Path) -> tuple[list[ManifestRow], set[str]]:
    """Return the rows of a list, and the last source if an incomplete row follows it."""
    if not path.exists():
        return [], set()
    try:
        check_file(path, MAX_MANIFEST_BYTES)
        complete, _, last = path.read_text(encoding="utf-8").rpartition("\n")
        try:
            rows = [json.loads(line) for line in (*complete.splitlines(), last) if line.strip()]
            torn = False
        except ValueError:
            rows = [json.loads(line) for line in complete.splitlines() if line.strip()]
            torn = True
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a manifest ({str(error)[:200]}): choose another output folder") from error
    if not all(isinstance(row, dict) and "id" in row for row in rows):
        raise InputError(f"{path} is not a manifest (rows without an id): choose another output folder")
    return rows, {_source_of(rows[-1])} if torn and rows else set()
