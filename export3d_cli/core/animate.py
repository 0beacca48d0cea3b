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
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from export3d_cli.core.camera import Camera
from export3d_cli.core.checkpoint import load_into, load_weights
from export3d_cli.core.control import PARTS, Control
from export3d_cli.core.device import pick_device, pick_precision
from export3d_cli.core.driver import SETTLE, DriverStream, OnMissing, holds_motion, motion_rows
from export3d_cli.core.errors import Export3DError, InputError, NoFaceError
from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.motion import CROP_SCALE, Motion, Tracker, crop_image, head_points
from export3d_cli.core.face.smooth import Smooth
from export3d_cli.core.face.tape import FaceTape
from export3d_cli.core.media.image import read_image, to_tensor, to_uint8
from export3d_cli.core.media.video import VideoWriter
from export3d_cli.core.model.export3d import Export3D, Output, Source
from export3d_cli.core.watermark import Watermark, marker
from export3d_cli.core.weights import resolve

Progress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True)
class ReenactOptions:
    """How a driver is read, what of it reaches the source, and how the result is written."""

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
    face: str = "largest"  # of the source, where it shows several: largest | left | right | index:N
    drive: tuple[str, ...] = PARTS  # what of the driver is followed
    expression_scale: float = 1.0  # 0: the source's own, 1: the driver's
    pose_scale: float = 1.0
    pose: Literal["absolute", "relative"] = "absolute"  # the driver's camera, or the source's moved by the driver's
    relative_expression: bool = False  # the source's expression changed by the driver's change
    reference_frame: int = 0  # of the driver's frames that are used: what relative control counts from
    smooth: Smooth = "light"
    seed: int = 0
    watermark: Watermark = "none"  # beside the mark in the metadata

    @property
    def control(self) -> Control:
        """What of the driver reaches the source."""
        return Control(self.drive, self.expression_scale, self.pose_scale, self.pose, self.relative_expression)


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

    def set_source(self, image: np.ndarray, *, name: str = "the source", face: str = "largest") -> Motion:
        """Track and encode a photo, uint8 (H, W, 3) RGB; returns its one-frame Motion. Raises `NoFaceError`.

        `face` chooses among several: largest, left, right, or index:N, the N-th from the left, from 0.
        """
        found = self.find_face(image, name=name, face=face)
        motion = self.tracker.motion([found], Fraction(25), (image.shape[1], image.shape[0]))
        self.set_source_motion(crop_image(image, motion.crop, self.model.config.image_size), motion)
        return motion

    def find_face(self, image: np.ndarray, *, name: str = "the source", face: str = "largest") -> Face:
        """The face of a photo that `set_source` takes."""
        landmarker = self.tracker.landmarker
        landmarker.reset()
        found: Face | None = None
        if face != "largest":
            landmarker.follow(choose_face(landmarker.find_all(image), face, name), image)
        for _ in range(SETTLE):
            found = landmarker.track(image)
        if found is None:
            raise NoFaceError(f"no face found in {name}: use a photo with one large, upright face")
        return found

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

    def drive(
        self, motions: Iterable[Motion], *, control: Control | None = None, reference: Motion | None = None
    ) -> Iterator[np.ndarray]:
        """The source with the expression and camera of each frame of each Motion -> uint8 (H, W, 3), in order.

        `control` says what of them is taken, and counts from the one frame of `reference` what is relative.
        """
        control = control or Control()
        own, rest = self.source_camera().vector(), None
        if reference is not None:
            rest = self._coefficients(reference.beta[:1])
        for motion in motions:
            for at in range(0, len(motion), self.batch):
                beta, camera = motion.beta[at : at + self.batch], motion.camera[at : at + self.batch]
                lam = control.lam(self._need_source().lam, self._coefficients(beta), rest)
                seen = control.cameras(own, camera, None if reference is None else reference.camera[0])
                yield from self._frames(seen, lam=lam)

    def view(self, cameras: np.ndarray, *, beta: np.ndarray | None = None, depth: bool = False) -> Iterator[np.ndarray]:
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
                lam = self._coefficients(beta)
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

    def _coefficients(self, beta: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return self.model.expression.coefficients(self._tensor(beta))

    def _frames(
        self, camera: np.ndarray, *, lam: Tensor, planes: Tensor | None = None, depth: bool = False
    ) -> Iterator[np.ndarray]:
        with torch.inference_mode(), self._autocast():
            source = self._need_source().expand(len(camera))
            out = self.model.drive(source, None, self._tensor(camera), lam=lam, planes=planes)
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


def reenact(
    animator: Animator,
    source: Path,
    driver: Path,
    out: Path,
    options: ReenactOptions | None = None,
    *,
    progress: Progress | None = None,
    tape: FaceTape | None = None,
) -> Summary:
    """Animate the portrait `source` by `driver` (video, image, `.motion.npz` or ARKit CSV) into the video `out`.

    A `tape` given to several calls with one driver and the same options has it tracked only once.
    """
    options = options or ReenactOptions()
    began = time.monotonic()
    check_free(out, options.overwrite)
    torch.manual_seed(options.seed)
    control, mark = options.control, marker(options.watermark)
    animator.set_source(read_image(source), name=str(source), face=options.face)
    size = animator.model.config.image_size
    width = size * 3 if options.compare else size
    stream = open_driver(animator, driver, options, tape=tape)
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
            frames = animator.drive([motion], control=control, reference=stream.reference)
            for frame, crop in zip(frames, crops, strict=True):
                writer.write(mark(np.concatenate([beside, crop, frame], axis=1) if crop is not None else frame))
                written += 1
                if progress is not None:
                    progress("frames", written, stream.total)
    return Summary(
        out, written, stream.missing, stream.fps, time.monotonic() - began, animator.device_name, tuple(stream.notes)
    )


def open_driver(
    animator: Animator, driver: Path, options: ReenactOptions, *, tape: FaceTape | None = None
) -> DriverStream:
    """The driver's motion as `options` want it, for the animator's source."""
    return DriverStream(
        driver, animator.tracker, batch=animator.batch, crop_scale=animator.crop_scale,
        shown=animator.model.config.image_size if options.compare else None, fps=options.fps, start=options.start,
        duration=options.duration, max_frames=options.max_frames, on_missing=options.on_missing, smooth=options.smooth,
        reference=options.reference_frame if options.control.needs_reference else None,
        camera=animator.source_camera().vector(), tape=tape,
    )  # fmt: skip


def choose_face(faces: list[Face], which: str, name: str) -> Face:
    """largest, left, right or index:N (from the left, from 0) of the faces in a photo, given the largest first."""
    if not faces:
        raise NoFaceError(f"no face found in {name}: use a photo with one large, upright face")
    if which == "largest":
        return faces[0]
    across = sorted(faces, key=lambda face: float(face.landmarks[:, 0].mean()))
    index = {"left": 0, "right": len(faces) - 1}.get(which)
    if index is None:
        kind, _, number = which.partition(":")
        if kind != "index" or not number.isdecimal():
            raise InputError(f"face {which!r} is none: use largest, left, right or index:N")
        index = int(number)
    if index >= len(faces):
        raise InputError(f"{name} shows {len(faces)} face(s): {which} does not exist, index:0 is the leftmost")
    return across[index]


def _sound(driver: Path, options: ReenactOptions) -> tuple[Path | None, float]:
    """The file whose sound joins the result, and where in it to begin: only the driver's own is skipped along."""
    if options.audio == "driver":
        return (None if holds_motion(driver) else driver), options.start
    return (None if options.audio == "none" else Path(options.audio)), 0.0


def check_free(out: Path, overwrite: bool) -> None:
    """Raise `InputError` where something would be replaced that must not be."""
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"{out} exists: choose another output or pass --overwrite")
