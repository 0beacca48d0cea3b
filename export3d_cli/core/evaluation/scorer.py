"""One result beside the truth: what the pictures, the landmarker and a face embedder say. The ruler of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from export3d_cli.core.evaluation import metrics
from export3d_cli.core.evaluation.face_embedding import Embedder
from export3d_cli.core.face.beta import BETA_NAMES
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import Camera

Frames = list[np.ndarray]  # uint8 (H, W, 3) each
Scores = dict[str, float]  # by names of `metrics.METRICS`
PerceptualDistance = Callable[[Frames, Frames], float]
NUM_BLENDSHAPES = 52  # the first entries of beta are blendshapes
MAX_BLINK_FOR_GAZE = 0.5  # an eye that blinks more shows too little of its iris
# What must move in the driver for its correlation to count, and by how much (standard deviation).
CORRELATED_SERIES = {
    "jaw": (("jawOpen",), 0.03),
    "blink": (("eyeBlinkLeft", "eyeBlinkRight"), 0.05),
    "smile": (("mouthSmileLeft", "mouthSmileRight"), 0.05),
    "yaw": ((), 0.7),  # degrees
}
_BLINKS = [BETA_NAMES.index(f"eyeBlink{side}") for side in ("Left", "Right")]
_IRISES = [BETA_NAMES.index(name) for name in ("irisXLeft", "irisYLeft", "irisXRight", "irisYRight")]


@dataclass(frozen=True)
class TrackedFrames:
    """What the landmarker sees in frames; no motion where it sees no face at all."""

    frames: Frames
    motion: Motion | None
    found: np.ndarray  # (T,) bool


@dataclass(frozen=True)
class FrameSample:
    """Which of the frames made count: rows for the metrics of single frames, and consecutive ones for steadiness."""

    rows: np.ndarray  # (K,) int
    consecutive: np.ndarray  # (R,) int; empty where fewer than three consecutive frames are known


@dataclass(frozen=True)
class MetricSuite:
    """What measures."""

    tracker: LandmarkerTracker
    embedder: Embedder | None = None
    perceptual: PerceptualDistance | None = None
    perceptual_name: str = ""  # its column

    def track(self, frames: Frames, *, independent: bool = False) -> TrackedFrames:
        """The face in square frames; `apart`: frames that do not follow each other."""
        motion = self.tracker.track_crops(frames, independent=independent)
        return TrackedFrames(frames, motion, np.zeros(len(frames), bool) if motion is None else motion.found)

    def embed(self, tracked: TrackedFrames, rows: np.ndarray) -> np.ndarray:
        """Unit vectors (F, D) of those of the rows that show a face; F = 0 without an embedder too."""
        rows = rows[tracked.found[rows]]
        if self.embedder is None or tracked.motion is None or not len(rows):
            return np.zeros((0, 1), dtype=np.float32)
        points = tracked.motion.landmarks[rows][..., :2] * tracked.frames[0].shape[0]
        return self.embedder([tracked.frames[i] for i in rows], points)

    def score(
        self,
        result: TrackedFrames,
        truth: TrackedFrames,
        sample: FrameSample,
        *,
        has_ground_truth: bool,
        source_embedding: np.ndarray | None = None,
    ) -> Scores:
        """Every metric but those of novel views; NaN where one cannot be told.

        Args:
            result: what was made.
            truth: the driver's frames; or, if `known`, what should have come out.
            sample: which frames count.
            known: whether `truth` shows the source's own head.
            face: embedding (1, D) of the source.
        """
        rows, run = sample.rows, sample.consecutive
        scores = dict.fromkeys(metrics.METRICS, float("nan"))
        scores["lost"] = float(1 - result.found[rows].mean())
        if has_ground_truth:
            pairs = [(result.frames[i], truth.frames[i]) for i in rows]
            scores["psnr"] = float(np.mean([metrics.psnr(a, b) for a, b in pairs]))
            scores["ssim"] = float(np.mean([metrics.ssim(a, b) for a, b in pairs]))
            if self.perceptual is not None:
                scores[self.perceptual_name] = self.perceptual([a for a, _ in pairs], [b for _, b in pairs])
            if len(run):
                scores["flicker"] = metrics.flicker(*(np.stack([x.frames[i] for i in run]) for x in (result, truth)))
        others = self.embed(result, rows)
        if source_embedding is not None and len(source_embedding) and len(others):
            scores["identity"] = float((others @ source_embedding[0]).mean())
        return scores | _compare_faces(result, truth, sample, has_ground_truth=has_ground_truth)

    def score_views(
        self, views: TrackedFrames, cameras: np.ndarray, source_embedding: np.ndarray | None
    ) -> list[Scores]:
        """`view_pose`, `view_identity` and `view_lost` of each novel view, asked for by cameras (V, 25)."""
        found, scores = views.found, []
        turns = np.zeros(len(found)) if views.motion is None else metrics.rotation_angle(views.motion.camera, cameras)
        for i in range(len(found)):
            other = self.embed(views, np.array([i]))
            known = source_embedding is not None and len(source_embedding) and len(other)
            scores.append({
                "view_pose": float(turns[i]) if found[i] else float("nan"),
                "view_identity": float(other[0] @ source_embedding[0]) if known and source_embedding is not None else float("nan"),
                "view_lost": float(not found[i]),
            })  # fmt: skip
        return scores


def yaw_pitch(camera: np.ndarray) -> np.ndarray:
    """Yaw and pitch of cameras (T, 25) in degrees, (T, 2)."""
    return np.array([Camera.from_vector(row).angles()[:2] for row in camera])


def _compare_faces(
    result: TrackedFrames, truth: TrackedFrames, sample: FrameSample, *, has_ground_truth: bool
) -> Scores:
    """Metrics of the landmarks, where both have a face; of another head only what can be expected to agree."""
    both = truth.found & result.found
    rows, run = sample.rows[both[sample.rows]], sample.consecutive
    if truth.motion is None or result.motion is None or not len(rows):
        return {}
    beta, other = truth.motion.beta[rows], result.motion.beta[rows]
    camera, other_camera = truth.motion.camera[rows], result.motion.camera[rows]
    turned, other_turned = yaw_pitch(camera), yaw_pitch(other_camera)
    scores = {
        "aed": metrics.mean_abs_difference(beta[:, :NUM_BLENDSHAPES], other[:, :NUM_BLENDSHAPES]),
        "apd": metrics.mean_abs_difference(metrics.pose_vector(camera), metrics.pose_vector(other_camera)),
        "yaw_error": metrics.mean_abs_difference(turned[:, 0], other_turned[:, 0]),
        "pitch_error": metrics.mean_abs_difference(turned[:, 1], other_turned[:, 1]),
    }
    seeing = (beta[:, _BLINKS].max(1) < MAX_BLINK_FOR_GAZE) & (other[:, _BLINKS].max(1) < MAX_BLINK_FOR_GAZE)
    if seeing.any():
        sight = [metrics.gaze_direction(b[seeing][:, _IRISES].reshape(-1, 2, 2)) for b in (beta, other)]
        scores["gaze_error"] = metrics.gaze_error(*sight)
    if len(run) and both[run].all():
        scores["jitter"] = metrics.excess_jitter(result.motion.landmarks[run], truth.motion.landmarks[run])
    if has_ground_truth:
        a, b = truth.motion.landmarks[rows], result.motion.landmarks[rows]
        scores["akd478"] = metrics.landmark_distance(a, b)
        scores["akd68"] = metrics.landmark_distance(a, b, metrics.IBUG68)
    for key, (names, least) in CORRELATED_SERIES.items():
        columns = [BETA_NAMES.index(name) for name in names]
        a, b = (beta[:, columns].mean(1), other[:, columns].mean(1)) if names else (turned[:, 0], other_turned[:, 0])
        scores[key] = metrics.correlation(a, b, least)
    return scores
