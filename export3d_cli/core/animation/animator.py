"""What happens to a photo and a driver: set the source once, then drive, view or edit, streaming frames.

    animator = Animator.from_weights()
    animator.set_source(read_image(Path("src.jpg")))
    frame = next(animator.drive([motion]))          # uint8 (K, K, 3)

Memory does not grow with the driver's length: the face is tracked, generated and encoded a few frames at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.animation.compositor import Compositor, check_outputs, read_portrait
from export3d_cli.core.animation.driver_stream import DriverStream, select_audio
from export3d_cli.core.animation.options import Crop, Progress, Quality, ReenactOptions, Summary, check_overwrite
from export3d_cli.core.animation.output_size import (
    QUALITIES,
    depth_picture,
    mesh_size,
    pictures,
    room_around,
    sampling,
    shrunk,
)
from export3d_cli.core.animation.pipeline import BackgroundWriter, PrefetchIterator
from export3d_cli.core.animation.retargeting import Control, amplify_expression
from export3d_cli.core.animation.source_crop import portrait_of
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.crop import CROP_SCALE
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.face.matting import FacePosition, PersonMatting
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.track_cache import TrackCache
from export3d_cli.core.face.tracker import FaceTracker, TrackerName, open_landmarker_tracker, open_tracker
from export3d_cli.core.media.image import to_tensor
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.model.checkpoint import check_header_size, load_into, load_weights
from export3d_cli.core.model.export3d import Export3D, Output, PosedHead, Source
from export3d_cli.core.model.fast.triplane_interpolation import KEYFRAME_WINDOW, TriplaneInterpolator
from export3d_cli.core.model.super_resolution import photo_residual
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.device import (
    AdaptiveBatcher,
    autocast,
    cast_weights,
    pick_device,
    pick_precision,
    precision_notes,
    restore_fp32,
    tracking_thread_count,
    trim_heap,
    tune_malloc,
)
from export3d_cli.core.runtime.errors import Export3DError
from export3d_cli.core.runtime.weights import resolve_weights

POINTS = 1 << 17  # of a volume, decoded at once
AHEAD = 2  # batches of the driver's motion that are read before they are asked for
TIDY = 32  # such batches after which memory is tidied


class Animator:
    """One model, one source at a time."""

    def __init__(
        self, model: Export3D, tracker: LandmarkerTracker, *, device: torch.device, precision: str, batch: int = 0,
        quality: Quality = "best",
    ) -> None:  # fmt: skip
        self.model = model.to(device).eval()
        # what is not always computed in fp32
        self._parts = [part for part in model.children() if part not in (model.expression, model.decoder)]
        self._full = [cast_weights(part, precision) for part in self._parts]
        self.quality = quality
        self.tracker = tracker
        self.device = device
        self.precision = precision
        self.batch = batch or (32 if device.type == "cuda" else 4)
        self._reach = QUALITIES[quality][2] if device.type == "cpu" else 0.0  # elsewhere many at once cost little
        self._keys: TriplaneInterpolator | None = None  # of the source, where tri-planes are blended
        self._in_memory = AdaptiveBatcher()
        self.notes = precision_notes(precision, device)  # what the user should know
        self._source: Source | None = None
        self._crop: np.ndarray | None = None
        self._more: Tensor | None = None  # (1, 3, M, M) of the photo, see `superres.finer`
        self._room: Tensor | None = None  # see `Export3D.encode_source`
        self._motion: Motion | None = None
        self._faces: Sequence[FacePosition] = ()  # see `PersonMask.alpha`
        self.person_mask = PersonMatting(resolve_weights("selfie_segmentation"))
        self._followers: dict[TrackerName, FaceTracker] = {"landmarker": tracker}
        self._crop_scale = CROP_SCALE[0]

    @classmethod
    def from_weights(
        cls, weights: str | Path | None = None, *, device: str = "auto", precision: str = "auto", threads: int = 0,
        batch: int = 0, quality: Quality = "balanced",
    ) -> Animator:  # fmt: skip
        """Load weights by name, path or `hf:owner/repo`; None takes the embedded ones. Raises `WeightsError`.

        `quality` is that of the volume rendering, see `QUALITIES`.
        """
        if threads:
            torch.set_num_threads(threads)
        state, config, _ = load_weights(resolve_weights(weights))
        check_header_size(config, state)
        model = Export3D(config)
        load_into(model, state)
        place = pick_device(device)
        tune_malloc()
        tracker, precision = (
            open_landmarker_tracker(threads=tracking_thread_count(place)),
            pick_precision(precision, place),
        )
        return cls(model, tracker, device=place, precision=precision, batch=batch, quality=quality)

    @property
    def device_name(self) -> str:
        """Device and precision, for people."""
        return f"{self.device} {self.precision}"

    def set_source(
        self, image: np.ndarray, *, name: str = "the source", face: str = "largest", crop: Crop = "auto", size: int = 0
    ) -> Motion:
        """Track and encode a photo, uint8 (H, W, 3) RGB; returns its one-frame Motion. Raises `NoFaceError`.

        `face` chooses among several: largest, left, right, or index:N, the N-th from the left, from 0. `crop` none
        takes the picture, which must be square, as it is. `size` is the side of the frames, see `frame_size`.
        """
        side = self.model.config.image_size
        seen = portrait_of(image, self.tracker, side, name=name, face=face, crop=crop, size=size)
        self.set_source_motion(seen.crop, seen.motion, around=seen.around, faces=seen.faces)
        return seen.motion

    def follower(self, name: TrackerName) -> FaceTracker:
        """The tracker that reads drivers, made when it is first asked for. Raises `WeightsError`."""
        if name not in self._followers:
            self._followers[name] = open_tracker(name, device=str(self.device))
        return self._followers[name]

    def set_source_motion(
        self, crop: np.ndarray, motion: Motion, frame: int = 0, *, around: np.ndarray | None = None,
        faces: Sequence[FacePosition] = (),
    ) -> None:  # fmt: skip
        """Encode a face crop, uint8 (K, K, 3), already tracked: row `frame` of `motion`.

        Frames will be as large; a crop larger than the model's picture gives them its detail, and `around`, (M, M, 3),
        the same with more of the photo on all sides, also what is there. `faces` are the person's own and those of
        others, who stay where they are.
        """
        self._motion = own = motion.select(np.array([frame]))
        self._faces = faces
        self._crop_scale, self._crop = float(1 / np.ptp(own.landmarks[0, :, :2], axis=0).max()), crop
        shown = crop if around is None and len(crop) > self.model.config.image_size else around
        more = (
            None if shown is None else photo_residual(to_tensor(shown)[None], len(crop), self.model.config.image_size)
        )
        self._more = None if more is None else more.to(self.device)
        self._room = None if around is None else self._tensor(room_around(own.crop, own.size)[None])
        self._encode(crop, own)

    def _encode(self, crop: np.ndarray, own: Motion) -> None:
        crop = shrunk(crop, self.model.config.image_size)
        person = self._tensor(self.person_mask.alpha(crop, self._faces, hair_strands=True)[None, None])
        self._source = self._computed(
            self.model.encode_source, to_tensor(crop)[None].to(self.device), self._tensor(own.beta),
            self._tensor(own.camera), self._tensor(landmarks_to_head_frame(own.landmarks, own.camera)), person, self._room,
        )  # fmt: skip
        self._keys = TriplaneInterpolator(self._planes, self._reach) if self._reach else None

    def drive(
        self, motions: Iterable[Motion], *, control: Control | None = None, reference: Motion | None = None
    ) -> Iterator[np.ndarray]:
        """The source with the expression and camera of each frame of each Motion -> uint8 (K, K, 3), in order.

        `control` says what of them is taken, and counts from the one frame of `reference` what is relative.
        """
        control = control or Control()
        own = self.source_camera().to_vector()
        rest = None if reference is None else self._coefficients(reference.beta[:1])
        for motion in motions:
            for at in range(0, len(motion), self.ahead):
                beta, camera = motion.beta[at : at + self.ahead], motion.camera[at : at + self.ahead]
                lam = control.target_expression(self._need_source().lam, self._coefficients(beta), rest)
                seen = control.target_cameras(own, camera, None if reference is None else reference.camera[0])
                yield from self._moving(seen, amplify_expression(self._need_source().lam, lam))

    def view(self, cameras: np.ndarray, *, beta: np.ndarray | None = None, depth: bool = False) -> Iterator[np.ndarray]:
        """The source seen by cameras (T, 25); one tri-plane serves all as long as the expression stays.

        Args:
            cameras: (T, 25).
            beta: expressions (1, 64) or (T, 64); None: the source's own.
            depth: show the depth in colours, near red, far blue, instead of the picture.
        """
        lam, posed, source = self._lam(beta), None, None
        for at in range(0, len(cameras), self.batch):
            part = cameras[at : at + self.batch]
            if len(lam) > 1:
                yield from self._frames(part, lam=lam[at : at + self.batch], depth=depth)
                continue
            if posed is None or source is not self._source:  # it is another one after `widen`
                source = self._need_source()
                posed = self._computed(self.model.pose_head, source, lam)
            yield from self._frames(part, lam=lam.expand(len(part), -1), posed=posed, depth=depth)

    def edit(self, changes: np.ndarray) -> Iterator[np.ndarray]:
        """The source with its lambda changed by (T, n), seen by its own camera."""
        source = self._need_source()
        lam = source.lam + self._tensor(changes)
        for at in range(0, len(lam), self.ahead):
            part = lam[at : at + self.ahead]
            yield from self._moving(np.repeat(self.source_camera().to_vector()[None], len(part), axis=0), part)

    def field(self, points: np.ndarray, *, beta: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """RGB (N, 3) in about [-1, 1] and density (N,) of the volume at points (N, 3) of the head frame, both float32.

        `beta` (1, 64) is the expression; None: the source's own.
        """
        source, parts = self._need_source(), []
        posed = self._computed(self.model.pose_head, source, self._lam(beta))
        with torch.inference_mode(), autocast(self.device, self.precision):
            for part in self._tensor(points).split(POINTS):
                colours, densities = self.model.query_field(source, posed, part[None])
                parts.append(torch.cat([colours[0, :, :3], densities[0, :, None]], dim=-1).float().cpu())
        found = torch.cat(parts).numpy()
        return found[:, :3], found[:, 3]

    def source_motion(self) -> Motion:
        """Face and camera of the source, one frame."""
        self._need_source()
        assert self._motion is not None
        return self._motion

    def source_camera(self) -> Camera:
        """The camera that took the source."""
        return Camera.from_vector(self.source_motion().camera[0])

    @property
    def ahead(self) -> int:
        """Frames of a driver that are best given together."""
        return max(self.batch, KEYFRAME_WINDOW) if self._reach else self.batch

    @property
    def crop_scale(self) -> float:
        """Side of the source's crop in face boxes; a driver cropped alike has a face of the same size."""
        self._need_source()
        return self._crop_scale

    @property
    def size(self) -> int:
        """Side of the frames, pixels."""
        return len(self.source_crop())

    def source_crop(self) -> np.ndarray:
        """The crop of the photo that is animated, uint8 (K, K, 3); frames are as large."""
        self._need_source()
        assert self._crop is not None
        return self._crop

    def _lam(self, beta: np.ndarray | None) -> Tensor:
        """What to ask the model for: the source's own, or an expression."""
        own = self._need_source().lam
        return own if beta is None else amplify_expression(own, self._coefficients(beta))

    def _coefficients(self, beta: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return self.model.expression.coefficients(self._tensor(beta))

    def _planes(self, lam: Tensor) -> Tensor:
        return self._computed(self.model.generate_planes, self._need_source(), lam)

    def _computed(self, part: Callable[..., Any], *args: Any) -> Any:
        with torch.inference_mode(), autocast(self.device, self.precision):
            return part(*args)

    def _moving(self, camera: np.ndarray, lam: Tensor) -> Iterator[np.ndarray]:
        """Frames of a moving expression, lambda (T, n), T at most `ahead`."""
        planes = None if (keys := self._keys) is None else keys(lam)
        for at in range(0, len(lam), self.batch):
            part = slice(at, at + self.batch)
            own = None if planes is None or keys is not self._keys else planes[part]  # made anew after `widen`
            yield from self._frames(camera[part], lam=lam[part], planes=own)

    def _frames(
        self, camera: np.ndarray, *, lam: Tensor, posed: PosedHead | None = None, depth: bool = False,
        planes: Tensor | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        def make(part: slice) -> np.ndarray:
            with torch.inference_mode():
                seen = camera[part]
                out = self._drive(seen, lam[part], posed, None if planes is None else planes[part])
                return depth_picture(out, seen, self.size) if depth else pictures(out, self._more, self.size)

        yield from self._in_memory(make, 0, len(camera))

    def _drive(self, camera: np.ndarray, lam: Tensor, posed: PosedHead | None, planes: Tensor | None = None) -> Output:
        """The model on frames; what overflows in half precision is made again in fp32, and all that follows too.

        `posed` is of the one expression that all of `lam` are, `planes` are tri-planes of each.
        """
        source = self._need_source().expand(len(camera))
        size, samples = sampling(self.model.config, self.quality)
        with autocast(self.device, self.precision):
            posed = posed and posed.expand(len(camera))
            posed = posed if planes is None else self.model.pose_head(source, lam, planes)
            out = self.model.drive(
                source, None, self._tensor(camera), lam=lam, posed=posed, raw_size=size, samples=samples,
                mesh_size=mesh_size(self.model.config, self.size),
            )  # fmt: skip
        if out.image.isfinite().all():
            return out
        if self.precision == "fp32" or self._crop is None:
            raise Export3DError("the network gives numbers that are not finite: use a smaller scale, or other weights")
        self.notes.append(f"{self.precision} gave numbers that are not finite: went on in fp32")
        self.precision = "fp32"
        for part, full in zip(self._parts, self._full, strict=True):
            restore_fp32(part, full)
        self._encode(self._crop, self.source_motion())
        return self._drive(camera, lam.float(), None)

    def _need_source(self) -> Source:
        if self._source is None:
            raise Export3DError("no source yet: call set_source(image) first")
        return self._source

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(self.device)


def reenact(
    animator: Animator,
    source: Path,
    driver: Path,
    out: Path,
    options: ReenactOptions | None = None,
    *,
    progress: Progress | None = None,
    tape: TrackCache | None = None,
) -> Summary:
    """Animate the portrait `source` by `driver` (video, image, `.motion.npz` or ARKit CSV) into the video `out`.

    A `tape` given to several calls with one driver and the same options has it tracked only once.
    """
    options, began = options or ReenactOptions(), time.monotonic()
    check_outputs([out], options.background, options.crf)
    check_overwrite(out, options.overwrite)
    torch.manual_seed(options.seed)
    control, mark = options.control, get_watermarker(options.watermark)
    composer = compose_source(animator, source, options)
    stream = open_driver(animator, driver, options, tape=tape, shown=composer.source_frame.shape[0])
    audio, audio_start = select_audio(driver, options.audio, options.start)

    def write(shown: tuple[np.ndarray, np.ndarray | None]) -> None:
        writer.write(mark(composer(*shown)))

    def told(written: int) -> None:
        if progress is not None:
            progress("frames", written, stream.total)

    with (
        stream,
        VideoWriter(
            out, size=composer.size, fps=stream.fps, crf=options.crf, audio=audio, audio_start=audio_start,
            alpha=composer.transparent,
        ) as writer,
        BackgroundWriter(write, animator.batch, on_written=told, stop=writer.abort) as behind,
        # the driver's motion, read by a thread; `fan` computes with torch, which has the processor to itself
        nullcontext(stream) if options.tracker == "fan" else PrefetchIterator(stream, AHEAD, stop=stream.stop) as parts,
    ):  # fmt: skip
        for number, (motion, crops) in enumerate(parts):
            frames = animator.drive([motion], control=control, reference=stream.reference)
            for shown in zip(frames, crops, strict=True):
                behind.put(shown)
            if number % TIDY == 0:
                trim_heap()
    return Summary(
        out, behind.written, stream.missing, stream.fps, time.monotonic() - began, animator.device_name,
        (*stream.notes, *animator.notes),
    )  # fmt: skip


def compose_source(animator: Animator, source: Path, options: ReenactOptions) -> Compositor:
    """Set the source, and make what puts its results into frames."""
    photo = read_portrait(source)
    motion = animator.set_source(photo, name=str(source), face=options.face, crop=options.crop, size=options.size)
    return Compositor(
        photo, animator.source_crop(), motion.crop, paste_back=options.paste_back, background=options.background,
        compare=options.compare,
    )  # fmt: skip


def open_driver(
    animator: Animator, driver: Path, options: ReenactOptions, *, tape: TrackCache | None = None, shown: int = 0
) -> DriverStream:
    """The driver's motion as `options` want it, for the animator's source; `shown`: side of its pictures, 0: usual."""
    return DriverStream(
        driver, animator.follower(options.tracker), face=options.driver_face, batch=animator.ahead,
        crop_scale=animator.crop_scale, fps=options.fps,
        crop_size=(shown or animator.size) if options.compare else None,
        start=options.start, duration=options.duration, max_frames=options.max_frames, on_missing=options.on_missing,
        smooth=options.smooth, reference=options.reference_frame if options.control.needs_reference else None,
        camera=animator.source_camera().to_vector(), track_cache=tape,
    )  # fmt: skip
