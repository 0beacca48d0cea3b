"""What is read, made and written side by side: in order, never far ahead, and over when it is left, however it is."""

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

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.batch import reenact_all
from export3d_cli.core.animation.compositor import Compositor
from export3d_cli.core.animation.driver_stream import DriverStream
from export3d_cli.core.animation.novel_view import NovelViewOptions, novel_view
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.pipeline import BackgroundWriter, PrefetchIterator
from export3d_cli.core.animation.reenact import load_portrait, open_driver, reenact
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.face_track import FaceTrack
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import MediaError, NoFaceError
from export3d_cli.core.runtime.weights import example_path

MakeClip = Callable[..., Path]
SOURCE = example_path("source.jpg")


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.enumerate()
    yield
    deadline = time.monotonic() + 10  # those of an ffmpeg end a moment after it
    while set(threading.enumerate()) - set(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= set(before)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert true()


class Counting:
    """0, 1, 2, ..., and how many were made, by whom, and whether it was closed by the same."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.count, self.error = count, error
        self.made, self.closed, self.threads = 0, False, set[int]()

    def __iter__(self) -> Iterator[int]:
        try:
            for k in range(self.count):
                self.threads.add(threading.get_ident())
                self.made += 1
                yield k
            if self.error is not None:
                raise self.error
        finally:
            self.threads.add(threading.get_ident())
            self.closed = True


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_come_in_order_and_never_far_ahead(depth: int) -> None:
    items, got = Counting(40), []
    with PrefetchIterator(items, depth) as ahead:
        until(lambda: items.made == depth)
        time.sleep(0.02)  # it would go on now
        for k in ahead:
            assert items.made <= k + 1 + depth
            if k == 7:
                until(lambda: items.made == 8 + depth)
            got.append(k)
    assert got == list(range(40))
    assert items.closed and len(items.threads) == 1 and threading.get_ident() not in items.threads


@pytest.mark.parametrize("depth", [1, 3])
def test_writer_runs_items_in_order_and_reports_in_the_calling_thread(depth: int) -> None:
    done, reported, threads, gate = [], [], set(), threading.Semaphore(0)

    def do(k: int) -> None:
        gate.acquire()
        threads.add(threading.get_ident())
        done.append(k)

    def report(count: int) -> None:
        assert threading.current_thread() is threading.main_thread() and len(done) >= count
        reported.append(count)

    with BackgroundWriter(do, depth, on_written=report) as behind:
        for k in range(20):
            if k >= depth:  # no room before one more is done
                assert len(done) == k - depth
                gate.release()
            behind.put(k)
        assert reported == list(range(1, 21 - depth))
        gate.release(depth)
    assert done == list(range(20)) and reported == list(range(1, 21)) and behind.written == 20
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_nothing_to_do() -> None:
    with PrefetchIterator([], 2) as ahead, BackgroundWriter(print, 2) as behind:
        assert list(ahead) == []
    assert behind.written == 0


def put_all(do: Callable[[int], object], depth: int, items: Iterable[int]) -> None:
    with BackgroundWriter(do, depth) as behind:
        for k in items:
            behind.put(k)


def test_errors_keep_type_place_and_order() -> None:
    got: list[int] = []
    with (
        PrefetchIterator(Counting(3, NoFaceError("none here")), 2) as ahead,
        pytest.raises(NoFaceError, match="none") as raised,
    ):
        got.extend(ahead)
    assert got == [0, 1, 2]
    assert "raise self.error" in "".join(traceback.format_tb(raised.value.__traceback__))

    def fail(k: int) -> None:
        if k == 2:
            raise MediaError(f"not {k}")
        got.append(-k)

    items = Counting(100)
    with pytest.raises(MediaError, match="not 2") as failed:
        put_all(fail, 1, items)
    assert got == [0, 1, 2, 0, -1] and items.made == 4
    assert 'raise MediaError(f"not' in "".join(traceback.format_tb(failed.value.__traceback__))
    with pytest.raises(MediaError, match="not 2"):
        put_all(fail, 9, [2])  # raised at the end


def test_writer_raises_a_swallowed_error_again() -> None:
    with pytest.raises(ZeroDivisionError), BackgroundWriter(lambda k: 1 / k, 1) as behind:  # noqa: PT012 - also at the end
        behind.put(0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                behind.put(1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MediaError])
def test_leaving_early_ends_both_threads(error: type[BaseException]) -> None:
    """One waits for room, the other is in the middle of an item, which `stop` ends."""
    items, done, stopped, busy = Counting(1000), [], threading.Event(), threading.Event()

    def do(k: int) -> None:
        busy.set()
        if stopped.wait(10):
            raise OSError("the pipe is closed")
        done.append(k)

    def run() -> None:
        with BackgroundWriter(do, 5, stop=stopped.set) as behind, PrefetchIterator(items, 2) as ahead:
            for k in ahead:
                behind.put(k)
                if k == 3:
                    assert busy.wait(10)
                    raise error("enough")

    with pytest.raises(error):
        run()
    assert done == [] and items.closed and items.made <= 6


def test_a_stuck_source_is_stopped() -> None:
    stuck, stopped = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        stuck.set()
        assert stopped.wait(10)
        raise MediaError("cut off")

    with PrefetchIterator(items(), 2, stop=stopped.set) as ahead:
        assert next(iter(ahead)) == 0
        assert stuck.wait(10)
    with PrefetchIterator([1, 2], 1, stop=lambda: pytest.fail("it had ended")) as ahead:
        assert list(ahead) == [1, 2]


def test_no_room_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    items = Counting(3)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(MemoryError, match="new thread"), PrefetchIterator(items, 1):
        pass
    assert items.made == 0


def plain(animator: Animator, driver: Path, out: Path, options: ReenactOptions) -> tuple[int, int, tuple[str, ...]]:
    """`reenact` without threads: frames, those without a face, notes."""
    (portrait, compositor), add_watermark = load_portrait(animator, SOURCE, options), get_watermarker(options.watermark)
    crop_size = compositor.source_frame.shape[0]
    with open_driver(animator, portrait, driver, options, crop_size=crop_size) as stream:
        motions, crops = zip(*stream, strict=True)
    frames = animator.animate(portrait, motions, control=options.control, reference=stream.reference)
    with VideoWriter(out, size=compositor.size, fps=stream.fps, crf=options.crf) as writer:
        for frame, crop in zip(frames, chain(*crops), strict=True):
            writer.write(add_watermark(compositor(frame, crop)))
    return writer.frame_count, stream.missing, tuple(stream.notes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compare": True, "watermark": "invisible", "relative_expression": True, "pose": "relative"},
        {"background": "#204060", "paste_back": True, "on_missing": "skip"},
    ],
)
def test_the_bytes_of_a_plain_loop(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, options: dict[str, object]
) -> None:
    job = ReenactOptions(audio="none", **options)  # type: ignore[arg-type]
    clip = make_clip("gap3.mp4", filters="drawbox=enable='between(n,3,4)':t=fill:color=black:w=iw:h=ih", frames=9)
    wanted, reported = plain(animator, clip, tmp_path / "plain.mp4", job), []

    def progress(stage: str, done: int, total: int | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        reported.append(done)

    summary = reenact(animator, SOURCE, clip, tmp_path / "out.mp4", job, progress=progress)
    assert (summary.frames, summary.missing, summary.notes) == wanted
    assert wanted[:2] == ((7, 2) if job.on_missing == "skip" else (9, 2))
    assert reported == list(range(1, wanted[0] + 1))
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, error: BaseException) -> list[str]:
    """Have a method raise at its call-th call; gives the names of the threads that call it."""
    real, threads = getattr(owner, name), []

    def failing(*args: object, **kwargs: object) -> object:
        threads.append(threading.current_thread().name)
        if len(threads) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return threads


@pytest.mark.parametrize(("part", "call"), [("read", 1), ("read", 3), ("make", 2), ("compose", 1), ("write", 3)])
def test_an_error_of_any_part(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, call: int
) -> None:
    """It comes as it is, nothing stays behind, and the next run is as if nothing had been."""
    clip, out = make_clip("clip.mp4"), tmp_path / "out.mp4"
    owner, name = {
        "read": (FaceTrack, "track"), "make": (Animator, "_render"), "compose": (Compositor, "__call__"),
        "write": (VideoWriter, "write"),
    }[part]  # fmt: skip
    seen = 3 * (part == "read")  # the source's own
    with monkeypatch.context() as patch:
        error = ValueError(part)
        threads = fail_at(patch, owner, name, seen + call, error)
        with pytest.raises(ValueError, match=part) as raised:
            reenact(animator, SOURCE, clip, out)
    assert raised.value is error
    assert "in failing" in "".join(traceback.format_tb(error.__traceback__))
    main = threading.main_thread().name
    assert len(threads) == seen + call and set(threads[seen:]) == ({main} if part == "make" else set(threads) - {main})
    assert list(tmp_path.iterdir()) == []
    assert reenact(animator, SOURCE, clip, out).frames == 6


@pytest.mark.parametrize("when", [1, 6])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_while_telling(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, error: type[BaseException], when: int
) -> None:
    """Also after the last frame, when the file is not there yet."""

    def progress(stage: str, done: int, total: int | None) -> None:
        if done == when:
            raise error

    with pytest.raises(error):
        reenact(animator, SOURCE, make_clip("clip.mp4"), tmp_path / "out.mp4", progress=progress)
    with pytest.raises(error):
        novel_view(animator, SOURCE, tmp_path / "view.mp4", NovelViewOptions(frames=6), progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_left_before_the_first_frame(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds of the driver are tracked before anything is made; that does not go on."""
    clip, frames = make_clip("long.mp4", frames=40), []
    real = VideoReader.__iter__

    def slowly(self: VideoReader) -> Iterator[np.ndarray]:
        for frame in real(self):
            frames.append(len(frames))
            yield frame

    monkeypatch.setattr(VideoReader, "__iter__", slowly)
    options = ReenactOptions()
    portrait, _ = load_portrait(animator, SOURCE, options)
    with open_driver(animator, portrait, clip, options) as stream, PrefetchIterator(stream, 2, stop=stream.stop):
        until(lambda: len(frames) > 3)
    assert len(frames) < 40


def test_a_failed_source_leaves_no_half_tape(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of the driver until then is not taken for all of it."""
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
def test_a_hung_ffmpeg_is_not_waited_for(make_clip: MakeClip, tmp_path: Path, side: str) -> None:
    """Left while a thread waits for one that was stopped: it is killed, long before it is taken for hung."""
    if side == "reader":
        reader = VideoReader(make_clip("long.mp4", frames=40))
        with reader, PrefetchIterator(reader, 40, stop=reader.close) as ahead:
            assert next(iter(ahead)).shape == (512, 512, 3)
            process = reader._process
            assert process is not None
            os.kill(process._popen.pid, signal.SIGSTOP)
    else:
        writer = VideoWriter(tmp_path / "out.mp4", size=(1024, 512), fps=Fraction(25))
        with pytest.raises(KeyboardInterrupt), writer, BackgroundWriter(writer.write, 8, stop=writer.abort) as behind:  # noqa: PT012
            process = writer._process
            assert process is not None
            os.kill(process._popen.pid, signal.SIGSTOP)
            for _ in range(8):  # more than a pipe holds
                behind.put(np.zeros((512, 1024, 3), np.uint8))
            raise KeyboardInterrupt
    assert process._popen.returncode == -signal.SIGKILL and not process.stalled
    assert list(tmp_path.iterdir()) == []


def test_the_stream_fails_once_it_is_stopped(animator: Animator, make_clip: MakeClip) -> None:
    with (
        animator.borrow_landmarker() as tracker,
        DriverStream(make_clip("clip.mp4"), tracker, batch=2, crop_scale=0.5) as stream,
    ):
        stream.stop()
        with pytest.raises(MediaError, match="stopped"):
            next(iter(stream))
