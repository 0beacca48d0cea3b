"""The motion of a driver, streamed in batches: a video, an image, a `.motion.npz` or a Live Link Face CSV.

Memory does not grow with the driver's length: frames are tracked as they are read. Only their faces are kept, until the
crop is calibrated over the first `LOOKAHEAD_S` seconds and the reference frame has been read.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from export3d_cli.core.face import arkit
from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.face.crop import ClipCalibration, Square, crop_image
from export3d_cli.core.face.fan_tracker import NUM_FAN_LANDMARKS as FAN_POINTS
from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.motion import Motion, resample_rows
from export3d_cli.core.face.smoothing import MotionSmoother, SmoothingLevel
from export3d_cli.core.face.target_face import TargetFaceTracker
from export3d_cli.core.face.track_cache import TrackCache
from export3d_cli.core.face.tracker import FaceTracker
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.errors import InputError, MediaError, NoFaceError
from export3d_cli.core.runtime.weights import resolve_weights

LOOKAHEAD_S = 10  # seconds of the driver over which its crop is calibrated
OnMissing = Literal["hold", "skip", "fail"]  # what to do with frames without a face
# motion of some frames, and their driver crops (None: not shown)
MotionBatch = tuple[Motion, "list[np.ndarray | None]"]


class DriverStream:
    """Iterator over the driver's motion and face crops; a context manager for one pass.

    Args:
        driver: a video, an image, a folder of images, a file written by `Motion.save`, or a CSV of Live Link Face.
        tracker: finds and follows the face; used by this object alone until it is closed.
        batch: maximum number of frames in a batch.
        crop_scale: side of the crop in face boxes.
        face: which of several faces: largest, left, right, or index:N, the N-th from the left, from 0.
        crop_size: side of the driver crops that come with the motion, in pixels; None: no crops.
        fps: output frame rate; None keeps the driver's.
        start: seconds to skip.
        duration: seconds to use; None: to the end.
        max_frames: maximum number of frames to use; None: all.
        on_missing: for a frame without a face: repeat the last face, skip the frame, or raise `NoFaceError`.
        smooth: strength of the motion smoothing.
        reference: output frame, from 0, whose motion is kept in the attribute `reference`; None: none.
        camera: (25,), position and distance of the head in a CSV; None: EG3D's.
        track_cache: records the faces at the first pass; later passes with the same driver, tracker, face and frames
            take them from it.

    Attributes:
        fps: exact output frame rate.
        total: expected number of frames.
        missing: frames without a face so far.
        reference: motion of the reference frame, one row; set before the first batch is yielded.
        notes: for the user; complete after the last batch.
    """

    def __init__(
        self,
        driver: Path,
        tracker: FaceTracker,
        *,
        batch: int,
        crop_scale: float,
        face: str = "largest",
        crop_size: int | None = None,
        fps: Fraction | None = None,
        start: float = 0.0,
        duration: float | None = None,
        max_frames: int | None = None,
        on_missing: OnMissing = "hold",
        smooth: SmoothingLevel = "off",
        reference: int | None = None,
        camera: np.ndarray | None = None,
        track_cache: TrackCache | None = None,
    ) -> None:
        self.driver, self.tracker = driver, tracker
        self.batch, self.crop_scale, self.crop_size = batch, crop_scale, crop_size
        self.max_frames, self.on_missing = max_frames, on_missing
        self.smooth, self.track_cache, self.face = smooth, track_cache, face
        self.missing = 0
        self.notes: list[str] = []
        self.reference: Motion | None = None
        self._reference_row = reference
        self._motion: Motion | None = None
        self._reader: VideoReader | None = None
        self._crop_reader: VideoReader | None = None  # reads the same frames a second time, for the crops
        self._crop_frames: Iterator[tuple[int, np.ndarray]] | None = None
        self._stopped = False
        self._track_key = (driver.resolve(), type(tracker), face, fps, start, duration, max_frames)
        if is_motion_file(driver):
            if crop_size is not None:
                raise InputError(f"{driver} holds no images for --compare: leave out --compare")
            if driver.suffix.lower() == ".csv":
                camera = Camera.orbit(0).to_vector() if camera is None else camera
                motion, self.notes = arkit.read_csv(driver, resolve_weights("arkit_measures"), camera)
            else:
                motion = Motion.load(driver, landmark_counts=(mesh.NUM_LANDMARKS, FAN_POINTS, 0))
            self.fps = motion.fps if fps is None else fps
            rows = resample_rows(len(motion), motion.fps, self.fps, start, duration)[:max_frames]
            if not len(rows):
                raise InputError(f"start {start} s is after the end of {driver}")
            self._motion = motion.select(rows)
            self.total = len(rows)
        elif has_image_suffix(driver):
            self.fps, self.total = fps or Fraction(25), 1
        else:
            self._reader = VideoReader(driver, fps=fps, start=start, duration=duration)
            if crop_size is not None:
                self._crop_reader = VideoReader(driver, fps=fps, start=start, duration=duration)
            info = self._reader.info
            self.fps, self.total = info.fps, min(info.frame_count, max_frames or info.frame_count)
            self.notes += self._reader.notes

    def __enter__(self) -> DriverStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Make an iteration in another thread raise `MediaError` at its next frame."""
        self._stopped = True
        for reader in (self._reader, self._crop_reader):
            if reader is not None:
                reader.close()

    def __iter__(self) -> Iterator[MotionBatch]:
        self._smoother = MotionSmoother(self.smooth, self.fps)
        if self._motion is None:
            yield from self._track()
            return
        self.missing = int((~self._motion.found).sum())
        if self._reference_row is not None:
            self._check_reference(self.total)
            before = self._motion.select(np.arange(self._reference_row + 1))
            self.reference = self._last_row(MotionSmoother(self.smooth, self.fps)(before))
        for start in range(0, self.total, self.batch):
            motion = self._motion.select(np.arange(start, min(start + self.batch, self.total)))
            yield self._smoother(motion), [None] * len(motion)

    def _images(self, reader: VideoReader | None) -> Iterator[np.ndarray]:
        if reader is None:
            yield read_image(self.driver)
            return
        for index, frame in enumerate(reader):
            if self.max_frames is not None and index >= self.max_frames:
                return
            if self._stopped:
                raise MediaError(f"reading {self.driver} was stopped")
            yield frame

    def _faces(self) -> Iterator[tuple[Face | None, tuple[int, int]]]:
        """Yield the face of each frame, tracked or from the cache, and the frame's (width, height)."""
        if self.track_cache is not None and self.track_cache.is_complete(self._track_key):
            for face in self.track_cache:
                yield face, self.track_cache.size
            self.notes += [note for note in self.track_cache.notes if note not in self.notes]
            return
        if self.track_cache is not None:
            self.track_cache.restart(self._track_key)
        track_face = TargetFaceTracker(self.tracker.landmarker, self.fps, choice=self.face, name=str(self.driver))
        for image in self._images(self._reader):
            size = (image.shape[1], image.shape[0])
            face = track_face(image)
            if self.track_cache is not None:
                self.track_cache.append(face, size)
            yield face, size
        if self._reader is not None:  # such as a damaged end of the file
            self.notes += [note for note in self._reader.notes if note not in self.notes]
        self.notes += track_face.notes
        if self.track_cache is not None:
            self.track_cache.finish(self.notes)

    def _track(self) -> Iterator[MotionBatch]:
        """Track frame by frame; only faces are queued, until the crop is calibrated."""
        queue: list[tuple[int, Face | None]] = []  # frame index, face
        clip: ClipCalibration | None = None
        last_face: Face | None = None
        size = (0, 0)
        lookahead = max(1, round(LOOKAHEAD_S * self.fps), (self._reference_row or 0) + 1)
        for index, (face, size) in enumerate(self._faces()):
            if face is None:
                self.missing += 1
                if self.on_missing == "fail":
                    raise NoFaceError(f"no face in frame {index} of {self.driver}: use --on-missing hold or skip")
                if self.on_missing == "skip":
                    continue
            queue.append((index, face))
            if clip is None and len(queue) >= lookahead and any(f is not None for _, f in queue):
                clip = self._start(queue, size)
            if clip is not None and len(queue) >= self.batch:
                last_face = yield from self._flush(queue, last_face, clip, size)
        if not any(f is not None for _, f in queue) and last_face is None:
            raise NoFaceError(f"no face found in {self.driver}: use a driver that shows one large, upright face")
        if queue:
            clip = clip or self._start(queue, size)
            yield from self._flush(queue, last_face, clip, size, final=True)

    def _start(self, queue: list[tuple[int, Face | None]], size: tuple[int, int]) -> ClipCalibration:
        """Calibrate the crop over the queue, and compute the motion of the reference frame, smoothed as all frames."""
        clip = self._compute_crop([f for _, f in queue], size)
        if self._reference_row is not None:
            self._check_reference(len(queue))
            smoother = MotionSmoother(self.smooth, self.fps)
            last_face = next(face for _, face in queue if face is not None)
            for start in range(0, self._reference_row + 1, self.batch):
                part = queue[start : min(start + self.batch, self._reference_row + 1)]
                motion, last_face = self._to_motion(part, last_face, clip, size)
                self.reference = self._last_row(smoother(motion))
        return clip

    def _check_reference(self, frames: int) -> None:
        if self._reference_row is not None and self._reference_row >= frames:
            raise InputError(f"{self.driver} has {frames} frames: frame {self._reference_row} cannot be the reference")

    @staticmethod
    def _last_row(motion: Motion) -> Motion:
        return motion.select(np.array([-1]))

    def _to_motion(
        self, part: list[tuple[int, Face | None]], last_face: Face, clip: ClipCalibration, size: tuple[int, int]
    ) -> tuple[Motion, Face]:
        """Return the motion of some frames, which repeats the last face where there is none, and that last face."""
        faces = []
        for _, face in part:
            last_face = face or last_face
            faces.append(last_face)
        motion = self.tracker.make_motion(faces, self.fps, size, clip=clip)
        return replace(motion, found=np.array([face is not None for _, face in part])), last_face

    def _compute_crop(self, faces: list[Face | None], size: tuple[int, int]) -> ClipCalibration:
        """Calibrate the driver's crop: as many face boxes wide as the source's, so that both faces have one size."""
        return self.tracker.calibrate_clip(
            [f for f in faces if f is not None], size, (self.crop_scale, self.crop_scale)
        )

    def _flush(
        self, queue: list[tuple[int, Face | None]], last_face: Face | None, clip: ClipCalibration,
        size: tuple[int, int], *, final: bool = False,
    ) -> Generator[MotionBatch, None, Face]:  # fmt: skip
        """Yield full batches of the queue, with `final` all of it; return the last face."""
        last_face = last_face or next(face for _, face in queue if face is not None)
        while len(queue) >= self.batch or (final and queue):
            part, queue[:] = queue[: self.batch], queue[self.batch :]
            motion, last_face = self._to_motion(part, last_face, clip, size)
            yield self._smoother(motion), [self._driver_crop(index, clip.crop) for index, _ in part]
        return last_face

    def _driver_crop(self, index: int, crop: Square) -> np.ndarray | None:
        """Return the crop of a frame, which is read a second time so that no frame is queued in memory."""
        if self.crop_size is None:
            return None
        if self._crop_frames is None:
            self._crop_frames = enumerate(self._images(self._crop_reader))
        image = next(image for number, image in self._crop_frames if number == index)
        return crop_image(image, crop, self.crop_size)


def is_motion_file(driver: Path) -> bool:
    """Return whether a driver is a file of numbers, without images or sound."""
    return driver.suffix.lower() in (".npz", ".csv")


def select_audio(driver: Path, audio: str, start: float) -> tuple[Path | None, float]:
    """Return the file with the result's sound, if any, and the second where it starts: `start` in the driver itself.

    `audio` is driver, none or a file, as in `ReenactOptions`.
    """
    if audio == "driver":
        return (None if is_motion_file(driver) else driver), start
    return (None if audio == "none" else Path(audio)), 0.0
