"""The parts of a run side by side: what is read, made and written, the first and the last in threads of their own.

    with VideoWriter(...) as writer, Behind(writer.write, 2) as behind, Ahead(pictures, 2) as ahead:
        for picture in ahead:
            behind.put(make(picture))

Results and their order are those of a plain loop. However the block is left - at its end, by an error of any part, by
Ctrl-C - both threads have ended when what was opened before them is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_Self = TypeVar("_Self", bound="_Worker")
_END = object()


def _noop(*_: object) -> None:
    pass


class _Worker:
    """A thread between `__enter__` and `_leave`; `_room` bounds, and `_queue` carries, what goes from side to side."""

    def __init__(self, depth: int, stop: Callable[[], None]) -> None:
        # a semaphore is written in Python, and Ctrl-C in the middle of it would leave it locked
        self._slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth):
            self._slots.put(None)
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._stop = stop
        self._leaving = self._ended = False
        self._error: BaseException | None = None
        # waited for; a daemon, so that Ctrl-C in the moment of its start, or a second one, cannot hold up the exit
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self: _Self) -> _Self:
        try:
            self._thread.start()
        except BaseException as error:  # Ctrl-C comes here, too, and then the thread may have begun
            self._leaving = True
            self._wake()
            if isinstance(error, RuntimeError):  # there is no room for another thread
                raise MemoryError(str(error)) from error
            raise
        return self

    def _leave(self, *, early: bool) -> None:
        self._leaving = True
        self._wake()
        try:
            if early:
                self._stop()
        finally:
            self._thread.join()
            self._error = None  # its traceback leads back here

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # to be raised in the other one
            self._error = error
        self._ended = True
        self._wake()

    def _loop(self) -> None:
        raise NotImplementedError

    def _wake(self) -> None:
        """Let go whichever side waits for the other."""
        self._slots.put(None)
        self._queue.put(_END)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class PrefetchIterator(_Worker, Generic[T]):
    """Iterate over items that a thread makes, at most `depth` of them before they are asked for.

    A context manager, one pass. What the items raise is raised in their place.

    Args:
        items: iterated over, and closed, by the thread alone.
        depth: 1 or more.
        stop: called where the block is left before the last item, so that the next one is not waited for.
    """

    def __init__(self, items: Iterable[T], depth: int, *, stop: Callable[[], None] = _noop) -> None:
        super().__init__(depth, stop)
        self._items = items

    def __exit__(self, *_: object) -> None:
        self._leave(early=not self._ended)

    def __iter__(self) -> Iterator[T]:
        while (item := self._queue.get()) is not _END:
            self._slots.put(None)
            yield item
        self._check()

    def _loop(self) -> None:
        items = iter(self._items)
        self._slots.get()
        while not self._leaving and (item := next(items, _END)) is not _END:
            self._queue.put(item)
            self._slots.get()


class BackgroundWriter(_Worker, Generic[T]):
    """Has a thread do something with each item that is `put`, in order, while at most `depth` of them are not done.

    A context manager: at its end all is done, or, where it is left by an exception, what waits is dropped. What `do`
    raises is raised by the next `put`, or at the end.

    Args:
        do: called by the thread.
        depth: 1 or more.
        told: called by the user's thread, in `put` and at the end, with 1, 2, ... as items are done.
        stop: called where the block is left by an exception, so that the item in work is not waited for.
    """

    def __init__(
        self, write: Callable[[T], object], depth: int, *, on_written: Callable[[int], None] = _noop,
        stop: Callable[[], None] = _noop,
    ) -> None:  # fmt: skip
        super().__init__(depth, stop)
        self._write, self._depth, self._on_written = write, depth, on_written
        self._reported = 0
        self.written = 0

    def put(self, item: T) -> None:
        """Hand over the next item; waits while there is no room."""
        self._wait()
        self._queue.put(item)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        early = True
        try:
            if kind is None:
                for _ in range(self._depth):  # all the room there is: nothing is left to do
                    self._wait()
                early = False
        finally:
            self._leave(early=early)

    def _wait(self) -> None:
        self._check()
        self._slots.get()
        self._check()
        while self._reported < self.written:
            self._reported += 1
            self._on_written(self._reported)

    def _loop(self) -> None:
        while (item := self._queue.get()) is not _END and not self._leaving:
            self._write(item)
            self.written += 1
            self._slots.put(None)
