"""Head pose from landmarks: the mean face, the camera of each frame, and landmarks lifted into the head frame.

"Crop units" are positions divided by the side of the crop: x, y in [0, 1] inside it, z at the same scale.
"""

import functools
from dataclasses import dataclass

import numpy as np

from export3d_cli.core.face.landmarks import NUM_LANDMARKS, RIGID_POINTS, RIGID_WEIGHTS
from export3d_cli.core.runtime.camera import FOCAL, RADIUS, default_intrinsics
from export3d_cli.core.runtime.weights import load_arrays, resolve_weights

RIGID_CENTROID = np.array([0.000000, 0.004524, -0.064495])  # weighted mean of the canonical rigid points
TRACKER_Z_SCALE = 1.1  # the landmarker flattens faces: with this factor turning heads read their true angle
# Depth of `landmarks_to_head_frame` over the depth that the pose fit uses. With it the landmarks of one frame, seen by
# another frame's camera, come nearest to the other frame's: the same factor for 63 filmed people and for 445 rendered
# heads, at turns of 5 and of 30 degrees.
RELIEF_SCALE = 0.94


@dataclass(frozen=True)
class CanonicalFace:
    """MediaPipe's mean face and the triangles of the basis flow, made by `weights/make_canonical_face.py`."""

    points: np.ndarray  # (478, 3) float64, head frame; all points of an iris lie at the centre of the eye
    mirror: np.ndarray  # (478,) int64: index of each point's mirror point
    # (902, 4) int32: three points, then the kind: 0 skin, 1 the inside of the mouth, 2 eye (a fan around the iris, so
    # that the gaze can move). All have the same winding: positive area with y down, seen from the front.
    flow_triangles: np.ndarray


@functools.lru_cache(maxsize=1)
def load_canonical_face() -> CanonicalFace:
    """Read the shipped canonical face; raises `WeightsError`."""
    return CanonicalFace(**load_arrays(resolve_weights("canonical_face")))


def fit_cameras(landmarks: np.ndarray) -> np.ndarray:
    """Fit the camera of each frame: the rigid motion from the canonical face's rigid points to the landmarks.

    A weighted similarity fit in three dimensions (Umeyama 1991). The scale is removed by moving the camera, repeated
    because perspective depends on the distance. Against exact labels of synthetic heads it reads pitch better than
    PnP of the image positions alone (slope .95 against .71). (F, 478, 3), crop units -> (F, 25) float32.
    """
    weights = np.array(list(RIGID_WEIGHTS.values()))
    weights /= weights.sum()
    model = load_canonical_face().points[list(RIGID_POINTS)]
    model_mean = weights @ model
    centred = model - model_mean
    variance = float((weights * (centred**2).sum(-1)).sum())
    rigid = landmarks[:, list(RIGID_POINTS)].astype(np.float64)
    depth = np.full(len(rigid), RADIUS)
    for _ in range(4):
        cloud = _unproject(rigid, depth, weights, TRACKER_Z_SCALE)  # (F, K, 3), camera frame
        cloud_mean = np.einsum("k,fki->fi", weights, cloud)
        cross = np.einsum("k,fki,kj->fij", weights, cloud - cloud_mean[:, None], centred)
        u, s, vt = np.linalg.svd(cross)
        sign = np.ones_like(s)
        sign[:, 2] = np.sign(np.linalg.det(u @ vt))
        scale = (s * sign).sum(-1) / variance
        depth = depth / scale
    rotation = (u * sign[:, None]) @ vt
    pose = np.tile(np.eye(4), (len(rigid), 1, 1))
    pose[:, :3, :3] = rotation
    pose[:, :3, 3] = cloud_mean / scale[:, None] - rotation @ model_mean
    cam2world = np.linalg.inv(pose).reshape(-1, 16)
    intrinsics = np.tile(default_intrinsics().ravel(), (len(rigid), 1))
    return np.concatenate([cam2world, intrinsics], axis=1).astype(np.float32)


def landmarks_to_head_frame(landmarks: np.ndarray, camera: np.ndarray, relief: float = RELIEF_SCALE) -> np.ndarray:
    """Lift landmarks (T, 478, 3) in crop units, seen by cameras (T, 25), into the head frame, (T, 478, 3) float32.

    Each point stays on its ray, so the same camera projects the result onto the landmarks again. Depths are `relief`
    times those of the pose fit, around the mean depth of the canonical face's rigid points.
    """
    landmarks = np.asarray(landmarks, dtype=np.float64)
    cam2world = np.asarray(camera, dtype=np.float64)[:, :16].reshape(-1, 4, 4)
    R, t = cam2world[:, :3, :3], cam2world[:, :3, 3]
    depth = np.einsum("tji,tj->ti", R, RIGID_CENTROID - t)[:, 2]  # of the rigid points' mean, camera frame
    weights = np.zeros(NUM_LANDMARKS)
    weights[list(RIGID_POINTS)] = list(RIGID_WEIGHTS.values())
    cloud = _unproject(landmarks, depth, weights / weights.sum(), relief * TRACKER_Z_SCALE)
    return (np.einsum("tij,tnj->tni", R, cloud) + t[:, None]).astype(np.float32)


def head_frame_to_landmarks(points: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Invert `landmarks_to_head_frame`: points (T, 478, 3), seen by cameras (T, 25), in crop units, float32."""
    cam2world = np.asarray(camera, dtype=np.float64)[:, :16].reshape(-1, 4, 4)
    R, t = cam2world[:, :3, :3], cam2world[:, :3, 3]
    cloud = np.einsum("tji,tnj->tni", R, points - t[:, None])  # camera frame
    depth = np.einsum("tji,tj->ti", R, RIGID_CENTROID - t)[:, 2:]  # (T, 1)
    z = (cloud[..., 2] / depth - 1) * FOCAL / (RELIEF_SCALE * TRACKER_Z_SCALE)
    xy = cloud[..., :2] / cloud[..., 2:] * FOCAL + 0.5
    return np.concatenate([xy, z[..., None]], axis=-1).astype(np.float32)


def _unproject(points: np.ndarray, depth: np.ndarray, weights: np.ndarray, z_scale: float) -> np.ndarray:
    """Map crop units (F, K, 3) into the camera frame, with z times `z_scale` and its weighted mean at `depth` (F,)."""
    z = points[..., 2] - (points[..., 2] @ weights)[:, None]
    depths = depth[:, None] * (1 + z_scale * z / FOCAL)
    rays = np.concatenate([(points[..., :2] - 0.5) / FOCAL, np.ones_like(z)[..., None]], axis=-1)
    return rays * depths[..., None]
