"""Statistics of beta: what they predict, and damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.face.expression_coefficients import BETA_NAMES, BetaStatistics
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.weights import load_arrays


def test_regression_recovers_a_linear_map() -> None:
    rng = np.random.default_rng(0)
    slope = rng.standard_normal((52, 12)) * 0.1
    to_all = np.concatenate([np.eye(52), slope], axis=1)
    covariance = to_all.T @ (0.1 * np.eye(52)) @ to_all
    fitted = BetaStatistics(np.zeros(64), covariance, np.zeros(0), np.zeros(0)).regression(range(52))
    np.testing.assert_allclose(fitted, to_all.T, atol=2e-3)


def test_shipped_statistics_open_the_lips_with_the_jaw() -> None:
    change = BetaStatistics.load().regression([BETA_NAMES.index("jawOpen")])[:, 0]
    assert change[BETA_NAMES.index("jawOpen")] == pytest.approx(1, abs=0.05)
    assert change[BETA_NAMES.index("lipGapCentre")] > 0.3


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no")
    for name in ("bad.npz", "none.npz"):
        with pytest.raises(WeightsError, match=name):
            load_arrays(tmp_path / name)
