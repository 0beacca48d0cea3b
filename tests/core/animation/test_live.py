"""Live animation: calibration, a lost face, mirror, outputs; a file stands in for the camera."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from itertools import chain, count, islice, repeat
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from live_link import live_link

from export3d_cli.core.animation import live as live_module
from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.live import LiveFrame, LiveOptions, LiveTracker, live
from export3d_cli.core.animation.pipeline import LatestIterator, map_latest
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.motion_packets import open_packets
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.probe import probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.camera import head_pose, rotation_exp, with_head_pose
from export3d_cli.core.runtime.errors import InputError, MediaError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli

SOURCE, DRIVER = example_path("source.jpg"), example_path("drive.mp4")
GREY = np.full((512, 512, 3), 128, np.uint8)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Every tenth frame of the bundled driver."""
    with VideoReader(DRIVER) as reader:
        return list(reader)[::10]


def follow(tracker: LiveTracker, images: list[np.ndarray], start: float, step: float) -> list[LiveFrame]:
    return [tracker(image, start + step * k) for k, image in enumerate(images)]


def test_tracker_calibrates_follows_settles_without_a_face_and_comes_back(images: list[np.ndarray]) -> None:
    tracker = LiveTracker(open_landmarker_tracker(), Fraction(25), "off")
    first = follow(tracker, images[:5], 0.0, 0.5)  # two seconds from the first face
    assert [frame.state for frame in first] == ["calibrating"] * 4 + ["live"]
    assert [frame.motion is None for frame in first] == [True] * 4 + [False]
    assert first[-1].reference is not None
    neutral = first[-1].reference.beta

    moving = follow(tracker, images[5:9], 2.1, 0.1)
    strengths = [frame.strength for frame in moving]
    assert strengths == sorted(strengths)
    assert 0 < strengths[0] < 0.999
    later = tracker(images[9], 3.0)
    assert later.strength == 1.0
    assert later.motion is not None
    assert later.motion.found.all()
    assert np.abs(later.motion.beta - neutral).max() > 0.1

    lost = follow(tracker, [GREY] * 10, 3.1, 0.1)
    assert [frame.state for frame in lost] == ["no face"] * 10
    assert lost[0].strength == 1.0  # a short loss is not visible
    assert [frame.strength for frame in lost] == sorted((frame.strength for frame in lost), reverse=True)
    assert lost[-1].strength == 0.0
    back = follow(tracker, [images[9]] * 2, 4.8, 0.1)  # the camera is rarely looked at without a face
    assert [frame.state for frame in back] == ["live"] * 2
    assert back[0].strength == 0.0
    assert 0 < back[1].strength < 0.5

    tracker.recentre = True
    centred = tracker(images[9], 5.0)
    assert centred.motion is not None
    assert centred.reference is not None
    assert np.array_equal(centred.reference.camera, centred.motion.camera)
    assert np.array_equal(centred.reference.beta, neutral)

    tracker.recalibrate = True
    again = follow(tracker, [images[9]] * 6, 5.1, 0.5)
    assert [frame.state for frame in again] == ["calibrating"] * 4 + ["live"] * 2
    assert again[2].strength == 0.0
    assert again[-1].reference is not None
    assert again[-1].motion is not None
    assert np.abs(again[-1].reference.beta - again[-1].motion.beta).max() < 0.02  # this face is neutral now


class Recorder(LiveTracker):
    """A tracker whose first face already is the neutral one."""

    def __call__(self, image: np.ndarray, now: float) -> LiveFrame:
        self._calibrated_s = 2.0
        return super().__call__(image, now)


