"""Reading and writing in threads: order, look-ahead limits, errors, and threads that end when the block is left."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.batch import reenact_all
from export3d_cli.core.animation.compositor import Compositor, load_photo
from export3d_cli.core.animation.driver_stream import DriverStream
from export3d_cli.core.animation.novel_view import NovelViewOptions, novel_view
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.pipeline import BackgroundWriter, PrefetchIterator, chain_parallel
from export3d_cli.core.animation.reenact import open_driver, reenact
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.face_track import FaceTrack
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.device import torch_state
from export3d_cli.core.runtime.errors import MediaError, NoFaceError
from export3d_cli.core.runtime.weights import example_path

MakeClip = Callable[..., Path]
SOURCE = example_path("source.jpg")


@pytest.fixture(autouse=True)
def check_no_thread_remains() -> Iterator[None]:
    before = threading.enumerate()
    yield
    deadline = time.monotonic() + 10  # threads that serve ffmpeg end shortly after it
    while set(threading.enumerate()) - set(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= set(before)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


class CountingItems:
    """Iterable of 0, 1, 2, ... that records how many it yielded, in which threads, and whether it was closed."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.count, self.error = count, error
        self.yielded, self.closed, self.threads = 0, False, set[int]()

    def __iter__(self) -> Iterator[int]:
        try:
            for k in range(self.count):
                self.threads.add(threading.get_ident())
                self.yielded += 1
                yield k
            if self.error is not None:
                raise self.error
        finally:
            self.threads.add(threading.get_ident())
            self.closed = True


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_iterator_keeps_order_and_depth(depth: int) -> None:
    items, got = CountingItems(40), []
    with PrefetchIterator(items, depth) as inputs:
        wait_until(lambda: items.yielded == depth)
        time.sleep(0.02)  # time to exceed the depth
        for k in inputs:
            assert items.yielded <= k + 1 + depth
            if k == 7:
                wait_until(lambda: items.yielded == 8 + depth)
            got.append(k)
    assert got == list(range(40))
    assert items.closed and len(items.threads) == 1 and threading.get_ident() not in items.threads


@pytest.mark.parametrize("depth", [1, 3])
def test_background_writer_keeps_order_and_depth(depth: int) -> None:
    done, threads, gate = [], set(), threading.Semaphore(0)

    def write(k: int) -> None:
        gate.acquire()
        threads.add(threading.get_ident())
        done.append(k)

    with BackgroundWriter(write, depth) as background:
        for k in range(20):
            if k >= depth:  # no free slot before one more is written
                assert len(done) == k - depth
                gate.release()
            background.put(k)
        gate.release(depth)
    assert done == list(range(20))
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_parts_are_evaluated_in_parallel_and_chained_in_order() -> None:
    barrier, taken, share = threading.Barrier(2, timeout=10), CountingItems(12), set[int]()

    def part(k: int) -> Iterator[tuple[int, int]]:
        barrier.wait()  # passes only if two parts run at once
        share.add(torch.get_num_threads())
        yield from ((k, 0), (k, 1))

    with torch_state(threads=4):
        got = []
        for item in chain_parallel(map(part, taken), 2):
            assert taken.yielded <= item[0] + 6
            got.append(item)
        assert torch.get_num_threads() == 4 and share == {2}
    assert got == [(k, n) for k in range(12) for n in range(2)]


def test_a_single_part_and_one_worker_run_in_the_callers_thread() -> None:
    def part(_: int) -> Iterator[int]:
        yield threading.get_ident()

    assert list(chain_parallel(map(part, range(3)), 1)) == [threading.get_ident()] * 3
    assert list(chain_parallel(map(part, range(1)), 2)) == [threading.get_ident()]
    assert threading.get_ident() not in list(chain_parallel(map(part, range(3)), 2))
    assert list(chain_parallel([], 2)) == []


