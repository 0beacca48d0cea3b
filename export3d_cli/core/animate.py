"""What happens to a photo and a driver: set the source once, then drive, view or edit, streaming frames.

    animator = Animator.from_weights()
    animator.set_source(read_image(Path("src.jpg")))
    frame = next(animator.drive([motion]))          # uint8 (H, W, 3)

Memory does not grow with the driver's length: the face is tracked, generated and encoded a few frames at a time. Only the
driver's crop needs to look ahead, over its first ten seconds.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.camera import RADIUS, Camera, rotation_from_angles
from export3d_cli.core.checkpoint import load_into, load_weights
from export3d_cli.core.errors import Export3DError, InputError, NoFaceError
from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.motion import CROP_SCALE, Motion, Tracker, clip_crop, crop_image, head_points
from export3d_cli.core.media.image import is_image, read_image, to_tensor, to_uint8
from export3d_cli.core.media.video import VideoReader, VideoWriter
from export3d_cli.core.model.export3d import Export3D, Source
from export3d_cli.core.weights import resolve

LOOKAHEAD = 10  # seconds of the driver over which its crop is measured
Progress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True)
class ReenactOptions:
    """How a driver is read and the result written."""

    audio: str = "driver"  # driver | none | a file
    crf: int = 18
    fps: Fraction | None = None  # None: the driver's, exactly
    start: float = 0.0  # seconds
    duration: float | None = None  # seconds
    max_frames: int | None = None
    on_missing: Literal["hold", "skip", "fail"] = "hold"  # frames without a face
    overwrite: bool = False
    compare: bool = False  # source | driver | result side by side
    batch: int = 0  # frames at once; 0: chosen for the device


@dataclass(frozen=True)
class NovelViewOptions:
    """A sweep of the camera around the portrait; angles in degrees, first and last."""

    yaw: tuple[float, float] | None = (-30.0, 30.0)  # +: the head turns to the image's right; None: frontal
    pitch: tuple[float, float] | None = None  # +: up
    roll: tuple[float, float] | None = None  # +: clockwise
    frames: int = 60
    loop: Literal["pingpong", "once"] = "pingpong"
    fps: Fraction = Fraction(25)
    crf: int = 18
    overwrite: bool = False


@dataclass(frozen=True)
class EditOptions:
    """Expression directions to move along; the camera stays the source's."""

    edits: tuple[tuple[int, tuple[float, float]], ...] = ((1, (0.0, 1.0)),)  # (v_i from 1, (first, last) change of lambda_i)
    frames: int = 60
    fps: Fraction = Fraction(25)
    crf: int = 18
    overwrite: bool = False


@dataclass(frozen=True)
class Summary:
    """What was written."""

    out: Path
    frames: int
    missing: int  # driver frames without a face
    fps: Fraction
    seconds: float  # wall-clock
    device: str
    notes: tuple[str, ...] = field(default=())


