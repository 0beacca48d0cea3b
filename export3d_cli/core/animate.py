"""What happens to a photo and a driver: set the source once, then drive, view or edit, streaming frames.

    animator = Animator.from_weights()
    animator.set_source(read_image(Path("src.jpg")))
    frame = next(animator.drive([motion]))          # uint8 (H, W, 3)

Memory does not grow with the driver's length: the face is tracked, generated and encoded a few frames at a time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.camera import Camera
from export3d_cli.core.checkpoint import load_into, load_weights
from export3d_cli.core.driver import SETTLE, DriverStream, OnMissing, motion_rows
from export3d_cli.core.errors import Export3DError, InputError, NoFaceError
from export3d_cli.core.face.motion import CROP_SCALE, Motion, Tracker, crop_image, head_points
from export3d_cli.core.media.image import read_image, to_tensor, to_uint8
from export3d_cli.core.media.video import VideoWriter
from export3d_cli.core.model.export3d import Export3D, Output, Source
from export3d_cli.core.weights import resolve

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
    on_missing: OnMissing = "hold"  # frames without a face
    overwrite: bool = False
    compare: bool = False  # source | driver | result side by side
    batch: int = 0  # frames at once; 0: chosen for the device


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

    def __init__(
        self, model: Export3D, tracker: Tracker, *, device: torch.device, precision: str, batch: int = 0
    ) -> None:
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
        tracker = Tracker(resolve("face_landmarker"))
        return cls(model, tracker, device=place, precision=pick_precision(precision, place), batch=batch)

    @property
    def device_name(self) -> str:
        """Device and precision, for people."""
        return f"{self.device} {self.precision}"

    def set_source(self, image: np.ndarray, *, name: str = "the source") -> Motion:
        """Track and encode a photo, uint8 (H, W, 3) RGB; returns its one-frame Motion. Raises `NoFaceError`."""
        self.tracker.landmarker.reset()
        face = None
        for _ in range(SETTLE):
            face = self.tracker.landmarker.track(image)
        if face is None:
            raise NoFaceError(f"no face found in {name}: use a photo with one large, upright face")
        motion = self.tracker.motion([face], Fraction(25), (image.shape[1], image.shape[0]))
        self.set_source_motion(crop_image(image, motion.crop, self.model.config.image_size), motion)
        return motion

    def set_source_motion(self, crop: np.ndarray, motion: Motion, frame: int = 0) -> None:
        """Encode a face crop, uint8 (H, W, 3) of the model's size, already tracked: row `frame` of `motion`."""
        self._motion = own = motion_rows(motion, np.array([frame]))
        extent = own.landmarks[0, :, :2].max(0) - own.landmarks[0, :, :2].min(0)
        self._crop_scale = float(1 / extent.max())
        with torch.inference_mode(), self._autocast():
            self._source = self.model.encode_source(
                to_tensor(crop)[None].to(self.device), self._tensor(own.beta), self._tensor(own.camera),
                self._tensor(head_points(own.landmarks, own.camera)),
            )  # fmt: skip

    def drive(self, motions: Iterable[Motion]) -> Iterator[np.ndarray]:
        """The source with the expression and camera of each frame of each Motion -> uint8 (H, W, 3), in order."""
        for motion in motions:
            for at in range(0, len(motion), self.batch):
                beta, camera = motion.beta[at : at + self.batch], motion.camera[at : at + self.batch]
                yield from self._frames(camera, beta=beta)

    def view(
        self, cameras: np.ndarray, *, beta: np.ndarray | None = None, depth: bool = False
    ) -> Iterator[np.ndarray]:
        """The source seen by cameras (T, 25); one tri-plane serves all as long as the expression stays.

        Args:
            cameras: (T, 25).
            beta: expressions (1, 64) or (T, 64); None: the source's own.
            depth: show the depth in colours, near red, far blue, instead of the picture.
        """
        source = self._need_source()
        lam, planes = source.lam, None
        with torch.inference_mode(), self._autocast():
            if beta is not None:
                lam = self.model.expression.coefficients(self._tensor(beta))
            if len(lam) == 1:
                planes = self.model.planes(source, lam)
        for at in range(0, len(cameras), self.batch):
            part = cameras[at : at + self.batch]
            b = len(part)
            if planes is not None:
                shown = planes.expand(b, -1, -1, -1, -1)
                yield from self._frames(part, lam=lam.expand(b, -1), planes=shown, depth=depth)
            else:
                yield from self._frames(part, lam=lam[at : at + b], depth=depth)

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
        self, camera: np.ndarray, *, beta: np.ndarray | None = None, lam: Tensor | None = None,
        planes: Tensor | None = None, depth: bool = False,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        with torch.inference_mode(), self._autocast():
            source = self._need_source().expand(len(camera))
            out = self.model.drive(
                source, None if beta is None else self._tensor(beta), self._tensor(camera), lam=lam, planes=planes
            )
            images = to_uint8(out.image) if not depth else depth_picture(out, camera, self.model.config.image_size)
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


def depth_picture(out: Output, camera: np.ndarray, size: int) -> np.ndarray:
    """Depth in colours, uint8 (B, size, size, 3): red 0.45 before the head's centre, blue as far behind it."""
    import cv2

    centre = np.linalg.norm(camera.reshape(-1, 25)[:, [3, 7, 11]], axis=1)  # distance to the head frame's origin
    large = F.interpolate(torch.cat([out.depth, out.opacity], 1).float(), (size, size), mode="bilinear")
    depth, opacity = large.cpu().numpy().transpose(1, 0, 2, 3)
    near = np.clip(0.5 - (depth - centre[:, None, None]) / 0.9, 0, 1)
    colours = [cv2.applyColorMap(np.uint8(255 * n), cv2.COLORMAP_TURBO)[..., ::-1] for n in near]  # type: ignore[call-overload]
    return np.uint8(np.stack(colours) * opacity[..., None].clip(0, 1))  # type: ignore[return-value]


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
    check_free(out, options.overwrite)
    animator.set_source(read_image(source), name=str(source))
    size = animator.model.config.image_size
    width = size * 3 if options.compare else size
    stream = DriverStream(
        driver, animator.tracker, batch=animator.batch, crop_scale=animator.crop_scale,
        shown=size if options.compare else None, fps=options.fps, start=options.start, duration=options.duration,
        max_frames=options.max_frames, on_missing=options.on_missing,
    )  # fmt: skip
    audio, audio_start = _sound(driver, options)
    beside = animator.source_crop()
    written = 0
    with (
        stream,
        VideoWriter(
            out, size=(width, size), fps=stream.fps, crf=options.crf, audio=audio, audio_start=audio_start
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


def _sound(driver: Path, options: ReenactOptions) -> tuple[Path | None, float]:
    """The file whose sound joins the result, and where in it to begin: only the driver's own is skipped along."""
    if options.audio == "driver":
        return (None if driver.name.endswith(".npz") else driver), options.start
    return (None if options.audio == "none" else Path(options.audio)), 0.0


def check_free(out: Path, overwrite: bool) -> None:
    """Raise `InputError` where something would be replaced that must not be."""
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"{out} exists: choose another output or pass --overwrite")
