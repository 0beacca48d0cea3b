"""The tracker `fan`: 68 points by the package face-alignment, and from them what the landmarker tells by itself.

    image -> square around the face, 512 -> 3DFAN-4 -> 68 points -> pose, coefficients (`fit.py`) -> camera, beta

It drives only: a source needs the landmarker's 478 points. Of the package's networks 3DFAN-4 is the one whose points
stay on the same places of a turned head. Faces are found, and their being there confirmed, by YuNet.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from export3d_cli.core.face.beta import ARKIT_NAMES, BETA_NAMES
from export3d_cli.core.face.crop import CROP_SCALE, Square, crop_image, fit_crop_square
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.landmark_fitting import FaceBasis, FaceFit, fit_frames, fit_neutral
from export3d_cli.core.face.landmarker import Face, hold_missing_faces
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import FOCAL, default_intrinsics, with_head_pose
from export3d_cli.core.runtime.errors import Export3DError, WeightsError

NUM_FAN_LANDMARKS = 68
INPUT_SIDE_PX = 512  # pixels; the network sees half of that, but the package rounds its points to whole ones
# The package is given a face's box; it sees a square of 200/195 of its width and height, 0.12 of the height higher.
_BOX_SIDE_PX = INPUT_SIDE_PX * 195 / 200 / 2
_FULL_PATCH_BOX = np.array(
    [
        INPUT_SIDE_PX / 2 - _BOX_SIDE_PX / 2,
        INPUT_SIDE_PX / 2 - 0.38 * _BOX_SIDE_PX,
        INPUT_SIDE_PX / 2 + _BOX_SIDE_PX / 2,
        INPUT_SIDE_PX / 2 + 0.62 * _BOX_SIDE_PX,
    ]
)
_CONFIRM_SIDE_PX = 160  # pixels: the square in which the face is confirmed
_MAX_SHAPE_DEVIATION = 0.2  # deviation from any view of the mean face, over the points' spread, that no face has
# A face box of the landmarker reaches up to the hair: in sides of the box of the 68 points.
FACE_BOX_RATIO = 1.18
_NOSE_WEIGHTS = (0.55, 0.45)  # of the points 30 and 33: where the landmarker has the middle of its crop
INSTALL_COMMAND = "pip install 'export3d-cli[fan]'"


class FanLandmarker:
    """Finds faces and their 68 points: a `FaceFinder`. An instance is not safe to share between threads.

    Of a `Face` it knows the landmarks (68, 3) in pixels, z being 0; the coefficients take the whole clip to know.
    """

    def __init__(self, detector: FaceDetector, mean_face: np.ndarray, *, device: str = "cpu") -> None:
        """Raises `WeightsError` where the package or its weights are missing and cannot be had.

        Args:
            detector: finds faces.
            mean: the mean face (68, 3), which tells faces from other things.
            device: cpu, cuda or mps, as torch calls them.
        """
        self.detector, self.mean_face = detector, mean_face
        self._network = _load_network(device)
        self.reset()

    def reset(self) -> None:
        """Forget the tracked face; call it between two videos."""
        self._square: Square | None = None
        self._tracked_size: tuple[int, ...] = ()

    def follow(self, face: Face, image: np.ndarray) -> None:
        """Let `track` look for this face of `image` from now on."""
        self._square, self._tracked_size = _input_square(face.landmarks[:, :2]), image.shape

    def track(self, image: np.ndarray) -> Face | None:
        """The face of the next frame of a video, uint8 (H, W, 3) RGB; None if there is none."""
        if image.shape != self._tracked_size:
            self.reset()
        face = None if self._square is None else self._confirm_face(image, self._square)
        if face is None:
            face = next(self._detect_faces(image), None)
        self._square, self._tracked_size = None if face is None else _input_square(face.landmarks[:, :2]), image.shape
        return face

    def find_all(self, image: np.ndarray) -> list[Face]:
        """Every face of the image, the largest first."""
        return list(self._detect_faces(image))

    def predict_points(self, image: np.ndarray, square: Square) -> np.ndarray:
        """The 68 points (68, 2) in pixels that the network sees in a square of the image, whatever is there."""
        x0, y0, side = square
        seen = self._network.get_landmarks_from_image(
            crop_image(image, square, INPUT_SIDE_PX), detected_faces=[_FULL_PATCH_BOX]
        )
        points: np.ndarray = (np.asarray(seen[0], dtype=np.float64)[:, :2] + 0.5) * side / INPUT_SIDE_PX + [x0, y0]
        return points

    def _detect_faces(self, image: np.ndarray) -> Iterator[Face]:
        for detection in self.detector(image):
            rough = self.predict_points(image, _input_square(detection.box.reshape(2, 2)))
            face = (
                None
                if _shape_deviation(rough, self.mean_face) > _MAX_SHAPE_DEVIATION
                else self._confirm_face(image, _input_square(rough))
            )
            if face is not None:
                yield face

    def _confirm_face(self, image: np.ndarray, view: Square) -> Face | None:
        there = self.detector(crop_image(image, view, _CONFIRM_SIDE_PX))
        if not there:
            return None
        points = self.predict_points(image, view)
        if _shape_deviation(points, self.mean_face) > _MAX_SHAPE_DEVIATION:
            return None
        landmarks = np.column_stack([points, np.zeros(NUM_FAN_LANDMARKS)]).astype(np.float32)
        return Face(landmarks, np.zeros(len(ARKIT_NAMES), np.float32), there[0].score)


class FanTracker:
    """68 points and the way from them to `Motion`: a `FaceTracker`."""

    num_landmarks = NUM_FAN_LANDMARKS

    def __init__(self, basis: Path, detector: FaceDetector, *, device: str = "cpu") -> None:
        """See `Fan`; `basis` is the file of `FaceBasis` and `Dialect`."""
        self.basis, self.calibration = FaceBasis.load(basis), BetaCalibration.load(basis)
        self.landmarker = FanLandmarker(detector, self.basis.mean, device=device)
        self._neutral: np.ndarray | None = None

    def calibrate_clip(
        self, faces: Sequence[Face], size: tuple[int, int], scale: tuple[float, float] = CROP_SCALE
    ) -> Square:
        """The crop of a clip, as `clip_crop` chooses it; and the person's face at rest, which `motion` counts from."""
        pixels = np.stack([face.landmarks[:, :2] for face in faces]).astype(np.float64)
        nose = _NOSE_WEIGHTS[0] * pixels[:, 30] + _NOSE_WEIGHTS[1] * pixels[:, 33]
        x0, y0, side = crop = fit_crop_square(nose, FACE_BOX_RATIO * np.ptp(pixels, axis=1).max(-1), size, scale)
        self._neutral = fit_neutral((pixels - [x0, y0]) / side, self.basis)
        return crop

    def make_motion(
        self,
        faces: Sequence[Face | None],
        fps: Fraction,
        size: tuple[int, int],
        *,
        crop: Square | None = None,
        scale: tuple[float, float] = CROP_SCALE,
    ) -> Motion:
        """Faces of one clip -> Motion with 68 landmarks, (T, 68, 3); with a crop, that of the last `settle`.

        Raises `NoFaceError` when no frame has a face.
        """
        present, found, held = hold_missing_faces(faces)
        if crop is None:
            crop = self.calibrate_clip(present, size, scale)
        if self._neutral is None:
            raise Export3DError("no face at rest is known: call settle(faces, size) first")
        x0, y0, side = crop
        points = (np.stack([face.landmarks[:, :2] for face in present]).astype(np.float64) - [x0, y0]) / side
        fit = fit_frames(points, self.basis, self._neutral)
        depth = fit.depth()
        z = FOCAL * (depth / depth.mean(1, keepdims=True) - 1)
        landmarks = np.concatenate([points, z[..., None]], axis=-1).astype(np.float32)
        beta = self.calibration(
            np.concatenate([fit.coefficients, compute_measures_68(points_to_head_frame(points, fit))], axis=1)
        )
        return Motion(beta[held], _cameras_from_fit(fit)[held], landmarks[held], found, fps, crop, size)


