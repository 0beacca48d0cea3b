"""The tracker `fan`: 68 points from the package face-alignment, turned into `Motion`.

    image -> square around the face, 512 -> 3DFAN-4 -> 68 points -> `landmark_fitting` -> camera, beta

For drivers only: a source needs the landmarker's 478 points. Of the package's networks 3DFAN-4 is the one whose points
stay at the same places of a turned head. YuNet detects the faces and confirms them while they are tracked.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export3d_cli.core.face.crop import CROP_SCALE, ClipCalibration, Square, crop_image, fit_crop_square
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, compute_measures
from export3d_cli.core.face.face_track import Face, FaceTracker
from export3d_cli.core.face.landmark_fitting import FaceBasis, FaceFit, fit_frames, fit_neutral
from export3d_cli.core.face.landmarks import IBUG68_MEASURE_POINTS
from export3d_cli.core.runtime.camera import FOCAL, default_intrinsics, with_head_pose
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.weights import load_arrays

NUM_FAN_LANDMARKS = 68
INPUT_SIDE_PX = 512  # the network sees half of it, but the package rounds points to whole pixels of it
# From a face box the package crops a square: side (width + height) * 200/195, centre 0.12 of the height higher. This
# box makes it take the whole patch.
_BOX_SIDE_PX = INPUT_SIDE_PX * 195 / 200 / 2
_FULL_PATCH_BOX = INPUT_SIDE_PX / 2 + _BOX_SIDE_PX * np.array([-0.5, -0.38, 0.5, 0.62])
_CONFIRM_SIDE_PX = 160  # side of the picture in which the face is confirmed
_MAX_SHAPE_DEVIATION = 0.2  # see `_shape_deviation`; faces have about 0.1
FACE_BOX_RATIO = 1.18  # side of the landmarker's face box, which reaches the hair, over that of the 68 points
_NOSE_WEIGHTS = (0.55, 0.45)  # of the points 30 and 33: the landmarker's nose tip, centre of its crop
INSTALL_COMMAND = "pip install 'export3d-cli[fan]'"


class FanTracker(FaceTracker):
    """The tracker `fan`. It fills only the landmarks of a `Face`, with z = 0; coefficients need the whole clip."""

    def __init__(self, basis: Path, detector: FaceDetector, *, device: str = "cpu") -> None:
        """Load the network and `basis`, `fan_basis.npz`; raise `WeightsError` if package or weights are missing.

        The basis also holds the linear map from fitted coefficients to the landmarker's beta: `gain` and `rest`, (64,)
        each; the gain is 0 for entries that 68 points do not show, such as the gaze.
        """
        arrays = {name: array.astype(np.float64) for name, array in load_arrays(basis).items()}
        self.basis = FaceBasis(arrays["mean"], arrays["identity"], arrays["expression"])
        self.gain, self.offset = arrays["gain"], arrays["rest"]
        self.detector = detector
        self._network = _load_network(device)

    def search(self, image: np.ndarray, *, thorough: bool) -> Iterator[Face]:
        """Search the image once; points unlike any view of the mean face are rejected."""
        for detection in self.detector(image):
            rough = self.predict_points(image, _input_square(detection.box.reshape(2, 2)))
            if _shape_deviation(rough, self.basis.mean) <= _MAX_SHAPE_DEVIATION:
                face = self._confirm_face(image, _input_square(rough))
                if face is not None:
                    yield face

    def find_near(self, image: np.ndarray, face: Face) -> Face | None:
        """Look at the place of `face`."""
        return self._confirm_face(image, _input_square(face.landmarks[:, :2]))

    def predict_points(self, image: np.ndarray, square: Square) -> np.ndarray:
        """Return the network's points (68, 2) in pixels for a square of the image, whether or not it shows a face."""
        x0, y0, side = square
        crop = crop_image(image, square, INPUT_SIDE_PX)
        predicted = self._network.get_landmarks_from_image(crop, detected_faces=[_FULL_PATCH_BOX])
        return (np.asarray(predicted[0], dtype=np.float64)[:, :2] + 0.5) * side / INPUT_SIDE_PX + [x0, y0]

    def _confirm_face(self, image: np.ndarray, view: Square) -> Face | None:
        detections = self.detector(crop_image(image, view, _CONFIRM_SIDE_PX))
        points = self.predict_points(image, view) if detections else None
        if points is None or _shape_deviation(points, self.basis.mean) > _MAX_SHAPE_DEVIATION:
            return None
        landmarks = np.column_stack([points, np.zeros(NUM_FAN_LANDMARKS)]).astype(np.float32)
        return Face(landmarks, np.zeros(len(ARKIT_NAMES), np.float32), detections[0].score)

    def calibrate_clip(self, faces: Sequence[Face], size: tuple[int, int],
                       scale: tuple[float, float] = CROP_SCALE) -> ClipCalibration:  # fmt: skip
        """Choose the crop of a clip (see `fit_clip_crop`) and fit the person's neutral face."""
        pixels = np.stack([face.landmarks[:, :2] for face in faces]).astype(np.float64)
        nose = _NOSE_WEIGHTS[0] * pixels[:, 30] + _NOSE_WEIGHTS[1] * pixels[:, 33]
        x0, y0, side = crop = fit_crop_square(nose, FACE_BOX_RATIO * np.ptp(pixels, axis=1).max(-1), size, scale)
        return ClipCalibration(crop, fit_neutral((pixels - [x0, y0]) / side, self.basis))

    def fit(self, faces: Sequence[Face], clip: ClipCalibration) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit the face model to the points."""
        assert clip.neutral_face is not None
        x0, y0, side = clip.crop
        points = (np.stack([face.landmarks[:, :2] for face in faces]).astype(np.float64) - [x0, y0]) / side
        fit = fit_frames(points, self.basis, clip.neutral_face)
        depth = fit.depth()
        z = FOCAL * (depth / depth.mean(1, keepdims=True) - 1)
        landmarks = np.concatenate([points, z[..., None]], axis=-1).astype(np.float32)
        measures = compute_measures(points_to_head_frame(points, fit), IBUG68_MEASURE_POINTS)  # (F, 8): no irises
        fitted = np.concatenate([fit.coefficients, measures, np.zeros((len(points), 4))], axis=1)
        beta = fitted * self.gain + self.offset
        beta[:, : len(ARKIT_NAMES)] = beta[:, : len(ARKIT_NAMES)].clip(0, 1)
        identity = np.concatenate([np.eye(4).ravel(), default_intrinsics().ravel()])
        cameras = with_head_pose(np.tile(identity, (len(points), 1)), fit.rotation, fit.centre)
        return beta.astype(np.float32), cameras, landmarks


def points_to_head_frame(points: np.ndarray, fit: FaceFit) -> np.ndarray:
    """Lift points (F, 68, 2) in crop units to the depth of the fitted face, (F, 68, 3) in the head frame."""
    depth = fit.depth()[..., None]
    cloud = np.concatenate([(points - 0.5) / FOCAL * depth, depth], axis=-1) - fit.centre[:, None]
    return np.einsum("fji,fnj->fni", fit.rotation, cloud)


def _input_square(points: np.ndarray) -> Square:
    """Return the input square of the network for a face given by points, or by the corners of its box, (N, 2)."""
    low, high = points.min(0), points.max(0)
    side = float((high - low).sum() * 200 / 195)
    x, y = (low + high) / 2 - [0, 0.12 * (high - low)[1]]
    return float(x - side / 2), float(y - side / 2), side


def _shape_deviation(points: np.ndarray, mean: np.ndarray) -> float:
    """Return the RMS distance of points (68, 2) from the nearest affine view of the mean face, over their spread."""
    design = np.column_stack([mean, np.ones(NUM_FAN_LANDMARKS)])
    residual = points - design @ np.linalg.lstsq(design, points, rcond=None)[0]
    return float(np.sqrt((residual**2).sum() / max(((points - points.mean(0)) ** 2).sum(), 1e-9)))


def import_face_alignment() -> Any:
    """Import the module face_alignment; raises `WeightsError` if it is not installed."""
    try:
        import numba

        config: Any = numba.config
        disable_jit, config.DISABLE_JIT = config.DISABLE_JIT, True  # compiling takes longer than it saves
        try:
            import face_alignment
        finally:
            config.DISABLE_JIT = disable_jit
    except ImportError as error:
        raise WeightsError(f"the tracker fan needs the package face-alignment ({error}): "
                           f"run `{INSTALL_COMMAND}`") from error  # fmt: skip
    return face_alignment


def _load_network(device: str) -> Any:
    """Load the package's 3DFAN-4; the package fetches the weights if torch's cache lacks them."""
    package = import_face_alignment()
    url = package.api.models_urls["3DFAN-4"]
    file = Path(package.utils.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        kind = package.LandmarksType.TWO_HALF_D
        return package.FaceAlignment(kind, device=device, flip_input=False, face_detector="folder", compile=False)
    except OSError as error:
        raise WeightsError(f"the weights of fan are not at {file} and cannot be fetched ({error}): "
                           f"go online once, or put {url} there") from error  # fmt: skip
    except Exception as error:  # torch raises many types for a damaged file
        raise WeightsError(f"{file} does not load as weights of fan ({type(error).__name__}): delete it") from error
