"""Landmarks -> beta (64) and camera (25); the fixed clip crop; the Motion file.

beta is 52 ARKit blendshape coefficients (`ARKIT_NAMES`), then the 12 `MEASURES`, taken in the head frame and divided by
the inter-ocular distance. The camera is EG3D's intrinsics and the cam2world found by PnP of the canonical face's rigid
points. "Crop units" are positions divided by the crop's side: x, y in [0, 1] inside it, z at the same scale.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from export3d_cli import __version__
from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.landmarker import ARKIT_NAMES, WARMUP_PASSES, Face, Landmarker
from export3d_cli.core.runtime.camera import FOCAL, default_intrinsics
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS, check_file, write_atomic

MEASURE_NAMES = (
    "lipGapLeft", "lipGapCentre", "lipGapRight", "mouthWidth", "mouthCornerHeightLeft", "mouthCornerHeightRight",
    "eyeOpeningLeft", "eyeOpeningRight", "irisXLeft", "irisYLeft", "irisXRight", "irisYRight",
)  # fmt: skip
BETA_NAMES = ARKIT_NAMES + MEASURE_NAMES
RIGID_CENTROID = np.array([0.000000, 0.004524, -0.064495])  # weighted mean of the canonical rigid points
TRACKER_Z_SCALE = 1.1  # the tracker flattens faces: with this, turning heads read their true angle
# How much of that depth a face has: with it the landmarks of a frame, seen by another frame's camera, come nearest to
# those of the other. The same of 63 filmed people and of 445 rendered heads, at turns of 5 and of 30 degrees.
RELIEF_SCALE = 0.94
_READ_ERRORS: tuple[type[Exception], ...] = (InputError, *DAMAGED_ZIP_ERRORS)
MAX_BYTES = 2**31  # of a motion file, unpacked: about four hours at 25 frames a second
FPS_RANGE = (Fraction(1, 1000), Fraction(1000))  # frames a second, least and most
MAX_VALUE = 1e6  # of any number in a motion file
CHUNK_FRAMES = 1024  # frames computed at once: a long video's landmarks are in memory, but not in double precision
CROP_SCALE = (2.1, 1.6)  # crop side in face boxes: wanted, and the least to fall back to before borders are replicated
Square = tuple[float, float, float]  # x0, y0, side in pixels


@dataclass(frozen=True)
class Motion:
    """What a face does over T frames. A driver needs only `beta` and `camera`."""

    beta: np.ndarray  # (T, 64) float32
    camera: np.ndarray  # (T, 25) float32, head frame
    landmarks: np.ndarray  # (T, 478, 3) float32, crop units; a driver's may be (T, 68, 3), or none, (T, 0, 3)
    found: np.ndarray  # (T,) bool; the other rows of a frame without a face repeat the last one found
    fps: Fraction
    crop: tuple[float, float, float]  # x0, y0, side in pixels of the frames; may reach outside them
    size: tuple[int, int]  # width, height of the frames

    def __len__(self) -> int:
        return len(self.beta)

    def save(self, path: Path) -> None:
        """Write a `.motion.npz`, atomically."""
        arrays = {
            "beta": self.beta, "camera": self.camera, "landmarks": self.landmarks, "found": self.found,
            "fps": np.array([self.fps.numerator, self.fps.denominator], dtype=np.int64),
            "crop": np.array(self.crop, dtype=np.float64), "size": np.array(self.size, dtype=np.int64),
            "version": np.array(__version__),
        }  # fmt: skip
        with write_atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub of its flag

    @classmethod
    def load(cls, path: Path, *, landmark_counts: tuple[int, ...] = (mesh.NUM_LANDMARKS,)) -> Motion:
        """Read a `.motion.npz` with as many landmarks a face; raises `InputError` for a file that is not one."""
        path = Path(path)
        try:
            check_file(path, MAX_BYTES)
            with path.open("rb") as file:
                with zipfile.ZipFile(file) as archive:
                    if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                        raise ValueError(f"more than {MAX_BYTES >> 20} MiB when unpacked")
                file.seek(0)
                with warnings.catch_warnings(), np.load(file, allow_pickle=False) as data:
                    warnings.simplefilter("ignore")  # of headers as Python 2 wrote them: errors are told on one line
                    motion = cls._from_arrays(data)
        except _READ_ERRORS as error:
            raise InputError(f"{path} is not a motion file ({error}): make one with `export3d preprocess`") from error
        T = len(motion.beta) if motion.beta.ndim else 0
        shapes = (motion.beta.shape, motion.camera.shape, motion.landmarks.shape, motion.found.shape)
        if T == 0 or shapes not in [((T, 64), (T, 25), (T, count, 3), (T,)) for count in landmark_counts]:
            expected = f"(T, 64), (T, 25), (T, {landmark_counts[0]}, 3), (T,)"
            raise InputError(f"{path} is a motion file of shapes {shapes}: expected {expected}")
        finite = all(np.isfinite(a).all() for a in (motion.beta, motion.camera, motion.landmarks, motion.crop))
        if not finite or motion.fps <= 0:
            raise InputError(f"{path} holds numbers that are not finite or a rate that is not positive")
        if len(motion.crop) != 3 or len(motion.size) != 2:
            raise InputError(f"{path} holds a crop {motion.crop} of frames {motion.size}: expected 3 and 2 numbers")
        if not FPS_RANGE[0] <= motion.fps <= FPS_RANGE[1]:
            raise InputError(f"{path} has a rate of {float(motion.fps):.3g} frames/s: it must be 1/1000 to 1000")
        turn = motion.camera[:, :16].reshape(-1, 4, 4)[:, :3, :3]
        arrays = (motion.beta, motion.camera, motion.landmarks, motion.crop)
        largest = max(float(np.abs(array).max(initial=0)) for array in arrays)
        if largest > MAX_VALUE or np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max() > 0.01:
            raise InputError(
                f"{path} holds numbers beyond {MAX_VALUE:g}, or cameras that are no rotation: make it again"
            )
        return motion

    @classmethod
    def _from_arrays(cls, data: Mapping[str, np.ndarray]) -> Motion:
        """What a file holds, its shapes not yet looked at."""

        def numbers(name: str) -> np.ndarray:
            array = data[name]
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
                raise TypeError(f"{name} is no array of numbers")
            return array

        def floats(name: str) -> np.ndarray:
            with np.errstate(all="ignore"):  # what is too large becomes infinite, and is refused for it
                return numbers(name).astype(np.float32)

        n, d = (int(v) for v in numbers("fps"))
        return cls(
            beta=floats("beta"), camera=floats("camera"), landmarks=floats("landmarks"),
            found=numbers("found").astype(bool), fps=Fraction(n, d), crop=tuple(float(v) for v in numbers("crop")),  # type: ignore[arg-type]
            size=tuple(int(v) for v in numbers("size")),  # type: ignore[arg-type]
        )  # fmt: skip


class LandmarkerTracker:
    """A landmarker, the canonical face that goes with it, and the way from its faces to `Motion`."""

    num_landmarks = mesh.NUM_LANDMARKS

    def __init__(self, bundle: Path, *, detector: FaceDetector | None = None, threads: int = 1) -> None:
        """See `Landmarker`."""
        self.landmarker = Landmarker(bundle, detector=detector, threads=threads)
        self.canonical = mesh.load_canonical_face(bundle)

    def track_frames(self, frames: Iterable[np.ndarray]) -> list[Face | None]:
        """Track the face through frames, uint8 (H, W, 3) RGB, taken one at a time."""
        self.landmarker.reset()
        return [self.landmarker.track(frame) for frame in frames]

    def track_crops(self, frames: Sequence[np.ndarray], *, independent: bool = False) -> Motion | None:
        """The face in square frames, which are the crop; `apart`: frames that do not follow each other.

        None where no frame shows one.
        """
        side = len(frames[0])
        if independent:
            faces = [self.track_frames([frame] * WARMUP_PASSES)[-1] for frame in frames]
        else:
            faces = self.track_frames([*[frames[0]] * WARMUP_PASSES, *frames])[WARMUP_PASSES:]
        self.landmarker.reset()
        try:
            return self.make_motion(faces, Fraction(25), (side, side), crop=(0.0, 0.0, float(side)))
        except NoFaceError:
            return None

    def calibrate_clip(
        self, faces: Sequence[Face], size: tuple[int, int], scale: tuple[float, float] = CROP_SCALE
    ) -> Square:
        """The crop of a clip of which these faces are known."""
        return fit_clip_crop(np.stack([face.landmarks for face in faces]), size, scale)

    def make_motion(
        self,
        faces: Sequence[Face | None],
        fps: Fraction,
        size: tuple[int, int],
        *,
        crop: Square | None = None,
        scale: tuple[float, float] = CROP_SCALE,
    ) -> Motion:
        """Faces of one clip, in pixels of frames of `size` (width, height) -> Motion in one fixed crop.

        Raises `NoFaceError` when no frame has a face.
        """
        present, found, held = hold_missing_faces(faces)
        landmarks = np.stack([face.landmarks for face in present]).astype(np.float32, copy=False)  # (F, 478, 3)
        x0, y0, side = crop if crop is not None else fit_clip_crop(landmarks, size, scale)
        cameras = np.empty((len(present), 25), np.float32)
        beta = np.empty((len(present), len(BETA_NAMES)), np.float32)
        for at in range(0, len(present), CHUNK_FRAMES):
            part = slice(at, at + CHUNK_FRAMES)
            points = (landmarks[part].astype(np.float64) - [x0, y0, 0]) / side
            cameras[part] = fit_cameras(points, self.canonical.points)
            beta[part, : len(ARKIT_NAMES)] = [face.blendshapes for face in present[part]]
            # at full relief: beta, which weights were trained on, does not change with it
            beta[part, len(ARKIT_NAMES) :] = compute_measures(landmarks_to_head_frame(points, cameras[part], 1.0))
            landmarks[part] = points
        if not found.all():
            beta, cameras, landmarks = beta[held], cameras[held], landmarks[held]
        return Motion(beta, cameras, landmarks, found, fps, (x0, y0, side), size)


def hold_missing_faces(faces: Sequence[Face | None]) -> tuple[list[Face], np.ndarray, np.ndarray]:
    """The faces that are there, which frames those are (T,), and each frame's row among them, the last one held (T,).

    Raises `NoFaceError` when there is none.
    """
    found = np.array([face is not None for face in faces], dtype=bool)
    if not found.any():
        raise NoFaceError("no face was found in any frame")
    return [face for face in faces if face is not None], found, (np.cumsum(found) - 1).clip(0)


def fit_cameras(landmarks: np.ndarray, canonical: np.ndarray) -> np.ndarray:
    """Camera of each frame: the rigid motion that lays the canonical face's rigid points on the landmarks.

    A weighted similarity fit in three dimensions (Umeyama 1991), the scale being taken out by moving the camera, a few
    times over because perspective depends on the distance. Against exact labels of synthetic heads it reads pitch
    truer than PnP of the image positions alone (slope 0.95 against 0.71).

    Args:
        landmarks: (F, 478, 3), crop units. canonical: (478, 3), head frame.

    Returns:
        (F, 25) float32.
    """
    weights = np.array(list(mesh.RIGID_WEIGHTS.values()))
    weights /= weights.sum()
    model = canonical[list(mesh.RIGID_POINTS)]
    model_mean = weights @ model
    centred = model - model_mean
    spread = float((weights * (centred**2).sum(-1)).sum())
    seen = landmarks[:, list(mesh.RIGID_POINTS)].astype(np.float64)
    depth = np.full(len(seen), 2.7)
    for _ in range(4):
        cloud = _unproject(seen, depth, weights, TRACKER_Z_SCALE)  # (F, K, 3), camera frame
        cloud_mean = np.einsum("k,fki->fi", weights, cloud)
        cross = np.einsum("k,fki,kj->fij", weights, cloud - cloud_mean[:, None], centred)
        u, s, vt = np.linalg.svd(cross)
        sign = np.ones_like(s)
        sign[:, 2] = np.sign(np.linalg.det(u @ vt))
        scale = (s * sign).sum(-1) / spread
        depth = depth / scale
    rotation = (u * sign[:, None]) @ vt
    pose = np.tile(np.eye(4), (len(seen), 1, 1))
    pose[:, :3, :3] = rotation
    pose[:, :3, 3] = cloud_mean / scale[:, None] - rotation @ model_mean
    cam2world = np.linalg.inv(pose).reshape(-1, 16)
    intrinsics = np.tile(default_intrinsics().ravel(), (len(seen), 1))
    return np.concatenate([cam2world, intrinsics], axis=1).astype(np.float32)


def _unproject(points: np.ndarray, depth: np.ndarray, weights: np.ndarray, z_scale: float) -> np.ndarray:
    """Crop units (F, K, 3), z times `z_scale` -> camera frame (F, K, 3), the weighted mean of z at `depth` (F,)."""
    z = points[..., 2] - (points[..., 2] @ weights)[:, None]
    depths = depth[:, None] * (1 + z_scale * z / FOCAL)
    rays = np.concatenate([(points[..., :2] - 0.5) / FOCAL, np.ones_like(z)[..., None]], axis=-1)
    return rays * depths[..., None]


def fit_clip_crop(pixels: np.ndarray, size: tuple[int, int], scale: tuple[float, float] = CROP_SCALE) -> Square:
    """One square for a clip: the median nose at its centre, its side the wanted number of face boxes.

    Where the frames are cut tighter than wanted the square shrinks to stay inside them, down to the least scale.
    """
    extent = pixels[..., :2].max(1) - pixels[..., :2].min(1)  # (F, 2)
    return fit_crop_square(pixels[:, 1, :2], extent.max(-1), size, scale)


def fit_crop_square(noses: np.ndarray, boxes: np.ndarray, size: tuple[int, int], scale: tuple[float, float]) -> Square:
    """`clip_crop` for noses (F, 2) and longer sides of the faces' boxes (F,)."""
    nose, box = np.median(noses, axis=0), float(np.median(boxes))
    room = 2 * min(nose[0], nose[1], size[0] - nose[0], size[1] - nose[1])
    side = float(np.clip(room, scale[1] * box, scale[0] * box))
    return float(nose[0] - side / 2), float(nose[1] - side / 2), side


