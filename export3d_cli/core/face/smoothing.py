"""Smoothing of a driver's motion, in parts and in constant memory.

A driver that is a file is known ahead: each frame becomes a weighted mean of the frames before and after it, so nothing
lags. The weights are those of a bilateral filter (Tomasi and Manduchi 1998) in time: they fall with the distance in
time and with the change of the signal. Jitter is averaged; a blink, far larger than jitter, keeps its height.

A live source has no next frame. The causal One-Euro filter (Casiez et al. 2012) is for such sources: a first-order
low-pass filter whose cutoff frequency rises with the signal's speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import head_pose, rotation_exp, rotation_log, with_head_pose

SmoothingLevel = Literal["off", "light", "strong"]


# Standard deviations of the bilateral weights: in time, seconds, and in change, multiples of `*_CHANGE`.
KERNELS: dict[SmoothingLevel, tuple[float, float]] = {"light": (0.06, 1.0), "strong": (0.12, 2.5)}
KERNEL_REACH = 2.5  # standard deviations in time at which the kernel ends
# Changes three to five times as large as the jitter of tracked faces.
_FINE_MEASURES = ("eyeOpening", "iris")  # entries of beta with a tenth of the others' range
BETA_CHANGE = np.array([0.008 if name.startswith(_FINE_MEASURES) else 0.03 for name in BETA_NAMES])
ROTATION_CHANGE = 0.015  # radians
CENTRE_CHANGE = np.array([0.0015, 0.0015, 0.012])  # of the head in the camera frame, head-frame units
TORSO_CHANGE = np.array([0.002, 0.002, 0.005, 0.004])  # of the torso, see `Motion`
LANDMARK_CHANGE = 0.0015  # head-frame units


# Cutoff frequencies of beta, rotation, centre, torso and landmarks in Hz: at rest, and the addition per unit of speed
# (coefficients, radians or head-frame units per second).
ONE_EURO_CUTOFFS: dict[SmoothingLevel, tuple[tuple[float, float], ...]] = {
    "light": ((2.0, 6.0), (1.2, 20.0), (2.5, 50.0), (2.5, 50.0), (2.5, 50.0)),
    "strong": ((0.8, 2.0), (0.5, 8.0), (1.0, 25.0), (1.0, 25.0), (1.0, 25.0)),
}
SPEED_CUTOFF_HZ = 2.0  # cutoff of the measured speed itself


class _Signals(NamedTuple):
    """What is smoothed, of one frame or of T frames, float64."""

    beta: np.ndarray  # (..., 64)
    rotation: np.ndarray  # (..., 3, 3), head to camera
    centre: np.ndarray  # (..., 3), of the head in the camera frame
    torso: np.ndarray  # (..., 4)
    face: np.ndarray  # (..., N, 3) landmarks in the head frame; N is 478, or 0 for drivers without them

    @classmethod
    def of(cls, motion: Motion) -> _Signals:
        """Return the signals of T frames."""
        beta, torso, face = (x.astype(np.float64) for x in (motion.beta, motion.torso, motion.head_landmarks))
        return cls(beta, *head_pose(motion.camera), torso, face)

    def changes_to(self, other: _Signals) -> tuple[np.ndarray, ...]:
        """Return the differences; that of rotations is a rotation vector."""
        rotation = rotation_log(np.swapaxes(self.rotation, -1, -2) @ other.rotation)
        rest = (other.centre - self.centre, other.torso - self.torso, other.face - self.face)
        return other.beta - self.beta, rotation, *rest

    def moved_by(self, *steps: np.ndarray) -> _Signals:
        """Add steps like those of `changes_to`."""
        beta, rotation, centre, torso, face = steps
        turned = self.rotation @ rotation_exp(rotation)
        return _Signals(self.beta + beta, turned, self.centre + centre, self.torso + torso, self.face + face)


def smooth_stream(motions: Iterable[Motion], level: SmoothingLevel, *, causal: bool = False) -> Iterator[Motion]:
    """Smooth beta, camera and landmarks of one shot that is given in parts; the rows come back in order.

    Rows without a face repeat the last output, and the filter restarts after them. With `causal`, for a live source, no
    later frame is used, and each part may have a rate of its own.
    """
    if level == "off":
        yield from motions
    elif causal:
        yield from _smooth_causal(motions, level)
    else:
        yield from _smooth_bilateral(motions, KERNELS[level])


def _smooth_bilateral(motions: Iterable[Motion], kernel: tuple[float, float]) -> Iterator[Motion]:
    window: Motion | None = None  # rows to smooth, between the rows that their kernels reach
    first = 0  # first row to smooth
    last: _Signals | None = None  # last output
    for motion in motions:
        window = motion if window is None else Motion.concatenate([window, motion])
        reach = int(KERNEL_REACH * kernel[0] * window.fps)
        ready = slice(first, len(window) - reach)
        if ready.start < ready.stop:
            smoothed, last = _smooth_rows(window, ready, kernel, last)
            yield smoothed
            drop = max(0, ready.stop - reach)
            window, first = window.select(np.arange(drop, len(window))), ready.stop - drop
    if window is not None and first < len(window):
        yield _smooth_rows(window, slice(first, len(window)), kernel, last)[0]


def _smooth_rows(window: Motion, rows: slice, kernel: tuple[float, float],
                 last: _Signals | None) -> tuple[Motion, _Signals]:  # fmt: skip
    """Smooth some rows of a window that holds all rows they depend on; `last` is the output before them."""
    signals = _Signals.of(window)
    own = _Signals(*(signal[rows] for signal in signals))
    run = np.cumsum(~window.found)  # rows without a face separate runs
    index = np.arange(rows.start, rows.stop)
    steps = [np.zeros_like(x) for x in (own.beta, own.centre, own.centre, own.torso, own.face)]
    weights = [np.ones_like(x) for x in (own.beta, own.centre[:, :1], own.centre, own.torso, own.face[..., :1])]
    sd_time, sd_change = kernel
    reach = int(KERNEL_REACH * sd_time * window.fps)
    for offset in [*range(-reach, 0), *range(1, reach + 1)]:
        other = (index + offset).clip(0, len(window) - 1)
        valid = window.found[other] & (other == index + offset) & (run[other] == run[index])
        weight_in_time = valid * np.exp(-0.5 * (offset / (sd_time * float(window.fps))) ** 2)
        changes = own.changes_to(_Signals(*(signal[other] for signal in signals)))
        sizes = (
            changes[0] / BETA_CHANGE,
            np.linalg.norm(changes[1], axis=1, keepdims=True) / ROTATION_CHANGE,
            changes[2] / CENTRE_CHANGE,
            changes[3] / TORSO_CHANGE,
            np.linalg.norm(changes[4], axis=-1, keepdims=True) / LANDMARK_CHANGE,
        )
        for total, step, change, size in zip(weights, steps, changes, sizes, strict=True):
            weight = weight_in_time.reshape(-1, *[1] * (size.ndim - 1)) * np.exp(-0.5 * (size / sd_change) ** 2)
            total += np.nan_to_num(weight)  # a torso that is not seen
            step += np.nan_to_num(weight * change)
    smoothed = own.moved_by(*(step / total for step, total in zip(steps, weights, strict=True)))
    return _hold_missing(window.select(index), smoothed, last)


def _hold_missing(motion: Motion, smoothed: _Signals, last: _Signals | None) -> tuple[Motion, _Signals]:
    """Return the motion with smoothed signals, rows without a face repeating the last output, and its last output."""
    if last is not None:
        smoothed = _Signals(*(np.concatenate([a[None], b]) for a, b in zip(last, smoothed, strict=True)))
    before = 0 if last is None else 1
    found = np.concatenate([np.ones(before, bool), motion.found])
    source = np.maximum.accumulate(np.where(found, np.arange(len(found)), 0))
    held = _Signals(*(signal[source] for signal in smoothed))
    camera = with_head_pose(motion.camera, held.rotation[before:], held.centre[before:])
    beta, torso = (x[before:].astype(np.float32) for x in (held.beta, held.torso))
    output = replace(motion, beta=beta, torso=torso).with_head(camera, held.face[before:])
    return output, _Signals(*(signal[-1] for signal in held))


def _smooth_causal(motions: Iterable[Motion], level: SmoothingLevel) -> Iterator[Motion]:
    """Apply a One-Euro filter to each signal; the filters restart after a frame without a face."""
    cutoffs = ONE_EURO_CUTOFFS[level]
    previous: _Signals | None = None  # signals of the frame before, unless it had no face
    output: _Signals | None = None  # their filtered values
    last: _Signals | None = None  # output of the last frame with a face
    for motion in motions:
        signals = _Signals.of(motion)
        rate, rows = float(motion.fps), list[_Signals]()
        for *row, found in zip(*signals, motion.found, strict=True):
            new = _Signals(*row)
            if previous is None or output is None or not found:
                output, speeds = new, [np.zeros(1)] * len(cutoffs)
            else:
                steps, changes = [], zip(output.changes_to(new), previous.changes_to(new), strict=True)
                for k, (change, raw_change) in enumerate(changes):
                    speeds[k] = speeds[k] + _smoothing_factor(SPEED_CUTOFF_HZ, rate) * (raw_change * rate - speeds[k])
                    # no axis of a rotation is special
                    speed = np.linalg.norm(speeds[k]) if k == 1 else np.abs(speeds[k])
                    steps.append(change * _smoothing_factor(cutoffs[k][0] + cutoffs[k][1] * speed, rate))
                output = output.moved_by(*steps)
            previous = new if found else None
            rows.append(output)
        smoothed, last = _hold_missing(motion, _Signals(*map(np.stack, zip(*rows, strict=True))), last)
        yield smoothed


def _smoothing_factor(cutoff: Any, rate: float) -> Any:
    """Return the weight of a new sample in a first-order low-pass filter."""
    omega = 2 * np.pi * cutoff / rate
    return omega / (omega + 1)
