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

STALL_S = 60.0  # seconds without a byte moved and without processor time, after which ffmpeg is taken for hung
BUSY_FACTOR = 10  # times as long where it works, or where the system does not tell whether it does
_DRAIN_TIMEOUT_S = 5.0  # seconds for the messages of a program that has ended


class FfmpegProcess:
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
        self, command: list[str], *, stdin: bool = False, stdout: bool = False, output_file: Path | None = None
    ) -> None:
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._messages: deque[str] = deque(maxlen=20)
        self._bytes_moved, self._waiting, self._ended = 0, False, threading.Event()
        self._stall_detector = StallDetector(self._popen.pid, output_file)
        self.stalled = False
        self._message_thread = threading.Thread(target=self._read_messages, daemon=True)
        try:
            self._message_thread.start()
            threading.Thread(target=self._kill_if_stalled, daemon=True).start()
        except BaseException as error:  # nobody else knows of it yet, and it would write on what is cleared away
            self._popen.kill()
            self._popen.wait()
            if isinstance(error, RuntimeError):  # there is no room for another thread
                raise MemoryError(str(error)) from error
            raise

    def read_into(self, buffer: memoryview) -> int:
        """Fill `view` from its output; the number of bytes that came before the end."""
        assert self._popen.stdout is not None
        got = 0
        with self._watched_wait():
            while got < len(buffer):
                count = self._popen.stdout.readinto1(buffer[got:])  # type: ignore[attr-defined]
                if not count:
                    break
                got += count
                self._bytes_moved += count
        return got

    def write(self, data: memoryview) -> None:
        """Give it all of `data`; raises `OSError` when it takes no more."""
        with self._watched_wait():
            for at in range(0, len(data), 1 << 16):
                self._bytes_moved += self._stdin.write(data[at : at + (1 << 16)])

    def close_input(self) -> None:
        """Tell it that nothing more comes."""
        with self._watched_wait(), contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def wait(self) -> int:
        """The exit status, once ffmpeg and its messages have ended."""
        with self._watched_wait():
            code = self._popen.wait()
        self._ended.set()
        self._message_thread.join(_DRAIN_TIMEOUT_S)  # a program that a killed one has started may keep the pipe open
        return code

    def kill(self) -> None:
        """Leave no process and no open pipe behind; harmless after `wait`."""
        if self._popen.poll() is None:
            self._popen.kill()
        self.wait()
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still in a write buffer has nowhere to go
                    pipe.close()

    def error_summary(self) -> str:
        """The end of what ffmpeg said, on one line."""
        if self.stalled:
            return self._stall_detector.message()
        code = self._popen.poll() or 0
        silent = f"ffmpeg was ended by signal {-code}" if code < 0 else "ffmpeg gave no reason"
        return "; ".join(list(self._messages)[-4:]) or silent

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._popen.stdin is not None
        return self._popen.stdin

    @contextlib.contextmanager
    def _watched_wait(self) -> Iterator[None]:
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _kill_if_stalled(self) -> None:
        while not self._ended.wait(_poll_interval()) and self._popen.poll() is None:
            if not self._waiting:
                self._stall_detector.reset()
            elif self._stall_detector.has_stalled(self._bytes_moved):
                self.stalled = True
                self._popen.kill()
                return

    def _read_messages(self) -> None:
        assert self._popen.stderr is not None
        for line in self._popen.stderr:
            text = line.decode("utf-8", "replace").strip()
            if text:
                self._messages.append(text[:300])


class StallDetector:
    """Whether a process makes progress. Looks are counted, not the clock: a machine asleep, or Ctrl-Z, is no stall."""

    def __init__(self, pid: int, output_file: Path | None = None) -> None:
        self._pid, self._output_file = pid, output_file
        self._last_progress: tuple[int, int] | None = None
        self._cpu_ticks: int | None = None
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self._seconds_without_bytes = self._seconds_without_cpu = (
            0.0  # seconds without a byte; and without processor time, either
        )

    def has_stalled(self, bytes_moved: int = 0) -> bool:
        """To be asked once a tick: whether it is hung, when `moved` bytes went through its pipes so far."""
        written = 0
        if self._output_file is not None:
            with contextlib.suppress(OSError):
                written = self._output_file.stat().st_mtime_ns
        if (bytes_moved, written) != self._last_progress:
            self._last_progress = (bytes_moved, written)
            self.reset()
        before, self._cpu_ticks = self._cpu_ticks, _cpu_ticks_of(self._pid)
        self._seconds_without_bytes += _poll_interval()
        self._seconds_without_cpu = (
            self._seconds_without_cpu + _poll_interval() if before is not None and before == self._cpu_ticks else 0.0
        )
        return self._seconds_without_cpu >= STALL_S or self._seconds_without_bytes >= BUSY_FACTOR * STALL_S

    def message(self) -> str:
        """What to tell when it has stopped."""
        return f"ffmpeg made no progress for {self._seconds_without_bytes:.0f} s and was ended (try again, or convert the file first)"


def run_ffmpeg(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg for what it says; raises `MediaError` when it hangs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as run:
        pulse = StallDetector(run.pid)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    out, err = run.communicate(timeout=_poll_interval())
                    return subprocess.CompletedProcess(command, run.returncode, out, err)
                if pulse.has_stalled():
                    raise MediaError(f"{command[0]} does not answer: {pulse.message()}")
        except BaseException:
            run.kill()
            raise


def _poll_interval() -> float:
    """Seconds between two looks."""
    return min(1.0, STALL_S / 4)


def _cpu_ticks_of(pid: int) -> int | None:
    """Processor time of a process, in the system's ticks; None where it is not told, or it waits for a disk."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "D" else int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return None
