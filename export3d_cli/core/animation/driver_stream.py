"""A driver as a stream of motion, a batch at a time: a video, an image, a `.motion.npz` or a Live Link Face CSV.

Memory does not grow with the driver's length: frames are tracked as they are read, and only faces wait, until the crop
is known (it is measured over the first ten seconds) and the reference frame has come.
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

LOOKAHEAD_S = 10  # seconds of the driver over which its crop is measured
OnMissing = Literal["hold", "skip", "fail"]  # what becomes of frames without a face
MotionBatch = tuple[
    Motion, "list[np.ndarray | None]"
]  # motion of some frames, and their face crops where they are shown


class DriverStream:
    """Iterate over the driver's motion with its face crops; a context manager, one pass.

    Args:
        driver: a video, an image, a folder of pictures, a file written by `Motion.save`, or a CSV of Live Link Face.
        tracker: follows the face.
        face: which one, where there are several: largest, left, right, or index:N, the N-th from the left, from 0.
        batch: most frames at once.
        crop_scale: side of the crop in face boxes.
        shown: side in pixels of the face crops that come with the motion; None: no crops.
        fps: rate of the frames given; None keeps the driver's.
        start: seconds to skip.
        duration: seconds to use; None: to the end.
        max_frames: most frames to use; None: all.
        on_missing: repeat the last frame with a face, leave the frame out, or raise `NoFaceError`.
        smooth: how much the motion is smoothed.
        reference: frame of those given, from 0, whose motion is kept in `reference`; None: none.
        camera: (25,), where and as far away as which a CSV's head is seen; None: EG3D's usual.
        track_cache: records the faces at the first pass; later passes with the same driver, tracker, face and frames
            take them from it.

    `fps` is the exact rate, `total` the expected number of frames, `missing` how many showed no face so far,
    `reference` (one row, or None) is there from the first part on.
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
        self._crop_reader: VideoReader | None = None  # the same frames again, to be shown
        self._crop_frames: Iterator[tuple[int, np.ndarray]] | None = None
        self._stopped = False
        self._track_key = (driver.resolve(), type(tracker), face, fps, start, duration, max_frames)
        if is_motion_file(driver):
            if crop_size is not None:
                raise InputError(f"{driver} holds no pictures to show beside the result: leave out --compare")
            if driver.suffix.lower() == ".csv":
                camera = Camera.orbit(0).to_vector() if camera is None else camera
                motion, self.notes = arkit.read_csv(driver, resolve_weights("arkit_measures"), camera)
            else:
                motion = Motion.load(driver, landmark_counts=(mesh.NUM_LANDMARKS, FAN_POINTS, 0))
            self.fps = motion.fps if fps is None else fps
            chosen = resample_rows(len(motion), motion.fps, self.fps, start, duration)[:max_frames]
            if not len(chosen):
                raise InputError(f"start {start} s lies behind the end of {driver}")
            self._motion = motion.select(chosen)
            self.total = len(chosen)
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
        """Have an iteration that goes on in another thread fail at its next frame."""
        self._stopped = True
        for reader in (self._reader, self._crop_reader):
            if reader is not None:
                reader.close()

    def __iter__(self) -> Iterator[MotionBatch]:
        self._filter = MotionSmoother(self.smooth, self.fps)
        if self._motion is None:
            yield from self._track()
            return
        self.missing = int((~self._motion.found).sum())
        if self._reference_row is not None:
            self._check_reference(self.total)
            before = self._motion.select(np.arange(self._reference_row + 1))
            self.reference = self._last_row(MotionSmoother(self.smooth, self.fps)(before))
        for at in range(0, self.total, self.batch):
            part = self._motion.select(np.arange(at, min(at + self.batch, self.total)))
            yield self._filter(part), [None] * len(part)

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
        """The face of each frame, and the frame's size: tracked, or from the tape."""
        if self.track_cache is not None and self.track_cache.is_complete(self._track_key):
            for face in self.track_cache:
                yield face, self.track_cache.size
            self.notes += [note for note in self.track_cache.notes if note not in self.notes]
            return
        if self.track_cache is not None:
            self.track_cache.restart(self._track_key)
        follow = TargetFaceTracker(self.tracker.landmarker, self.fps, choice=self.face, name=str(self.driver))
        for image in self._images(self._reader):
            size = (image.shape[1], image.shape[0])
            face = follow(image)
            if self.track_cache is not None:
                self.track_cache.append(face, size)
            yield face, size
        if self._reader is not None:  # what shows only at the end
            self.notes += [note for note in self._reader.notes if note not in self.notes]
        self.notes += follow.notes
        if self.track_cache is not None:
            self.track_cache.finish(self.notes)

    def _track(self) -> Iterator[MotionBatch]:
        """Track frame by frame; frames wait only until the crop is known, and only their faces and small crops do."""
        waiting: list[tuple[int, Face | None]] = []  # frame number, face
        clip: ClipCalibration | None = None
        held: Face | None = None
        size = (0, 0)
        ahead = max(1, round(LOOKAHEAD_S * self.fps), (self._reference_row or 0) + 1)
        for index, (face, size) in enumerate(self._faces()):
            if face is None:
                self.missing += 1
                if self.on_missing == "fail":
                    raise NoFaceError(f"no face in frame {index} of {self.driver}: use --on-missing hold or skip")
                if self.on_missing == "skip":
                    continue
            waiting.append((index, face))
            if clip is None and len(waiting) >= ahead and any(f is not None for _, f in waiting):
                clip = self._start(waiting, size)
            if clip is not None and len(waiting) >= self.batch:
                held = yield from self._flush(waiting, held, clip, size)
        if not any(f is not None for _, f in waiting) and held is None:
            raise NoFaceError(f"no face found in {self.driver}: use a driver that shows one large, upright face")
        if waiting:
            clip = clip or self._start(waiting, size)
            yield from self._flush(waiting, held, clip, size, rest=True)

    def _start(self, waiting: list[tuple[int, Face | None]], size: tuple[int, int]) -> ClipCalibration:
        """The crop, once enough frames wait; and the reference frame's motion, smoothed like the frames."""
        clip = self._compute_crop([f for _, f in waiting], size)
        if self._reference_row is not None:
            self._check_reference(len(waiting))
            smoothed = MotionSmoother(self.smooth, self.fps)
            held = None
            for at in range(0, self._reference_row + 1, self.batch):
                part = waiting[at : min(at + self.batch, self._reference_row + 1)]
                first = held or next(f for _, f in waiting if f is not None)
                motion, held = self._to_motion(part, first, clip, size)
                self.reference = self._last_row(smoothed(motion))
        return clip

    def _check_reference(self, frames: int) -> None:
        if self._reference_row is not None and self._reference_row >= frames:
            raise InputError(f"{self.driver} has {frames} frames: there is no reference frame {self._reference_row}")

    @staticmethod
    def _last_row(motion: Motion) -> Motion:
        return motion.select(np.array([-1]))

    def _to_motion(
        self, part: list[tuple[int, Face | None]], last: Face, clip: ClipCalibration, size: tuple[int, int]
    ) -> tuple[Motion, Face]:
        """Motion of some frames, those without a face repeating the last one with one, which is returned."""
        faces = []
        for _, face in part:
            last = face or last
            faces.append(last)
        motion = self.tracker.make_motion(faces, self.fps, size, clip=clip)
        return replace(motion, found=np.array([face is not None for _, face in part])), last

    def _compute_crop(self, faces: list[Face | None], size: tuple[int, int]) -> ClipCalibration:
        """The driver's crop, as many face boxes wide as the source's, so that both faces have one size."""
        return self.tracker.calibrate_clip(
            [f for f in faces if f is not None], size, (self.crop_scale, self.crop_scale)
        )

    def _flush(
        self, waiting: list[tuple[int, Face | None]], held: Face | None, clip: ClipCalibration, size: tuple[int, int],
        *, rest: bool = False,
    ) -> Generator[MotionBatch, None, Face]:  # fmt: skip
        """Turn waiting frames into batches; those without a face repeat the last one with one, which is returned."""
        last = held or next(f for _, f in waiting if f is not None)
        while len(waiting) >= self.batch or (rest and waiting):
            part, waiting[:] = waiting[: self.batch], waiting[self.batch :]
            motion, last = self._to_motion(part, last, clip, size)
            yield self._filter(motion), [self._driver_crop(index, clip.crop) for index, _ in part]
        return last

    def _driver_crop(self, index: int, crop: Square) -> np.ndarray | None:
        """The driver's frame to be shown, read a second time so that none has to wait in memory."""
        if self.crop_size is None:
            return None
        if self._crop_frames is None:
            self._crop_frames = enumerate(self._images(self._crop_reader))
        image = next(image for number, image in self._crop_frames if number == index)
        return crop_image(image, crop, self.crop_size)


def is_motion_file(driver: Path) -> bool:
    """Whether a driver is a file of numbers, with neither pictures nor sound."""
    return driver.suffix.lower() in (".npz", ".csv")


def select_audio(driver: Path, audio: str, start: float) -> tuple[Path | None, float]:
    """The file whose sound joins the result, and where in it to begin: only the driver's own is skipped along.

    `audio` is driver, none or a file, as in `ReenactOptions`.
    """
    if audio == "driver":
        return (None if is_motion_file(driver) else driver), start
    return (None if audio == "none" else Path(audio)), 0.0
