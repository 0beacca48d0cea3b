"""The lists of a data set: `manifest.jsonl`, a line a clip, and `rejected.jsonl`, with what was left out and why.

A shard keeps its own, `manifest-<i>of<n>.jsonl` and `rejected-<i>of<n>.jsonl`, until a run without a shard merges them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import MAX_LIST, check_file, write_atomic

Line = dict[str, Any]


class Lists:
    """The lists of a data set, or of one shard of it: lines are added after every input, and sorted at the end."""

    def __init__(self, out: Path, shard: tuple[int, int] | None) -> None:
        self.out, self.shard = out, shard
        others = {kind: sorted(out.glob(f"{kind}-*of*.jsonl")) for kind in ("manifest", "rejected")}
        self._merged = [] if shard else [path for paths in others.values() for path in paths]
        known: dict[str, list[Line]] = {}
        torn: set[str] = set()
        for kind in others:
            known[kind] = []
            for path in (out / f"{kind}.jsonl", *others[kind]):
                lines, last = _read_lines(path)
                known[kind] += lines
                torn |= last
        for kind in known:  # a run was killed while it wrote: what it wrote last is done again
            known[kind] = [line for line in known[kind] if _source(line) not in torn]
        self.finished = {_source(line) for line in known["manifest"]}
        self.finished |= {_source(line) for line in known["rejected"] if not line.get("failed")}
        own = known
        if shard is not None:
            own = {kind: [x for x in _read_lines(self.path(kind))[0] if _source(x) not in torn] for kind in others}
        self.lines = list({str(line["id"]): line for line in own["manifest"]}.values())
        self.rejected = [line for line in own["rejected"] if not line.get("failed")]  # those are tried again
        self._begun = False

    def path(self, kind: str) -> Path:
        """The file of a list."""
        return self.out / (f"{kind}-{self.shard[0]}of{self.shard[1]}.jsonl" if self.shard else f"{kind}.jsonl")

    def add(self, lines: list[Line], rejected: list[Line]) -> None:
        """Enter one input; the rejected clips last, for they tell that the input is finished."""
        if not self._begun:  # without what the last run left half written
            self._write_all()
            self._begun = True
        self.lines += lines
        self.rejected += rejected
        for kind, new in (("manifest", lines), ("rejected", rejected)):
            if new:
                with self.path(kind).open("ab") as file:
                    file.write(_text(new).encode())

    def close(self) -> None:
        """Write the lists as they are in the end; the shards' own are in them now."""
        self._write_all()
        for path in self._merged:
            path.unlink(missing_ok=True)

    def _write_all(self) -> None:
        for kind, lines in (("manifest", self.lines), ("rejected", self.rejected)):
            lines.sort(key=lambda line: str(line["id"]))
            if lines or kind == "manifest" or self.path(kind).exists():
                with write_atomic(self.path(kind)) as temporary:
                    temporary.write_text(_text(lines), encoding="utf-8")


def _text(lines: list[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _source(line: Line) -> str:
    return str(line.get("source", line.get("id")))


def _read_lines(path: Path) -> tuple[list[Line], set[str]]:
    """The lines of a list; and the input entered last, if a line was left half written behind it."""
    if not path.exists():
        return [], set()
    try:
        check_file(path, MAX_LIST)
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
    return lines, {_source(lines[-1])} if torn and lines else set()