def test_an_error_in_a_part_is_raised_at_its_place() -> None:
    def part(k: int) -> Iterator[int]:
        yield 1 // (3 - k)

    items = chain_parallel(map(part, range(9)), 2)
    assert [next(items) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_chained_parts_end_with_the_generator() -> None:
    started = []

    def part(k: int) -> Iterator[int]:
        started.append(k)
        yield k

    items = chain_parallel(map(part, range(100)), 2)
    assert next(items) == 0
    items.close()
    assert len(started) <= 6


def test_two_threads_render_the_same_frames_as_one(tiny_weights: Path) -> None:
    animator = Animator.from_weights(tiny_weights, device="cpu", precision="fp32", batch=2)
    portrait = animator.portrait(read_image(SOURCE))
    changes = np.random.default_rng(3).normal(0, 1, (11, 10)).astype(np.float32)
    made = []
    for threads in (1, 2):
        with torch_state(threads=threads):
            made.append(np.stack(list(animator.edit(portrait, changes))))
    np.testing.assert_array_equal(*made)


def test_pipeline_without_items() -> None:
    with PrefetchIterator([], 2) as inputs, BackgroundWriter(print, 2):
        assert list(inputs) == []


def put_all(write: Callable[[int], object], depth: int, items: Iterable[int]) -> None:
    with BackgroundWriter(write, depth) as background:
        for k in items:
            background.put(k)


def test_errors_keep_type_traceback_and_position() -> None:
    got: list[int] = []
    with (
        PrefetchIterator(CountingItems(3, NoFaceError("none here")), 2) as inputs,
        pytest.raises(NoFaceError, match="none") as raised,
    ):
        got.extend(inputs)
    assert got == [0, 1, 2]
    assert "raise self.error" in "".join(traceback.format_tb(raised.value.__traceback__))

    def fail(k: int) -> None:
        if k == 2:
            raise MediaError(f"not {k}")
        got.append(-k)

    items = CountingItems(100)
    with pytest.raises(MediaError, match="not 2") as failed:
        put_all(fail, 1, items)
    assert got == [0, 1, 2, 0, -1] and items.yielded == 4
    assert 'raise MediaError(f"not' in "".join(traceback.format_tb(failed.value.__traceback__))
    with pytest.raises(MediaError, match="not 2"):
        put_all(fail, 9, [2])  # raised at the end


def test_background_writer_raises_an_error_again_after_it_was_caught() -> None:
    with pytest.raises(ZeroDivisionError), BackgroundWriter(lambda k: 1 / k, 1) as background:  # noqa: PT012 - also at the end
        background.put(0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                background.put(1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MediaError])
def test_leaving_the_block_early_ends_both_threads(error: type[BaseException]) -> None:
    """One thread waits for a slot; the other is writing an item, which `stop` ends."""
    items, done, stopped, busy = CountingItems(1000), [], threading.Event(), threading.Event()

    def write(k: int) -> None:
        busy.set()
        if stopped.wait(10):
            raise OSError("the pipe is closed")
        done.append(k)

    def run() -> None:
        with BackgroundWriter(write, 5, stop=stopped.set) as background, PrefetchIterator(items, 2) as inputs:
            for k in inputs:
                background.put(k)
                if k == 3:
                    assert busy.wait(10)
                    raise error("enough")

    with pytest.raises(error):
        run()
    assert done == [] and items.closed and items.yielded <= 6


def test_prefetch_iterator_stops_a_stuck_source() -> None:
    stuck, stopped = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        stuck.set()
        assert stopped.wait(10)
        raise MediaError("cut off")

    with PrefetchIterator(items(), 2, stop=stopped.set) as inputs:
        assert next(iter(inputs)) == 0
        assert stuck.wait(10)
    with PrefetchIterator([1, 2], 1, stop=lambda: pytest.fail("it had ended")) as inputs:
        assert list(inputs) == [1, 2]


def test_thread_that_cannot_start_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    items = CountingItems(3)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(MemoryError, match="new thread"), PrefetchIterator(items, 1):
        pass
    assert items.yielded == 0


def reenact_without_threads(
    animator: Animator, driver: Path, out: Path, options: ReenactOptions
) -> tuple[int, int, tuple[str, ...]]:
    """Reenact in one thread; return the numbers of frames and of frames without a face, and the notes."""
    portrait, add_watermark = load_photo(animator, SOURCE, options), get_watermarker(options.watermark)
    compositor = Compositor([portrait], background=options.background, compare=options.compare)
    with open_driver(animator, portrait, driver, options) as stream:
        motions, crops, references = zip(*stream, strict=True)
    frames = animator.animate(portrait, motions, control=options, reference=references[0], layers=True)
    with VideoWriter(out, size=compositor.size, fps=stream.fps, crf=options.crf) as writer:
        for frame, crop in zip(frames, chain(*crops), strict=True):
            writer.write(add_watermark(compositor(frame, driver=crop)))
    return writer.frame_count, stream.missing, tuple(stream.notes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compare": True, "watermark": "invisible", "relative_expression": True, "pose": "relative"},
        {"background": "#204060", "framing": "face", "on_missing": "skip"},
    ],
)
def test_reenact_writes_the_bytes_of_a_plain_loop(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, options: dict[str, object]
) -> None:
    job = ReenactOptions(audio="none", **options)  # type: ignore[arg-type]
    clip = make_clip("gap3.mp4", filters="drawbox=enable='between(n,3,4)':t=fill:color=black:w=iw:h=ih", frames=9)
    expected, reported = reenact_without_threads(animator, clip, tmp_path / "plain.mp4", job), []

    def progress(stage: str, done: int, total: int | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        reported.append(done)

    summary = reenact(animator, SOURCE, clip, tmp_path / "out.mp4", job, progress=progress)
    assert (summary.frames, summary.missing, summary.notes) == expected
    assert expected[:2] == ((7, 2) if job.on_missing == "skip" else (9, 2))
    assert reported == list(range(1, expected[0] + 1))
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, error: BaseException) -> list[str]:
    """Make a method raise at its call-th call; return the names of the threads that call it."""
    real, threads = getattr(owner, name), []

    def failing(*args: object, **kwargs: object) -> object:
        threads.append(threading.current_thread().name)
        if len(threads) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return threads


