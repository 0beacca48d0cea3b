"""Smoothing of known signals: less jitter, no lag, full blinks, and no change where nothing moves."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest

from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.smoothing import SmoothingLevel, smooth_stream
from export3d_cli.core.runtime.camera import head_pose, orbit_camera, rotation_exp, rotation_log, with_head_pose

NOISE = {"beta": 0.01, "turn": 0.0026, "centre": np.array([3e-4, 4e-4, 3e-3])}  # standard deviations of the tracker
FPS = Fraction(25)


class Track(NamedTuple):
    beta: np.ndarray  # (T, 64)
    turn: np.ndarray  # (T, 3) rotation vector of the head
    centre: np.ndarray  # (T, 3)


def speaking(t: np.ndarray) -> Track:
    """Return a speaking face: jaw at 3 Hz, one blink per second, the head turning and swaying."""
    beta = np.full((len(t), 64), 0.2)
    beta[:, 24] = 0.25 + 0.25 * np.sin(2 * np.pi * 3 * t)
    beta[:, 8] = np.exp(-(((t % 1.0 - 0.5) / 0.07) ** 2))
    turn = np.stack([0.15 * np.sin(2.4 * t), 0.35 * np.sin(1.7 * t), 0.08 * np.sin(1.1 * t)], axis=1)
    centre = np.stack([0.06 * np.sin(1.7 * t), 0.05 * np.sin(2.4 * t), 2.7 + 0.25 * np.sin(1.3 * t)], axis=1)
    return Track(beta, turn, centre)


def motion_of(track: Track, fps: Fraction = FPS) -> Motion:
    T = len(track.beta)
    cameras = np.repeat(orbit_camera(0)[None], T, axis=0)
    cameras = with_head_pose(cameras, rotation_exp(track.turn), track.centre)
    points = np.zeros((T, 0, 3), np.float32)
    return Motion(track.beta.astype(np.float32), cameras, points, np.ones(T, bool), fps, (0.0, 0.0, 1.0), (1, 1))


def track_of(motion: Motion) -> Track:
    rotation, centre = head_pose(motion.camera)
    return Track(motion.beta.astype(float), rotation_log(rotation), centre)


def smooth_motion(motion: Motion, level: SmoothingLevel, *, causal: bool = False) -> Motion:
    return Motion.concatenate(list(smooth_stream([motion], level, causal=causal)))


def noisy(track: Track, seed: int = 0) -> Track:
    rng = np.random.default_rng(seed)
    return Track(*(np.asarray(x + NOISE[k] * rng.standard_normal(x.shape)) for k, x in track._asdict().items()))


def test_torso_is_smoothed_where_it_is_seen() -> None:
    motion = motion_of(speaking(np.arange(100) / 25))
    torso = np.random.default_rng(0).normal(0, 5e-4, (100, 4)).astype(np.float32)
    torso[:30] = np.nan
    smoothed = smooth_motion(replace(motion, torso=torso), "light").torso
    assert np.isnan(smoothed[:30]).all()
    assert jitter(smoothed[30:]) < 0.5 * jitter(torso[30:])


def jitter(x: np.ndarray) -> float:
    """Return the RMS of the second difference."""
    return float(np.sqrt(np.mean(np.diff(x[10:], 2, axis=0) ** 2)))


def lag(out: np.ndarray, truth: np.ndarray) -> float:
    """Return the delay of `out` after `truth` in frames: the subframe shift with the least squared error."""
    t = np.arange(len(truth))
    shifts = np.arange(-1, 4, 0.05)
    inside = slice(20, -20)
    error = [np.mean((np.interp(t - s, t, truth)[inside] - out[inside]) ** 2) for s in shifts]
    return float(shifts[np.argmin(error)])


def measure(level: SmoothingLevel, *, causal: bool = False, fps: Fraction = FPS) -> dict[str, tuple[float, float]]:
    """Return per signal the jitter of a still face over the unfiltered, and the lag of a speaking face in frames."""
    t = np.arange(round(20 * fps)) / float(fps)
    still = noisy(Track(*(np.repeat(x[:1], len(t), axis=0) for x in speaking(t))))
    moving, noisy_moving = speaking(t), noisy(speaking(t))
    smoothed_still, smoothed_moving = (
        track_of(smooth_motion(motion_of(track, fps), level, causal=causal)) for track in (still, noisy_moving)
    )
    columns = {"jaw": ("beta", 24), "blink": ("beta", 8), "yaw": ("turn", 1), "x": ("centre", 0), "z": ("centre", 2)}
    return {
        name: (
            jitter(getattr(smoothed_still, kind)[:, k]) / jitter(getattr(still, kind)[:, k]),
            lag(getattr(smoothed_moving, kind)[:, k], getattr(moving, kind)[:, k]),
        )
        for name, (kind, k) in columns.items()
    }


@pytest.mark.parametrize("fps", [FPS, Fraction(60)])
@pytest.mark.parametrize(("level", "max_jitter"), [("off", 1.001), ("light", 0.5), ("strong", 0.1)])
def test_smoothing_reduces_jitter_without_lag(level: SmoothingLevel, max_jitter: float, fps: Fraction) -> None:
    for name, (jitter_ratio, lag_frames) in measure(level, fps=fps).items():
        assert jitter_ratio <= max_jitter, f"{name} keeps {jitter_ratio:.2f} of its jitter"
        assert abs(lag_frames) <= 0.051, f"{name} lags {lag_frames:.2f} frames"


@pytest.mark.parametrize(("level", "max_jitter", "max_lag"), [("light", 0.5, 0.99), ("strong", 0.3, 2.5)])
def test_causal_smoothing_reduces_jitter_with_little_lag(
    level: SmoothingLevel, max_jitter: float, max_lag: float
) -> None:
    for name, (jitter_ratio, lag_frames) in measure(level, causal=True).items():
        assert jitter_ratio <= max_jitter, f"{name} keeps {jitter_ratio:.2f} of its jitter"
        assert lag_frames <= max_lag, f"{name} lags {lag_frames:.2f} frames"


@pytest.mark.parametrize(("level", "kept"), [("light", 0.95), ("strong", 0.85)])
def test_smoothing_keeps_blinks_steps_and_fast_speech(level: SmoothingLevel, kept: float) -> None:
    """A blink of three frames, a step of the jaw, speech at 5 Hz, a quick turn, with the tracker's noise."""
    t = np.arange(100) / 25
    track = speaking(np.zeros(100))
    track.beta[:, [8, 24, 32]] = 0.1
    track.beta[40:43, 8] += [0.4, 0.6, 0.4]
    track.beta[60:, 24] += 0.3
    track.beta[:, 32] += 0.2 * np.sin(2 * np.pi * 5 * t)
    track.turn[:] = 0
    track.turn[50:53, 1] = [0.1, 0.2, 0.1]
    output = track_of(smooth_motion(motion_of(noisy(track)), level))
    assert output.beta[41, 8] - np.median(output.beta[:, 8]) >= kept * 0.6
    assert output.beta[59, 24] - 0.1 <= (1 - kept) * 0.3 + 0.01 and output.beta[60, 24] - 0.1 >= kept * 0.3 - 0.01
    wave = np.sin(2 * np.pi * 5 * t)
    assert output.beta[:, 32] @ wave / (wave @ wave) >= kept * 0.2
    assert output.turn[51, 1] >= kept * 0.2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("level", ["light", "strong"])
