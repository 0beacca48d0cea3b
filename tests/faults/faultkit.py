"""Helpers of the fault tests: bad files, `export3d` in this process with limits, and child processes."""

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

CPU_LIMIT_S = 20  # processor time of a command with one bad file; it takes about one second
WALL_CLOCK_FACTOR = 15  # wall-clock limit as a multiple of the CPU limit, for busy machines
MAX_GROWTH_MIB = 1500  # memory that a command may allocate at its peak
ERROR_CODES = {  # documented exit codes per kind of input
    "image": {2, 3}, "video": {1, 2, 3}, "motion": {2}, "weights": {4}, "config": {2}, "manifest": {2}, "csv": {2},
}  # fmt: skip


@dataclass(frozen=True)
class BadFile:
    """A bad file: its reader, a name, and a function that writes it."""

    reader: str  # a key of ERROR_CODES
    name: str  # unique for its reader; the file name is `file`
    make: Callable[[Path], None]  # writes the bad file to this path
    file: str
    harmless: bool = False  # may be readable after all: then exit code 0 and a complete output

    def __str__(self) -> str:
        return f"{self.reader}-{self.name}"


@dataclass(frozen=True)
class CommandResult:
    """Result of a command."""

    exit_code: int
    stdout: str
    stderr: str
    exception: BaseException | None
    growth_mib: int  # peak memory minus memory before


class TookTooLongError(Exception):
    """A command exceeded its time limit."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise after `seconds` of CPU time or `WALL_CLOCK_FACTOR` times that by the clock; finally kill the process."""

    def raise_timeout(*_: object) -> None:
        raise TookTooLongError(f"not done after {seconds} s")

    before = {number: signal.signal(number, raise_timeout) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(WALL_CLOCK_FACTOR * seconds)
    faulthandler.dump_traceback_later(WALL_CLOCK_FACTOR * seconds + 60, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        for number, handler in before.items():
            signal.signal(number, handler)


def memory_mib(key: str = "VmRSS") -> int:
    """Return the memory of this process in MiB: current (VmRSS) or peak (VmHWM); 0 where /proc is missing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith(key)), 0)


def run(*args: object, seconds: int = CPU_LIMIT_S) -> CommandResult:
    """Run `export3d ARGS` in this process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory_mib()
    with time_limit(seconds):
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
    exception = None if isinstance(result.exception, SystemExit) else result.exception
    return CommandResult(result.exit_code, result.stdout, result.stderr, exception, memory_mib("VmHWM") - before)


def check_error(ended: CommandResult, codes: set[int]) -> None:
    """Check for a documented exit code, one line on stderr, no traceback and bounded memory."""
    if ended.exception is not None:
        raise AssertionError(f"traceback instead of an error: {ended.exception!r}") from ended.exception
    assert ended.exit_code in codes, (ended.exit_code, ended.stderr)
    if ended.exit_code:
        is_misuse = ended.stderr.startswith("Usage: ") and ended.stderr.count("Error: ") == 1
        assert is_misuse or (ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1), ended.stderr
        assert len(ended.stderr) < 2000, f"error line of {len(ended.stderr)} characters"
    assert ended.growth_mib < MAX_GROWTH_MIB, f"{ended.growth_mib} MiB"


def list_names(folder: Path) -> list[str]:
    """List the names in a folder, including hidden files."""
    return sorted(os.listdir(folder)) if folder.exists() else []


def command_line(*args: object) -> list[str]:
    """Return the command line of `export3d ARGS`."""
    return [sys.executable, "-m", "export3d_cli", *map(str, args)]


def spawn(args: Sequence[object], **more: Any) -> subprocess.Popen[bytes]:
    """Start `export3d ARGS` in a new session with captured output."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True} | more
    return subprocess.Popen(command_line(*args), **options)


def limit_resource(kind: int, limit: int) -> Callable[[], None]:
    """Return a `preexec_fn` that sets a resource limit."""
    return lambda: resource.setrlimit(kind, (limit, limit))


def session_processes(session: int, folder: Path) -> list[int]:
    """Return the running processes of a session (each `spawn` starts one), and encoders that write into a folder."""
    pids = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                writes = os.fsencode(folder) in (entry / "cmdline").read_bytes()  # encoders have their own session
                if (int(fields[3]) == session or writes) and fields[0] != "Z":
                    pids.append(int(entry.name))
    return pids
