"""Running ffmpeg: pipes that never wait for each other, and an end for a run that makes no progress."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from export3d_cli.core.runtime.errors import MediaError

STALL = 60.0  # seconds without a byte moved and without processor time, after which ffmpeg is taken for hung
BUSY = 10  # times as long where it works, or where the system does not tell whether it does
_LAST_WORDS = 5.0  # seconds for the messages of a program that has ended


class Process:
    """One ffmpeg run; its messages are drained by a thread so that neither side ever waits for the other.

    While we wait for it - not while it waits for us - a second thread looks after it: without progress it is killed,
    which ends our waiting, and `last_lines` says so.

    Args:
        command: program and arguments.
        stdin: whether we write to it.
        stdout: whether we read from it.
        out: the file that it writes: progress, too, as long as it changes.
    """

    def __init__(
        self, command: list[str], *, stdin: bool = False, stdout: bool = False, out: Path | None = None
    ) -> None:
        self._run = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._lines: deque[str] = deque(maxlen=20)
        self._moved, self._waiting, self._over = 0, False, threading.Event()
        self._pulse = Pulse(self._run.pid, out)
        self.stalled = False
        self._drain = threading.Thread(target=self._read_messages, daemon=True)
        try:
            self._drain.start()
            threading.Thread(target=self._watch, daemon=True).start()
        except BaseException as error:  # nobody else knows of it yet, and it would write on what is cleared away
            self._run.kill()
            self._run.wait()
            if isinstance(error, RuntimeError):  # there is no room for another thread
                raise MemoryError(str(error)) from error
            raise

    def read_into(self, view: memoryview) -> int:
        """Fill `view` from its output; the number of bytes that came before the end."""
        assert self._run.stdout is not None
        got = 0
        with self._wait_for_it():
            while got < len(view):
                count = self._run.stdout.readinto1(view[got:])  # type: ignore[attr-defined]
                if not count:
                    break
                got += count
                self._moved += count
        return got

    def write(self, data: memoryview) -> None:
        """Give it all of `data`; raises `OSError` when it takes no more."""
        with self._wait_for_it():
            for at in range(0, len(data), 1 << 16):
                self._moved += self._pipe.write(data[at : at + (1 << 16)])

    def close_input(self) -> None:
        """Tell it that nothing more comes."""
        with self._wait_for_it(), contextlib.suppress(BrokenPipeError):
            self._pipe.close()

    def wait(self) -> int:
        """The exit status, once ffmpeg and its messages have ended."""
        with self._wait_for_it():
            code = self._run.wait()
        self._over.set()
        self._drain.join(_LAST_WORDS)  # a program that a killed one has started may keep the pipe open
        return code

    def kill(self) -> None:
        """Leave no process and no open pipe behind; harmless after `wait`."""
        if self._run.poll() is None:
            self._run.kill()
        self.wait()
        for pipe in (self._run.stdin, self._run.stdout, self._run.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still in a write buffer has nowhere to go
                    pipe.close()

    def last_lines(self) -> str:
        """The end of what ffmpeg said, on one line."""
        if self.stalled:
            return self._pulse.says()
        code = self._run.poll() or 0
        silent = f"ffmpeg was ended by signal {-code}" if code < 0 else "ffmpeg gave no reason"
        return "; ".join(list(self._lines)[-4:]) or silent

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._run.stdin is not None
        return self._run.stdin

    @contextlib.contextmanager
    def _wait_for_it(self) -> Iterator[None]:
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _watch(self) -> None:
        while not self._over.wait(_tick()) and self._run.poll() is None:
            if not self._waiting:
                self._pulse.calm()
            elif self._pulse.stopped(self._moved):
                self.stalled = True
                self._run.kill()
                return

    def _read_messages(self) -> None:
        assert self._run.stderr is not None
        for line in self._run.stderr:
            text = line.decode("utf-8", "replace").strip()
            if text:
                self._lines.append(text[:300])


class Pulse:
    """Whether a process makes progress. Looks are counted, not the clock: a machine asleep, or Ctrl-Z, is no stall."""

    def __init__(self, pid: int, out: Path | None = None) -> None:
        self._pid, self._out = pid, out
        self._seen: tuple[int, int] | None = None
        self._worked: int | None = None
        self.calm()

    def calm(self) -> None:
        """Begin to count anew."""
        self._silent = self._idle = 0.0  # seconds without a byte; and without processor time, either

    def stopped(self, moved: int = 0) -> bool:
        """To be asked once a tick: whether it is hung, when `moved` bytes went through its pipes so far."""
        written = 0
        if self._out is not None:
            with contextlib.suppress(OSError):
                written = self._out.stat().st_mtime_ns
        if (moved, written) != self._seen:
            self._seen = (moved, written)
            self.calm()
        before, self._worked = self._worked, _work_of(self._pid)
        self._silent += _tick()
        self._idle = self._idle + _tick() if before is not None and before == self._worked else 0.0
        return self._idle >= STALL or self._silent >= BUSY * STALL

    def says(self) -> str:
        """What to tell when it has stopped."""
        return f"ffmpeg made no progress for {self._silent:.0f} s and was ended (try again, or convert the file first)"


def ask(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg for what it says; raises `MediaError` when it hangs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as run:
        pulse = Pulse(run.pid)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    out, err = run.communicate(timeout=_tick())
                    return subprocess.CompletedProcess(command, run.returncode, out, err)
                if pulse.stopped():
                    raise MediaError(f"{command[0]} does not answer: {pulse.says()}")
        except BaseException:
            run.kill()
            raise


def _tick() -> float:
    """Seconds between two looks."""
    return min(1.0, STALL / 4)


def _work_of(pid: int) -> int | None:
    """Processor time of a process, in the system's ticks; None where it is not told, or it waits for a disk."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "D" else int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return None