@dataclass(frozen=True)
class BetaCalibration:
    """How the landmarker would put it: beta is gain times what was fitted, plus what a face at rest has."""

    gain: np.ndarray  # (64,); 0 for what 68 points do not tell, as where the eyes look
    offset: np.ndarray  # (64,)

    @classmethod
    def load(cls, path: Path) -> BetaCalibration:
        """Read it from the file of the basis, which `FaceBasis.load` has looked at."""
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
                gain, rest = (data[name].astype(np.float64) for name in ("gain", "rest"))
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise WeightsError(f"{path} holds no gains of beta ({error}): install export3d-cli again") from error
        if gain.shape != (len(BETA_NAMES),) or rest.shape != gain.shape:
            raise WeightsError(f"{path} holds gains of shape {gain.shape}: install export3d-cli again")
        return cls(gain, rest)

    def __call__(self, fitted: np.ndarray) -> np.ndarray:
        """Coefficients and measures (F, 60), the irises missing -> beta (F, 64) float32."""
        wide = np.zeros((len(fitted), len(BETA_NAMES)))
        wide[:, : fitted.shape[1]] = fitted
        beta = wide * self.gain + self.offset
        beta[:, : len(ARKIT_NAMES)] = beta[:, : len(ARKIT_NAMES)].clip(0, 1)
        return beta.astype(np.float32)


