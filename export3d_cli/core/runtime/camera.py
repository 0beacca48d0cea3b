"""Cameras as EG3D's 25 numbers: cam2world, 4x4 row-major, then intrinsics, 3x3 normalised by the image size.

The world is the HEAD FRAME: origin at the head's centre, x to the image's right for a frontal face, y down, z away
from the camera. The camera frame is OpenCV's (x right, y down, z forward). EG3D's world is the head frame with y and z
negated. NumPy only, so that trackers need no torch.
"""

import numpy as np

FOCAL = 4.2647  # EG3D's focal length in image sizes: a field of view of 18.837 degrees
RADIUS = 2.7  # EG3D's distance between camera and head centre


def default_intrinsics() -> np.ndarray:
    """Return EG3D's intrinsics, (3, 3)."""
    return np.array([[FOCAL, 0.0, 0.5], [0.0, FOCAL, 0.5], [0.0, 0.0, 1.0]])


def rotation_from_angles(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Return the head-to-camera rotation (3, 3) of `yaw_pitch_roll` in degrees: roll first, then yaw, then pitch."""
    y, p, r = np.radians([-yaw, pitch, roll])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    about_z = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


def orbit_camera(yaw: float, pitch: float = 0.0, roll: float = 0.0, *, radius: float = RADIUS) -> np.ndarray:
    """Return the camera (25,) of a head at the image centre, turned by the angles of `yaw_pitch_roll` in degrees."""
    camera = np.concatenate([np.zeros(16), default_intrinsics().ravel()])
    return with_head_pose(camera, rotation_from_angles(yaw, pitch, roll), np.array([0.0, 0.0, radius]))


def yaw_pitch_roll(camera: np.ndarray) -> np.ndarray:
    """Return yaw (+: to the image's right), pitch (+: up), roll (+: clockwise) of the head (..., 3) in degrees."""
    r = head_pose(camera)[0]
    yaw = -np.arctan2(r[..., 0, 2], np.hypot(r[..., 1, 2], r[..., 2, 2]))
    pitch, roll = np.arctan2(r[..., 1, 2], r[..., 2, 2]), np.arctan2(-r[..., 0, 1], r[..., 0, 0])
    return np.degrees(np.stack([yaw, pitch, roll], axis=-1))


def project_points(camera: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Project head-frame points (N, 3) to image sizes (N, 2): (0, 0) top left corner, (1, 1) bottom right."""
    rotation, centre = head_pose(camera)
    uvw = (np.asarray(points, dtype=np.float64) @ rotation.T + centre) @ np.reshape(camera[16:], (3, 3)).T
    return uvw[:, :2] / uvw[:, 2:]


def rotation_log(rotation: np.ndarray) -> np.ndarray:
    """Convert rotations (..., 3, 3) of less than half a turn to rotation vectors (..., 3), axis times radians."""
    r = np.asarray(rotation, dtype=np.float64)
    skew = (r - np.swapaxes(r, -1, -2)) / 2
    axis = np.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], axis=-1)
    sine = np.linalg.norm(axis, axis=-1, keepdims=True)
    angle = np.arctan2(sine, (np.trace(r, axis1=-2, axis2=-1)[..., None] - 1) / 2)
    return axis * np.divide(angle, sine, out=np.ones_like(sine), where=sine > 1e-9)


def rotation_exp(vector: np.ndarray) -> np.ndarray:
    """Convert rotation vectors (..., 3) to rotations (..., 3, 3) (Rodrigues), the inverse of `rotation_log`."""
    v = np.asarray(vector, dtype=np.float64)
    angle = np.linalg.norm(v, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(v, -1, 0)
    zero = np.zeros_like(x)
    k = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*v.shape[:-1], 3, 3)
    # sin(a) / a and (1 - cos(a)) / a^2, in forms that are finite at 0
    return np.eye(3) + np.sinc(angle / np.pi) * k + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * (k @ k)


def head_pose(camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return head-to-camera rotation (..., 3, 3) and head centre in the camera frame (..., 3) of cameras (..., 25)."""
    cam2world = np.asarray(camera, dtype=np.float64)[..., :16].reshape(*np.shape(camera)[:-1], 4, 4)
    rotation = np.swapaxes(cam2world[..., :3, :3], -1, -2)
    return rotation, -(rotation @ cam2world[..., :3, 3, None])[..., 0]


def with_head_pose(camera: np.ndarray, rotation: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return cameras (..., 25) float32 with the head poses (see `head_pose`) replaced and the intrinsics kept."""
    result = np.array(camera, dtype=np.float32)
    cam2world = np.zeros((*result.shape[:-1], 4, 4))
    camera_to_head = np.swapaxes(rotation, -1, -2)
    cam2world[..., :3, :3], cam2world[..., 3, 3] = camera_to_head, 1.0
    cam2world[..., :3, 3] = -(camera_to_head @ np.asarray(centre)[..., None])[..., 0]
    result[..., :16] = cam2world.reshape(*result.shape[:-1], 16)
    return result
