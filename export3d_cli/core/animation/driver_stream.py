"""A driver as a stream of motion: a video, a sound, an image, a folder of pictures, a `.motion.npz` or an ARKit CSV.

Memory does not grow with the driver's length. A driver consists of shots, which begin at cuts that
change the framing. Crop, smoothing and the automatic reference frame start again with each: they are measured over the
shot's first ten seconds, while faces and motion, not images, wait.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from export3d_cli.core.animation.options import MOTION_SUFFIXES, ReenactOptions
from export3d_cli.core.animation.retargeting import reference_rows
from export3d_cli.core.face import arkit, face_track
from export3d_cli.core.face.crop import ClipCalibration, crop_with_padding
from export3d_cli.core.face.face_track import Face, FaceTracker, TargetFaceTracker, TrackCache, rotate_clockwise
from export3d_cli.core.face.fan_tracker import NUM_FAN_LANDMARKS
from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.face.motion import Motion, resample_rows
from export3d_cli.core.face.smoothing import smooth_stream
from export3d_cli.core.face.speech import DEFAULT_FPS, read_speech
from export3d_cli.core.face.torso_tracking import TorsoTracker
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.errors import InputError, MediaError, NoFaceError

LOOKAHEAD_S = 10  # seconds of a shot over which its crop is measured and its reference frame is chosen
UNSEEN_TORSO = "does not show how the shoulders move: the torso follows the head there, as with --torso follow"
SAME_FRAMING = (0.25, 0.15)  # face boxes of movement, and change of the logarithm of the size


class MotionBatch(NamedTuple):
    """Consecutive frames of a driver."""

    motion: Motion
    driver_crops: list[np.ndarray | None]  # uint8 (K, K, 3), the face crop of each frame if it is to be shown
    # (R rows) row 0: the frame that relative control counts from; the others: the face at rest; one object per shot
    reference: Motion | None


@dataclass
class _Shot:
    """The faces of a shot that wait to become motion."""

    number: int
    faces: list[Face | None] = field(default_factory=list)
    clip: ClipCalibration | None = None  # once it is measured
    held: Face | None = None  # what a frame without a face repeats: the face before it, or the shot's first


class DriverStream(contextlib.AbstractContextManager["DriverStream"]):
    """Iterate over the driver's motion in batches; a context manager, one pass, or more with a `track_cache`.

    `driver` is a video, an image, a folder of pictures, a sound, a file written by `Motion.save`, or a CSV of Live Link
    Face.
    With the reference `auto` of `options`, each shot has its own, see `reference_rows`. `source` is the portrait's
    motion, one row; its camera also places the head of a CSV (None: EG3D's usual). Crops are `crop_scale` face boxes
    wide; those of `crop_size` pixels come with the motion (None: no crops). `track_cache` records the faces at the
    first pass; later passes with the same driver, tracker, face and frames read them from it. With a `matting` of
    people the motion of the torso is read, too, and with `read_code` the `code` of each frame and its face; faces of a
    `track_cache` have no codes.

    `fps` is the exact rate, `total` the expected number of frames, `missing` the frames without a face so far,
    `rotation` the clockwise degrees by which frames are rotated, so that the face is upright, `notes` are for the user.
    """

    def __init__(self, driver: Path, tracker: FaceTracker, options: ReenactOptions, *, batch: int, crop_scale: float,
                 crop_size: int | None = None, source: Motion | None = None,
                 track_cache: TrackCache | None = None, matting: PersonMatting | None = None,
                 read_code: Callable[[np.ndarray, Face], np.ndarray] | None = None) -> None:  # fmt: skip
        self.driver, self.tracker, self.options, self.source = driver, tracker, options, source
        self.batch, self.crop_scale, self.crop_size, self.track_cache = batch, crop_scale, crop_size, track_cache
        self._read_code = read_code
        self._torso = TorsoTracker(matting) if matting is not None else None
        self.missing = 0
        self.notes: list[str] = []
        self.rotation = 0
        self._motion: Motion | None = None
        self._reader: VideoReader | None = None
        self._crop_reader: VideoReader | None = None  # the same frames again, to be shown
        self._used = deque[int]()  # indices of frames that are read and whose motion the caller has not taken yet
        self._stopped = False
        fps, start, duration, max_frames = options.fps, options.start, options.duration, options.max_frames
        self._track_key = (driver.resolve(), type(tracker), options.driver_face, fps, start, duration, max_frames,
                           self._torso is None)  # fmt: skip
        speaks = options.uses_sound_of(driver)
        if options.text is not None and not speaks:
            raise InputError(f"--text is what a sound says, and {driver} drives by its picture: add --drive-by sound")
        if speaks or driver.suffix.lower() in MOTION_SUFFIXES:
            if crop_size is not None:
                raise InputError(f"{driver} holds no images for --compare: leave out --compare")
            if read_code is not None:
                raise InputError(f"{driver} holds no pictures to read motion from: leave out --motion")
            camera = orbit_camera(0) if source is None else source.camera[0]
            if speaks:
                fps = fps or DEFAULT_FPS
                if max_frames is not None:
                    duration = min(float(max_frames / fps), duration or np.inf)
                motion, self.notes = read_speech(driver, camera, fps=fps, start=start, duration=duration,
                                                 text=options.text)  # fmt: skip
                start, duration = 0.0, None  # the motion begins there
            elif driver.suffix.lower() == ".csv":
                motion, self.notes = arkit.read_csv(driver, camera)
            else:
                motion = Motion.load(driver, landmark_counts=(NUM_LANDMARKS, NUM_FAN_LANDMARKS, 0))
            self.fps = motion.fps if fps is None else fps
            chosen = resample_rows(len(motion), motion.fps, self.fps, start, duration)[:max_frames]
            if not len(chosen):
                raise InputError(f"start {start} s is after the end of {driver}")
            self._motion = motion.select(chosen)
            if self._torso is not None:
                self.notes.append(f"{driver} {UNSEEN_TORSO}")
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

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Make an iteration in another thread raise `MediaError` at its next frame."""
        self._stopped = True
        for reader in (self._reader, self._crop_reader):
            if reader is not None:
                reader.close()

    def __iter__(self) -> Iterator[MotionBatch]:
        parts = self._track() if self._motion is None else self._split(self._motion)
        shots = (smooth_stream((motion for _, motion in shot), self.options.smooth)
                 for _, shot in groupby(parts, key=itemgetter(0)))  # fmt: skip
        images = enumerate(self._images(self._crop_reader))  # read a second time, so that none waits in memory
        for motion, reference in self._with_reference(shots):
            numbers = [self._used.popleft() for _ in range(len(motion))]
            crops: list[np.ndarray | None] = [None] * len(motion)
            if self.crop_size is not None:
                for row, number in enumerate(numbers):
                    image = rotate_clockwise(next(image for k, image in images if k == number), self.rotation)
                    crops[row] = crop_with_padding(image, motion.crop, self.crop_size)
            yield MotionBatch(motion, crops, reference)

    def _with_reference(self, shots: Iterator[Iterator[Motion]]) -> Iterator[tuple[Motion, Motion | None]]:
        """Pair the motions of all shots with their reference frames; a fixed one may lie in a later shot."""
        number = self.options.reference
        for motions in shots if number == "auto" else [chain.from_iterable(shots)]:
            count = max(1, round(LOOKAHEAD_S * self.fps)) if number == "auto" else (number or 0) + 1
            ahead = [next(motions)]
            while sum(map(len, ahead)) < count and (motion := next(motions, None)) is not None:
                ahead.append(motion)
            reference = None if number is None else self._choose_reference(Motion.concatenate(ahead), number, count)
            for motion in chain(ahead, motions):
                yield motion, reference

    def _choose_reference(self, ahead: Motion, number: int | Literal["auto"], count: int) -> Motion:
        """Return the reference frame among the first `count` frames of a shot."""
        if number != "auto":
            if len(ahead) <= number:
                raise InputError(f"{self.driver} has {len(ahead)} frames: frame {number} cannot be the reference")
            return ahead.select(np.array([number]))
        assert self.source is not None
        rows = np.arange(min(count, len(ahead)))
        usable = ahead.select(rows[ahead.found[rows]] if ahead.found[rows].any() else rows)
        return usable.select(reference_rows(usable, self.source))

    def _split(self, motion: Motion) -> Iterator[tuple[int, Motion]]:
        """Yield the motion of a file in batches, as one shot."""
        self.missing = int((~motion.found).sum())
        for start in range(0, self.total, self.batch):
            rows = np.arange(start, min(start + self.batch, self.total))
            self._used.extend(rows.tolist())
            yield 0, motion.select(rows)

    def _images(self, reader: VideoReader | None) -> Iterator[np.ndarray]:
        if reader is None:
            yield read_image(self.driver)
            return
        for index, frame in enumerate(reader):
            if index == self.options.max_frames:
                return
            if self._stopped:
                raise MediaError(f"reading {self.driver} was stopped")
            yield frame

    def _faces(self) -> Iterator[tuple[Face | None, bool, tuple[int, int]]]:
        """Yield the face of each frame, whether a shot begins with it, and the frame's size.

        A cut that keeps the framing, such as a jump cut or a flash, does not begin a shot.
        """
        cache = self.track_cache
        if cache is not None and cache.is_complete(self._track_key):
            self.rotation = cache.rotation
            for face, is_new_shot in cache:
                yield face, is_new_shot, cache.size
            self.notes += [note for note in cache.notes if note not in self.notes]
            return
        if cache is not None:
            cache.restart(self._track_key)
        target = TargetFaceTracker(self.tracker, self.fps, choice=self.options.driver_face, name=str(self.driver))
        frames = face_track.UprightFrames(self.tracker, self._images(self._reader))
        is_cut, last = False, None
        for frame in frames:
            self.rotation, size = frames.rotation, (frame.shape[1], frame.shape[0])
            face, is_new_shot = target(frame), False
            is_cut |= target.is_new_shot
            if face is not None:
                is_new_shot = is_cut and last is not None and not _looks_alike(last, face)
                is_cut, last = False, face
                if self._torso is not None:
                    face = replace(face, torso=self._torso(frame, face, is_new_shot=is_new_shot))
                if self._read_code is not None:
                    face = replace(face, code=self._read_code(frame, face))
            if cache is not None:
                cache.append(face, size, is_new_shot=is_new_shot)
            yield face, is_new_shot, size
        if self.rotation:
            rotated = f"its frames are used rotated by {self.rotation} degrees clockwise"
            self.notes.append(f"the face in {self.driver} {face_track.describe_rotation(self.rotation)}: {rotated}")
        if self._reader is not None:  # what shows only at the end
            self.notes += [note for note in self._reader.notes if note not in self.notes]
        self.notes += target.notes
        if self._torso is not None and self._torso.unseen:
            self.notes.append(f"{self.driver} {UNSEEN_TORSO}")
        if cache is not None:
            cache.rotation = self.rotation
            cache.finish(self.notes)

    def _track(self) -> Iterator[tuple[int, Motion]]:
        """Yield motions before smoothing, with their shot's number; a shot's frames wait until its crop is known."""
        shot, missing = _Shot(0), 0
        size = (0, 0)
        for index, (face, is_new_shot, size) in enumerate(self._faces()):
            if is_new_shot:
                yield from self._flush(shot, size, 1)
                shot = _Shot(shot.number + 1)
            if face is None:
                missing += 1
                self.missing = max(missing, self.missing)  # of the first pass
                if self.options.on_missing == "fail":
                    raise NoFaceError(f"no face in frame {index} of {self.driver}: use --on-missing hold or skip")
                if self.options.on_missing == "skip":
                    continue
            self._used.append(index)
            shot.faces.append(face)
            shot.held = shot.held or face
            if shot.held is not None and (shot.clip is not None or len(shot.faces) >= LOOKAHEAD_S * self.fps):
                yield from self._flush(shot, size, self.batch)
        if shot.held is None:
            raise NoFaceError(f"no face found in {self.driver}: use a video that shows one large, upright face")
        yield from self._flush(shot, size, 1)

    def _flush(self, shot: _Shot, size: tuple[int, int], minimum: int) -> Iterator[tuple[int, Motion]]:
        """Yield the waiting frames of a shot in batches while there are at least `minimum`."""
        if shot.clip is None:  # the crop is as many face boxes wide as the portrait's, so that both faces have one size
            found = [face for face in shot.faces if face is not None]
            shot.clip = self.tracker.calibrate_clip(found, size, (self.crop_scale, self.crop_scale))
        while len(shot.faces) >= minimum:
            faces = shot.faces[: self.batch]
            del shot.faces[: self.batch]
            present = []
            for face in faces:
                shot.held = face or shot.held
                present.append(shot.held)
            motion = self.tracker.make_motion(present, self.fps, size, clip=shot.clip)
            motion = replace(motion, found=np.array([face is not None for face in faces]))
            yield shot.number, motion


def _looks_alike(one: Face, two: Face) -> bool:
    """Return whether faces before and after a cut have about the same place and size, so that the framing can stay."""
    points = (face.landmarks[:, :2] for face in (one, two))
    (low, high), (other_low, other_high) = ((p.min(0), p.max(0)) for p in points)
    side, other_side = (high - low).max(), (other_high - other_low).max()
    distance = np.linalg.norm((low + high - other_low - other_high) / 2) / side
    return bool(distance < SAME_FRAMING[0] and abs(np.log(other_side / side)) < SAME_FRAMING[1])