class Animator:
    """One model, one source at a time."""

    def __init__(self, model: Export3D, tracker: Tracker, *, device: torch.device, precision: str, batch: int = 0) -> None:
        self.model = model.to(device).eval()
        self.tracker = tracker
        self.device = device
        self.precision = precision
        self.batch = batch or (16 if device.type == "cuda" else 2)
        self._source: Source | None = None
        self._motion: Motion | None = None
        self._crop_scale = CROP_SCALE[0]

    @classmethod
    def from_weights(
        cls,
        weights: str | Path | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int = 0,
        batch: int = 0,
    ) -> Animator:
        """Load weights by name, path or `hf:owner/repo`; None takes the embedded ones. Raises `WeightsError`."""
        if threads:
            torch.set_num_threads(threads)
        state, config, _ = load_weights(resolve(weights))
        model = Export3D(config)
        load_into(model, state)
        place = pick_device(device)
        return cls(
            model, Tracker(resolve("face_landmarker")), device=place, precision=pick_precision(precision, place), batch=batch
        )  # fmt: skip

    @property
    def device_name(self) -> str:
        """Device and precision, for people."""
        return f"{self.device} {self.precision}"

    def set_source(self, image: np.ndarray, *, name: str = "the source") -> Motion:
        """Track and encode a photo, uint8 (H, W, 3) RGB; returns its one-frame Motion. Raises `NoFaceError`."""
        self.tracker.landmarker.reset()
        face = None
        for _ in range(3):  # tracking settles on the region of interest that it keeps in videos
            face = self.tracker.landmarker.track(image)
        if face is None:
            raise NoFaceError(f"no face found in {name}: use a photo with one large, upright face")
        motion = self.tracker.motion([face], Fraction(25), (image.shape[1], image.shape[0]))
        self.set_source_motion(crop_image(image, motion.crop, self.model.config.image_size), motion)
        return motion

    def set_source_motion(self, crop: np.ndarray, motion: Motion, frame: int = 0) -> None:
        """Encode a face crop, uint8 (H, W, 3) of the model's size, already tracked: row `frame` of `motion`."""
        points = head_points(motion.landmarks[frame : frame + 1], motion.camera[frame : frame + 1])
        extent = motion.landmarks[frame, :, :2].max(0) - motion.landmarks[frame, :, :2].min(0)
        self._crop_scale = float(1 / extent.max())
        self._motion = replace(
            motion, **{k: getattr(motion, k)[frame : frame + 1] for k in ("beta", "camera", "landmarks", "found")}
        )
        with torch.inference_mode(), self._autocast():
            self._source = self.model.encode_source(
                to_tensor(crop)[None].to(self.device), self._tensor(motion.beta[frame : frame + 1]),
                self._tensor(motion.camera[frame : frame + 1]), self._tensor(points),
            )  # fmt: skip

    def drive(self, motions: Iterable[Motion]) -> Iterator[np.ndarray]:
        """The source with the expression and camera of each frame of each Motion -> uint8 (H, W, 3), in order."""
        for motion in motions:
            for at in range(0, len(motion), self.batch):
                beta, camera = motion.beta[at : at + self.batch], motion.camera[at : at + self.batch]
                yield from self._frames(camera, beta=beta)

    def view(self, cameras: np.ndarray) -> Iterator[np.ndarray]:
        """The source as it is, seen by cameras (T, 25); one tri-plane serves all."""
        source = self._need_source()
        with torch.inference_mode(), self._autocast():
            planes = self.model.planes(source, source.lam)
        for at in range(0, len(cameras), self.batch):
            part = cameras[at : at + self.batch]
            yield from self._frames(part, lam=source.lam.expand(len(part), -1), planes=planes.expand(len(part), *planes.shape[1:]))

    def edit(self, changes: np.ndarray) -> Iterator[np.ndarray]:
        """The source with its lambda changed by (T, n), seen by its own camera."""
        source = self._need_source()
        lam = source.lam + self._tensor(changes)
        for at in range(0, len(lam), self.batch):
            part = lam[at : at + self.batch]
            yield from self._frames(self._camera(len(part)), lam=part)

    def source_camera(self) -> Camera:
        """The camera that took the source."""
        self._need_source()
        assert self._motion is not None
        return Camera.from_vector(self._motion.camera[0])

    @property
    def crop_scale(self) -> float:
        """Side of the source's crop in face boxes; a driver cropped alike has a face of the same size."""
        self._need_source()
        return self._crop_scale

    def source_crop(self) -> np.ndarray:
        """The crop of the photo that is animated, uint8 (H, W, 3)."""
        return to_uint8(self._need_source().image[0])

    def _frames(
        self, camera: np.ndarray, *, beta: np.ndarray | None = None, lam: Tensor | None = None, planes: Tensor | None = None
    ) -> Iterator[np.ndarray]:
        with torch.inference_mode(), self._autocast():
            source = self._need_source().expand(len(camera))
            out = self.model.drive(
                source, None if beta is None else self._tensor(beta), self._tensor(camera), lam=lam, planes=planes
            )
            images = to_uint8(out.image)
        yield from images

    def _camera(self, count: int) -> np.ndarray:
        return np.repeat(self.source_camera().vector()[None], count, axis=0)

    def _need_source(self) -> Source:
        if self._source is None:
            raise Export3DError("no source yet: call set_source(image) first")
        return self._source

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.precision not in kinds:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=kinds[self.precision])


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA when usable, else the CPU; raises `InputError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(device.type, False):
        raise InputError(f"device {name!r} is not usable on this machine: use --device auto or cpu")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and supported() else "fp32"


def reenact(
    animator: Animator,
    source: Path,
    driver: Path,
    out: Path,
    options: ReenactOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Summary:
    """Animate the portrait `source` by `driver` (video, image or `.motion.npz`) into the video `out`."""
    options = options or ReenactOptions()
    began = time.monotonic()
    _check_free(out, options.overwrite)
    animator.set_source(read_image(source), name=str(source))
    stream = _DriverStream(animator, driver, options)
    audio = None if options.audio == "none" or stream.is_motion else driver if options.audio == "driver" else Path(options.audio)
    size = animator.model.config.image_size
    width = size * 3 if options.compare else size
    beside = animator.source_crop()
    written = 0
    with (
        stream,
        VideoWriter(
            out, size=(width, size), fps=stream.fps, crf=options.crf, audio=audio, audio_start=options.start
        ) as writer,
    ):
        for motion, crops in stream:
            for frame, crop in zip(animator.drive([motion]), crops, strict=True):
                writer.write(np.concatenate([beside, crop, frame], axis=1) if crop is not None else frame)
                written += 1
                if progress is not None:
                    progress("frames", written, stream.total)
    return Summary(
        out, written, stream.missing, stream.fps, time.monotonic() - began, animator.device_name, tuple(stream.notes)
    )


def novel_view(
    animator: Animator, source: Path, out: Path, options: NovelViewOptions | None = None, *, progress: Progress | None = None
) -> Summary:
    """Orbit the portrait: one tri-plane, many cameras. Angles add to those of the photo; a video or one image."""
    options = options or NovelViewOptions()
    began = time.monotonic()
    _check_free(out, options.overwrite)
    animator.set_source(read_image(source), name=str(source))
    cameras = orbit_cameras(animator.source_camera(), options)
    frames = animator.view(cameras)
    return _write_all(animator, frames, len(cameras), out, options.fps, options.crf, began, progress)


def edit_basis(
    animator: Animator, source: Path, out: Path, options: EditOptions | None = None, *, progress: Progress | None = None
) -> Summary:
    """Move basis coefficients of the portrait's expression (fig. 9): lambda_i changes, nothing else does."""
    options = options or EditOptions()
    began = time.monotonic()
    _check_free(out, options.overwrite)
    n = animator.model.config.basis
    for v, _ in options.edits:
        if not 1 <= v <= n:
            raise InputError(f"basis vector {v} does not exist: these weights have 1 to {n}")
    animator.set_source(read_image(source), name=str(source))
    changes = np.zeros((options.frames, n), dtype=np.float32)
    for v, (first, last) in options.edits:
        changes[:, v - 1] += np.linspace(first, last, options.frames, dtype=np.float32)
    frames = animator.edit(changes)
    return _write_all(animator, frames, options.frames, out, options.fps, options.crf, began, progress)


def orbit_cameras(camera: Camera, options: NovelViewOptions) -> np.ndarray:
    """Cameras (T, 25) that see the head at the angles asked for, at the photo's distance, centred."""
    count = options.frames
    where = np.linspace(0, 1, count)
    if options.loop == "pingpong" and count > 2:
        where = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(count) / count)
    radius = float(np.linalg.norm(camera.cam2world[:3, 3])) or RADIUS
    position = np.linalg.inv(camera.cam2world)[:3, 3]  # keep the head where the photo has it
    out = []
    for t in where:
        ranges = (options.yaw, options.pitch, options.roll)
        yaw, pitch, roll = (a + t * (b - a) for a, b in (r or (0.0, 0.0) for r in ranges))
        pose = np.eye(4)
        pose[:3, :3] = rotation_from_angles(yaw, pitch, roll)
        pose[:3, 3] = position / np.linalg.norm(position) * radius
        out.append(Camera(np.linalg.inv(pose), camera.intrinsics).vector())
    return np.stack(out)


def _write_all(
    animator: Animator, frames: Iterator[np.ndarray], total: int, out: Path, fps: Fraction, crf: int, began: float,
    progress: Progress | None,
) -> Summary:  # fmt: skip
    size = animator.model.config.image_size
    with VideoWriter(out, size=(size, size), fps=fps, crf=crf) as writer:
        for count, frame in enumerate(frames, start=1):
            writer.write(frame)
            if progress is not None:
                progress("frames", count, total)
    return Summary(out, total, 0, fps, time.monotonic() - began, animator.device_name)


def _check_free(out: Path, overwrite: bool) -> None:
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"{out} exists: choose another output or pass --overwrite")


class _DriverStream:
    """Motion of the driver, a batch at a time, with its face crops where they are shown beside the result."""

    def __init__(self, animator: Animator, driver: Path, options: ReenactOptions) -> None:
        self.animator, self.driver, self.options = animator, driver, options
        self.is_motion = driver.name.endswith(".npz")
        self.missing = 0
        self.notes: list[str] = []
        self._reader: VideoReader | None = None
        self._second: VideoReader | None = None  # the same frames again, for --compare
        self._again: Iterator[tuple[int, np.ndarray]] | None = None
        if self.is_motion:
            motion = Motion.load(driver)
            self.fps = motion.fps if options.fps is None else options.fps
            first = round(options.start * motion.fps)
            last = first + round(options.duration * motion.fps) if options.duration else len(motion)
            self._rows = range(len(motion))[first:last][: options.max_frames]
            if not self._rows:
                raise InputError(f"start {options.start} s lies behind the end of {driver}")
            self._motion, self.total = motion, len(self._rows)
        elif is_image(driver):
            self.fps, self.total = options.fps or Fraction(25), 1
        else:
            self._reader, self._second = (
                VideoReader(driver, fps=options.fps, start=options.start, duration=options.duration) for _ in range(2)
            )
            self.fps = self._reader.info.fps
            self.total = min(self._reader.info.frames, options.max_frames or self._reader.info.frames)
            if self._reader.info.vfr and options.fps is None:
                self.notes.append(f"variable frame rate resampled to {self.fps}")

    def __enter__(self) -> _DriverStream:
        return self

    def __exit__(self, *exc: object) -> None:
        for reader in (self._reader, self._second):
            if reader is not None:
                reader.close()

    def __iter__(self) -> Iterator[tuple[Motion, list[np.ndarray | None]]]:
        if self.is_motion:
            rows = np.array(self._rows)
            self.missing = int((~self._motion.found[rows]).sum())
            for at in range(0, len(rows), self.animator.batch):
                part = rows[at : at + self.animator.batch]
                yield _rows(self._motion, part), [None] * len(part)
            return
        yield from self._follow()

    def _images(self, reader: VideoReader | None) -> Iterator[np.ndarray]:
        if reader is None:
            yield read_image(self.driver)
            return
        for index, frame in enumerate(reader):
            if self.options.max_frames is not None and index >= self.options.max_frames:
                return
            yield frame

    def _follow(self) -> Iterator[tuple[Motion, list[np.ndarray | None]]]:
        """Track frame by frame; frames wait only until the crop is known, and only their faces and small crops do."""
        tracker, options = self.animator.tracker, self.options
        tracker.landmarker.reset()
        waiting: list[tuple[int, Face | None]] = []  # frame number, face
        crop: tuple[float, float, float] | None = None
        held: Face | None = None
        size = (0, 0)
        ahead = max(1, round(LOOKAHEAD * self.fps))
        for index, image in enumerate(self._images(self._reader)):
            size = (image.shape[1], image.shape[0])
            face = tracker.landmarker.track(image)
            if face is None:
                self.missing += 1
                if options.on_missing == "fail":
                    raise NoFaceError(f"no face in frame {index} of {self.driver}: use --on-missing hold or skip")
                if options.on_missing == "skip":
                    continue
            waiting.append((index, face))
            if crop is None and len(waiting) >= ahead and any(f is not None for _, f in waiting):
                crop = self._crop([f for _, f in waiting], size)
            if crop is not None and len(waiting) >= self.animator.batch:
                held = yield from self._flush(waiting, held, crop, size)
        if not any(f is not None for _, f in waiting) and held is None:
            raise NoFaceError(f"no face found in {self.driver}: use a driver that shows one large, upright face")
        if waiting:
            crop = crop or self._crop([f for _, f in waiting], size)
            yield from self._flush(waiting, held, crop, size, rest=True)

    def _crop(self, faces: list[Face | None], size: tuple[int, int]) -> tuple[float, float, float]:
        """The driver's crop, as many face boxes wide as the source's, so that both faces have one size."""
        scale = self.animator.crop_scale
        return clip_crop(np.stack([f.landmarks for f in faces if f is not None]), size, (scale, scale))

    def _flush(
        self, waiting: list[tuple[int, Face | None]], held: Face | None,
        crop: tuple[float, float, float], size: tuple[int, int], *, rest: bool = False,
    ) -> Iterator[tuple[Motion, list[np.ndarray | None]]]:  # fmt: skip
        """Turn waiting frames into batches; frames without a face repeat the last one that had one."""
        batch = self.animator.batch
        first = held or next(f for _, f in waiting if f is not None)
        while len(waiting) >= batch or (rest and waiting):
            part, waiting[:] = waiting[:batch], waiting[batch:]
            faces = []
            for _, face in part:
                first = face or first
                faces.append(first)
            motion = self.animator.tracker.motion(faces, self.fps, size, crop=crop)
            yield motion, [self._shown(index, crop) for index, _ in part]
        return first

    def _shown(self, index: int, crop: tuple[float, float, float]) -> np.ndarray | None:
        """The driver's frame for the side-by-side picture, read a second time so that none has to wait in memory."""
        if not self.options.compare:
            return None
        if self._again is None:
            self._again = enumerate(self._images(self._second))
        image = next(image for number, image in self._again if number == index)
        return crop_image(image, crop, self.animator.model.config.image_size)


def _rows(motion: Motion, rows: np.ndarray) -> Motion:
    return replace(motion, **{k: getattr(motion, k)[rows] for k in ("beta", "camera", "landmarks", "found")})