def crop_image(image: np.ndarray, crop: tuple[float, float, float], size: int) -> np.ndarray:
    """Cut the square out of an image (H, W, 3) and resize it to (size, size, 3), uint8; borders replicated."""
    x0, y0, side = crop
    step = side / size
    if step > 1.5:  # warpAffine does not filter: shrink by area first
        height, width = image.shape[:2]
        image = cv2.resize(image, (round(width / step), round(height / step)), interpolation=cv2.INTER_AREA)
        fx, fy = image.shape[1] / width, image.shape[0] / height
    else:
        fx = fy = 1.0
    # output pixel centre (u + 0.5) maps to x0 + (u + 0.5) * step, minus 0.5 for the index of a pixel
    matrix = np.array([[step * fx, 0, (x0 + 0.5 * step) * fx - 0.5], [0, step * fy, (y0 + 0.5 * step) * fy - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def landmarks_to_head_frame(landmarks: np.ndarray, camera: np.ndarray, relief: float = RELIEF_SCALE) -> np.ndarray:
    """Landmarks (T, 478, 3) in crop units, seen by cameras (T, 25) -> (T, 478, 3) float32 in the head frame.

    Each point stays on its ray; its depth is `relief` times the one by which the pose is read, with the rigid points'
    mean depth laid on the canonical face's. So projecting with the same camera gives the landmarks back.
    """
    landmarks = np.asarray(landmarks, dtype=np.float64)
    cam2world = np.asarray(camera, dtype=np.float64)[:, :16].reshape(-1, 4, 4)
    R, t = cam2world[:, :3, :3], cam2world[:, :3, 3]
    depth = np.einsum("tji,tj->ti", R, RIGID_CENTROID - t)[:, 2]  # of the rigid points' mean, in the camera frame
    weights = np.zeros(mesh.NUM_LANDMARKS)
    weights[list(mesh.RIGID_POINTS)] = list(mesh.RIGID_WEIGHTS.values())
    cloud = _unproject(landmarks, depth, weights / weights.sum(), relief * TRACKER_Z_SCALE)
    return (np.einsum("tij,tnj->tni", R, cloud) + t[:, None]).astype(np.float32)


def compute_measures(points: np.ndarray) -> np.ndarray:
    """The 12 `MEASURES` of head-frame points (T, 478, 3) -> (T, 12), in inter-ocular distances; x right, heights up."""

    def eye(corners: tuple[int, int]) -> np.ndarray:
        return points[:, list(corners)].mean(1)

    left, right = eye((362, 263)), eye((33, 133))
    unit = np.linalg.norm(left - right, axis=-1)

    def gap(upper: Sequence[int], lower: Sequence[int]) -> np.ndarray:
        return (points[:, list(lower), 1].mean(1) - points[:, list(upper), 1].mean(1)) / unit

    base = points[:, 2, 1]  # under the nose: still while the mouth moves
    columns = [
        gap([311], [402]), gap([13], [14]), gap([81], [178]),
        np.linalg.norm(points[:, 291] - points[:, 61], axis=-1) / unit,
        (base - points[:, 291, 1]) / unit, (base - points[:, 61, 1]) / unit,
        gap([385, 386, 387], [380, 374, 373]), gap([160, 159, 158], [144, 145, 153]),
        *((points[:, 473] - left)[:, :2] / unit[:, None]).T, *((points[:, 468] - right)[:, :2] / unit[:, None]).T,
    ]  # fmt: skip
    return np.stack(columns, axis=1)


def _mirror_table() -> tuple[np.ndarray, np.ndarray]:
    """For each entry of beta, the entry it becomes in the mirror, and its sign."""

    def other(name: str) -> str:
        for a, b in (("Left", "Right"), ("Right", "Left")):
            if name.endswith(a):
                return name[: -len(a)] + b
        return name

    index = {name: i for i, name in enumerate(BETA_NAMES)}
    swap = {"jawLeft": "jawRight", "jawRight": "jawLeft", "mouthLeft": "mouthRight", "mouthRight": "mouthLeft"}
    order = np.array([index[swap.get(name, other(name))] for name in BETA_NAMES])
    sign = np.array([-1.0 if name.startswith("irisX") else 1.0 for name in BETA_NAMES], dtype=np.float32)
    return order, sign


_MIRROR_ORDER, _MIRROR_SIGN = _mirror_table()


def mirror_beta(beta: np.ndarray) -> np.ndarray:
    """beta (..., 64) of the mirrored face."""
    return beta[..., _MIRROR_ORDER] * _MIRROR_SIGN


def mirror_camera(camera: np.ndarray) -> np.ndarray:
    """Camera (..., 25) that sees the mirrored head in the mirrored image."""
    m = np.array([-1.0, 1.0, 1.0, 1.0], dtype=np.float32)
    out = camera.copy()
    pose = camera[..., :16].reshape(*camera.shape[:-1], 4, 4)
    out[..., :16] = (pose * m[:, None] * m).reshape(*camera.shape[:-1], 16)
    return out


def mirror_landmarks(landmarks: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Landmarks (..., 478, 3) in crop units of the mirrored image; `order` is `CanonicalFace.mirror`."""
    out = landmarks[..., order, :].copy()
    out[..., 0] = 1 - out[..., 0]
    return out


def resample_rows(count: int, source_fps: Fraction, fps: Fraction, start: float, duration: float | None) -> np.ndarray:
    """Rows of a motion of `count` frames at rate `own` that are seen at rate `fps`, from `start` for `duration` s."""
    first = round(start * source_fps)
    last = count if duration is None else min(count, first + round(duration * source_fps))
    if first >= last:
        return np.zeros(0, dtype=np.int64)
    frames = max(1, round((last - first) * fps / source_fps))
    return first + np.array([int(t * source_fps / fps) for t in range(frames)]).clip(max=last - first - 1)


def select_frames(motion: Motion, rows: np.ndarray) -> Motion:
    """The motion of some frames only."""
    return replace(motion, **{k: getattr(motion, k)[rows] for k in ("beta", "camera", "landmarks", "found")})
