"""The lists of a data set: `manifest.jsonl`, a line a clip, and `rejected.jsonl`, with what was left out and why.

A shard keeps its own, `manifest-<i>of<n>.jsonl` and `rejected-<i>of<n>.jsonl`, until a run without a shard merges them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import MAX_MANIFEST_BYTES, check_file, write_atomic

ManifestRow = dict[str, Any]


class DatasetManifest:
    """The lists of a data set, or of one shard of it: lines are added after every input, and sorted at the end."""

    def __init__(self, out: Path, shard: tuple[int, int] | None) -> None:
        self.out, self.shard = out, shard
        others = {kind: sorted(out.glob(f"{kind}-*of*.jsonl")) for kind in ("manifest", "rejected")}
        self._shard_files = [] if shard else [path for paths in others.values() for path in paths]
        known: dict[str, list[ManifestRow]] = {}
        torn: set[str] = set()
        for kind in others:
            known[kind] = []
            for path in (out / f"{kind}.jsonl", *others[kind]):
                lines, last = _read_rows(path)
                known[kind] += lines
                torn |= last
        for kind in known:  # a run was killed while it wrote: what it wrote last is done again
            known[kind] = [line for line in known[kind] if _source_of(line) not in torn]
        self.finished_sources = {_source_of(line) for line in known["manifest"]}
        self.finished_sources |= {_source_of(line) for line in known["rejected"] if not line.get("failed")}
        own = known
        if shard is not None:
            own = {kind: [x for x in _read_rows(self.path(kind))[0] if _source_of(x) not in torn] for kind in others}
        self.clips = list({str(line["id"]): line for line in own["manifest"]}.values())
        self.rejected = [line for line in own["rejected"] if not line.get("failed")]  # those are tried again
        self._cleaned = False

    def path(self, kind: str) -> Path:
        """The file of a list."""
        return self.out / (f"{kind}-{self.shard[0]}of{self.shard[1]}.jsonl" if self.shard else f"{kind}.jsonl")

    def add(self, clips: list[ManifestRow], rejected: list[ManifestRow]) -> None:
        """Enter one input; the rejected clips last, for they tell that the input is finished."""
        if not self._cleaned:  # without what the last run left half written
            self._write_all()
            self._cleaned = True
        self.clips += clips
        self.rejected += rejected
        for kind, new in (("manifest", clips), ("rejected", rejected)):
            if new:
                with self.path(kind).open("ab") as file:
                    file.write(_to_jsonl(new).encode())

    def close(self) -> None:
        """Write the lists as they are in the end; the shards' own are in them now."""
        self._write_all()
        for path in self._shard_files:
            path.unlink(missing_ok=True)

    def _write_all(self) -> None:
        for kind, lines in (("manifest", self.clips), ("rejected", self.rejected)):
            lines.sort(key=lambda line: str(line["id"]))
            if lines or kind == "manifest" or self.path(kind).exists():
                with write_atomic(self.path(kind)) as temporary:
                    temporary.write_text(_to_jsonl(lines), encoding="utf-8")


def _to_jsonl(lines: list[ManifestRow]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _source_of(line: ManifestRow) -> str:
    return str(line.get("source", line.get("id")))


def _read_rows(path: Path) -> tuple[list[ManifestRow], set[str]]:
    """The lines of a list; and the input entered last, if a line was left half written behind it."""
    if not path.exists():
        return [], set()
    try:
        check_file(path, MAX_MANIFEST_BYTES)
        whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
        try:
            lines = [json.loads(line) for line in (*whole.splitlines(), rest) if line.strip()]
            torn = False
        except ValueError:
            lines = [json.loads(line) for line in whole.splitlines() if line.strip()]
            torn = True
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a manifest ({str(error)[:200]}): choose another output folder") from error
    if not all(isinstance(line, dict) and "id" in line for line in lines):
        raise InputError(f"{path} is not a manifest (lines without an id): choose another output folder")
    return lines, {_source_of(lines[-1])} if torn and lines else set()
