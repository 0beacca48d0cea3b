"""The 64 expression coefficients beta: their names, the measures taken from landmarks, and how they vary together.

beta is 52 ARKit blendshape coefficients in [0, 1], then 12 measures in the head frame, divided by the inter-ocular
distance. "Left" and "right" are the person's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from export3d_cli.core.face.landmarks import MEASURE_POINTS, MeasurePoints
from export3d_cli.core.runtime.weights import load_arrays, resolve_weights

ARKIT_NAMES: tuple[str, ...] = (
    *("browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight"),
    *("cheekPuff", "cheekSquintLeft", "cheekSquintRight"),
    *("eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight", "eyeLookInLeft", "eyeLookInRight"),
    *("eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight"),
    *("eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight"),
    *("jawForward", "jawLeft", "jawOpen", "jawRight"),
    *("mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight", "mouthFunnel"),
    *("mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker"),
    *("mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper"),
    *("mouthSmileLeft", "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight"),
    *("mouthUpperUpLeft", "mouthUpperUpRight", "noseSneerLeft", "noseSneerRight", "tongueOut"),
)
MEASURE_NAMES = (
    "lipGapLeft", "lipGapCentre", "lipGapRight", "mouthWidth", "mouthCornerHeightLeft", "mouthCornerHeightRight",
    "eyeOpeningLeft", "eyeOpeningRight", "irisXLeft", "irisYLeft", "irisXRight", "irisYRight",
)  # fmt: skip
BETA_NAMES = ARKIT_NAMES + MEASURE_NAMES
RIDGE = 1e-4  # added to the variances, for coefficients that never change


def region_of(name: str) -> str:
    """Return the part of the face that an entry of beta describes: brows, gaze, eyes (their lids) or mouth."""
    prefixes = {"brow": "brows", "eyeLook": "gaze", "iris": "gaze", "eye": "eyes", "cheekSquint": "eyes"}
    return next((region for prefix, region in prefixes.items() if name.startswith(prefix)), "mouth")


# Entries of beta that describe each region; every entry belongs to one.
REGIONS = {
    region: tuple(k for k, name in enumerate(BETA_NAMES) if region_of(name) == region)
    for region in ("eyes", "gaze", "brows", "mouth")
}


def compute_measures(points: np.ndarray, indices: MeasurePoints = MEASURE_POINTS) -> np.ndarray:
    """Return `MEASURE_NAMES` of head-frame points (T, N, 3), heights upwards: (T, 12), or (T, 8) without irises."""
    left, right = (points[:, list(corners)].mean(1) for corners in indices.eye_corners)
    interocular = np.linalg.norm(left - right, axis=-1)

    def gap(upper: Sequence[int], lower: Sequence[int]) -> np.ndarray:
        return (points[:, list(lower), 1].mean(1) - points[:, list(upper), 1].mean(1)) / interocular

    left_corner, right_corner = indices.mouth_corners
    columns = [
        *(gap(*lips) for lips in indices.lip_gaps),
        np.linalg.norm(points[:, left_corner] - points[:, right_corner], axis=-1) / interocular,
        *(gap([corner], [indices.nose_base]) for corner in indices.mouth_corners),
        *(gap(*lids) for lids in indices.eyelids),
    ]
    for iris, eye in zip(indices.irises, (left, right), strict=False):
        columns += [*((points[:, iris] - eye)[:, :2] / interocular[:, None]).T]
    return np.stack(columns, axis=1)


class BetaStatistics(NamedTuple):
    """Mean (64,) of beta and covariance (64, 64) within clips, which predict unknown entries from known ones.

    Landmarks move along orthonormal `modes` (K, 478, 3), in inter-ocular distances, by a change of beta times `slopes`
    (64, K), as far as brows and mouth move them.
    """

    mean: np.ndarray
    covariance: np.ndarray
    modes: np.ndarray
    slopes: np.ndarray

    def regression(self, known: Sequence[int], ridge: float = RIDGE) -> np.ndarray:
        """Return the linear map (64, K) from changes of the `known` entries to the most likely change of all."""
        known = list(known)
        covariance = self.covariance[np.ix_(known, known)] + ridge * np.eye(len(known))
        return np.linalg.solve(covariance, self.covariance[known]).T

    @classmethod
    def load(cls) -> BetaStatistics:
        """Read the bundled file; raises `WeightsError`."""
        arrays = load_arrays(resolve_weights("beta_statistics"))
        return cls(*(arrays[name].astype(np.float64) for name in cls._fields))
