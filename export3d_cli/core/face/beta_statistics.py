"""How the entries of beta vary together: mean and covariance over tracked clips, `weights/beta_statistics.npz`.

Made by `python -m export3d_cli.core.face.beta_statistics OUT MOTION...`. With them, entries that are not known (the
measures of a Live Link Face CSV, the rest of a mouth that shall smile) are predicted from those that are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.errors import InputError, WeightsError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS, write_atomic
from export3d_cli.core.runtime.weights import resolve_weights

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

    def save(self, path: Path) -> None:
        """Write the file that `load` reads, atomically."""
        with write_atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{name: array.astype(np.float32) for name, array in self._asdict().items()})

    @classmethod
    def load(cls, path: Path | None = None) -> BetaStatistics:
        """Read a file written by `save`, or the bundled one; raises `WeightsError`."""
        path = path or resolve_weights("beta_statistics")
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                statistics = cls(*(data[name].astype(np.float64) for name in cls._fields))
        except DAMAGED_ZIP_ERRORS as error:
            raise WeightsError(f"{path} holds no statistics of beta ({error}): install export3d-cli again") from error
        n = len(BETA_NAMES)
        if [array.shape for array in statistics] != [(n,), (n, n)] or not all(np.isfinite(a).all() for a in statistics):
            raise WeightsError(f"{path} holds damaged statistics of beta: install export3d-cli again")
        return statistics


def fit_beta_statistics(motions: Iterable[Motion]) -> BetaStatistics:
    """Measure the statistics over the frames of clips that show a face."""
    total, count = np.zeros(len(BETA_NAMES)), 0
    scatter = np.zeros((len(BETA_NAMES),) * 2)
    for motion in motions:
        beta = motion.beta[motion.found].astype(np.float64)
        if len(beta):
            centred = beta - beta.mean(0)
            scatter += centred.T @ centred
            total, count = total + beta.sum(0), count + len(beta)
    if not count:
        raise InputError("no frame shows a face: give motion files with faces")
    return BetaStatistics(total / count, scatter / count)


if __name__ == "__main__":
    fit_beta_statistics(Motion.load(Path(name)) for name in sys.argv[2:]).save(Path(sys.argv[1]))
