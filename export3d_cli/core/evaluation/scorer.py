"""Scores one result against the ground truth with images, tracked landmarks and face embeddings."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from export3d_cli.core.evaluation import metrics
from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.landmarks import ARCFACE_POINTS, DLIB_POINTS, IBUG68, LEFT_EYE, RIGHT_EYE
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.tracker import LandmarkerTracker
from export3d_cli.core.media.image import to_tensor
from export3d_cli.core.runtime.camera import yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError

# frames, uint8 (H, W, 3) each, and their landmarks (F, 478, 2) in pixels -> unit vectors (F, D) float32
Embedder = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
# ArcFace's template at 112 px: eye on the image's left, on its right, nose, left and right mouth corner.
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
ARCFACE_SIZE_PX = 112
DLIB_CHIP_SIZE_PX, DLIB_PADDING = 150, 0.25  # of the face chips that dlib's network was trained on
_DLIB_FILE = "models/dlib_face_recognition_resnet_model_v1.dat"
Frames = list[np.ndarray]  # uint8 (H, W, 3) each
Scores = dict[str, float]  # by names of `metrics.METRICS`
NUM_BLENDSHAPES = 52  # the first entries of beta
MAX_BLINK_FOR_GAZE = 0.5  # eyeBlink above this hides too much of the iris
# Name -> (entries of beta to average, minimum standard deviation of the driver for correlation and slope to count).
CORRELATED_SERIES = {
    "jaw": (("jawOpen",), 0.03),
    "blink": (("eyeBlinkLeft", "eyeBlinkRight"), 0.05),
    "smile": (("mouthSmileLeft", "mouthSmileRight"), 0.05),
    "gaze": (("irisXLeft", "irisXRight"), 0.01),
}
MIN_YAW_STD = 0.7  # degrees, likewise
_BLINKS = [BETA_NAMES.index(f"eyeBlink{side}") for side in ("Left", "Right")]
_IRISES = [BETA_NAMES.index(name) for name in ("irisXLeft", "irisYLeft", "irisXRight", "irisYRight")]


def load_embedder(name: str, device: torch.device) -> Embedder:
    """Load `dlib` or the TorchScript file of that path; raise `InputError` if it is missing or unreadable."""
    network = _load_dlib() if name == "dlib" else _load_torchscript(Path(name), device)

    def embed(frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        vectors = network(frames, points)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return embed


def crop_to_arcface(image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """Return the face with `keypoints` (5, 2), in pixels, on ArcFace's template by a least-squares similarity."""
    z, w = (p[:, 0] + 1j * p[:, 1] for p in (keypoints, ARCFACE_TEMPLATE))  # as complex numbers it is w = a z + b
    a = np.vdot(z - z.mean(), w - w.mean()) / np.vdot(z - z.mean(), z - z.mean())
    b = w.mean() - a * z.mean()
    matrix = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
    return cv2.warpAffine(image, matrix, (ARCFACE_SIZE_PX, ARCFACE_SIZE_PX), flags=cv2.INTER_LINEAR)


