"""Animate portraits by a camera while it films; the newest frame always comes first, so the latency does not grow.

    camera thread -> newest frame -> `Animator.workers` threads that track and render a frame each -> outputs

Frames are tracked in turn, one at a time, and only those that are shown. The motion is relative to a neutral face,
which the first two seconds show: at that face and pose the portrait is as in its photo. Without a face, the portrait
settles to rest.
"""

import contextlib
import math
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import cv2
import numpy as np

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.compositor import Compositor, fill_frame, load_photo
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.pipeline import BackgroundWriter, LatestIterator, map_latest
from export3d_cli.core.animation.retargeting import Pose
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.crop import CROP_SCALE
from export3d_cli.core.face.face_track import TargetFaceTracker
from export3d_cli.core.face.motion import Motion, mirror_motion
from export3d_cli.core.face.motion_packets import PACKET_RATE, FacePacket, PacketTracker, VmcSender, open_packets
from export3d_cli.core.face.smoothing import SmoothingLevel, smooth_stream
from export3d_cli.core.face.tracker import FaceTracker
from export3d_cli.core.media.ffmpeg_process import FfmpegProcess
from export3d_cli.core.media.mjpeg_server import MjpegServer
from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.media.reader import open_camera
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.model.masks import smooth_step
from export3d_cli.core.runtime.device import precision_notes, trim_heap
from export3d_cli.core.runtime.errors import InputError, MediaError

CALIBRATION_S = 2.0  # seconds with a face that show the neutral face
SETTLE_S = 0.6  # seconds from full motion to rest, and back
PATIENCE_S = 0.2  # seconds without a face before the portrait settles
MAX_REPEAT_S = 5  # of one frame in a recording: an encoder that cannot keep up shortens it
RECORD_DEPTH = 8  # frames that wait for the encoder
REPORT_INTERVAL_S = 1.0
IDLE_INTERVAL_S = 0.5  # between two looks at a camera that is paused, shows no face, or whose page has no viewer
HISTOGRAM_MS = 20
WINDOW_NAME = "export3d live"
DEVICE_FORMAT = "v4l2"  # ffmpeg's output for devices
Output = Callable[[np.ndarray, str], bool]  # frame, state and figures as text -> whether somebody may see it
COMMANDS = {  # command -> label; its first letter is its key
    "calibrate": "Calibrate: 2 s of neutral face",
    "recentre": "Re-centre the head",
    "mirror": "Mirror",
    "pause": "Pause",
    "next": "Next portrait",
    "quit": "Quit",
}


@dataclass(frozen=True)
class LiveOptions(ReenactOptions):
    """Source of the motion and outputs, in addition to the options of a picture and of its motion."""

    camera: int | Path = 0  # number of a camera, or a video file that stands in for it
    receive: str | None = None  # livelink[:PORT] or vmc[:PORT]: motion that another program sends, instead of a camera
    host: str = "127.0.0.1"  # address that receives it
    send: str | None = None  # osc://HOST:PORT that the tracked motion is sent to, see `VmcSender`
    to: tuple[str, ...] = ("window",)  # window | http://HOST:PORT | v4l2:/dev/videoN
    record: Path | None = None
    seconds: float | None = None  # None: until it is stopped
    mirror: bool = False
    pose: Pose = "relative"
    relative_expression: bool = True

    def __post_init__(self) -> None:
        if self.motion != "landmarks":
            raise InputError(f"motion {self.motion} needs a file as driver: live follows landmarks")
        super().__post_init__()


@dataclass(frozen=True)
class LiveSummary:
    """Result of a live session."""

    frames: int  # shown
    seconds: float
    fps: float  # shown frames a second
    latency_ms: dict[str, float]  # p50 and p95 of the time from the arrival of a camera frame to its output
    dropped: int  # camera frames that were not tracked, as newer ones came; not those between two looks while idle
    missing: int  # shown frames whose camera frame has no face; not while paused or without a viewer
    device: str
    notes: tuple[str, ...] = field(default=())
    histogram: dict[int, int] = field(default_factory=dict)  # latency in steps of `HISTOGRAM_MS` -> shown frames


class LiveFrame(NamedTuple):
    """Motion of a camera frame."""

    time: float  # of its arrival, by `time.monotonic`
    state: str  # live | calibrating | no face
    motion: Motion | None  # one row; None before the first calibration
    reference: Motion | None  # one row, the neutral face
    strength: float  # 0: at rest, 1: full motion