def compute_measures_68(points: np.ndarray) -> np.ndarray:
    """The first 8 `MEASURES` of head-frame points (F, 68, 3) -> (F, 8), at the points nearest to the landmarker's."""

    def gap(upper: Sequence[int], lower: Sequence[int]) -> np.ndarray:
        return (points[:, list(lower), 1].mean(1) - points[:, list(upper), 1].mean(1)) / unit

    unit = np.linalg.norm(points[:, [42, 45]].mean(1) - points[:, [36, 39]].mean(1), axis=-1)
    columns = [
        gap([63], [65]), gap([62], [66]), gap([61], [67]),
        np.linalg.norm(points[:, 54] - points[:, 48], axis=-1) / unit,
        gap([54], [33]), gap([48], [33]), gap([43, 44], [46, 47]), gap([37, 38], [40, 41]),
    ]  # fmt: skip
    return np.stack(columns, axis=1)


def points_to_head_frame(points: np.ndarray, fit: FaceFit) -> np.ndarray:
    """Points (F, 68, 2) in crop units, at the depth of the fitted face -> (F, 68, 3), head frame."""
    depth = fit.depth()[..., None]
    cloud = np.concatenate([(points - 0.5) / FOCAL * depth, depth], axis=-1) - fit.centre[:, None]
    return np.einsum("fji,fnj->fni", fit.rotation, cloud)


def _cameras_from_fit(fit: FaceFit) -> np.ndarray:
    """The cameras (F, 25) that see the head as it was fitted."""
    plain = np.concatenate([np.eye(4).ravel(), default_intrinsics().ravel()])
    return with_head_pose(np.tile(plain, (len(fit.centre), 1)), fit.rotation, fit.centre)


def _input_square(points: np.ndarray) -> Square:
    """The square in which the network wants to see the face of points, or of a box's two corners, (N, 2)."""
    low, high = points.min(0), points.max(0)
    side = float((high - low).sum() * 200 / 195)
    x, y = (low + high) / 2 - [0, 0.12 * (high - low)[1]]
    return float(x - side / 2), float(y - side / 2), side


def _shape_deviation(points: np.ndarray, mean: np.ndarray) -> float:
    """How far points (68, 2) are from every affine view of the mean face, over their spread: 0.1 is usual."""
    design = np.column_stack([mean, np.ones(NUM_FAN_LANDMARKS)])
    left = points - design @ np.linalg.lstsq(design, points, rcond=None)[0]
    return float(np.sqrt((left**2).sum() / max(((points - points.mean(0)) ** 2).sum(), 1e-9)))


def import_face_alignment() -> Any:
    """The module face_alignment; raises `WeightsError` where it is not installed."""
    try:
        import numba

        config: Any = numba.config
        compiled, config.DISABLE_JIT = config.DISABLE_JIT, True  # compiling takes longer than it would save
        try:
            import face_alignment
        finally:
            config.DISABLE_JIT = compiled
    except ImportError as error:
        raise WeightsError(
            f"the tracker fan needs the package face-alignment ({error}): run `{INSTALL_COMMAND}`"
        ) from error
    return face_alignment


def _load_network(device: str) -> Any:
    """3DFAN-4 of the package, which fetches its weights when they are not in torch's folder yet."""
    package = import_face_alignment()
    url = package.api.models_urls["3DFAN-4"]
    file = Path(package.utils.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        return package.FaceAlignment(
            package.LandmarksType.TWO_HALF_D, device=device, flip_input=False, face_detector="folder", compile=False
        )
    except OSError as error:
        raise WeightsError(
            f"the weights of fan are not at {file} and cannot be fetched ({error}): go online once, or put there {url}"
        ) from error
    except Exception as error:  # torch has many ways to say that a file is damaged
        raise WeightsError(f"{file} does not load as weights of fan ({type(error).__name__}): delete it") from error
