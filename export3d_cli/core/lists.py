"""The lists of a data set: `manifest.jsonl`, a line a clip, and `rejected.jsonl`, with what was left out and why.

A shard keeps its own, `manifest-<i>of<n>.jsonl` and `rejected-<i>of<n>.jsonl`, until a run without a shard merges them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export3d_cli.core.errors import InputError
from export3d_cli.core.files import write_atomic

Line = dict[str, Any]


class Lists:
    """The lists of a data set, or of one shard of it, rewritten (atomically) after every input."""

    def __init__(self, out: Path, shard: tuple[int, int] | None) -> None:
        self.out, self.shard = out, shard
        others = {kind: sorted(out.glob(f"{kind}-*of*.jsonl")) for kind in ("manifest", "rejected")}
        self._merged = [] if shard else [path for paths in others.values() for path in paths]
        known = {
            kind: [line for path in (out / f"{kind}.jsonl", *others[kind]) for line in _read_lines(path)]
            for kind in others
        }
        self.finished = {str(line.get("source", line.get("id"))) for line in known["manifest"]}
        self.finished |= {str(line.get("source")) for line in known["rejected"] if not line.get("failed")}
        own = {kind: known[kind] if shard is None else _read_lines(self.path(kind)) for kind in others}
        self.lines = list({str(line["id"]): line for line in own["manifest"]}.values())
        self.rejected = [line for line in own["rejected"] if not line.get("failed")]  # those are tried again

    def path(self, kind: str) -> Path:
        """The file of a list."""
        return self.out / (f"{kind}-{self.shard[0]}of{self.shard[1]}.jsonl" if self.shard else f"{kind}.jsonl")

    def add(self, lines: list[Line], rejected: list[Line]) -> None:
        """Enter one input; the rejected clips last, for they tell that the input is finished."""
        self.lines += lines
        self.rejected += rejected
        if lines:
            self._write("manifest", self.lines)
        if rejected:
            self._write("rejected", self.rejected)

    def close(self) -> None:
        """Write the lists as they are in the end; the shards' own are in them now."""
        self._write("manifest", self.lines)
        if self.rejected or self.path("rejected").exists():
            self._write("rejected", self.rejected)
        for path in self._merged:
            path.unlink(missing_ok=True)

    def _write(self, kind: str, lines: list[Line]) -> None:
        ordered = sorted(lines, key=lambda line: str(line["id"]))
        with write_atomic(self.path(kind)) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in ordered), encoding="utf-8")


def _read_lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a manifest ({error}): choose another output folder") from error
    if not all(isinstance(line, dict) and "id" in line for line in lines):
        raise InputError(f"{path} is not a manifest (lines without an id): choose another output folder")
    return lines
