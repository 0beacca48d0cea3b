"""Reading, computing and writing in parallel: reading and writing run in threads of their own.

    with VideoWriter(...) as writer, BackgroundWriter(writer.write, 2) as background:
        with PrefetchIterator(images, 2) as inputs:
            for image in inputs:
                background.put(compute(image))

Results and their order are those of a plain loop. When the block is left - normally, by an error of any part, or by
Ctrl-C - both threads have ended before anything that was opened before them is closed.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import chain, cycle, islice
from operator import itemgetter
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
_Item = TypeVar("_Item")
_Self = TypeVar("_Self", bound="_Worker")
_END = object()


def _noop(*_: object) -> None:
    pass


class _Worker:
    """A thread that runs from `__enter__` to `_leave`; `_queue` carries items, and `_slots` bounds their number."""

    def __init__(self, depth: int, stop: Callable[[], None]) -> None:
        # not a semaphore, which is written in Python: Ctrl-C within it would leave it locked
        self._slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth):
            self._slots.put(None)
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._stop = stop
        self._leaving = self._ended = False
        self._error: BaseException | None = None
        # always joined; a daemon, so that Ctrl-C while it starts, or a second Ctrl-C, cannot block the exit
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self: _Self) -> _Self:
        try:
            self._thread.start()
        except BaseException as error:  # after Ctrl-C the thread may have started
            self._leaving = True
            self._wake()
            if isinstance(error, RuntimeError):  # the system allows no more threads
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
            self._error = None  # breaks the reference cycle through its traceback

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # raised again in the user's thread
            self._error = error
        self._ended = True
        self._wake()

    def _loop(self) -> None:
        raise NotImplementedError

    def _wake(self) -> None:
        """Wake the side that waits for the other."""
        self._slots.put(None)
        self._queue.put(_END)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class PrefetchIterator(_Worker, Generic[T]):
    """Iterator, for one pass in a `with` block, over items that a thread computes, at most `depth` of them ahead.

    An exception of `items` is raised at its place. On an early end `stop` is called, which must make `items` end.
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


class LatestIterator(PrefetchIterator[T]):
    """Iterator over the newest item that a thread has computed, for live sources; `dropped` counts others."""

    def __init__(self, items: Iterable[T], *, stop: Callable[[], None] = _noop) -> None:
        super().__init__(items, 0, stop=stop)
        self.dropped = 0

    def __iter__(self) -> Iterator[T]:
        while (item := self._queue.get()) is not _END:
            yield item
        self._check()

    def _loop(self) -> None:
        for item in self._items:
            if self._leaving:
                return
            with contextlib.suppress(Empty):
                self._queue.get_nowait()
                self.dropped += 1
            self._queue.put(item)


class BackgroundWriter(_Worker, Generic[T]):
    """Calls a function with each item in a thread, in order, while at most `depth` items are pending.

    A context manager: all items are written at its end; after an exception pending items are dropped. An exception of
    `write` is raised by the next `put`, or at the end.
    `stop` is called when the block is left by an exception; it must make `write` return soon.
    """

    def __init__(self, write: Callable[[T], object], depth: int, *, stop: Callable[[], None] = _noop) -> None:
        super().__init__(depth, stop)
        self._write, self._depth = write, depth

    def put(self, item: T) -> None:
        """Pass the next item; wait while `depth` items are pending."""
        self._wait()
        self._queue.put(item)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        early = True
        try:
            if kind is None:
                for _ in range(self._depth):  # when all slots are free, nothing is pending
                    self._wait()
                early = False
        finally:
            self._leave(early=early)

    def _wait(self) -> None:
        self._check()
        self._slots.get()
        self._check()

    def _loop(self) -> None:
        while (item := self._queue.get()) is not _END and not self._leaving:
            self._write(item)
            self._slots.put(None)


def map_latest(function: Callable[[_Item], T], items: Iterable[_Item], pool: ThreadPoolExecutor,
               workers: int) -> Generator[T, None, None]:  # fmt: skip
    """Yield `function` of live items, each taken by the next free thread; results later than newer ones are dropped.

    The workers share PyTorch's threads. The items must end before the pool does.
    """
    numbered, taking, threads = enumerate(items), threading.Lock(), torch.get_num_threads()

    def step() -> tuple[int, T] | None:
        torch.set_num_threads(max(1, threads // workers))
        with taking:
            taken = next(numbered, None)
        return None if taken is None else (taken[0], function(taken[1]))

    pending, newest = {pool.submit(step) for _ in range(workers)}, -1
    try:
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            results = [taken for future in done if (taken := future.result()) is not None]
            pending |= {pool.submit(step) for _ in results}
            for number, result in sorted(results, key=itemgetter(0)):
                if number > newest:
                    newest = number
                    yield result
    finally:
        torch.set_num_threads(threads)


def chain_parallel(parts: Iterable[Iterable[T]], workers: int) -> Generator[T, None, None]:
    """Yield the items of lazy parts in order; threads, which share PyTorch's threads, evaluate a part each.

    Parts are taken ahead, twice as many as there are workers, so that what taking one costs delays no worker. A single
    part is evaluated here, with all threads. The threads end with the generator: close it if it is not read to its end.
    """
    parts = iter(parts)
    first = list(islice(parts, 2 if workers > 1 else 0))
    if len(first) < 2:
        yield from chain.from_iterable(chain(first, parts))
        return
    threads, pending = torch.get_num_threads(), deque[SimpleQueue[tuple[list[T], BaseException | None]]]()
    share = max(1, threads // workers)

    def evaluate(task: tuple[Iterable[T], SimpleQueue[tuple[list[T], BaseException | None]]]) -> None:
        torch.get_num_threads()  # a thread's first call takes over the last number that any thread has set
        torch.set_num_threads(share)  # of this thread and of those that start later
        part, result = task
        try:
            result.put((list(part), None))
        except BaseException as error:  # raised again in the user's thread
            result.put(([], error))

    def take() -> list[T]:
        items, error = pending.popleft().get()
        if error is not None:
            raise error
        return items

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        pool = [stack.enter_context(BackgroundWriter(evaluate, 3)) for _ in range(workers)]
        parts = chain(first, parts)
        for worker in cycle(pool):
            torch.set_num_threads(share)  # threads that wait for each other would wait for the workers' cores, too
            part = next(parts, None)
            torch.set_num_threads(threads)
            if part is None:
                break
            pending.append(SimpleQueue())
            worker.put((part, pending[-1]))
            while pending and (len(pending) > 2 * workers or not pending[0].empty()):
                yield from take()
        while pending:
            yield from take()
