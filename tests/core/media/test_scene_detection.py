"""Scene changes between random images, and motion and light that are none."""

from __future__ import annotations

import numpy as np
import pytest

from export3d_cli.core.media.scene_detection import SceneCutDetector


def make_image(seed: int) -> np.ndarray:
    """Return an image of random squares, float (96, 128, 3)."""
    rng = np.random.default_rng(seed)
    return np.kron(rng.uniform(20, 230, (6, 8, 3)), np.ones((16, 16, 1)))


def find_scene_changes(frames: list[np.ndarray]) -> list[tuple[int, int]]:
    """Return the first frame of each new scene and the number of mixed frames before it."""
    cuts, rng = SceneCutDetector(), np.random.default_rng(0)
    noisy = ((frame + rng.normal(0, 4, frame.shape)).clip(0, 255).astype(np.uint8) for frame in frames)
    return [(i, mixed) for i, frame in enumerate(noisy) if (mixed := cuts(frame)) is not None]


def test_detector_reports_cut_immediately() -> None:
    assert find_scene_changes([make_image(0)] * 20 + [make_image(1)] * 20) == [(20, 0)]
    assert find_scene_changes([make_image(0), make_image(1)]) == [(1, 0)]


@pytest.mark.parametrize("length", [8, 12, 25, 50])
def test_detector_reports_dissolve_at_its_end(length: int) -> None:
    weights = np.arange(1, length + 1) / (length + 1)
    mixed = [make_image(0) * (1 - weight) + make_image(1) * weight for weight in weights]
    ((frame, mixed_count),) = find_scene_changes([make_image(0)] * 70 + mixed + [make_image(1)] * 40)
    assert 70 + length - 4 <= frame <= 70 + length + 3
    assert frame - mixed_count <= 70 + length // 8
    assert frame - mixed_count >= 68


def test_detector_reports_fade_to_black() -> None:
    ((frame, mixed_count),) = find_scene_changes(
        [make_image(0) * weight for weight in [1.0] * 30 + [1 - i / 20 for i in range(21)] + [0.0] * 10]
    )
    assert 45 <= frame <= 55
    assert 29 <= frame - mixed_count <= 33


def test_detector_ignores_motion_and_light() -> None:
    scene = np.kron(np.random.default_rng(0).uniform(20, 200, (6, 16, 3)), np.ones((16, 16, 1)))
    pan = [scene[:, 2 * i : 2 * i + 128] for i in range(60)]
    assert find_scene_changes(pan) == []
    lighter = [scene[:, :128] * (0.5 + i / 120) for i in range(80)]
    assert find_scene_changes(lighter) == []
    sway = [np.roll(scene[:, :128], round(6 * np.sin(i / 4)), axis=1) for i in range(80)]
    assert find_scene_changes(sway) == []
