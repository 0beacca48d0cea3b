"""What the fault tests share: a case of bad input, and running `export3d` inside this process within bounds."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from export3d_cli.main import cli

SECONDS = 20  # of processor time that a command may take with one bad file; it takes about one
PATIENCE = 15  # times as long it may take by the clock, on a busy machine
GROWTH = 1500  # MiB that it may take beyond what the process has
CODES = {"image": {2, 3}, "video": {1, 2, 3}, "motion": {2}, "weights": {4}, "config": {2}, "manifest": {2}, "csv": {2}}


@dataclass(frozen=True)
class Bad:
    """One bad file: who reads it, a name, and how it is made in an empty folder."""

    reader: str  # a key of CODES
    name: str  # unique within its reader; the file's name is `file`
    make: Callable[[Path], None]  # given the path that is to be the bad file
    file: str
    harmless: bool = False  # may turn out to be readable all the same: then exit 0 and a whole output

    def __str__(self) -> str:
        return f"{self.reader}-{self.name}"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    exception: BaseException | None
    growth: int  # MiB of memory at its peak, beyond what was there before


class TookTooLongError(Exception):
    """A command did not end in time."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise after so many seconds of processor time, or `PATIENCE` times as many by the clock; at last, end it all."""

    def late(*_: object) -> None:
        raise TookTooLongError(f"not done after {seconds} s")

    before = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(PATIENCE * seconds)
    faulthandler.dump_traceback_later(PATIENCE * seconds + 60, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        for number, handler in before.items():
            signal.signal(number, handler)


def memory(key: str = "VmRSS") -> int:
    """MiB of this process: now (VmRSS) or at most (VmHWM); 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith(key)), 0)


def run(*args: object, seconds: int = SECONDS) -> Ended:
    """`export3d ARGS` in this process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = memory()
    with within(seconds):
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
    exception = None if isinstance(result.exception, SystemExit) else result.exception
    return Ended(result.exit_code, result.stdout, result.stderr, exception, memory("VmHWM") - before)


def check_error(ended: Ended, codes: set[int]) -> None:
    """Our error: a documented exit code, one line on stderr, no traceback, bounded memory."""
    if ended.exception is not None:
        raise AssertionError(f"traceback instead of an error: {ended.exception!r}") from ended.exception
    assert ended.code in codes, (ended.code, ended.err)
    if ended.code:
        is_misuse = ended.err.startswith("Usage: ") and ended.err.count("Error: ") == 1
        assert is_misuse or (ended.err.startswith("error: ") and ended.err.count("\n") == 1), ended.err
        assert len(ended.err) < 2000, f"a line of {len(ended.err)} characters"
    assert ended.growth < GROWTH, f"{ended.growth} MiB"


def left(folder: Path) -> list[str]:
    """Names of all that is in a folder, hidden files too."""
    return sorted(os.listdir(folder)) if folder.exists() else []


def command(*args: object) -> list[str]:
    """`export3d ARGS` for a process of its own."""
    return [sys.executable, "-m", "export3d_cli", *map(str, args)]


def spawn(args: Sequence[object], **more: Any) -> subprocess.Popen[bytes]:
    """Start `export3d ARGS`, its messages kept."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True} | more
    return subprocess.Popen(command(*args), **options)


def limited(kind: int, limit: int) -> Callable[[], None]:
    """For `preexec_fn`: a resource limit."""
    return lambda: resource.setrlimit(kind, (limit, limit))


def descendants(session: int) -> list[int]:
    """Processes of a session (each `spawn` starts one) that are still there."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry.name))
    return found
