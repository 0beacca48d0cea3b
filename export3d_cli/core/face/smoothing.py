"""One-Euro smoothing of a driver's motion (Casiez et al. 2012): steady when the face is still, prompt when it moves.

Each signal is a low-pass filter of first order whose cut-off frequency rises with the signal's own speed. It looks at
no frame to come and keeps one frame in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import head_pose, rotation_exp, rotation_log, with_head_pose

SmoothingLevel = Literal["off", "light", "strong"]


@dataclass(frozen=True)
class Cutoff:
    """Cut-off in Hz: `rest` of a signal that stands still, and `gain` more for each unit of speed per second."""

    min_cutoff: float
    speed_gain: float


@dataclass(frozen=True)
class SmoothingStrength:
    """How much each kind of signal is smoothed."""

    beta: Cutoff  # each entry; coefficients a second
    rotation: Cutoff  # radians a second
    centre: Cutoff  # of the head, each camera axis; head-frame units a second


STRENGTHS: dict[str, SmoothingStrength] = {
    "light": SmoothingStrength(Cutoff(2.0, 6.0), Cutoff(1.2, 20.0), Cutoff(2.5, 50.0)),
    "strong": SmoothingStrength(Cutoff(0.8, 2.0), Cutoff(0.5, 8.0), Cutoff(1.0, 25.0)),
}
SPEED_CUTOFF_HZ = 2.0  # Hz: how fast the measured speed itself follows


class OneEuroFilter:
    """The filter of one signal, fed its change since the last output; the caller adds the step that it returns.

    So a rotation is filtered like a vector: its change is a rotation vector.
    """

    def __init__(self, cutoff: Cutoff, rate: float, *, joint: bool) -> None:
        self.cutoff, self.rate, self.joint = cutoff, rate, joint
        self._speed: np.ndarray | float = 0.0

    def step(self, change: np.ndarray, raw_change: np.ndarray) -> np.ndarray:
        """Part of `change` (new input minus last output) to take; `raw_change` is new input minus last input."""
        self._speed = self._speed + _smoothing_factor(SPEED_CUTOFF_HZ, self.rate) * (
            raw_change * self.rate - self._speed
        )
        speed = np.linalg.norm(self._speed) if self.joint else np.abs(self._speed)  # joint: no axis is special
        return change * _smoothing_factor(self.cutoff.min_cutoff + self.cutoff.speed_gain * speed, self.rate)


def _smoothing_factor(cutoff: np.ndarray | float, rate: float) -> np.ndarray | float:
    """What a first-order low-pass filter takes of a new sample."""
    turn = 2 * np.pi * cutoff / rate
    return turn / (turn + 1)


class MotionSmoother:
    """Smooths the beta and camera of Motion given a part at a time; rows without a face repeat the last output."""

    def __init__(self, level: SmoothingLevel, fps: Fraction) -> None:
        self.level = level
        if level == "off":
            return
        strength, rate = STRENGTHS[level], float(fps)
        self._beta = OneEuroFilter(strength.beta, rate, joint=False)
        self._rotation = OneEuroFilter(strength.rotation, rate, joint=True)
        self._centre = OneEuroFilter(strength.centre, rate, joint=False)
        self._last_output: tuple[np.ndarray, np.ndarray, np.ndarray] | None = (
            None  # beta, rotation, centre of the last frame
        )
        self._last_input: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __call__(self, motion: Motion) -> Motion:
        """The next frames, smoothed."""
        if self.level == "off":
            return motion
        rows = []
        for beta, camera, found in zip(motion.beta, motion.camera, motion.found, strict=True):
            if found or self._last_output is None:
                self._filter_frame((beta.astype(np.float64), *head_pose(camera)))
            assert self._last_output is not None
            rows.append(self._last_output)
        beta, rotation, centre = (np.stack(column) for column in zip(*rows, strict=True))
        return replace(motion, beta=beta.astype(np.float32), camera=with_head_pose(motion.camera, rotation, centre))

    def _filter_frame(self, new: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        if self._last_output is None or self._last_input is None:
            self._last_output = self._last_input = new
            return
        beta, rotation, centre = self._last_output
        was_beta, was_rotation, was_centre = self._last_input
        self._last_input = new
        turned = rotation_log(rotation.T @ new[1])
        self._last_output = (
            beta + self._beta.step(new[0] - beta, new[0] - was_beta),
            rotation @ rotation_exp(self._rotation.step(turned, rotation_log(was_rotation.T @ new[1]))),
            centre + self._centre.step(new[2] - centre, new[2] - was_centre),
        )
