"""One-Euro smoothing of a driver's motion (Casiez et al. 2012): little jitter when still, little lag when moving.

Each signal passes a first-order low-pass filter whose cutoff frequency rises with the signal's speed. The filter is
causal and keeps one frame in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import head_pose, rotation_exp, rotation_log, with_head_pose

SmoothingLevel = Literal["off", "light", "strong"]


@dataclass(frozen=True)
class Cutoff:
    """Cutoff frequency in Hz: `min_cutoff` at rest, plus `speed_gain` times the speed in units per second."""

    min_cutoff: float
    speed_gain: float


@dataclass(frozen=True)
class SmoothingStrength:
    """Cutoffs of each kind of signal."""

    beta: Cutoff  # per entry; speed in coefficients per second
    rotation: Cutoff  # speed in radians per second
    centre: Cutoff  # of the head, per camera axis; speed in head-frame units per second


STRENGTHS: dict[str, SmoothingStrength] = {
    "light": SmoothingStrength(Cutoff(2.0, 6.0), Cutoff(1.2, 20.0), Cutoff(2.5, 50.0)),
    "strong": SmoothingStrength(Cutoff(0.8, 2.0), Cutoff(0.5, 8.0), Cutoff(1.0, 25.0)),
}
SPEED_CUTOFF_HZ = 2.0  # cutoff of the measured speed itself


class OneEuroFilter:
    """The filter of one signal. It takes changes and returns steps, so that rotation vectors can be filtered too.

    With `joint` the speed is the norm over all axes, so that no axis is special; else each entry has its own.
    """

    def __init__(self, cutoff: Cutoff, rate: float, *, joint: bool) -> None:
        self.cutoff, self.rate, self.joint = cutoff, rate, joint
        self._speed: np.ndarray | float = 0.0

    def step(self, change: np.ndarray, raw_change: np.ndarray) -> np.ndarray:
        """Return the step from the last output, given new input minus last output and new input minus last input."""
        self._speed = self._speed + _smoothing_factor(SPEED_CUTOFF_HZ, self.rate) * (
            raw_change * self.rate - self._speed
        )
        speed = np.linalg.norm(self._speed) if self.joint else np.abs(self._speed)
        return change * _smoothing_factor(self.cutoff.min_cutoff + self.cutoff.speed_gain * speed, self.rate)


def _smoothing_factor(cutoff: np.ndarray | float, rate: float) -> np.ndarray | float:
    """Return the weight of a new sample in a first-order low-pass filter."""
    omega = 2 * np.pi * cutoff / rate
    return omega / (omega + 1)


class _Signals(NamedTuple):
    """What is smoothed of one frame, float64."""

    beta: np.ndarray  # (64,)
    rotation: np.ndarray  # (3, 3), head to camera
    centre: np.ndarray  # (3,), of the head in the camera frame


class MotionSmoother:
    """Smooths beta and camera of a Motion given in parts; rows without a face repeat the last output."""

    def __init__(self, level: SmoothingLevel, fps: Fraction) -> None:
        self.level = level
        if level == "off":
            return
        strength, rate = STRENGTHS[level], float(fps)
        self._beta = OneEuroFilter(strength.beta, rate, joint=False)
        self._rotation = OneEuroFilter(strength.rotation, rate, joint=True)
        self._centre = OneEuroFilter(strength.centre, rate, joint=False)
        self._last_output: _Signals | None = None
        self._last_input: _Signals | None = None

    def __call__(self, motion: Motion) -> Motion:
        """Return the next frames, smoothed."""
        if self.level == "off":
            return motion
        rows = []
        for beta, camera, found in zip(motion.beta, motion.camera, motion.found, strict=True):
            if found or self._last_output is None:
                self._last_output = self._filter_frame(_Signals(beta.astype(np.float64), *head_pose(camera)))
            rows.append(self._last_output)
        beta, rotation, centre = (np.stack(column) for column in zip(*rows, strict=True))
        return replace(motion, beta=beta.astype(np.float32), camera=with_head_pose(motion.camera, rotation, centre))

    def _filter_frame(self, new: _Signals) -> _Signals:
        output, previous, self._last_input = self._last_output, self._last_input, new
        if output is None or previous is None:
            return new
        rotation_change = rotation_log(output.rotation.T @ new.rotation)
        rotation_step = self._rotation.step(rotation_change, rotation_log(previous.rotation.T @ new.rotation))
        return _Signals(
            output.beta + self._beta.step(new.beta - output.beta, new.beta - previous.beta),
            output.rotation @ rotation_exp(rotation_step),
            output.centre + self._centre.step(new.centre - output.centre, new.centre - previous.centre),
        )