def test_session_records_and_reports(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(live_module, "LiveTracker", Recorder)
    monkeypatch.setattr(live_module, "REPORT_INTERVAL_S", 0.2)
    pytest.importorskip("pythonosc")
    out = tmp_path / "out.mp4"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f"live {SOURCE} --camera {DRIVER} --record {out} --seconds 2 --mirror --frame face --size 64 --json"
    line += f" --send osc://127.0.0.1:{port}"
    stopped = threading.Event()
    packets = open_packets(f"vmc:{port}", "127.0.0.1", stopped)
    result = CliRunner().invoke(cli, [*line.split(), "--device", "cpu", "--weights", str(tiny_weights)])
    first, second = islice((packet for packet, _ in packets if packet is not None), 2)
    stopped.set()
    assert first.coefficients.any()
    assert not np.array_equal(first.coefficients, second.coefficients)
    assert abs(np.linalg.det(first.rotation) - 1) < 1e-6
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["frames"] > 0
    assert summary["fps"] == pytest.approx(summary["frames"] / summary["seconds"], rel=0.05)
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p95"]
    assert summary["missing"] == 0
    assert sum(summary["histogram"].values()) == summary["frames"]
    steps = [int(step) for step in summary["histogram"]]
    assert min(steps) <= summary["latency_ms"]["p50"] <= max(steps) + 20
    info = probe(out)
    assert info.fps == probe(DRIVER).fps
    assert info.duration < summary["seconds"] + 0.1
    assert any(line.startswith("live, ") and "frames/s, latency" in line for line in result.stderr.splitlines())


def test_camera_is_rarely_looked_at_without_a_face_and_until_somebody_watches_the_page(
    animator: Animator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked: list[float] = []

    class Counting(LiveTracker):
        def __call__(self, image: Any, now: float) -> LiveFrame:
            tracked.append(now)
            state, strength = next(states)
            return LiveFrame(now, state, None, None, strength)

    monkeypatch.setattr(live_module, "LiveTracker", Counting)
    monkeypatch.setattr(live_module._Stage, "__call__", lambda stage, frame: GREY)  # a first picture takes its time
    monkeypatch.setattr(type(animator), "workers", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = LiveOptions(camera=DRIVER, seconds=3, framing="face", size=64)
    page = f"http://127.0.0.1:{port}"
    for to, calibrating, state in ((), 0, "no face"), ((page,), 15, "live"):
        states: Iterator[tuple[str, float]] = chain([("calibrating", 0.0)] * calibrating, repeat((state, 0.0)))
        tracked.clear()
        summary = live(animator, [SOURCE], replace(options, to=to))
        assert calibrating <= len(tracked) <= calibrating + 3 / live_module.IDLE_INTERVAL_S + 2
        assert summary.dropped < 25  # not the 12 that each look skips on purpose

    viewer, lines, pressed = http.client.HTTPConnection("127.0.0.1", port), list[str](), list[int]()

    def press(command: str) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as button:
            button.request("POST", f"/command/{command}")
            assert button.getresponse().status == 200
        pressed.append(len(tracked))

    def watch(line: str) -> None:
        if not lines:
            viewer.request("GET", "/stream")
        elif len(tracked) > 20 and not pressed:  # every frame of the camera is tracked
            press("pause")
        elif line.startswith("paused") and lines[-1].startswith("paused"):
            press("quit")
        lines.append(line)

    states = repeat(("no face", 1.0))  # one that was just lost
    tracked.clear()
    with contextlib.closing(viewer):
        summary = live(animator, [SOURCE], replace(options, to=(page,), seconds=30), report=watch)
    assert len(pressed) == 2
    assert len(tracked) - pressed[0] <= 1  # none while it was paused
    assert 0 < summary.missing <= len(tracked)  # the last one is not counted again


def test_recording_repeats_frames_to_keep_real_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 0.1, 0.5])  # of the beginning and of three frames, seconds
    monkeypatch.setattr(live_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with contextlib.ExitStack() as stack:
        record = live_module._open_recording(tmp_path / "out.mp4", (64, 64), Fraction(10), None, stack)
        for level in (0, 100, 200):
            record(np.full((64, 64, 3), level, np.uint8), "")
    levels = [round(float(frame.mean()), -2) for frame in VideoReader(tmp_path / "out.mp4")]
    assert levels == [0, 100, 200, 200, 200, 200]


def test_video_device_gets_frames_and_its_failures_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A named pipe stands in for a device, since v4l2loopback is not everywhere, and raw frames for ffmpeg's output."""
    with pytest.raises(InputError, match="/dev/video987 is not a video device: load v4l2loopback"):
        live_module._open_device(Path("/dev/video987"), (64, 64), Fraction(25), contextlib.ExitStack())
    frame = np.full((63, 65, 3), (200, 90, 30), np.uint8)
    with contextlib.ExitStack() as stack:
        show = live_module._open_device(Path("/dev/null"), (65, 63), Fraction(25), stack)
        with pytest.raises(MediaError, match=r"/dev/null takes no pictures: .*ioctl"):
            list(map(show, repeat(frame, 500), repeat("")))
    monkeypatch.setattr(live_module, "DEVICE_FORMAT", "rawvideo")
    monkeypatch.setattr(Path, "is_char_device", Path.is_fifo)
    os.mkfifo(tmp_path / "device")
    sizes = list[int]()
    reader = threading.Thread(target=lambda: sizes.append(len((tmp_path / "device").read_bytes())), daemon=True)
    reader.start()
    with contextlib.ExitStack() as stack:
        show = live_module._open_output(f"v4l2:{tmp_path}/device", (65, 63), Fraction(25), SimpleQueue(), stack)
        for _ in range(40):
            show(frame, "")
        time.sleep(2)
    reader.join()
    assert sizes[0] >= 20 * 64 * 62 * 3 // 2  # even sides, YUV 4:2:0; the last frames end with ffmpeg
    assert sizes[0] % (64 * 62 * 3 // 2) == 0


def test_commands_refuse_what_they_cannot_do() -> None:
    for line, message in (
        ("live --camera nothing.mp4", "does not exist"),
        ("live --to http://127.0.0.1:8000 --crf 20", "--crf has no effect with no --record"),
        ("live --from vmc --camera 1", "--camera has no effect with --from"),
        ("live --host 0.0.0.0", "--host has no effect with no --from"),
        ("app --port 0", "0 is not in the range"),
    ):
        result = CliRunner().invoke(cli, line.split())
        assert result.exit_code == 2
        assert message in result.stderr


def test_stage_turns_the_other_way_when_mirrored_and_rests_without_strength(animator: Animator) -> None:
    options = LiveOptions(framing="face", size=64)
    stage = live_module._Stage(animator, [SOURCE], options)
    portrait = stage._load(0)[0]
    reference = portrait.motion
    turned = replace(reference, camera=_turned(reference.camera, 0.3))
    rest = stage(LiveFrame(0.0, "no face", turned, reference, 0.0))
    frame = stage(LiveFrame(0.0, "live", turned, reference, 1.0))
    assert np.abs(frame.astype(int) - rest).mean() > 1
    seen: list[np.ndarray] = []
    animate = animator.animate

    def spy(portrait: object, motions: list[Motion], **options: object) -> Iterator[object]:
        seen.append(_yaw(options["reference"].camera[0]) - _yaw(motions[0].camera[0]))  # type: ignore[attr-defined]
        return animate(portrait, motions, **options)  # type: ignore[arg-type]

    animator.animate = spy  # type: ignore[method-assign, assignment]
    try:
        for _ in range(2):
            stage(LiveFrame(0.0, "live", turned, reference, 1.0))
            stage.mirrored = True
    finally:
        del animator.animate
    assert abs(seen[0]) > 0.2
    assert seen[1] == pytest.approx(-seen[0], abs=1e-4)


def _turned(camera: np.ndarray, radians: float) -> np.ndarray:
    rotation, centre = head_pose(camera)
    return with_head_pose(camera, rotation @ rotation_exp(np.array([[0.0, radians, 0.0]])), centre)


def _yaw(camera: np.ndarray) -> float:
    return float(np.arctan2(*head_pose(camera)[0][[0, 2], 2]))


def test_latest_iterator_drops_older_items_and_raises_errors_of_its_thread() -> None:
    def items() -> Iterator[int]:
        yield 0
        taken.wait(10)
        yield from range(1, 100)
        produced.set()
        taken.clear()
        taken.wait(10)
        raise MediaError("unplugged")

    taken, produced = threading.Event(), threading.Event()
    with LatestIterator(items()) as latest:
        values = iter(latest)
        assert next(values) == 0
        taken.set()
        assert produced.wait(10)
        assert next(values) == 99
        assert latest.dropped == 98
        taken.set()
        with pytest.raises(MediaError, match="unplugged"):
            next(values)


def test_map_latest_drops_late_results_and_raises_errors() -> None:
    later = threading.Event()

    def render(item: int) -> int:
        if item == 3:
            later.set()
        if item == 5:
            raise MediaError("cannot")
        return 10 * item if item else later.wait(10)

    with ThreadPoolExecutor(2) as pool:
        assert list(map_latest(render, range(5), pool, 2)) == [10, 20, 30, 40]  # 0 came after 30
        results = map_latest(render, count(5), pool, 1)
        with pytest.raises(MediaError, match="cannot"):
            next(results)


def test_slow_rendering_drops_frames_instead_of_delaying_them(
    animator: Animator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(live_module._Stage):
        def __call__(self, frame: LiveFrame) -> np.ndarray:
            time.sleep(0.3)
            return GREY

    monkeypatch.setattr(live_module, "_Stage", Slow)
    options = LiveOptions(camera=DRIVER, to=(), seconds=3, framing="face", size=64)
    workers: list[int] = []

    def spy(*arguments: Any) -> Any:
        workers.append(arguments[-1])
        return map_latest(*arguments)

    monkeypatch.setattr(live_module, "map_latest", spy)
    monkeypatch.setattr(type(animator), "workers", 1)
    summary = live(animator, [SOURCE], options)
    assert workers == [1]  # as many as threads of the animator
    assert summary.dropped > summary.frames
    assert summary.latency_ms["p95"] < 2000  # every frame of the camera in order would take 20 s


def test_packets_of_another_program_drive_the_portrait(animator: Animator) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 0))
        port, ended = sender.getsockname()[1] + 1, threading.Event()

        def send() -> None:
            number = 0
            while not ended.wait(0.02):
                number += 1
                sender.sendto(live_link(number, _17=0.5 * (number % 2)), ("127.0.0.1", port))

        thread = threading.Thread(target=send)
        thread.start()
        lines: list[str] = []
        options = LiveOptions(receive=f"livelink:{port}", to=(), seconds=5, framing="face", size=64)
        summary = live(animator, [SOURCE], options, report=lines.append)
        ended.set()
        thread.join()
    assert summary.missing < summary.frames
    assert lines[-1].startswith("live, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"camera": 987}, "camera 987 cannot be opened: .*use a file"),
        ({"to": ("rtmp://x",)}, "'rtmp://x' is not an output: use window"),
        ({"background": "transparent"}, "cannot be transparent"),
        ({"to": ("window",)}, "no display for a window: use --to http"),
    ],
)
def test_unusable_outputs_and_cameras_are_one_clear_error(
    animator: Animator, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    given = {"camera": DRIVER, "framing": "face", "size": 64, "to": (), **options}
    with pytest.raises(InputError, match=message):
        live(animator, [SOURCE], LiveOptions(**given))  # type: ignore[arg-type]


def test_next_portrait_of_another_shape_fills_the_first_ones_frame(animator: Animator, tmp_path: Path) -> None:
    wide = np.pad(read_image(SOURCE), ((0, 0), (200, 200), (0, 0)), mode="edge")
    write_image(tmp_path / "wide.png", wide)
    stage = live_module._Stage(animator, [SOURCE, tmp_path / "wide.png"], LiveOptions(size=128))
    still = LiveFrame(0.0, "no face", None, None, 0.0)
    first = stage(still)
    stage.next()
    second = stage(still)
    assert first.shape == second.shape == (128, 128, 3)
    assert 1 < np.abs(first.astype(int) - second).mean() < 60  # the same picture, at another scale
    stage.next()
    assert np.array_equal(stage(still), first)
