"""Data sets of rendered heads: images from known cameras, with class and depth of every pixel.

The folder holds `clips/<head>.mp4`, `labels/<head>.npz` (arrays `expression` (F,), `head_rot_deg` (F, 3) yaw, pitch and
roll, `intrinsics` for image size 1) and `depth/<head>.npz` (`depth` (F, d, d) in metres along the camera's axis,
`classes` (F, d, d), see `SKIN`). Frames of one expression show one still head. The last eleventh of the heads, by name,
is held out for `evaluate`; `preprocess` makes a data set of the others.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.errors import InputError

HELD_OUT = 11  # one head of so many is held out
SKIN, HAIR, CLOTHES = 1, 2, 5  # classes of the depth files; 0 is background, others are eyes and mouth


class HeadLabels(NamedTuple):
    """What is known of the F pictures of a head."""

    expression: np.ndarray  # (F,) int
    rotation: np.ndarray  # (F, 3) yaw, pitch and roll in degrees
    focal: float  # of the camera, in image sizes
    depth: np.ndarray  # (F, d, d) float32, metres along the camera's axis
    classes: np.ndarray  # (F, d, d) int


def has_exact_views(folder: Path) -> bool:
    """Return whether a folder holds rendered heads with exact views."""
    return (folder / "labels").is_dir() and (folder / "depth").is_dir()


def split_heads(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the heads to train on and of the held-out heads; raise `InputError` if there are none."""
    names = sorted(path.stem for path in (folder / "depth").glob("*.npz"))
    if not names:
        raise InputError(f"{folder / 'depth'} has no .npz file: give a folder with exact views of rendered heads")
    first = min(len(names) - 1, len(names) * (HELD_OUT - 1) // HELD_OUT)
    return names[:first], names[first:]


def read_labels(folder: Path, name: str) -> HeadLabels:
    """Read the labels of a head; raise `InputError` if they are missing or damaged."""
    try:
        with np.load(folder / "labels" / f"{name}.npz") as labels, np.load(folder / "depth" / f"{name}.npz") as truth:
            depth, classes = truth["depth"].astype(np.float32), truth["classes"]
            focal = float(labels["intrinsics"][0, 0])
            found = HeadLabels(labels["expression"], labels["head_rot_deg"], focal, depth, classes)
        if not len(found.expression) == len(found.rotation) == len(depth) or depth.shape != classes.shape:
            raise ValueError("arrays of different lengths")
    except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise InputError(f"{folder} has no exact views of {name} ({error}): see its labels and depth") from error
    return found


def crop_depth(labels: HeadLabels, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Return depth and person mask of the crop of a motion of the same F pictures.

    The depth (F, d, d) float16 is that of the head's surface along the camera's axis, in head-frame units, 0 elsewhere.
    A picture does not show the scale: a pixel of the face is taken to be as wide in both units, and the surface to go
    through the nearer half of the landmarks. The mask (F, d, d) uint8 is 255 on the person.
    """
    count = labels.depth.shape[-1]
    x0, y0, side = motion.crop
    cells = (np.arange(count) + 0.5) * side / count
    rows, columns = (np.floor((start + cells) * count / motion.size[0]).astype(int) for start in (y0, x0))
    inside = [(index >= 0) & (index < count) for index in (rows, columns)]
    grid = np.ix_(range(len(motion)), rows.clip(0, count - 1), columns.clip(0, count - 1))
    depth, classes = labels.depth[grid], labels.classes[grid] * (inside[0][:, None] & inside[1])
    head = (classes > 0) & (classes != CLOTHES)
    cam2world = motion.camera[:, :16].reshape(-1, 4, 4)
    offsets = landmarks_to_head_frame(motion.landmarks, motion.camera) - cam2world[:, None, :3, 3]
    own_depths = (offsets @ cam2world[:, :3, 2:3])[..., 0]  # (F, 478)
    u, v = np.floor(motion.landmarks[..., :2] * count).astype(int).clip(0, count - 1).transpose(2, 0, 1)
    surface = np.zeros(depth.shape, np.float16)
    for f, own in enumerate(own_depths):
        near = head[f, v[f], u[f]] & (own <= np.median(own))
        if near.any():
            middle, true_middle = np.median(own[near]), np.median(depth[f, v[f], u[f]][near])
            metres = (true_middle / labels.focal) / (middle / motion.camera[f, 16]) * side / motion.size[0]  # in a unit
            surface[f] = np.where(head[f], middle + (depth[f] - true_middle) / metres, 0)
    return surface, np.uint8(255) * (classes > 0)
