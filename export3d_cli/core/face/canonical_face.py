"""MediaPipe's canonical face mesh and the triangles of the basis flow, made by `weights/make_canonical_face.py`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from export3d_cli.core.runtime.weights import load_arrays, resolve_weights


@dataclass(frozen=True)
class CanonicalFace:
    """Mean face in the head frame."""

    points: np.ndarray  # (478, 3) float64, head frame; all points of an iris lie at the centre of the eye
    mirror: np.ndarray  # (478,) int64: index of each point's mirror point
    # (902, 4) int32: three points, then the kind: 0 skin, 1 the inside of the mouth, 2 eye (a fan around the iris, so
    # that the gaze can move). All have the same winding: positive area with y down, seen from the front.
    flow_triangles: np.ndarray


@functools.lru_cache(maxsize=1)
def load_canonical_face() -> CanonicalFace:
    """Read the shipped canonical face; raises `WeightsError`."""
    return CanonicalFace(**load_arrays(resolve_weights("canonical_face")))