def test_smoothing_keeps_a_still_face_exactly(level: SmoothingLevel, causal: bool) -> None:
    one = speaking(np.array([0.3]))
    still = motion_of(Track(*(np.repeat(x, 50, axis=0) for x in one)))
    motion = smooth_motion(still, level, causal=causal)
    np.testing.assert_array_equal(motion.beta, still.beta)
    np.testing.assert_allclose(motion.camera, still.camera, atol=1e-6)
    np.testing.assert_array_equal(motion.camera, motion.camera[:1].repeat(50, axis=0))


@pytest.mark.parametrize("causal", [False, True])
def test_smoothing_of_landmarks_reduces_jitter_and_keeps_a_blink(causal: bool) -> None:
    """In the head frame: a lid closes for three frames of a still face, seen by a camera that jitters."""
    rng, frames = np.random.default_rng(0), 100
    points = np.repeat(load_canonical_face().points[None], frames, axis=0)
    points[40:43, 159, 1] += [0.008, 0.012, 0.008]
    track = noisy(Track(*(np.repeat(x, frames, axis=0) for x in speaking(np.array([0.3])))))
    still = motion_of(track)
    motion = still.with_head(still.camera, points + rng.normal(0, 2.5e-4, points.shape))
    seen, smoothed = motion.head_landmarks, smooth_motion(motion, "light", causal=causal).head_landmarks
    assert jitter(smoothed[:, 1, 1]) < 0.6 * jitter(seen[:, 1, 1])
    assert smoothed[41, 159, 1] - np.median(smoothed[:, 159, 1]) > (0.7 if causal else 0.9) * 0.012


@pytest.mark.parametrize("causal", [False, True])
def test_smoothing_memory_does_not_grow_with_the_driver(causal: bool) -> None:
    part = motion_of(noisy(speaking(np.arange(8) / 25)))
    smoothed = smooth_stream(itertools.repeat(part), "strong", causal=causal)
    tracemalloc.start()
    for _ in range(10):
        next(smoothed)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(500):
        next(smoothed)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    parts_bytes = 500 * (part.beta.nbytes + part.camera.nbytes)
    assert after - before < parts_bytes / 4  # the interpreter's caches of small objects grow


@pytest.mark.parametrize("causal", [False, True])
def test_smoothing_in_parts_equals_one_pass_and_restarts_after_missing_frames(causal: bool) -> None:
    whole = motion_of(noisy(speaking(np.arange(40) / 25)))
    whole.found[10:13] = False
    whole.beta[13:] += 0.5  # as another face would have
    expected = smooth_motion(whole, "light", causal=causal)
    parts = [whole.select(np.arange(a, b)) for a, b in ((0, 1), (1, 11), (11, 12), (12, 40))]
    output = Motion.concatenate(list(smooth_stream(parts, "light", causal=causal)))
    for name in ("beta", "camera", "landmarks", "found"):
        np.testing.assert_array_equal(getattr(output, name), getattr(expected, name))
    np.testing.assert_array_equal(expected.beta[10:13], expected.beta[[9, 9, 9]])
    np.testing.assert_array_equal(expected.camera[10:13], expected.camera[[9, 9, 9]])
    for run in (np.arange(10), np.arange(13, 40)):
        alone = smooth_motion(whole.select(run), "light", causal=causal)
        np.testing.assert_array_equal(expected.beta[run], alone.beta)


def test_rotation_vectors_and_head_poses_round_trip() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 3))
    vectors *= np.linspace(0, 3.1, 50)[:, None] / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(rotation_log(rotation_exp(vectors)), vectors, atol=1e-7)
    cameras = np.stack([orbit_camera(20, -10, 5, radius=3), orbit_camera(-40)])
    np.testing.assert_allclose(with_head_pose(cameras, *head_pose(cameras)), cameras, atol=1e-6)
