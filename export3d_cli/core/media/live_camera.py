"""Frames of a camera as they arrive, or of a video file that stands in for one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import InputError

CameraFrame = tuple[np.ndarray, float]  # uint8 (H, W, 3) RGB, and the time of its arrival by `time.monotonic`
DEFAULT_FPS = 30  # of cameras that do not report their rate


def open_camera(camera: int | Path, stopped: threading.Event) -> tuple[Fraction, Iterator[CameraFrame]]:
    """Return a camera's rate, and its frames until `stopped` is set or it is disconnected.

    `camera` is its number, from 0, or a video file, which is repeated at its rate. Raises `InputError`.
    """
    if isinstance(camera, Path):
        reader = VideoReader(camera)
        return reader.info.fps, _play_file(reader, stopped)
    import cv2

    capture = cv2.VideoCapture(camera)
    if not capture.isOpened():
        raise InputError(f"camera {camera} cannot be opened: connect it, close programs that use it, or use a file")
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # frames that wait in the driver would be late
    rate = capture.get(cv2.CAP_PROP_FPS)
    fps = Fraction(rate).limit_denominator(1001) if 1 <= rate <= 240 else Fraction(DEFAULT_FPS)
    return fps, _read_camera(capture, stopped)


def _read_camera(capture: Any, stopped: threading.Event) -> Iterator[CameraFrame]:
    try:
        while not stopped.is_set():
            ok, image = capture.read()
            if not ok:  # it was disconnected
                return
            yield np.ascontiguousarray(image[..., ::-1]), time.monotonic()
    finally:
        capture.release()


def _play_file(reader: VideoReader, stopped: threading.Event) -> Iterator[CameraFrame]:
    due = time.monotonic()
    while True:
        with reader:
            for image in reader:
                due = max(due + float(1 / reader.info.fps), time.monotonic() - 1)  # catches up at most a second
                if stopped.wait(max(0.0, due - time.monotonic())):
                    return
                yield image, time.monotonic()