class LiveTracker:
    """Called with frames or packets; calibrates on a neutral face, then follows, smooths without delay and sends.

    Attributes, which any thread may set:
        recalibrate: take the next two seconds as the neutral face.
        recentre: take the present head pose as the neutral one.
        send: takes the motion of each face.
    """

    def __init__(self, tracker: FaceTracker | PacketTracker, fps: Fraction, level: SmoothingLevel) -> None:
        self._tracker: Any = tracker
        self._level = level
        self.send: VmcSender | None = None
        self._target: Callable[[Any], Any] = (
            (lambda packet: packet)
            if isinstance(tracker, PacketTracker)
            else TargetFaceTracker(tracker, fps, name="the camera")
        )
        self._time: float | None = None  # of the last frame
        self._faces: list[Any] = []  # of the calibration
        self._calibrated_s = 0.0
        self._is_calibrated = self._was_found = self.recalibrate = self.recentre = False
        self._reference: Motion | None = None
        self._last_face: Any = None
        self._presence = 0.0  # of a calibrated face, with PATIENCE_S above 1

    def __call__(self, image: np.ndarray | FacePacket | None, now: float) -> LiveFrame:
        """Return the motion of the next frame, uint8 (H, W, 3), or packet, None if there is none, at `now`."""
        elapsed = 0.0 if self._time is None else min(1.0, now - self._time)
        self._time = now
        face = self._target(image)
        size = (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else (1, 1)
        if self.recalibrate:
            self.recalibrate = self._is_calibrated = False
            self._faces, self._calibrated_s = [], 0.0
        change = -elapsed
        if face is not None and self._is_calibrated:
            change = elapsed if self._was_found else 0.0  # it came back at some time since the last frame
        self._was_found = face is not None
        self._presence = min(max(self._presence + change / SETTLE_S, 0.0), 1 + PATIENCE_S / SETTLE_S)
        if face is not None and not self._is_calibrated:
            self._faces.append(face)
            self._calibrated_s += elapsed
            if self._calibrated_s >= CALIBRATION_S:
                self._finish_calibration(size)
        state = "no face" if face is None else "live" if self._is_calibrated else "calibrating"
        self._last_face = face or self._last_face
        if self._reference is None:
            return LiveFrame(now, state, None, None, 0.0)
        rate = Fraction(1 / max(elapsed, 1e-3)).limit_denominator(1000)
        self._row = self._tracker.make_motion([self._last_face], rate, size, clip=self._clip)
        self._row = replace(self._row, found=np.array([face is not None]))
        motion = next(self._smoothed)
        if self.send is not None and face is not None:
            self.send(motion)
        if self.recentre:
            self.recentre = False
            self._reference = self._reference.with_head(motion.camera, self._reference.head_landmarks)
        strength = float(smooth_step(np.array(self._presence), 0, 1))
        return LiveFrame(now, state, motion, self._reference, strength)

    def _finish_calibration(self, size: tuple[int, int]) -> None:
        """Measure the crop, and the neutral face: the median expression, and the frame nearest to the mean pose."""
        self._clip = self._tracker.calibrate_clip(self._faces, size, CROP_SCALE)
        motion = self._tracker.make_motion(self._faces, Fraction(25), size, clip=self._clip)
        nearest = np.linalg.norm(motion.camera - motion.camera.mean(0), axis=1).argmin()
        neutral = replace(motion.select(np.array([nearest])), beta=np.median(motion.beta, axis=0)[None])
        self._reference = neutral.with_head(neutral.camera, np.median(motion.head_landmarks, axis=0)[None])
        self._smoothed = smooth_stream(iter(lambda: self._row, None), self._level, causal=True)
        self._faces, self._is_calibrated = [], True


class _Stage:
    """The portraits, one of them shown; later ones are encoded when they are first shown."""

    def __init__(self, animator: Animator, sources: Sequence[Path], options: LiveOptions) -> None:
        self._animator, self._sources, self._options = animator, sources, options
        self._mark = get_watermarker(options.watermark)
        self._portraits: dict[int, tuple[Portrait, Compositor]] = {}
        self._loading = threading.Lock()
        self._number = 0
        self._rest: dict[int, np.ndarray] = {}  # the frame at rest of each portrait
        self.mirrored = options.mirror
        self.notes: dict[str, None] = {}
        self.size = self._load(0)[1].size  # of all frames, width and height

    def next(self) -> None:
        """Show the next portrait."""
        self._number = (self._number + 1) % len(self._sources)

    def __call__(self, live: LiveFrame) -> np.ndarray:
        """Return a frame, uint8 (H, W, 3); threads may call it at the same time."""
        number, at_rest = self._number, live.strength == 0
        portrait, compositor = self._load(number)
        if at_rest and number in self._rest:
            return self._rest[number]
        motion, reference = live.motion or portrait.motion, live.reference or portrait.motion
        if self.mirrored:
            motion, reference = mirror_motion(motion), mirror_motion(reference)
        scales = live.strength * self._options.expression_scale, live.strength * self._options.pose_scale
        control = replace(self._options, expression_scale=scales[0], pose_scale=scales[1])
        rendered = self._animator.animate(
            portrait, [motion], control=control, reference=reference, notify=self.notes.setdefault, layers=True
        )
        frame = self._mark(fill_frame(compositor(next(rendered)), self.size))
        if at_rest:
            self._rest[number] = frame
        return frame

    def _load(self, number: int) -> tuple[Portrait, Compositor]:
        with self._loading:
            if number not in self._portraits:
                portrait = load_photo(self._animator, self._sources[number], self._options)
                self._portraits[number] = portrait, Compositor([portrait], background=self._options.background)
            return self._portraits[number]


def live(animator: Animator, sources: Sequence[Path], options: LiveOptions | None = None, *,
         report: Callable[[str], None] | None = None) -> LiveSummary:  # fmt: skip
    """Animate the first of the portraits by a camera until the user quits, Ctrl-C, or `seconds` have passed.

    `report` receives the state and its figures as a line of text, once a second.
    """
    options = options or LiveOptions()
    if options.background == "transparent":
        raise InputError("live pictures cannot be transparent: use a colour that can be keyed, such as #00ff00")
    options.check_outputs(*([options.record] if options.record else []))
    stopped = threading.Event()
    items: Iterator[tuple[Any, float]]
    tracker: FaceTracker | PacketTracker
    if options.receive:
        fps, items, tracker = PACKET_RATE, open_packets(options.receive, options.host, stopped), PacketTracker()
    else:
        (fps, items), tracker = open_camera(options.camera, stopped), animator.tracker()
    stage = _Stage(animator, sources, options)
    follow = LiveTracker(tracker, fps, options.smooth)
    images = LatestIterator(items, stop=stopped.set)
    commands: SimpleQueue[str] = SimpleQueue()
    latencies, recent = Counter[int](), Counter[int]()  # number of frames by latency in ms
    line, missing, skipped, paused, is_seen = "", 0, 0, False, True
    shown = np.zeros((*stage.size[::-1], 3), np.uint8)

    def track() -> Iterator[LiveFrame]:
        nonlocal skipped
        for image, now in images:
            if not paused:
                frame = follow(image, now)
            yield frame._replace(time=now)
            is_unseen = not is_seen and frame.state != "calibrating"  # the neutral face needs many frames
            if paused or is_unseen or (frame.state == "no face" and frame.strength == 0):
                dropped = images.dropped
                stopped.wait(IDLE_INTERVAL_S)
                skipped += images.dropped - dropped

    def render(frame: LiveFrame) -> tuple[LiveFrame, np.ndarray | None]:
        is_shown = (outputs or not options.send) and (not line or (is_seen and not paused))
        return frame, stage(frame) if is_shown else None

    with contextlib.ExitStack() as stack:
        outputs = [_open_output(name, stage.size, fps, commands, stack) for name in options.to]
        if options.send:
            follow.send = stack.enter_context(contextlib.closing(VmcSender(options.send)))
        if options.record:
            outputs.append(_open_recording(options.record, stage.size, fps, options.crf, stack))
        pool = stack.enter_context(ThreadPoolExecutor(animator.workers))
        began = reported = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt), images:  # Ctrl-C is the usual end: the recording is kept
            rendered = map_latest(render, track(), pool, animator.workers)
            for frame, picture in stack.enter_context(contextlib.closing(rendered)):
                pressed = [commands.get() for _ in range(commands.qsize())]
                for command in pressed:
                    match command:
                        case "calibrate":
                            follow.recalibrate = True
                        case "recentre":
                            follow.recentre = True
                        case "mirror":
                            stage.mirrored = not stage.mirrored
                        case "pause":
                            paused = not paused
                        case "next":
                            stage.next()
                shown = shown if picture is None else picture
                seen = [output(shown, line) for output in outputs]
                is_seen = any(seen) or not seen or bool(options.send)
                missing += frame.state == "no face" and is_seen and not paused
                now = time.monotonic()
                recent[int(1000 * (now - frame.time))] += 1
                if not line or now - reported >= REPORT_INTERVAL_S:
                    rate, (p50, p95) = recent.total() / (now - reported), _percentiles(recent)
                    line = f"{'paused' if paused else frame.state}, {rate:.1f} frames/s, latency {p50:.0f} ms "
                    line += f"(95 % within {p95:.0f} ms), {images.dropped - skipped} dropped"
                    latencies += recent
                    recent.clear()
                    reported = now
                    trim_heap()
                    if report is not None:
                        report(line)
                if "quit" in pressed or now - began >= (options.seconds or math.inf):
                    break
            else:
                if not line:
                    raise MediaError(
                        "the camera gives no pictures: allow this program to use it, or choose another one"
                    )
                stage.notes["the camera gives no more pictures: connect it again"] = None
    latencies += recent
    seconds, (p50, p95) = time.monotonic() - began, _percentiles(latencies)
    histogram = Counter(ms // HISTOGRAM_MS for ms in latencies.elements())
    return LiveSummary(latencies.total(), seconds, latencies.total() / seconds, {"p50": p50, "p95": p95},
                       images.dropped - skipped, missing, animator.device_name,
                       (*precision_notes(animator.precision, animator.device), *stage.notes),
                       {k * HISTOGRAM_MS: n for k, n in sorted(histogram.items())})  # fmt: skip


def _percentiles(latencies: Counter[int]) -> list[float]:
    return [float(value) for value in np.percentile([*latencies.elements()] or [0], (50, 95))]


def _open_output(
    name: str, size: tuple[int, int], fps: Fraction, commands: SimpleQueue[str], stack: contextlib.ExitStack
) -> Output:
    """Open a window, a video device or a page until `stack` ends."""
    if name == "window":
        return _open_window(commands, stack)
    if name.startswith("v4l2:"):
        return _open_device(Path(name[5:]), size, fps, stack)
    match = re.fullmatch(r"http://([\w.-]+):(\d{1,5})/?", name, flags=re.ASCII)
    if match is None:
        raise InputError(f"{name!r} is not an output: use window, http://127.0.0.1:8000 or v4l2:/dev/video10")
    server = stack.enter_context(MjpegServer(match[1], int(match[2]), COMMANDS, commands.put))

    def show(frame: np.ndarray, line: str) -> bool:
        server.status = line
        return server.show(frame)

    return show


def _open_window(commands: SimpleQueue[str], stack: contextlib.ExitStack) -> Output:
    no_display = "there is no display for a window: use --to http://127.0.0.1:8000 or --record out.mp4"
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise InputError(no_display)  # OpenCV would end the process
    try:
        cv2.namedWindow(WINDOW_NAME, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
    except cv2.error as error:  # opencv-python-headless
        raise InputError(no_display) from error
    stack.callback(cv2.destroyAllWindows)
    keys = {ord(name[0]): name for name in COMMANDS} | {27: "quit"}  # Esc

    def show(frame: np.ndarray, line: str) -> bool:
        cv2.imshow(WINDOW_NAME, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        cv2.setWindowTitle(WINDOW_NAME, f"{WINDOW_NAME}: {line}")
        key = cv2.waitKey(1)
        if key in keys:
            commands.put(keys[key])
        elif cv2.getWindowProperty(WINDOW_NAME, cv2.WND_PROP_VISIBLE) < 1:  # it was closed
            commands.put("quit")
        return True

    return show


def _open_device(device: Path, size: tuple[int, int], fps: Fraction, stack: contextlib.ExitStack) -> Output:
    """Open a video device that other programs read as a camera, such as v4l2loopback's, by ffmpeg."""
    if not device.is_char_device():
        raise InputError(f"{device} is not a video device: load v4l2loopback, and choose one of /dev/video*")
    command = f"-y -nostdin -loglevel error -probesize 32 -f rawvideo -pix_fmt rgb24 -video_size {size[0]}x{size[1]}"
    command += f" -framerate {fps} -i pipe:0 -vf crop=trunc(iw/2)*2:trunc(ih/2)*2,format=yuv420p -f {DEVICE_FORMAT}"
    process = FfmpegProcess([ffmpeg_path(), *command.split(), str(device)], stdin=True)
    stack.callback(process.kill)

    def show(frame: np.ndarray, line: str) -> bool:
        try:
            process.write(np.ascontiguousarray(frame).data.cast("B"))
        except OSError as error:
            process.wait()
            raise MediaError(f"{device} takes no pictures: {process.error_summary()}") from error
        return True

    return show


def _open_recording(
    path: Path, size: tuple[int, int], fps: Fraction, crf: int | None, stack: contextlib.ExitStack
) -> Output:
    """Open a video file in real time: each frame is repeated until the next one comes."""
    writer = stack.enter_context(VideoWriter(path, size=size, fps=fps, crf=crf))
    background = stack.enter_context(BackgroundWriter(writer.write, RECORD_DEPTH, stop=writer.abort))
    began, written = time.monotonic(), 0

    def record(frame: np.ndarray, line: str) -> bool:
        nonlocal written
        due = int((time.monotonic() - began) * fps) + 1
        for _ in range(min(due - written, round(MAX_REPEAT_S * fps))):
            background.put(frame)
        written = due
        return True

    return record
