"""One result beside the truth: what the pictures, the landmarker and a face embedder say. The ruler of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from export3d_cli.core.evaluation import metrics
from export3d_cli.core.evaluation.face_embedding import Embedder
from export3d_cli.core.face.motion import BETA_NAMES, Motion, Tracker
from export3d_cli.core.runtime.camera import Camera

Frames = list[np.ndarray]  # uint8 (H, W, 3) each
Scores = dict[str, float]  # by names of `metrics.METRICS`
Perceptual = Callable[[Frames, Frames], float]
ARKIT = 52  # the first entries of beta are blendshapes
SHUT = 0.5  # an eye that blinks more shows too little of its iris
# What must move in the driver for its correlation to count, and by how much (standard deviation).
SERIES = {
    "jaw": (("jawOpen",), 0.03),
    "blink": (("eyeBlinkLeft", "eyeBlinkRight"), 0.05),
    "smile": (("mouthSmileLeft", "mouthSmileRight"), 0.05),
    "yaw": ((), 0.7),  # degrees
}
_BLINKS = [BETA_NAMES.index(f"eyeBlink{side}") for side in ("Left", "Right")]
_IRISES = [BETA_NAMES.index(name) for name in ("irisXLeft", "irisYLeft", "irisXRight", "irisYRight")]


@dataclass(frozen=True)
class Tracked:
    """What the landmarker sees in frames; no motion where it sees no face at all."""

    frames: Frames
    motion: Motion | None
    found: np.ndarray  # (T,) bool


@dataclass(frozen=True)
class Sample:
    """Which of the frames made count: rows for the metrics of single frames, and consecutive ones for steadiness."""

    rows: np.ndarray  # (K,) int
    run: np.ndarray  # (R,) int; empty where fewer than three consecutive frames are known


@dataclass(frozen=True)
class Ruler:
    """What measures."""

    tracker: Tracker
    embedder: Embedder | None = None
    perceptual: Perceptual | None = None
    perceptual_name: str = ""  # its column

    def track(self, frames: Frames, *, apart: bool = False) -> Tracked:
        """The face in square frames; `apart`: frames that do not follow each other."""
        motion = self.tracker.read(frames, apart=apart)
        return Tracked(frames, motion, np.zeros(len(frames), bool) if motion is None else motion.found)

    def embed(self, tracked: Tracked, rows: np.ndarray) -> np.ndarray:
        """Unit vectors (F, D) of those of the rows that show a face; F = 0 without an embedder too."""
        rows = rows[tracked.found[rows]]
        if self.embedder is None or tracked.motion is None or not len(rows):
            return np.zeros((0, 1), dtype=np.float32)
        points = tracked.motion.landmarks[rows][..., :2] * tracked.frames[0].shape[0]
        return self.embedder([tracked.frames[i] for i in rows], points)

    def score(
        self, result: Tracked, truth: Tracked, sample: Sample, *, known: bool, face: np.ndarray | None = None
    ) -> Scores:
        """Every metric but those of novel views; NaN where one cannot be told.

        Args:
            result: what was made.
            truth: the driver's frames; or, if `known`, what should have come out.
            sample: which frames count.
            known: whether `truth` shows the source's own head.
            face: embedding (1, D) of the source.
        """
        rows, run = sample.rows, sample.run
        scores = dict.fromkeys(metrics.METRICS, float("nan"))
        scores["lost"] = float(1 - result.found[rows].mean())
        if known:
            pairs = [(result.frames[i], truth.frames[i]) for i in rows]
            scores["psnr"] = float(np.mean([metrics.psnr(a, b) for a, b in pairs]))
            scores["ssim"] = float(np.mean([metrics.ssim(a, b) for a, b in pairs]))
            if self.perceptual is not None:
                scores[self.perceptual_name] = self.perceptual([a for a, _ in pairs], [b for _, b in pairs])
            if len(run):
                scores["flicker"] = metrics.flicker(*(np.stack([x.frames[i] for i in run]) for x in (result, truth)))
        others = self.embed(result, rows)
        if face is not None and len(face) and len(others):
            scores["identity"] = float((others @ face[0]).mean())
        return scores | _compare_faces(result, truth, sample, known=known)

    def score_views(self, views: Tracked, cameras: np.ndarray, face: np.ndarray | None) -> list[Scores]:
        """`view_pose`, `view_identity` and `view_lost` of each novel view, asked for by cameras (V, 25)."""
        found, scores = views.found, []
        turns = np.zeros(len(found)) if views.motion is None else metrics.turn_between(views.motion.camera, cameras)
        for i in range(len(found)):
            other = self.embed(views, np.array([i]))
            known = face is not None and len(face) and len(other)
            scores.append({
                "view_pose": float(turns[i]) if found[i] else float("nan"),
                "view_identity": float(other[0] @ face[0]) if known and face is not None else float("nan"),
                "view_lost": float(not found[i]),
            })  # fmt: skip
        return scores


def angles(camera: np.ndarray) -> np.ndarray:
    """Yaw and pitch of cameras (T, 25) in degrees, (T, 2)."""
    return np.array([Camera.from_vector(row).angles()[:2] for row in camera])


def _compare_faces(result: Tracked, truth: Tracked, sample: Sample, *, known: bool) -> Scores:
    """Metrics of the landmarks, where both have a face; of another head only what can be expected to agree."""
    both = truth.found & result.found
    rows, run = sample.rows[both[sample.rows]], sample.run
    if truth.motion is None or result.motion is None or not len(rows):
        return {}
    beta, other = truth.motion.beta[rows], result.motion.beta[rows]
    camera, other_camera = truth.motion.camera[rows], result.motion.camera[rows]
    turned, other_turned = angles(camera), angles(other_camera)
    scores = {
        "aed": metrics.mean_difference(beta[:, :ARKIT], other[:, :ARKIT]),
        "apd": metrics.mean_difference(metrics.pose_numbers(camera), metrics.pose_numbers(other_camera)),
        "yaw_error": metrics.mean_difference(turned[:, 0], other_turned[:, 0]),
        "pitch_error": metrics.mean_difference(turned[:, 1], other_turned[:, 1]),
    }
    seeing = (beta[:, _BLINKS].max(1) < SHUT) & (other[:, _BLINKS].max(1) < SHUT)
    if seeing.any():
        sight = [metrics.gaze(b[seeing][:, _IRISES].reshape(-1, 2, 2)) for b in (beta, other)]
        scores["gaze_error"] = metrics.gaze_error(*sight)
    if len(run) and both[run].all():
        scores["jitter"] = metrics.jitter(result.motion.landmarks[run], truth.motion.landmarks[run])
    if known:
        a, b = truth.motion.landmarks[rows], result.motion.landmarks[rows]
        scores["akd478"] = metrics.landmark_distance(a, b)
        scores["akd68"] = metrics.landmark_distance(a, b, metrics.IBUG68)
    for key, (names, least) in SERIES.items():
        columns = [BETA_NAMES.index(name) for name in names]
        a, b = (beta[:, columns].mean(1), other[:, columns].mean(1)) if names else (turned[:, 0], other_turned[:, 0])
        scores[key] = metrics.correlation(a, b, least)
    return scores
