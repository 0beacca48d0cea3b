"""ffmpeg subprocesses with pipes that cannot deadlock; one that hangs is killed."""

import contextlib
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from export3d_cli.core.runtime.errors import MediaError

STALL_S = 300.0  # ffmpeg counts as hung after this time without input or output; seeking in a long AVI takes minutes
_DRAIN_TIMEOUT_S = 5.0  # wait for the last messages of a process that has ended


class FfmpegProcess:
    """A running ffmpeg process. One thread drains its stderr, so that a full pipe cannot block it.

    A second thread kills the process if it makes no progress while the caller waits for it (not while it waits for the
    caller); `error_summary` then gives the reason. Changes of `output_file`, which the process writes, are progress.
    """

    def __init__(self, command: list[str], *, stdin: bool = False, stdout: bool = False,
                 output_file: Path | None = None) -> None:  # fmt: skip
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        # an encoder runs in its own process group, so that Ctrl-C does not stop it: it ends when its input ends
        self._popen = subprocess.Popen(command, stdin=pipe if stdin else none, stdout=pipe if stdout else none,
                                       stderr=pipe, start_new_session=stdin)  # fmt: skip
        self._output_file = output_file
        self._messages: deque[str] = deque(maxlen=4)
        self._bytes_moved, self._waiting, self._ended = 0, False, threading.Event()
        self.stalled = False
        self._message_thread = threading.Thread(target=self._read_messages, daemon=True)
        self._message_thread.start()
        threading.Thread(target=self._kill_if_stalled, daemon=True).start()

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
            return _stall_message()
        code = self._popen.poll() or 0
        no_message = f"ffmpeg was killed by signal {-code}" if code < 0 else "ffmpeg gave no reason"
        return "; ".join(self._messages) or no_message

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
        """Count polls without progress, not seconds: a suspended machine or Ctrl-Z is no stall."""
        interval = min(1.0, STALL_S / 8)
        polls, last_progress = 0, (0, 0)
        while not self._ended.wait(interval) and self._popen.poll() is None:
            written = 0
            with contextlib.suppress(OSError):
                written = self._output_file.stat().st_mtime_ns if self._output_file else 0
            progress = (self._bytes_moved, written)
            polls = polls + 1 if self._waiting and progress == last_progress else 0
            last_progress = progress
            if polls * interval >= STALL_S:
                self.stalled = True
                self._popen.kill()

    def _read_messages(self) -> None:
        assert self._popen.stderr is not None
        for line in self._popen.stderr:
            if text := line.decode("utf-8", "replace").strip():
                self._messages.append(text[:300])


def run_ffmpeg(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg to its end and return its output; raise `MediaError` if it hangs."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=STALL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise MediaError(f"{command[0]} does not answer: {_stall_message()}") from error


def _stall_message() -> str:
    return f"ffmpeg made no progress for {STALL_S:.0f} s and was killed (try again, or convert the file first)"
