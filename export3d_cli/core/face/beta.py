"""The 64 expression coefficients beta: their names, and the 12 measures taken from head-frame points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


def compute_measures(points: np.ndarray) -> np.ndarray:
    """The 12 `MEASURES` of head-frame points (T, 478, 3) -> (T, 12), in inter-ocular distances; x right, heights up."""

    def eye(corners: tuple[int, int]) -> np.ndarray:
        return points[:, list(corners)].mean(1)

    left, right = eye((362, 263)), eye((33, 133))
    unit = np.linalg.norm(left - right, axis=-1)

    def gap(upper: Sequence[int], lower: Sequence[int]) -> np.ndarray:
        return (points[:, list(lower), 1].mean(1) - points[:, list(upper), 1].mean(1)) / unit

    base = points[:, 2, 1]  # under the nose: still while the mouth moves
    columns = [
        gap([311], [402]), gap([13], [14]), gap([81], [178]),
        np.linalg.norm(points[:, 291] - points[:, 61], axis=-1) / unit,
        (base - points[:, 291, 1]) / unit, (base - points[:, 61, 1]) / unit,
        gap([385, 386, 387], [380, 374, 373]), gap([160, 159, 158], [144, 145, 153]),
        *((points[:, 473] - left)[:, :2] / unit[:, None]).T, *((points[:, 468] - right)[:, :2] / unit[:, None]).T,
    ]  # fmt: skip
    return np.stack(columns, axis=1)
