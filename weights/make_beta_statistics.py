"""Make `beta_statistics.npz`: how beta, and the landmarks with it, vary in tracked clips.

python weights/make_beta_statistics.py weights/beta_statistics.npz DATASET/clips/*.motion.npz
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from export3d_cli.core.face.expression_coefficients import REGIONS
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.landmarks import (
    EYELID_FOLDS,
    LEFT_EYE,
    LEFT_IRIS,
    MEASURE_POINTS,
    NOSE_BASE,
    RIGHT_EYE,
    RIGHT_IRIS,
)
from export3d_cli.core.face.motion import MIRROR_ORDER, Motion
from export3d_cli.core.runtime.camera import yaw_pitch_roll

MAX_TURN_DEG = 30  # yaw and pitch of the frames that count; beyond, the tracker guesses the far side
NUM_MODES = 20  # of the landmarks' motion
RIDGE = 0.1  # of their regression on beta, in standard deviations
MIN_STD = 0.01  # added to those of beta
EYES = sum((RIGHT_EYE, LEFT_EYE, RIGHT_IRIS, LEFT_IRIS, *EYELID_FOLDS), ())  # which the modes do not move


def measure(motions: Iterable[Motion]) -> dict[str, np.ndarray]:
    """Return the arrays of `BetaStatistics`, over frames with a face seen from the front.

    Covariance and modes are within clips; landmarks are in inter-ocular distances.
    """
    betas, means, landmarks = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for motion in motions:
        turns = np.abs([yaw_pitch_roll(camera)[:2] for camera in motion.camera])
        motion = motion.select(np.flatnonzero(motion.found & (turns <= MAX_TURN_DEG).all(1)))
        if len(motion):
            beta, points = motion.beta.astype(np.float64), motion.head_landmarks.astype(np.float64)
            left, right = (points[:, list(corners)].mean((0, 1)) for corners in MEASURE_POINTS.eye_corners)
            means.append(beta)
            betas.append(beta - beta.mean(0))
            landmarks.append((points - points.mean(0)) / np.linalg.norm(left - right))
    centred, moved = np.concatenate(betas), np.concatenate(landmarks)
    covariance = centred.T @ centred / len(centred)
    modes, slopes = landmark_modes(covariance, np.tensordot(centred.T, moved, 1) / len(centred))
    return {"mean": np.concatenate(means).mean(0).astype(np.float32), "covariance": covariance.astype(np.float32),
            "modes": modes.astype(np.float16), "slopes": slopes.astype(np.float32)}  # fmt: skip


def landmark_modes(covariance: np.ndarray, joint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return orthonormal modes (K, 478, 3) and slopes (64, K) from the covariance with landmarks (64, 478, 3).

    Brows move landmarks above the eyes, the mouth those below them, alike on both sides of the face.
    """
    std = np.sqrt(covariance.diagonal()) + MIN_STD
    scaled = covariance / np.outer(std, std) + RIDGE * np.eye(len(std))
    motion = np.linalg.solve(scaled, (joint / std[:, None, None]).reshape(len(std), -1)).reshape(joint.shape)
    motion = (motion + motion[np.ix_(MIRROR_ORDER, load_canonical_face().mirror)] * (-1, 1, 1)) / 2
    height = load_canonical_face().points[:, 1]  # downwards
    eyes, nose = height[list(EYES)].mean(), height[NOSE_BASE]
    below = ((height - eyes) / (nose - eyes) * 2).clip(0, 1)[:, None]  # 0 above the eyes, 1 from half the nose on
    motion[list(REGIONS["mouth"])] *= below
    motion[list(REGIONS["brows"])] *= 1 - below
    motion[[*REGIONS["eyes"], *REGIONS["gaze"]]] = 0
    motion[:, list(EYES)] = 0
    u, s, vt = np.linalg.svd(motion.reshape(len(std), -1), full_matrices=False)
    print(f"{NUM_MODES} modes hold {(s[:NUM_MODES] ** 2).sum() / (s**2).sum():.3f} of the motion")
    slopes = u[:, :NUM_MODES] * s[:NUM_MODES] / std[:, None]
    return vt[:NUM_MODES].reshape(NUM_MODES, *joint.shape[1:]), slopes


if __name__ == "__main__":
    np.savez(Path(sys.argv[1]), **measure(Motion.load(Path(name)) for name in sys.argv[2:]))
