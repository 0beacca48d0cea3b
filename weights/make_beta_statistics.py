"""Make `beta_statistics.npz`: mean and covariance of beta over tracked clips.

python weights/make_beta_statistics.py weights/beta_statistics.npz DATASET/clips/*.motion.npz
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import yaw_pitch_roll

MAX_TURN_DEG = 30  # yaw and pitch of the frames that count; beyond, the tracker guesses the far side


def measure(motions: Iterable[Motion]) -> dict[str, np.ndarray]:
    """Return the mean (64,) over frames with a face seen from the front, and the covariance (64, 64) within clips."""
    n = len(BETA_NAMES)
    total, count, scatter = np.zeros(n), 0, np.zeros((n, n))
    for motion in motions:
        turns = np.abs([yaw_pitch_roll(camera)[:2] for camera in motion.camera])
        beta = motion.beta[motion.found & (turns <= MAX_TURN_DEG).all(1)].astype(np.float64)
        if len(beta):
            centred = beta - beta.mean(0)
            scatter += centred.T @ centred
            total, count = total + beta.sum(0), count + len(beta)
    return {"mean": (total / count).astype(np.float32), "covariance": (scatter / count).astype(np.float32)}


if __name__ == "__main__":
    np.savez(Path(sys.argv[1]), **measure(Motion.load(Path(name)) for name in sys.argv[2:]))
