"""The engine: encode a portrait once, then animate, view or edit it; frames are streamed.

    animator = Animator.from_weights()
    portrait = animator.portrait(read_image(Path("src.jpg")))
    frame = next(animator.animate(portrait, [motion]))          # uint8 (H, W, 3), the whole photo

An `Animator` holds weights and no portrait: threads may share one. Memory does not grow with the driver's length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.animation.expression_controls import EditedExpression, look_at_camera
from export3d_cli.core.animation.framing import MAX_FRAME_SIZE_PX, PHOTO_MARGIN, place_on_canvas
from export3d_cli.core.animation.options import Crop, Framing, Quality
from export3d_cli.core.animation.person import Person, apply_person, fingerprint
from export3d_cli.core.animation.photo_canvas import FrameLayers, PhotoCanvas
from export3d_cli.core.animation.pipeline import chain_parallel
from export3d_cli.core.animation.retargeting import Control, MotionSource
from export3d_cli.core.config.schema import BETA_DIM, CAMERA_DIM
from export3d_cli.core.face.cover_detection import CoverDetector, CoveredParts
from export3d_cli.core.face.crop import ClipCalibration, Square, crop_with_padding, fit_clip_crop
from export3d_cli.core.face.face_track import Face, FaceTracker, find_photo_face
from export3d_cli.core.face.given_landmarks import complete_landmarks
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.face.matting import FacePosition, PersonMatting, face_positions
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.tracker import LandmarkerTracker, TrackerName, open_tracker
from export3d_cli.core.media.image import to_tensor, to_uint8
from export3d_cli.core.model.checkpoint import check_header_size, load_into, load_weights
from export3d_cli.core.model.export3d import Export3D, Output, PosedHead, Source
from export3d_cli.core.model.fast.triplane_interpolation import KEYFRAME_INTERVAL, TriplaneInterpolator
from export3d_cli.core.model.motion_beyond_lambda import NUM_MEASURES
from export3d_cli.core.model.warp.photo_flow import PhotoFlow, extend_flow
from export3d_cli.core.runtime import device as devices
from export3d_cli.core.runtime.device import AdaptiveBatcher, autocast, cast_weights, copy_for_inference
from export3d_cli.core.runtime.errors import Export3DError, InputError, NoFaceError
from export3d_cli.core.runtime.weights import resolve_weights

# Of additional photos, see `similarity`: pairs of one person had 0.6 to 0.94; of 593 pairs of two people 27 % reach it,
# most of them photos from one studio. Another light lowers it.
MIN_SIMILARITY = 0.5
FIELD_POINTS = 1 << 17  # points of the volume that are decoded at once
FP32_PARTS = ("expression", "decoder", "planedict")  # parts of the network whose weights always stay fp32
NOT_FINITE = "the network gives values that are not finite: use a smaller scale, or other weights"
# Side of the volume rendering and samples of a ray, as fractions of those that the weights were trained at. PSNR to
# `best` of three driven portraits, frame by frame: balanced 39 to 45 dB.
RENDER_SCALES: dict[Quality, tuple[float, float]] = {"fast": (0.5, 0.5), "balanced": (0.5, 0.75), "best": (1.0, 1.0)}
Notify = Callable[[str], None]  # takes a note for the user


@dataclass(frozen=True, eq=False)
class FaceCrop:
    """The part of a photo that the network encodes; immutable, its arrays are read-only."""

    crop: np.ndarray = field(repr=False)  # uint8 (K, K, 3)
    motion: Motion = field(repr=False)  # one frame: its expression, camera and landmarks
    faces: tuple[FacePosition, ...]  # the person's face in the crop, then those of other people, who do not move
    covered: CoveredParts  # covered parts of the face, which are not animated

    def __post_init__(self) -> None:
        motion = self.motion
        for array in (self.crop, motion.beta, motion.camera, motion.landmarks, motion.found):
            array.flags.writeable = False


@dataclass(frozen=True, eq=False)
class Portrait(FaceCrop):
    """An encoded photo, made by `Animator.portrait`; immutable, its arrays are read-only."""

    face_box: tuple[int, int, int, int]  # x0, y0, x1, y1 of the person's landmarks, pixels of the photo as it was given
    shown: tuple[int, int, int, int]  # x0, y0, x1, y1 of the part that frames show, pixels of the photo as it was given
    source: Source = field(repr=False)  # the network's encoding of the crop
    canvas: PhotoCanvas = field(repr=False)  # the photo, or the part of it that frames show
    # (N, 3, M, M) the crop with the photo around it, for fine detail; then those of additional photos
    padded: Tensor | None = field(repr=False)
    model: Export3D = field(repr=False)  # the network that encoded the crop
    precision: str  # fp32 | bf16 | fp16, which its frames are rendered in
    others: tuple[FaceCrop, ...] = field(default=(), repr=False)  # of additional photos of the person
    person: Person | None = field(default=None, repr=False)  # whose basis the network has

    @cached_property
    def planes(self) -> Tensor:
        """The tri-plane of its own expression, (1, 3, C, P, P), which serves all frames of the quality `fast`."""
        return self.generate_planes(self.source.lam)

    def generate_planes(self, lam: Tensor) -> Tensor:
        """Generate the tri-planes (B, 3, C, P, P) of coefficients lambda (B, n)."""
        with torch.inference_mode(), autocast(lam.device, self.precision):
            return self.model.generate_planes(self.source, lam)

    def motion_planes(self, codes: Tensor) -> Tensor:
        """Generate the tri-planes (B, 3, C, P, P) of motion codes (B, d), see `PlaneDict`."""
        assert self.model.planedict is not None
        identity, bases = self._plane_dict
        with torch.inference_mode():
            return identity + self.model.planedict.planes(codes, bases)

    @cached_property
    def _plane_dict(self) -> tuple[Tensor, Tensor]:
        """Its tri-plane with the mean expression, (1, 3, C, P, P), and the plane bases."""
        assert self.model.planedict is not None
        with torch.inference_mode(), autocast(self.source.tokens.device, self.precision):
            return self.model.identity_planes(self.source).float(), self.model.planedict.bases()

    @cached_property
    def edits(self) -> dict[Any, EditedExpression]:
        """The last result of `edit_expression`, by its edit."""
        return {}

    @cached_property
    def trials(self) -> dict[Any, np.ndarray]:
        """What its trial frames showed, by the control and whether the edit starts from a neutral face."""
        return {}

    @property
    def camera(self) -> np.ndarray:
        """(25,) float32, the camera that took the photo, in the head frame."""
        return self.motion.camera[0]

    @property
    def square(self) -> Square:
        """The crop in what frames show: x0, y0, side in pixels; may reach outside."""
        return self.canvas.square

    @property
    def frame_size(self) -> tuple[int, int]:
        """Width and height of the frames, pixels."""
        return self.canvas.size

    @property
    def crop_scale(self) -> float:
        """Side of the crop in face boxes; a driver cropped alike has a face of the same size."""
        return float(1 / np.ptp(self.motion.landmarks[0, :, :2], axis=0).max())


class Animator:
    """Weights on a device; thread-safe.

    It shares the model's weights, and never writes to them. `precision` is fp32, bf16 or fp16; `batch` frames are
    rendered at once (0: chosen for the device), at a `quality` of `RENDER_SCALES`. On CUDA it turns off TF32 for the
    convolutions of the process, so that fp32 is fp32.
    """

    def __init__(self, model: Export3D, *, device: torch.device, precision: str, batch: int = 0,
                 quality: Quality = "best") -> None:  # fmt: skip
        self.device, self.precision, self.quality = device, precision, quality
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False
        self.fp32_model = copy_for_inference(model, device)
        self.model = self.fp32_model
        if precision != "fp32" and device.type == "cpu":  # elsewhere autocast does it
            self.model = copy_for_inference(self.fp32_model, device)
            for name, part in self.model.named_children():
                if name not in FP32_PARTS:
                    cast_weights(part, precision)
        self.batch = batch or (32 if device.type == "cuda" else 4 // self.workers)
        config, (image_scale, sample_scale) = model.config, RENDER_SCALES[quality]
        samples = round(sample_scale * config.coarse_samples), round(sample_scale * config.fine_samples)
        self._sampling: dict[str, Any] = {"raw_size": round(image_scale * config.raw_size), "samples": samples}
        # how far lambda may be from that of interpolated tri-planes; a GPU makes many at once cheaply
        may_interpolate = device.type == "cpu" and quality == "balanced"
        self._triplane_tolerance = config.triplane_tolerance[1] if may_interpolate else 0.0
        self._trackers: dict[str, FaceTracker] = {}
        self.matting = PersonMatting(resolve_weights("selfie_segmentation"))
        self.cover_detector = CoverDetector(resolve_weights("cover_detector"))

    @classmethod
    def from_weights(cls, weights: str | Path | None = None, *, device: str = "auto", precision: str = "auto",
                     batch: int = 0, quality: Quality = "balanced") -> Animator:  # fmt: skip
        """Load weights by name, path or `hf:owner/repo`; None loads the embedded ones. Raises `WeightsError`."""
        state, config, _ = load_weights(resolve_weights(weights))
        check_header_size(config, state)
        model = Export3D(config)
        load_into(model, state)
        torch_device = devices.pick_device(device)
        precision = devices.pick_precision(precision, torch_device)
        devices.tune_malloc()
        return cls(model, device=torch_device, precision=precision, batch=batch, quality=quality)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the weights, by which person files know them."""
        return fingerprint(self.fp32_model)

    @property
    def device_name(self) -> str:
        """Device and precision, for display."""
        return f"{self.device} {self.precision}"

    @property
    def workers(self) -> int:
        """Number of threads that render: two, as one alone leaves cores idle between its many short operations."""
        return min(2, torch.get_num_threads()) if self.device.type == "cpu" else 1

    @property
    def chunk_size(self) -> int:
        """Number of frames that are prepared together; motions of this length are rendered without waiting."""
        return max(self.batch, KEYFRAME_INTERVAL) if self._triplane_tolerance else self.batch

    def tracker(self, name: TrackerName = "landmarker") -> FaceTracker:
        """Return the tracker of this name, opened at first use; threads share it. Raises `WeightsError`."""
        if name not in self._trackers:
            threads = 1 if self.device.type == "cpu" else min(4, max(1, torch.get_num_threads() // 2))
            self._trackers[name] = open_tracker(name, device=str(self.device), threads=threads)
        return self._trackers[name]

    def portrait(self, photo: np.ndarray | Person, *, face: str = "largest", framing: Framing = "photo",
                 crop: Crop = "auto", size: int = 0, name: str = "the photo",
                 also: Mapping[str, np.ndarray] | None = None, force: bool = False,
                 landmarks: np.ndarray | None = None) -> Portrait:  # fmt: skip
        """Find a face in a photo, uint8 (H, W, 3) RGB or a person file's, and encode the crop around it.

        `face` is largest, left, right, or index:N, the N-th from the left, from 0. Frames show all of the photo or,
        with the `framing` face, a square around the head; their longer side is `size`, 0: the photo's, see
        `place_on_canvas`. The network's `crop` is a square around the face (auto) or all that frames show, which must
        be square (none). `name` is for errors.

        `also` are more photos of the person by their names: frames take from them what they show better of the head,
        such as teeth, shut eyes or the other cheek. The largest face of each is used, with `force` even if it seems to
        be somebody else's. `landmarks` (68, 2), (478, 2) or (478, 3) are those of the face in pixels; None: found.

        Raises `NoFaceError` without an upright face, `InputError` if an option does not fit the photo or the weights,
        or if `also` seems to show somebody else.
        """
        tracker, person = self.tracker(), photo if isinstance(photo, Person) else None
        if isinstance(photo, Person):
            if also:
                raise InputError(f"{name} already holds all photos of the person: leave out the additional ones")
            if face != "largest" or landmarks is not None:
                raise InputError(f"{name} is tuned to the largest face in it: leave out other faces, and landmarks")
            photo.check(name, self.model, self.fingerprint)
            photo, *more = photo.photos
            also, force = {f"photo {k} of {name}": image for k, image in enumerate(more, 2)}, True
        assert isinstance(tracker, LandmarkerTracker)
        if landmarks is None:
            target = self._find_face(photo, name, person, face)
        else:
            target = tracker.face_at(complete_landmarks(landmarks))
        face_box = bounding_box(target.landmarks)
        if crop == "none" and framing == "photo" and photo.shape[0] != photo.shape[1]:
            shape = f"{photo.shape[1]}x{photo.shape[0]}"
            raise InputError(f"{name} is {shape}: --crop none takes square pictures, use --crop auto")
        photo, (target, *others), square, shown = place_on_canvas(photo, [target, *tracker.find_all(photo)], framing,
                                                                  crop, size, self.matting.alpha)  # fmt: skip
        motion, crop_image, padded = self._cut_face(photo, square, target, min(round(square[2]), MAX_FRAME_SIZE_PX))
        faces = tuple(face_positions(target, others, square))
        with ThreadPoolExecutor(1) as pool:  # while the network encodes the crop
            canvas = pool.submit(self._make_canvas, photo, square, faces)
            portrait = self._encode(Portrait(
                crop_image, motion, faces, self._covered_parts(crop_image, motion), face_box, shown,
                None, None, self._image_tensor(padded), self.model, self.precision, person=person,  # type: ignore[arg-type]
            ), self.precision)  # fmt: skip
            portrait = self._add_photos(portrait, also, force) if also else portrait
            return replace(portrait, canvas=canvas.result())

    def portrait_from_motion(self, crop: np.ndarray, motion: Motion) -> Portrait:
        """Encode a tracked face crop, uint8 (K, K, 3), by the first row of `motion`; frames show it at its size."""
        motion, crop, size = motion.select(np.array([0])), crop.copy(), len(crop)
        box = bounding_box(motion.landmarks[0] * motion.crop[2] + (*motion.crop[:2], 0))
        padded = self._image_tensor(crop) if size > self.model.config.image_size else None
        return self._encode(Portrait(
            crop, motion, (), self._covered_parts(crop, motion), box, (0, 0, size, size), None,  # type: ignore[arg-type]
            self._make_canvas(crop, (0.0, 0.0, float(size)), ()), padded, self.model, self.precision,
        ), self.precision)  # fmt: skip

    def _find_face(self, photo: np.ndarray, name: str, person: Person | None, face: str = "largest") -> Face:
        try:
            return find_photo_face(self.tracker(), photo, name=name, face=face)
        except NoFaceError as error:
            if person is None:
                raise
            raise NoFaceError(f"no face found in {name}: make the file again with `export3d personalize`") from error

    def _cut_face(
        self, photo: np.ndarray, square: Square, face: Face, size: int
    ) -> tuple[Motion, np.ndarray, np.ndarray]:
        """Return a face's motion, one row, and its crop, uint8 (size, size, 3), alone and with the photo around it."""
        x0, y0, side = square
        padding = round(PHOTO_MARGIN * size)
        around = padding * side / size  # the same in pixels of the photo
        photo_size = (photo.shape[1], photo.shape[0])
        motion = self.tracker().make_motion([face], Fraction(25), photo_size, clip=ClipCalibration(square))
        padded = crop_with_padding(photo, (x0 - around, y0 - around, side + 2 * around), size + 2 * padding)
        return motion, padded[padding:-padding, padding:-padding].copy(), padded

    def _make_canvas(self, photo: np.ndarray, square: Square, faces: Sequence[FacePosition]) -> PhotoCanvas:
        return PhotoCanvas.from_photo(photo, square, partial(self.matting.alpha, hair_strands=True), faces)

    def _covered_parts(self, crop: np.ndarray, motion: Motion) -> CoveredParts:
        return self.cover_detector.covered_parts(crop, motion.landmarks[0])

    def _add_photos(self, portrait: Portrait, photos: Mapping[str, np.ndarray], force: bool) -> Portrait:
        """Return the portrait with additional photos, by their names."""
        if self.model.flow is None or portrait.padded is None:
            raise InputError("these weights use one photo: leave out the additional ones")
        padding = (portrait.padded.shape[-1] - len(portrait.crop)) // 2
        others, stacked = list[FaceCrop](), [portrait.padded]
        for name, photo in photos.items():
            target = self._find_face(photo, name, portrait.person)
            square = fit_clip_crop(target.landmarks[None], (photo.shape[1], photo.shape[0]))
            motion, _, padded = self._cut_face(photo, square, target, len(portrait.crop))
            landmarks = self._tensor(landmarks_to_head_frame(motion.landmarks, motion.camera))
            with torch.inference_mode():
                matched, similarity = self.fp32_model.match_colours(
                    portrait.source, to_tensor(padded)[None].to(self.device), padding, self._tensor(motion.camera),
                    landmarks,
                )  # fmt: skip
            if similarity < MIN_SIMILARITY and not force:
                raise InputError(
                    f"{name} seems to show somebody else (similarity {similarity:.2f}, at least {MIN_SIMILARITY}): "
                    "leave it out, or pass --force"
                )
            stacked.append(matched)
            crop = to_uint8(matched[0, :, padding:-padding, padding:-padding])
            faces = tuple(face_positions(target, [], square))
            others.append(FaceCrop(crop, motion, faces, self._covered_parts(crop, motion)))
        together = torch.cat(stacked).contiguous(memory_format=torch.channels_last)
        return self._encode(replace(portrait, others=tuple(others), padded=together), portrait.precision)

    def animate(self, portrait: Portrait, motions: Iterable[Motion], *, control: Control | None = None,
                reference: Motion | None = None, edit: EditedExpression | None = None, notify: Notify | None = None,
                layers: bool = False) -> Generator[Any, None, None]:  # fmt: skip
        """Render the portrait with the expressions and cameras of a driver: frames uint8 (H, W, 3), in order.

        The chunking of the driver's frames into `motions` has no effect: they are rendered `chunk_size` at a time, and
        a frame is yielded when its chunk is full or `motions` ends. `control` says which parts of the motion are used,
        and how strongly; None: all, unchanged. `reference` is the driver's frame that relative control refers to:
        without it that raises `InputError`. With it, frames also show what the driver's landmarks do beyond lambda;
        more rows of it tell the driver's face at rest. `edit` is one frame: its base replaces the portrait's
        expression, its change is added to every frame. `notify` is called with notes for the user. With `layers`,
        `FrameLayers` are yielded, for a `Compositor`.
        """
        control = control or Control()
        if control.needs_reference and reference is None:
            raise InputError("relative control needs the driver's reference frame: pass reference=")
        torso_ratio = None if control.torso == "driver" else control.torso
        renderer = _Renderer(self, portrait, notify, layers, torso_ratio)
        coefficients = partial(self._coefficients, portrait.model)
        read = partial(self._read_expression, portrait, control.motion)
        tracked = None if reference is None else coefficients(reference.beta[:1])
        base = None if reference is None or tracked is None else read(tracked, reference.code[:1])
        base_camera = None if reference is None else reference.camera[0]
        follow = None
        if control.drives_whole_face and control.motion != "pixels" and reference is not None and tracked is not None:
            follow = self._landmark_follower(portrait, reference, tracked)
        own_beta, own, edited = portrait.motion.beta[0], portrait.source.coefficients, torch.zeros(())
        if edit is not None:
            own_beta, own = edit.base.astype(np.float32), coefficients(edit.base[None])
            edited = portrait.source.coefficients + self._change(portrait.model, edit.beta, portrait.motion.beta) - own
        base_beta = reference.beta[0] if control.relative_expression and reference is not None else own_beta
        source_camera = portrait.camera

        def parts() -> Iterator[Iterable[Any]]:
            for motion in _chunks(motions, self.chunk_size):
                beta = control.select_regions(base_beta, motion.beta)
                driven, change = coefficients(beta), edited.to(own)
                lam = control.target_expression(own, read(driven, motion.code), base)
                cameras = control.target_cameras(source_camera, motion.camera, base_camera, portrait.canvas.limits)
                if control.eyes_to_camera:
                    start = base_beta if control.relative_expression else own_beta
                    shown = own_beta + control.expression_scale * (beta - start)
                    change = change + coefficients(look_at_camera(shown, cameras)) - coefficients(shown)
                moved = control.target_torso(source_camera, motion.torso, reference, portrait.canvas.limits)
                offsets = None if follow is None else follow(driven, motion)
                if offsets is None:
                    lam = self._amplify(portrait, lam + change)
                else:  # the landmarks show the driver's expression in full: only what is added to it is amplified
                    lam = lam + self.model.config.expression_gain * change
                    offsets = control.expression_scale * offsets
                codes = self._tensor(motion.code) if control.motion == "pixels" else None
                yield from renderer.render_motion(cameras, lam, torso=moved, offsets=offsets, codes=codes)

        return chain_parallel(parts(), self.workers)

    def view(self, portrait: Portrait, cameras: np.ndarray, *, beta: np.ndarray | None = None,
             base: np.ndarray | None = None, notify: Notify | None = None,
             layers: bool = False) -> Generator[Any, None, None]:  # fmt: skip
        """Render the portrait from cameras (T, 25): frames uint8 (H, W, 3); one tri-plane serves a fixed expression.

        `beta` are expressions (1, 64) or (T, 64), None: the portrait's; they are an edit of `base`, a driver's
        expressions (1, 64) or (T, 64), None: of the portrait's. `notify` and `layers` are as in `animate`.
        """
        _check_rows("cameras", cameras, CAMERA_DIM)
        if beta is not None and len(_check_rows("beta", beta, BETA_DIM)) not in (1, len(cameras)):
            raise InputError(f"beta must have 1 or {len(cameras)} rows, got {len(beta)}")
        renderer, lam = _Renderer(self, portrait, notify, layers), self._lam(portrait, beta, base)
        posed = self._pose(portrait, lam) if len(lam) == 1 else None
        parts = renderer.render(cameras, lam.expand(len(cameras), -1), posed=posed)
        return chain_parallel(parts, self.workers)

    def edit(
        self, portrait: Portrait, changes: np.ndarray, *, notify: Notify | None = None
    ) -> Generator[np.ndarray, None, None]:
        """Render the portrait from its own camera: frames uint8 (H, W, 3).

        `changes` (T, n) are of its lambda, or (T, n + m) also of its measures, from `expression_change`.
        """
        n = self.model.config.num_coefficients
        if changes.shape[1:] == (n,):
            changes = np.pad(changes, ((0, 0), (0, NUM_MEASURES)))
        _check_rows("changes", changes, n + NUM_MEASURES)
        renderer = _Renderer(self, portrait, notify)
        cameras = np.repeat(portrait.camera[None], len(changes), axis=0)
        parts = renderer.render_motion(cameras, portrait.source.coefficients + self._tensor(changes))
        return chain_parallel(parts, self.workers)

    def expression_change(self, portrait: Portrait, beta: np.ndarray, base: np.ndarray | None = None) -> np.ndarray:
        """Return the changes of lambda and measures (T, n + m) that make `edit` show expressions beta (T, 64).

        `base` is as in `view`.
        """
        return (self._lam(portrait, beta, base) - portrait.source.coefficients).float().cpu().numpy()

    def coefficients(self, beta: np.ndarray) -> np.ndarray:
        """Return lambda and measures (T, n + m) of expressions beta (T, 64)."""
        return self._coefficients(self.model, beta).float().cpu().numpy()

    def coefficient_change(self, beta: np.ndarray, base: np.ndarray) -> np.ndarray:
        """Return `Export3D.change_expression` (T, n + m) from expressions `base` to `beta`, both (T, 64)."""
        return self._change(self.model, beta, base).float().cpu().numpy()

    def query_field(self, portrait: Portrait, points: np.ndarray, *, beta: np.ndarray | None = None,
                    base: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Return RGB (N, 3), about [-1, 1], and density (N,) of the volume at points (N, 3) of the head frame.

        `beta` (1, 64) is the expression, None: the portrait's; `base` is as in `view`.
        """
        self._check_owner(portrait)
        posed, parts = self._pose(portrait, self._lam(portrait, beta, base)), []
        with torch.inference_mode(), autocast(self.device, portrait.precision):
            for part in self._tensor(points).split(FIELD_POINTS):
                colours, densities = portrait.model.query_field(portrait.source, posed, part[None])
                parts.append(torch.cat([colours[0, :, :3], densities[0, :, None]], dim=-1).float().cpu())
        values = torch.cat(parts).numpy()
        return values[:, :3], values[:, 3]

    def _encode(self, portrait: Portrait, precision: str) -> Portrait:
        """Return the portrait with its photos encoded, in fp32 where values overflow in half precision."""
        model = self.fp32_model if precision == "fp32" else self.model
        if portrait.person is not None:
            model = apply_person(model, portrait.person)
        source = self._encode_crop(model, precision, portrait)
        if not all(bool(x.isfinite().all()) for x in (source.tokens, *source.stem)):
            if precision == "fp32":
                raise Export3DError(NOT_FINITE)
            return self._encode(portrait, "fp32")
        others = tuple(self._encode_crop(model, precision, photo, source) for photo in portrait.others)
        return replace(portrait, source=replace(source, others=others), model=model, precision=precision)

    def _encode_crop(self, model: Export3D, precision: str, face: FaceCrop, first: Source | None = None) -> Source:
        """Encode a crop, as an addition to the photo `first` if given."""
        size = model.config.image_size
        interpolation = cv2.INTER_AREA if len(face.crop) > size else cv2.INTER_LINEAR
        small = cv2.resize(face.crop, (size, size), interpolation=interpolation)
        alpha = self.matting.alpha(small, face.faces, hair_strands=True)[None, None]
        landmarks = landmarks_to_head_frame(face.motion.landmarks, face.motion.camera)
        with torch.inference_mode(), autocast(self.device, precision):
            return model.encode_source(to_tensor(small)[None].to(self.device), self._tensor(face.motion.beta),
                                       self._tensor(face.motion.camera), self._tensor(landmarks), self._tensor(alpha),
                                       self._tensor(np.array([face.covered])), first)  # fmt: skip

    def _check_owner(self, portrait: Portrait) -> None:
        # which a person's network shares
        if portrait.model.generator not in (self.model.generator, self.fp32_model.generator):
            raise Export3DError("the portrait was encoded by another Animator: call portrait() of this one")

    def _lam(self, portrait: Portrait, beta: np.ndarray | None, base: np.ndarray | None = None) -> Tensor:
        """Return coefficients (T, n + m) for the network, of the portrait or of expressions as in `view`."""
        own = portrait.source.coefficients
        if beta is None:
            return own
        if base is None:
            base = portrait.motion.beta
        else:
            own = self._coefficients(portrait.model, base)
        return self._amplify(portrait, own + self._change(portrait.model, beta, base))

    def _amplify(self, portrait: Portrait, lam: Tensor) -> Tensor:
        """Return coefficients (B, n + m) to give to the network, so that its frames show `lam` (B, n + m)."""
        return torch.lerp(portrait.source.coefficients.expand_as(lam), lam, self.model.config.expression_gain)

    def _landmark_follower(
        self, portrait: Portrait, reference: Motion, base: Tensor
    ) -> Callable[[Tensor, Motion], Tensor | None]:
        """Return a function from a driver's lambda (T, n + m) and motion to `Export3D.landmark_offsets` (T, 478, 3).

        They count from the driver's face at rest, the mean of the reference's rows; None without landmarks.
        `base` (1, n + m) is lambda in row 0 of the reference.
        """
        own = self._tensor(reference.head_landmarks)  # (R, 478, 3)

        def offsets(lam: Tensor, motion: Motion, rest: Tensor | None = None) -> Tensor | None:
            points = self._tensor(motion.head_landmarks)
            if portrait.model.flow is None or not (points.numel() and own.numel()):
                return None
            with torch.inference_mode():
                return portrait.model.landmark_offsets(portrait.source, lam, points, base, own[:1], rest)

        rest = offsets(self._coefficients(portrait.model, reference.beta), reference)
        return partial(offsets, rest=None if rest is None else rest.mean(0, keepdim=True))

    def _change(self, model: Export3D, beta: np.ndarray, base: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return model.change_expression(self._tensor(beta), self._tensor(base))

    def _coefficients(self, model: Export3D, beta: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return model.coefficients(self._tensor(beta))

    def _read_expression(self, portrait: Portrait, source: MotionSource, tracked: Tensor, code: np.ndarray) -> Tensor:
        """Return the coefficients (T, n + m) that a driver shows the portrait, read from `source`.

        `tracked` (T, n + m) are those of the driver's landmarks, `code` (T, d) what `PlaneDict` reads.
        """
        if source == "landmarks":
            return tracked
        if portrait.model.planedict is None or not code.size:
            raise InputError(f"motion {source} needs weights with `PlaneDict`, and a driver with the codes it reads")
        landmarks = tracked if source == "both" else None
        with torch.inference_mode():
            return portrait.model.read_coefficients(portrait.source, self._tensor(code), landmarks)

    def read_code(self, frame: np.ndarray, face: Face) -> np.ndarray:
        """Return the motion code (d,) that `PlaneDict` reads from a frame, uint8 (H, W, 3), with this face."""
        assert self.model.planedict is not None
        x0, y0, side = square = fit_clip_crop(face.landmarks[None], (frame.shape[1], frame.shape[0]))
        crop = crop_with_padding(frame, square, self.model.config.image_size)
        uv = (face.landmarks[None, :, :2] - (x0, y0)) / side
        with torch.inference_mode():
            codes = self.model.planedict.encode(self._image_tensor(crop), self._tensor(uv))
        return codes.motion[0].cpu().numpy()

    def _pose(self, portrait: Portrait, lam: Tensor) -> PosedHead:
        with torch.inference_mode(), autocast(self.device, portrait.precision):
            return portrait.model.pose_head(portrait.source, lam)

    def _render(self, portrait: Portrait, cameras: np.ndarray, lam: Tensor, posed: PosedHead | None = None,
                planes: Tensor | None = None, offsets: Tensor | None = None) -> tuple[Output, PosedHead]:  # fmt: skip
        """Render B frames; `posed` is of the one expression that all of `lam` are, the rest is as in `pose_head`."""
        model, source = portrait.model, portrait.source.expand(len(cameras))
        # larger frames need a larger mesh, up to twice: otherwise the outline shows steps
        scale = np.clip(len(portrait.crop) / model.config.image_size, 1, 2)
        if posed is None and planes is None and self.quality == "fast":
            planes = portrait.planes.expand(len(cameras), -1, -1, -1, -1)
        with torch.inference_mode(), autocast(self.device, portrait.precision):
            posed = posed.expand(len(cameras)) if posed is not None else model.pose_head(source, lam, planes, offsets)
            output = model.drive(source, lam, self._tensor(cameras), posed=posed, **self._sampling,
                                 mesh_size=int(scale * model.config.mesh_size),
                                 face_only=self.device.type == "cpu")  # fmt: skip
        return output, posed

    def _extend_flow(self, portrait: Portrait, cameras: np.ndarray, output: Output, head: PosedHead,
                     torso: float | Tensor | None) -> PhotoFlow:  # fmt: skip
        """Extend the flow of B frames over the photo."""
        source, count = portrait.source.expand(len(cameras)), len(cameras)
        landmarks = source.landmarks.float() if head.mesh is None else head.mesh.points[:, :NUM_LANDMARKS]
        uv = None if output.sample_grid is None else output.sample_grid[:, :2]
        weights = output.flow_weights
        head_weight = output.opacity if weights is None else weights[:, :2].sum(1, keepdim=True)
        face = output.opacity if output.face is None else output.face
        photo_face = torch.zeros_like(face) if source.proximity is None else (source.proximity > 0.999).float()
        return extend_flow(landmarks.expand(count, -1, -1), source.landmarks, source.camera, self._tensor(cameras), uv,
                           head_weight, face, photo_face, torso, output.windows)  # fmt: skip

    def _tensor(self, array: np.ndarray) -> Tensor:
        array = np.ascontiguousarray(array, dtype=np.float32)
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)

    def _image_tensor(self, image: np.ndarray) -> Tensor:
        """Return an image, uint8 (H, W, 3), as (1, 3, H, W) in [-1, 1]."""
        return to_tensor(image)[None].to(self.device, memory_format=torch.channels_last)


class _Renderer:
    """Renders the frames of one iteration, and holds all state that passes between its batches."""

    def __init__(self, animator: Animator, portrait: Portrait, notify: Notify | None, layers: bool = False,
                 torso: float | None = None) -> None:  # fmt: skip
        animator._check_owner(portrait)
        self._animator, self._portrait, self._notify = animator, portrait, notify or (lambda note: None)
        self._as_layers, self._torso = layers, torso
        self._fp32_portrait: Portrait | None = None
        self._lock = threading.Lock()  # of the line above: two threads render
        self._batcher = AdaptiveBatcher()
        self._interpolator: TriplaneInterpolator | None = None
        if animator._triplane_tolerance:
            # a method of this object would be a cycle
            self._interpolator = TriplaneInterpolator(portrait.generate_planes, animator._triplane_tolerance)
        if portrait.precision != animator.precision:
            self._report_fallback()
        if any(portrait.covered):
            self._notify(portrait.covered.note())

    def render_motion(self, cameras: np.ndarray, lam: Tensor, *, torso: np.ndarray | None = None,
                      offsets: Tensor | None = None,
                      codes: Tensor | None = None) -> Iterator[Iterable[Any]]:  # fmt: skip
        """Yield lazy parts of the frames of a moving expression, lambda with measures (T, n + m).

        The motion codes (T, d) move the tri-plane in place of lambda, see `PlaneDict`.
        """
        size, n = self._animator.chunk_size, self._animator.model.config.num_coefficients
        for start in range(0, len(lam), size):
            part = slice(start, start + size)
            planes = None
            if codes is None and self._interpolator is not None:
                planes = self._interpolator(lam[part, :n])
            yield from self.render(cameras[part], lam[part], planes=planes,
                                   codes=None if codes is None else codes[part],
                                   torso=None if torso is None else torso[part],
                                   offsets=None if offsets is None else offsets[part])  # fmt: skip

    def render(self, cameras: np.ndarray, lam: Tensor, *, posed: PosedHead | None = None,
               planes: Tensor | None = None, torso: np.ndarray | None = None,
               offsets: Tensor | None = None, codes: Tensor | None = None) -> Iterator[Iterable[Any]]:  # fmt: skip
        """Yield lazy parts of the frames with lambda and measures (T, n + m); the rest as in `Animator._render`.

        `torso` (T, 4) are its motions, see `Control.target_torso`; None: it follows the neck.
        """
        portrait, size = self._portrait, len(self._portrait.crop)

        def compute(part: slice) -> Iterable[Any]:
            with torch.inference_mode():
                code = None if codes is None else codes[part]
                part_planes = None if planes is None else planes[part]
                part_planes = part_planes if code is None else portrait.motion_planes(code)
                moved = None if offsets is None else offsets[part]
                output, head = self._animator._render(portrait, cameras[part], lam[part], posed, part_planes, moved)
                if not output.image.isfinite().all():
                    output, head = self._render_fp32(cameras[part], lam[part], moved, code)
                images = to_uint8(output.image if portrait.padded is None else output.upscale(portrait.padded, size))
                torso_motion = self._torso if torso is None else self._animator._tensor(torso[part])
                flow = self._animator._extend_flow(portrait, cameras[part], output, head, torso_motion)
                layers = FrameLayers.from_output(images, flow, output)
                return layers if self._as_layers else [portrait.canvas.compose(layer) for layer in layers]

        for start in range(0, len(cameras), self._animator.batch):
            stop = min(start + self._animator.batch, len(cameras))
            yield self._batcher(compute, start, stop)

    def _render_fp32(self, cameras: np.ndarray, lam: Tensor, offsets: Tensor | None,
                     codes: Tensor | None) -> tuple[Output, PosedHead]:  # fmt: skip
        """Render a batch that overflowed in half precision again in fp32."""
        if self._portrait.precision == "fp32":
            raise Export3DError(NOT_FINITE)
        with self._lock:
            if self._fp32_portrait is None:
                self._fp32_portrait = self._animator._encode(self._portrait, "fp32")
                self._report_fallback()
        planes = None if codes is None else self._fp32_portrait.motion_planes(codes)
        output, posed = self._animator._render(self._fp32_portrait, cameras, lam.float(), None, planes, offsets)
        if not output.image.isfinite().all():
            raise Export3DError(NOT_FINITE)
        return output, posed

    def _report_fallback(self) -> None:
        self._notify(f"{self._animator.precision} gave values that are not finite: rendered in fp32 instead")


def bounding_box(landmarks: np.ndarray) -> tuple[int, int, int, int]:
    """Return x0, y0, x1, y1 of landmarks (N, 3), rounded."""
    x0, y0 = (int(v) for v in landmarks[:, :2].min(0).round())
    x1, y1 = (int(v) for v in landmarks[:, :2].max(0).round())
    return x0, y0, x1, y1


def _check_rows(name: str, array: np.ndarray, columns: int) -> np.ndarray:
    """Return an array unless it is not (T, columns) or not finite."""
    if array.ndim != 2 or array.shape[1] != columns or not np.isfinite(array).all():
        raise InputError(f"{name} must be finite numbers of shape (T, {columns}), got {array.shape}")
    return array


def _chunks(motions: Iterable[Motion], length: int) -> Iterator[Motion]:
    """Yield the motion of `length` frames at a time, however they are spread over `motions`."""
    rest: Motion | None = None
    for motion in motions:
        waiting = motion if rest is None else Motion.concatenate([rest, motion])
        whole = len(waiting) - len(waiting) % length
        for start in range(0, whole, length):
            yield waiting.select(np.arange(start, start + length))
        rest = waiting.select(np.arange(whole, len(waiting)))
    if rest is not None and len(rest):
        yield rest
