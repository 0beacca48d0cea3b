"""How the entries of beta vary together: mean and covariance over tracked clips, `weights/beta_statistics.npz`.

With them, entries that are not known (the measures of a Live Link Face CSV, the rest of a mouth that shall smile) are
predicted from those that are. `weights/make_beta_statistics.py` measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from export3d_cli.core.runtime.weights import load_arrays, resolve_weights

RIDGE = 1e-4  # added to the variances, for coefficients that never change


class BetaStatistics(NamedTuple):
    """Mean (64,) of beta, and its covariance (64, 64) within clips, where the person stays the same."""

    mean: np.ndarray
    covariance: np.ndarray

    def regression(self, known: Sequence[int], ridge: float = RIDGE) -> np.ndarray:
        """Return the linear map (64, K) from changes of the `known` entries to the most likely change of all."""
        known = list(known)
        covariance = self.covariance[np.ix_(known, known)] + ridge * np.eye(len(known))
        slope: np.ndarray = np.linalg.solve(covariance, self.covariance[known]).T
        return slope

    @classmethod
    def load(cls) -> BetaStatistics:
        """Read the bundled file; raises `WeightsError`."""
        arrays = load_arrays(resolve_weights("beta_statistics"))
        return cls(*(arrays[name].astype(np.float64) for name in cls._fields))
