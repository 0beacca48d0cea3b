"""The tracker `fan`: 68 points from the package face-alignment, turned into `Motion`.

    image -> square around the face, 512 -> 3DFAN-4 -> 68 points -> `fit_frames` -> camera, beta

For drivers only: a source needs the landmarker's 478 points. Of the package's networks 3DFAN-4 is the one whose points
stay at the same places of a turned head. YuNet detects the faces and confirms them while they are tracked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export3d_cli.core.face.crop import CROP_SCALE, ClipCalibration, Square, crop_image, fit_crop_square
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, compute_measures
from export3d_cli.core.face.face_track import Face, FaceTracker
from export3d_cli.core.face.landmarks import IBUG68_MEASURE_POINTS
from export3d_cli.core.runtime.camera import FOCAL, RADIUS, default_intrinsics, rotation_exp, with_head_pose
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.weights import load_arrays

GAUSS_NEWTON_STEPS, DESCENT_SWEEPS = 5, 12  # linearisations; passes of coordinate descent in each
NEUTRAL_FRAMES, NEUTRAL_ROUNDS = 48, 6  # frames used for the neutral face; alternations of both fits
OFF_MODEL_SD = 0.004  # standard deviation of a person's points from the identity modes, head-frame units
SPARSITY_WEIGHT = 1.5  # L1 weight: cost of a coefficient of 1 in squared deviations
COEFFICIENT_SD = 0.7  # standard deviation of the prior of coefficients
# Coefficients that 68 points hardly show, or confuse with others: they stay 0.
UNOBSERVED_PREFIXES = ("cheekPuff", "cheekSquint", "eyeLook", "jawForward", "noseSneer", "tongueOut")
OBSERVABLE = np.array([not name.startswith(UNOBSERVED_PREFIXES) for name in ARKIT_NAMES])
# Standard deviation of each point, crop units: sides of the jaw, chin, brows, nose, eyes and lips.
LANDMARK_SD = np.repeat([0.02, 0.01, 0.02, 0.006, 0.005, 0.003, 0.004], [6, 5, 6, 10, 9, 12, 20])
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


@dataclass(frozen=True)
class FaceBasis:
    """A linear face model of 68 points in the head frame; `fan_basis.npz` holds it."""

    mean: np.ndarray  # (68, 3)
    identity: np.ndarray  # (K, 68, 3), one standard deviation each
    expression: np.ndarray  # (52, 68, 3), in the order of ARKIT_NAMES

    def deform(self, neutral: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """Return the points (F, 68, 3) of a neutral face (68, 3) with coefficients (F, 52)."""
        return neutral + np.tensordot(coefficients, self.expression, 1)


@dataclass(frozen=True)
class FaceFit:
    """A fit to F frames."""

    rotation: np.ndarray  # (F, 3, 3), head to camera
    centre: np.ndarray  # (F, 3), the head frame's origin in the camera frame
    coefficients: np.ndarray  # (F, 52) in [0, 1]
    shape: np.ndarray  # (F, 68, 3), head frame

    def project(self) -> np.ndarray:
        """Return the shape in crop units, (F, 68, 2)."""
        points = self._camera_points()
        return FOCAL * points[..., :2] / points[..., 2:] + 0.5

    def depth(self) -> np.ndarray:
        """Return the shape's depth in the camera frame, (F, 68)."""
        return self._camera_points()[..., 2]

    def _camera_points(self) -> np.ndarray:
        return np.einsum("fij,fnj->fni", self.rotation, self.shape) + self.centre[:, None]


def fit_frames(points: np.ndarray, basis: FaceBasis, neutral: np.ndarray) -> FaceFit:
    """Fit pose and coefficients of each frame (F, 68, 2), crop units, on its own to a person's neutral face (68, 3)."""
    coefficients = np.zeros((len(points), len(ARKIT_NAMES)))
    shape = basis.deform(neutral, coefficients)
    fit = FaceFit(*_initial_pose(points, shape), coefficients, shape)
    for step in range(GAUSS_NEWTON_STEPS):
        residual, by_pose, by_point = _linearise(points, fit)
        jacobian = _mode_jacobian(by_point, basis.expression[OBSERVABLE])
        if step == 0:  # pose only: a large pose error would be fitted as an expression
            jacobian *= 0
        previous = fit.coefficients[:, OBSERVABLE]
        target = residual + (jacobian @ previous[..., None])[..., 0]
        current = _solve_bounded(*_eliminate_pose(by_pose, jacobian, target), previous)
        residual = residual - (jacobian @ (current - previous)[..., None])[..., 0]
        pose_step = np.linalg.solve(by_pose.mT @ by_pose, by_pose.mT @ residual[..., None])[..., 0]
        coefficients = np.zeros_like(fit.coefficients)
        coefficients[:, OBSERVABLE] = current
        fit = FaceFit(rotation_exp(pose_step[:, :3]) @ fit.rotation, fit.centre + pose_step[:, 3:], coefficients,
                      basis.deform(neutral, coefficients))  # fmt: skip
    return fit


