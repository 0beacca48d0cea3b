"""Statistics of beta: what they predict, and damaged files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.face.beta_statistics import BetaStatistics, fit_beta_statistics
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.errors import WeightsError


def test_regression_recovers_a_linear_map_across_persons(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    slope = rng.standard_normal((52, 12)) * 0.1
    motions = []
    for _ in range(20):
        coefficients = rng.random((60, 52))
        person_offset = 0.3 * rng.standard_normal(12)  # a wide mouth, narrow eyes
        beta = np.concatenate([coefficients, coefficients @ slope + person_offset + 1.0], axis=1).astype(np.float32)
        cameras, found = np.zeros((60, 25), np.float32), np.ones(60, bool)
        motions.append(Motion(beta, cameras, np.zeros((60, 0, 3)), found, Fraction(25), (0, 0, 1), (1, 1)))
    fit_beta_statistics(motions).save(tmp_path / "b.npz")
    statistics = BetaStatistics.load(tmp_path / "b.npz")
    fitted = statistics.regression(range(52))
    np.testing.assert_allclose(fitted[:52], np.eye(52), atol=2e-3)
    np.testing.assert_allclose(fitted[52:].T, slope, atol=2e-3)
    np.testing.assert_allclose(statistics.mean[52:] - fitted[52:] @ statistics.mean[:52], 1.0, atol=0.3)


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no")
    BetaStatistics(np.zeros(3), np.eye(3)).save(tmp_path / "small.npz")
    BetaStatistics(np.zeros(64), np.full((64, 64), np.nan)).save(tmp_path / "nan.npz")
    for name in ("bad.npz", "small.npz", "nan.npz"):
        with pytest.raises(WeightsError, match=name):
            BetaStatistics.load(tmp_path / name)
