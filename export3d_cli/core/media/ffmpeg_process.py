"""ffmpeg subprocesses with pipes that cannot deadlock and a watchdog that kills a hung process."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from export3d_cli.core.runtime.errors import MediaError

STALL_S = 60.0  # ffmpeg counts as hung after this time without I/O and without CPU time
BUSY_FACTOR = 10  # times STALL_S without I/O if ffmpeg uses CPU time, or if its CPU time is unknown
_DRAIN_TIMEOUT_S = 5.0  # wait for the last messages of a process that has ended


class FfmpegProcess:
    """A running ffmpeg process. One thread drains its stderr, so that a full pipe cannot block it.

    A second thread kills the process if it makes no progress while the caller waits for it (not while it waits for
    the caller). The caller's wait then ends, and `error_summary` gives the reason.

    Args:
        command: program and arguments.
        stdin: open a pipe to the process.
        stdout: open a pipe from the process.
        output_file: file that the process writes; changes of it count as progress.
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
        except BaseException as error:  # the caller has no object yet on which to call `kill`
            self._popen.kill()
            self._popen.wait()
            if isinstance(error, RuntimeError):  # no memory for another thread
                raise MemoryError(str(error)) from error
            raise

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer` from stdout; return the number of bytes read, fewer than its size at the end of the stream."""
        assert self._popen.stdout is not None
        filled = 0
        with self._watched_wait():
            while filled < len(buffer):
                count = self._popen.stdout.readinto1(buffer[filled:])  # type: ignore[attr-defined]
                if not count:
                    break
                filled += count
                self._bytes_moved += count
        return filled

    def write(self, data: memoryview) -> None:
        """Write all of `data` to stdin; raise `OSError` if the process has closed it."""
        with self._watched_wait():
            for start in range(0, len(data), 1 << 16):
                self._bytes_moved += self._stdin.write(data[start : start + (1 << 16)])

    def close_input(self) -> None:
        """Close stdin: end of the input."""
        with self._watched_wait(), contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def wait(self) -> int:
        """Wait for the end of the process and of its messages; return the exit status."""
        with self._watched_wait():
            code = self._popen.wait()
        self._ended.set()
        self._message_thread.join(_DRAIN_TIMEOUT_S)  # a child of a killed process can keep the pipe open
        return code

    def kill(self) -> None:
        """Kill the process if it still runs and close the pipes; may be called after `wait`."""
        if self._popen.poll() is None:
            self._popen.kill()
        self.wait()
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # flushing the write buffer fails if the process is dead
                    pipe.close()

    def error_summary(self) -> str:
        """Return ffmpeg's last messages, or why there are none, on one line."""
        if self.stalled:
            return self._stall_detector.message()
        code = self._popen.poll() or 0
        no_message = f"ffmpeg was killed by signal {-code}" if code < 0 else "ffmpeg gave no reason"
        return "; ".join(list(self._messages)[-4:]) or no_message

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
    """Detects that a process makes no progress.

    Time is counted in polls, not by the clock, so that a suspended machine or Ctrl-Z is no stall.
    """

    def __init__(self, pid: int, output_file: Path | None = None) -> None:
        self._pid, self._output_file = pid, output_file
        self._last_progress: tuple[int, int] | None = None
        self._cpu_ticks: int | None = None
        self.reset()

    def reset(self) -> None:
        """Restart both counters."""
        self._seconds_without_bytes = 0.0
        self._seconds_without_cpu = 0.0

    def has_stalled(self, bytes_moved: int = 0) -> bool:
        """Return whether the process hangs. Call it once per poll; `bytes_moved`: total through its pipes so far."""
        output_time = 0
        if self._output_file is not None:
            with contextlib.suppress(OSError):
                output_time = self._output_file.stat().st_mtime_ns
        if (bytes_moved, output_time) != self._last_progress:
            self._last_progress = (bytes_moved, output_time)
            self.reset()
        before, self._cpu_ticks = self._cpu_ticks, _cpu_ticks_of(self._pid)
        self._seconds_without_bytes += _poll_interval()
        self._seconds_without_cpu = (
            self._seconds_without_cpu + _poll_interval() if before is not None and before == self._cpu_ticks else 0.0
        )
        return self._seconds_without_cpu >= STALL_S or self._seconds_without_bytes >= BUSY_FACTOR * STALL_S

    def message(self) -> str:
        """Return the error text for a stalled process."""
        seconds = f"{self._seconds_without_bytes:.0f} s"
        return f"ffmpeg made no progress for {seconds} and was killed (try again, or convert the file first)"


def run_ffmpeg(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg to its end and return its output; raise `MediaError` if it hangs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as process:
        detector = StallDetector(process.pid)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    out, err = process.communicate(timeout=_poll_interval())
                    return subprocess.CompletedProcess(command, process.returncode, out, err)
                if detector.has_stalled():
                    raise MediaError(f"{command[0]} does not answer: {detector.message()}")
        except BaseException:
            process.kill()
            raise


def _poll_interval() -> float:
    """Return the seconds between two polls."""
    return min(1.0, STALL_S / 4)


def _cpu_ticks_of(pid: int) -> int | None:
    """Return the CPU time of a process in clock ticks; None if unknown (no /proc) or if it waits for a disk."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "D" else int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return None