def _load_torchscript(path: Path, device: torch.device) -> Embedder:
    """Load a user's network: faces on ArcFace's template, (B, 3, 112, 112) RGB, ImageNet mean and std -> (B, D)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a TorchScript face embedder ({reason}): "
                         "give one, or --identity dlib") from error  # fmt: skip
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def embed(frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        eyes = [points[:, list(eye)].mean(1) for eye in (RIGHT_EYE, LEFT_EYE)]  # left to right in the image
        keypoints = np.stack([*eyes, *(points[:, k] for k in ARCFACE_POINTS)], axis=1)
        crops = [crop_to_arcface(frame, five) for frame, five in zip(frames, keypoints, strict=True)]
        batch = (to_tensor(np.stack(crops)).to(device) * 0.5 + 0.5 - mean) / std
        with torch.inference_mode():
            return torch.cat([network(chunk) for chunk in batch.split(32)]).float().cpu().numpy()

    return embed


def _load_dlib() -> Embedder:
    """Load dlib's ResNet (128 numbers). Cosines are about .97 for one person, and .85 (.79 to .92) for strangers."""
    # not imported: the models' package needs pkg_resources, which setuptools removed
    models = importlib.util.find_spec("face_recognition_models")
    if importlib.util.find_spec("dlib") is None or models is None or not models.submodule_search_locations:
        raise InputError("identity dlib needs two more packages: pip install 'export3d-cli[eval]'")
    dlib = importlib.import_module("dlib")
    network = dlib.face_recognition_model_v1(str(Path(models.submodule_search_locations[0]) / _DLIB_FILE))

    def embed(frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        vectors = []
        for frame, five in zip(frames, points[:, list(DLIB_POINTS)], strict=True):
            corners = dlib.points()
            for x, y in five:
                corners.append(dlib.point(round(float(x)), round(float(y))))
            face = dlib.full_object_detection(dlib.rectangle(0, 0, frame.shape[1], frame.shape[0]), corners)
            chip = dlib.get_face_chip(frame, face, size=DLIB_CHIP_SIZE_PX, padding=DLIB_PADDING)
            vectors.append(network.compute_face_descriptor(chip))
        return np.array(vectors, dtype=np.float32)

    return embed


@dataclass(frozen=True)
class TrackedFrames:
    """Frames with their tracked motion; None if no frame has a face."""

    frames: Frames
    motion: Motion | None
    found: np.ndarray  # (T,) bool


@dataclass(frozen=True)
class MetricSuite:
    """The tracker and networks that measure frames."""

    tracker: LandmarkerTracker
    embedder: Embedder | None = None
    perceptual: Callable[[np.ndarray, np.ndarray], float] | None = None
    perceptual_name: str = ""  # column of the perceptual distance

    def track(self, frames: Frames, *, independent: bool = False) -> TrackedFrames:
        """Track the face in square frames; `independent`: the frames are no sequence."""
        motion = self.tracker.track_crops(frames, independent=independent)
        return TrackedFrames(frames, motion, np.zeros(len(frames), bool) if motion is None else motion.found)

    def embed(self, tracked: TrackedFrames, rows: np.ndarray | None = None) -> np.ndarray:
        """Return unit vectors (F, D) of the rows with a face; F is 0 without an embedder."""
        rows = np.arange(len(tracked.frames)) if rows is None else rows
        rows = rows[tracked.found[rows]]
        if self.embedder is None or tracked.motion is None or not len(rows):
            return np.zeros((0, 1), dtype=np.float32)
        points = tracked.motion.landmarks[rows][..., :2] * tracked.frames[0].shape[0]
        return self.embedder([tracked.frames[i] for i in rows], points)

    def score(self, result: TrackedFrames, truth: TrackedFrames, rows: np.ndarray, consecutive: np.ndarray, *,
              has_ground_truth: bool, source: TrackedFrames) -> Scores:  # fmt: skip
        """Return the metrics that apply to frames: `rows` (K,) one by one, `consecutive` (R,) for flicker and jitter.

        `truth` are the driver's frames without a ground truth. `source` is the photo.
        """
        scores = {"lost": float(1 - result.found[rows].mean())}
        if has_ground_truth:
            pairs = [(result.frames[i], truth.frames[i]) for i in rows]
            scores["psnr"] = float(np.mean([metrics.psnr(a, b) for a, b in pairs]))
            scores["ssim"] = float(np.mean([metrics.ssim(a, b) for a, b in pairs]))
            if self.perceptual is not None:
                scores[self.perceptual_name] = float(np.mean([self.perceptual(a, b) for a, b in pairs]))
            if len(consecutive):
                clips = (np.stack([tracked.frames[i] for i in consecutive]) for tracked in (result, truth))
                scores["flicker"] = metrics.flicker(*clips)
        scores |= self.identity(result, source, rows)
        return scores | _compare_faces(result, truth, rows, consecutive, has_ground_truth=has_ground_truth)

    def identity(self, tracked: TrackedFrames, source: TrackedFrames, rows: np.ndarray) -> Scores:
        """Return how near the rows with a face are to the photo `source`: CSIM, if there is an embedder, and AVD."""
        rows, scores = rows[tracked.found[rows]], Scores()
        if tracked.motion is not None and source.motion is not None and len(rows):
            scores["avd"] = metrics.vertex_distance(tracked.motion.select(rows), source.motion)
            if self.embedder is not None:
                scores["identity"] = float((self.embed(tracked, rows) @ self.embed(source)[0]).mean())
        return scores


def _compare_faces(result: TrackedFrames, truth: TrackedFrames, rows: np.ndarray, consecutive: np.ndarray, *,
                   has_ground_truth: bool) -> Scores:  # fmt: skip
    """Return the landmark metrics over frames where both have a face; distances only with a ground truth."""
    both = truth.found & result.found
    rows = rows[both[rows]]
    if truth.motion is None or result.motion is None or not len(rows):
        return {}
    beta, result_beta = truth.motion.beta[rows], result.motion.beta[rows]
    camera, result_camera = truth.motion.camera[rows], result.motion.camera[rows]
    (yaw, pitch, _), (result_yaw, result_pitch, _) = (yaw_pitch_roll(x).T for x in (camera, result_camera))
    scores = {"aed": metrics.mean_abs_difference(beta[:, :NUM_BLENDSHAPES], result_beta[:, :NUM_BLENDSHAPES])}
    scores["aucon"] = metrics.action_unit_consistency(beta, result_beta)
    eyes_open = np.maximum(beta[:, _BLINKS], result_beta[:, _BLINKS]).max(1) < MAX_BLINK_FOR_GAZE
    if eyes_open.any():
        irises = [b[eyes_open][:, _IRISES].reshape(-1, 2, 2) for b in (beta, result_beta)]
        scores["gaze_error"] = metrics.gaze_error(*map(metrics.gaze_direction, irises))
        scores["et"] = metrics.eye_tracking_error(*irises)
    if len(consecutive) and both[consecutive].all():
        landmarks = (tracked.landmarks[consecutive] for tracked in (result.motion, truth.motion))
        scores["jitter"] = metrics.excess_jitter(*landmarks)
    if has_ground_truth:  # another person's pose is followed relative to a frame, not copied
        scores["apd"] = metrics.mean_abs_difference(metrics.pose_vector(camera), metrics.pose_vector(result_camera))
        scores["prmse"] = metrics.pose_rmse(camera, result_camera)
        scores["yaw_error"] = metrics.mean_abs_difference(yaw, result_yaw)
        scores["pitch_error"] = metrics.mean_abs_difference(pitch, result_pitch)
        a, b = truth.motion.landmarks[rows], result.motion.landmarks[rows]
        scores["akd478"] = metrics.landmark_distance(a, b)
        scores["akd68"] = metrics.landmark_distance(a[:, IBUG68], b[:, IBUG68])
    for key, (names, min_std) in CORRELATED_SERIES.items():
        columns = [BETA_NAMES.index(name) for name in names]
        series = beta[:, columns].mean(1), result_beta[:, columns].mean(1)
        scores[key], scores[f"{key}_slope"] = metrics.correlation_and_slope(*series, min_std)
    scores["yaw"], scores["yaw_slope"] = metrics.correlation_and_slope(yaw, result_yaw, MIN_YAW_STD)
    return scores