def fit_neutral(points: np.ndarray, basis: FaceBasis) -> np.ndarray:
    """Fit the neutral face (68, 3) of a clip to its frames (F, 68, 2), whatever their expressions and poses."""
    points = points[np.unique(np.linspace(0, len(points) - 1, NEUTRAL_FRAMES).round().astype(int))]
    modes = np.concatenate([basis.identity, OFF_MODEL_SD * np.eye(204).reshape(204, 68, 3)])
    identity = np.zeros(len(modes))
    neutral = basis.mean
    for _ in range(NEUTRAL_ROUNDS):
        residual, by_pose, by_point = _linearise(points, fit_frames(points, basis, neutral))
        jacobian = _mode_jacobian(by_point, modes)
        normal, rhs = _eliminate_pose(by_pose, jacobian, residual + jacobian @ identity)
        # the mean, not the sum: errors of one clip's frames are correlated and must not outweigh the prior
        identity = np.linalg.solve(normal.mean(0) + np.eye(len(modes)), rhs.mean(0))
        neutral = basis.mean + np.tensordot(identity, modes, 1)
    return neutral


def _initial_pose(points: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a first guess of rotation and centre: in-plane rotation only, distance from the size of the face."""
    a, b = shape[..., :2] - shape[..., :2].mean(1, keepdims=True), points - points.mean(1, keepdims=True)
    along = np.einsum("fni,fni->f", a, b)
    across = np.einsum("fn,fn->f", a[..., 0], b[..., 1]) - np.einsum("fn,fn->f", a[..., 1], b[..., 0])
    zero = np.zeros_like(along)
    rotation = rotation_exp(np.stack([zero, zero, np.arctan2(across, along)], axis=1))
    scale = np.hypot(along, across) / (a**2).sum((1, 2))  # crop units per head-frame unit
    depth = FOCAL / np.maximum(scale, 0.1 * FOCAL / RADIUS)
    xy = (points.mean(1) - 0.5) / FOCAL * depth[:, None]
    return rotation, np.column_stack([xy, depth]) - np.einsum("fij,fj->fi", rotation, shape.mean(1))


def _linearise(points: np.ndarray, fit: FaceFit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return residuals (F, 136), derivatives by pose (F, 136, 6) and points (F, 68, 2, 3), in standard deviations."""
    rotated = np.einsum("fij,fnj->fni", fit.rotation, fit.shape)
    x, y, z = np.moveaxis(rotated + fit.centre[:, None], -1, 0)
    zero = np.zeros_like(x)
    by_translation = np.stack([FOCAL / z, zero, -FOCAL * x / z**2, zero, FOCAL / z, -FOCAL * y / z**2], axis=-1)
    by_translation = by_translation.reshape(*x.shape, 2, 3) / LANDMARK_SD[:, None, None]
    a, b, c = np.moveaxis(rotated, -1, 0)  # a small rotation w moves a point by w x point
    by_rotation = by_translation @ np.stack([zero, c, -b, -c, zero, a, b, -a, zero], axis=-1).reshape(*x.shape, 3, 3)
    residual = (points - fit.project()) / LANDMARK_SD[:, None]
    by_pose = np.concatenate([by_rotation, by_translation], axis=-1).reshape(len(x), 136, 6)
    return residual.reshape(len(x), 136), by_pose, by_translation @ fit.rotation[:, None]


def _mode_jacobian(by_point: np.ndarray, modes: np.ndarray) -> np.ndarray:
    """Return derivatives by modes (K, 68, 3) from those by points (F, 68, 2, 3), (F, 136, K)."""
    return (by_point @ modes.transpose(1, 2, 0)).reshape(len(by_point), 136, len(modes))


def _eliminate_pose(by_pose: np.ndarray, jacobian: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the normal equations (F, K, K), (F, K) of the modes with the pose eliminated (Schur complement)."""
    coupling = by_pose.mT @ jacobian  # (F, 6, K)
    solved = np.linalg.solve(by_pose.mT @ by_pose, coupling)
    rhs = jacobian.mT @ target[..., None] - solved.mT @ (by_pose.mT @ target[..., None])
    return jacobian.mT @ jacobian - solved.mT @ coupling, rhs[..., 0]


def _solve_bounded(normal: np.ndarray, rhs: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Minimise squared error plus L2 and L1 penalty over coefficients (F, K) in [0, 1], by coordinate descent."""
    K = normal.shape[-1]
    normal = normal + np.eye(K) / COEFFICIENT_SD**2
    current = start.copy()
    for _ in range(DESCENT_SWEEPS):
        for k in range(K):
            descent = rhs[:, k] - SPARSITY_WEIGHT - (normal[:, k] * current).sum(-1)
            current[:, k] = (current[:, k] + descent / normal[:, k, k]).clip(0, 1)
    return current


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
