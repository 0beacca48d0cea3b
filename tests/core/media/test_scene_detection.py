"""Scenes made of noise pictures: cuts, dissolves and fades are told, motion and light are not."""

from __future__ import annotations

import numpy as np
import pytest

from export3d_cli.core.media.scene_detection import SceneCutDetector


def picture(seed: int) -> np.ndarray:
    """Soft blots, float (96, 128, 3)."""
    rng = np.random.default_rng(seed)
    return np.kron(rng.uniform(20, 230, (6, 8, 3)), np.ones((16, 16, 1)))


def told(frames: list[np.ndarray]) -> list[tuple[int, int]]:
    """Frames that begin another scene, and how many mixed ones came before each."""
    cuts, rng = SceneCutDetector(), np.random.default_rng(0)
    noisy = ((frame + rng.normal(0, 4, frame.shape)).clip(0, 255).astype(np.uint8) for frame in frames)
    return [(i, mixed) for i, frame in enumerate(noisy) if (mixed := cuts(frame)) is not None]


def test_a_cut_is_told_at_once() -> None:
    assert told([picture(0)] * 20 + [picture(1)] * 20) == [(20, 0)]
    assert told([picture(0), picture(1)]) == [(1, 0)]


@pytest.mark.parametrize("length", [8, 12, 25, 50])
def test_a_dissolve_is_told_at_its_end(length: int) -> None:
    shares = np.arange(1, length + 1) / (length + 1)
    mixed = [picture(0) * (1 - share) + picture(1) * share for share in shares]
    ((at, before),) = told([picture(0)] * 70 + mixed + [picture(1)] * 40)
    assert 70 + length - 4 <= at <= 70 + length + 3
    assert at - before <= 70 + length // 8
    assert at - before >= 68


def test_a_fade_to_black_is_told() -> None:
    ((at, before),) = told([picture(0) * share for share in [1.0] * 30 + [1 - i / 20 for i in range(21)] + [0.0] * 10])
    assert 45 <= at <= 55
    assert 29 <= at - before <= 33


def test_motion_and_light_are_no_cuts() -> None:
    scene = np.kron(np.random.default_rng(0).uniform(20, 200, (6, 16, 3)), np.ones((16, 16, 1)))
    pan = [scene[:, 2 * i : 2 * i + 128] for i in range(60)]
    assert told(pan) == []
    lighter = [scene[:, :128] * (0.5 + i / 120) for i in range(80)]
    assert told(lighter) == []
    sway = [np.roll(scene[:, :128], round(6 * np.sin(i / 4)), axis=1) for i in range(80)]
    assert told(sway) == []