@pytest.mark.parametrize(("part", "call"), [("read", 1), ("read", 3), ("make", 2), ("compose", 1), ("write", 3)])
def test_error_of_any_part_is_raised_and_leaves_nothing(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, call: int
) -> None:
    """The error is raised unchanged, no file remains, and the next run is not affected."""
    clip, out = make_clip("clip.mp4"), tmp_path / "out.mp4"
    owner, name = {
        "read": (FaceTrack, "track"), "make": (Animator, "_render"), "compose": (Compositor, "__call__"),
        "write": (VideoWriter, "write"),
    }[part]  # fmt: skip
    earlier = 3 * (part == "read")  # calls for the source
    with monkeypatch.context() as patch:
        error = ValueError(part)
        threads = fail_at(patch, owner, name, earlier + call, error)
        with pytest.raises(ValueError, match=part) as raised:
            reenact(animator, SOURCE, clip, out)
    assert raised.value is error
    assert "in failing" in "".join(traceback.format_tb(error.__traceback__))
    main = threading.main_thread().name
    # two threads may render, and the main thread if there is little to do
    assert len(threads) >= call if part == "make" else len(threads) == earlier + call and main not in threads[earlier:]
    assert list(tmp_path.iterdir()) == []
    assert reenact(animator, SOURCE, clip, out).frames == 6


@pytest.mark.parametrize("when", [1, 6])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupt_in_a_progress_report_leaves_no_file(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, error: type[BaseException], when: int
) -> None:
    """Also after the last frame, before the file is renamed."""

    def progress(stage: str, done: int, total: int | None) -> None:
        if done == when:
            raise error

    with pytest.raises(error):
        reenact(animator, SOURCE, make_clip("clip.mp4"), tmp_path / "out.mp4", progress=progress)
    with pytest.raises(error):
        novel_view(animator, SOURCE, tmp_path / "view.mp4", NovelViewOptions(frames=6), progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_leaving_before_the_first_frame_stops_tracking(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-ahead of ten seconds is not tracked to its end."""
    clip, frames = make_clip("long.mp4", frames=40), []
    real = VideoReader.__iter__

    def slowly(self: VideoReader) -> Iterator[np.ndarray]:
        for frame in real(self):
            frames.append(len(frames))
            yield frame

    monkeypatch.setattr(VideoReader, "__iter__", slowly)
    options = ReenactOptions()
    portrait = load_photo(animator, SOURCE, options)
    with open_driver(animator, portrait, clip, options) as stream, PrefetchIterator(stream, 2, stop=stream.stop):
        wait_until(lambda: len(frames) > 3)
    assert len(frames) < 40


def test_failed_portrait_leaves_no_partial_track_cache(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faces that were tracked until the failure are not taken for the whole driver."""
    sources = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in sources:
        path.write_bytes(SOURCE.read_bytes())
    fail_at(monkeypatch, VideoWriter, "write", 1, MediaError("full"))
    clip = make_clip("long.mp4", frames=40)
    monkeypatch.setattr("export3d_cli.core.animation.driver_stream.LOOKAHEAD_S", 0.1)
    summary = reenact_all(animator, sources, clip, str(tmp_path / "{src}.mp4"))
    assert [line.rpartition(" ")[2] for line in summary.failed] == ["full"]
    assert [done.frames for done in summary.done] == [40]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("side", ["reader", "writer"])
def test_stopped_ffmpeg_is_killed_when_the_block_is_left(make_clip: MakeClip, tmp_path: Path, side: str) -> None:
    """A thread waits for a suspended ffmpeg: it is killed at once, without waiting for the stall timeout."""
    if side == "reader":
        reader = VideoReader(make_clip("long.mp4", frames=40))
        with reader, PrefetchIterator(reader, 40, stop=reader.close) as inputs:
            assert next(iter(inputs)).shape == (512, 512, 3)
            process = reader._process
            assert process is not None
            os.kill(process._popen.pid, signal.SIGSTOP)
    else:
        writer = VideoWriter(tmp_path / "out.mp4", size=(1024, 512), fps=Fraction(25))
        background = BackgroundWriter(writer.write, 8, stop=writer.abort)
        with pytest.raises(KeyboardInterrupt), writer, background:  # noqa: PT012 - interrupted within the block
            process = writer._process
            assert process is not None
            os.kill(process._popen.pid, signal.SIGSTOP)
            for _ in range(8):  # more than a pipe holds
                background.put(np.zeros((512, 1024, 3), np.uint8))
            raise KeyboardInterrupt
    assert process._popen.returncode == -signal.SIGKILL and not process.stalled
    assert list(tmp_path.iterdir()) == []


def test_driver_stream_raises_after_stop(animator: Animator, make_clip: MakeClip) -> None:
    with DriverStream(make_clip("clip.mp4"), animator.tracker(), ReenactOptions(), batch=2, crop_scale=0.5) as stream:
        stream.stop()
        with pytest.raises(MediaError, match="stopped"):
            next(iter(stream))
