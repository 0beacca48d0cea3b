"""Make `look_basis.npz`: how faces change with age, weight and beard, and where hair lies.

    python weights/make_look_basis.py weights/look_basis.npz RENDERS:DATASET [RENDERS:DATASET ...]

Each RENDERS is a folder of rendered heads with `meta.csv` (age, weight, sex, ancestry, stubble of each head), and
DATASET is what `export3d preprocess` makes of its clips. `depth/*.npz` in RENDERS, if it exists, has the class of every
pixel. Everything is a linear regression over the heads on all attributes at once, made symmetric.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from export3d_cli.core.animation.attribute_editing import FACE_HALF, FACE_UNIT, HEAD_HALF, MAP_SIZE, spread_affine
from export3d_cli.core.dataset.exact_views import CLOTHES, HAIR, SKIN
from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.head_pose import landmarks_to_head_frame, load_canonical_face
from export3d_cli.core.face.landmarks import FACE_OVAL, NUM_MESH_VERTICES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.camera import yaw_pitch_roll

ATTRIBUTES = ("age", "stub", "weight", "male", "muscle", "asian", "caucasian")
MAX_YAW = 15.0  # degrees off the camera's axis, of the colours
FRAMES, FIRST_FRAMES = 2, 16  # of each clip, and of those from which they are chosen
RIDGE = 1e-2
BROAD_SD = 8.0  # cells: wider changes of the skin's colours are left out
WEIGHT_GAIN = 2.0  # of weight -1 and 1, in the change between the middle and the end of the sliders
BEARD_TOP = 0.22  # height below which beards grow, in the maps' coordinates: between nostrils and upper lip
FULLNESS = ("head/head-fat", "cheek/l-cheek-volume")  # MakeHuman's sliders of the face; both cheeks have the same
BEARDS = ("short", "full")  # that are not stubble


def read_heads(folders: list[tuple[Path, Path]]) -> dict[str, tuple[dict[str, str], list[Path], Path]]:
    """Return each head's row of meta.csv, its motion files and its RENDERS."""
    heads = {}
    for renders, dataset in folders:
        clips = defaultdict(list)
        for path in sorted((dataset / "clips").glob("*.motion.npz")):
            clips[path.name.removesuffix(".motion.npz").split("-")[-1].split("_")[0]].append(path)
        with (renders / "meta.csv").open() as file:
            heads |= {row["id"]: (row, clips[row["id"]], renders) for row in csv.DictReader(file) if row["id"] in clips}
    return heads


def attributes(row: dict[str, str]) -> list[float]:
    """Return the regressors: decades of age, stubble, three of weight from -1 to 1, then those only controlled for."""
    details = json.loads(row["details"])
    fullness = [
        sum(sign * details.get(f"{name}-{end}", 0.0) for end, sign in (("incr", 1), ("decr", -1))) for name in FULLNESS
    ]
    age, stubble, weight, *controls = (float(row[name] or 0) for name in ATTRIBUTES)
    beards = (float(row["beard"] == kind) for kind in BEARDS)
    return [(age - 40) / 10, stubble, 2 * weight - 1, *fullness, *controls, *beards, 1.0]


def regress(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the coefficients (K, ...) of y (N, ...) on x (N, K)."""
    flat = y.reshape(len(y), -1)
    return np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ flat).reshape(-1, *y.shape[1:])


def fit_shape(clips: list[tuple[np.ndarray, np.ndarray]], owner: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the change of the landmarks (2, 478, 3) per decade and per unit of weight, from (beta, landmarks)."""
    centred = [(beta - beta.mean(0), (points - points.mean(0)).reshape(len(points), -1)) for beta, points in clips]
    gram = sum(b.T @ b for b, _ in centred)
    expression = np.linalg.solve(gram + np.eye(len(gram)), sum(b.T @ p for b, p in centred))  # (64, 1434)
    beta, points = (np.stack([part[k].mean(0) for part in clips]) for k in (0, 1))
    neutral = points - ((beta - beta.mean(0)) @ expression).reshape(points.shape)
    heads = np.unique(owner)
    means, x = np.stack([neutral[owner == k].mean(0) for k in heads]), x[heads]
    change = regress(x, means)
    change = np.stack([change[0], WEIGHT_GAIN * change[2:5].sum(0)])
    print("largest change per decade and per unit of weight", *np.abs(change).max((1, 2)))
    return (change + change[:, load_canonical_face().mirror] * [-1, 1, 1]) / 2


def map_axis(half: float) -> np.ndarray:
    """Return the coordinates (MAP_SIZE,) of a map's columns or rows."""
    return ((np.arange(MAP_SIZE) + 0.5) / MAP_SIZE * 2 - 1) * half


def high_pass(tone: np.ndarray) -> np.ndarray:
    """Remove the broad part of a map of the face, (MAP_SIZE, MAP_SIZE, 3): hairlines and lights, not skin."""
    oval = load_canonical_face().points[list(FACE_OVAL), :2] / FACE_UNIT
    inside = np.zeros(tone.shape[:2], np.uint8)
    cv2.fillPoly(inside, [np.int32((oval / FACE_HALF + 1) / 2 * MAP_SIZE)], 1)
    weight = cv2.erode(inside, np.ones((7, 7))).astype(np.float64)
    broad = cv2.GaussianBlur(tone * weight[..., None], (0, 0), BROAD_SD)
    return (tone - broad / (cv2.GaussianBlur(weight, (0, 0), BROAD_SD)[..., None] + 1e-3)) * inside[..., None]


@cache
def map_operator(half: float) -> np.ndarray:
    """Return the matrix (MAP_SIZE, MAP_SIZE, 468) from landmarks to the positions of a map's cells."""
    axis = map_axis(half)
    nodes = load_canonical_face().points[:NUM_MESH_VERTICES, :2] / FACE_UNIT
    return spread_affine(nodes, np.eye(NUM_MESH_VERTICES), np.stack(np.meshgrid(axis, axis), axis=-1))


def sample(picture: np.ndarray, landmarks: np.ndarray, half: float, interpolation: int) -> np.ndarray:
    """Return a picture (S, S, ...) over the map of `half`, by landmarks (478, 2) in sizes of the picture."""
    positions = map_operator(half) @ landmarks[:NUM_MESH_VERTICES] * len(picture) - 0.5
    return cv2.remap(picture, *np.float32(positions.transpose(2, 0, 1)), interpolation, borderValue=0)


def read_maps(motion: Motion, frames: Iterator[np.ndarray]) -> list[np.ndarray]:
    """Return log colours (MAP_SIZE, MAP_SIZE, 3) over the mean face, of the frames seen from the front."""
    yaw = yaw_pitch_roll(motion.camera)[:FIRST_FRAMES, 0]
    columns = [BETA_NAMES.index(name) for name in ("jawOpen", "mouthSmileLeft", "browInnerUp")]
    rest = motion.beta[:FIRST_FRAMES, columns].sum(1)
    rows = [k for k in np.argsort(rest) if abs(yaw[k]) < MAX_YAW and motion.found[k]][:FRAMES]
    maps = []
    for k, frame in enumerate(islice(frames, max(rows, default=-1) + 1)):
        if k not in rows:
            continue
        colours = sample(frame, motion.landmarks[k, :, :2], FACE_HALF, cv2.INTER_LINEAR)
        maps.append(np.log((colours.astype(np.float32) + 8) / 263))
    return maps


def hair_counts(motion: Motion, classes: np.ndarray) -> np.ndarray:
    """Return how often each place of the head's map shows hair, skin and clothes: (MAP_SIZE, MAP_SIZE, 3)."""
    counts = np.zeros((MAP_SIZE, MAP_SIZE, 3))
    x0, y0, side = motion.crop
    width = motion.size[0]
    for k in np.flatnonzero(motion.found)[::4]:
        landmarks = (motion.landmarks[k, :, :2] * side + [x0, y0]) / width
        shown = sample(classes[k], landmarks, HEAD_HALF, cv2.INTER_NEAREST)
        counts += np.stack([shown == HAIR, (shown == SKIN) | (shown == 3) | (shown == 4), shown == CLOTHES], axis=-1)
    return counts


class Heads(NamedTuple):
    """What was measured of N heads."""

    regressors: np.ndarray  # (N, K) see `attributes`
    owners: np.ndarray  # (C,) head of each clip
    clips: list[tuple[np.ndarray, np.ndarray]]  # C of beta (F, 64) and landmarks (F, 478, 3) in the head frame
    colours: np.ndarray  # (N, MAP_SIZE, MAP_SIZE, 3) see `read_maps`; NaN if there are none
    classes: np.ndarray  # (MAP_SIZE, MAP_SIZE, 3) see `hair_counts`, of all heads


def measure(folders: list[tuple[Path, Path]]) -> Heads:
    """Read the heads of all folders."""
    clips, owners, regressors, colours, classes = [], [], [], [], np.zeros((MAP_SIZE, MAP_SIZE, 3))
    for row, paths, renders in read_heads(folders).values():
        maps: list[np.ndarray] = []
        for number, path in enumerate(paths):
            motion = Motion.load(path)
            points = landmarks_to_head_frame(motion.landmarks, motion.camera)
            front = motion.found & (np.abs(yaw_pitch_roll(motion.camera)[:, 0]) < 2 * MAX_YAW)
            if front.any():
                clips.append((motion.beta[front].astype(np.float64), points[front].astype(np.float64)))
                owners.append(len(regressors))
            if number == 0:
                with closing(iter(VideoReader(path.with_name(path.name.replace(".motion.npz", ".mp4"))))) as frames:
                    maps = read_maps(motion, frames)
            depth = renders / "depth" / f"{row['id']}.npz"
            if depth.exists():
                classes += hair_counts(motion, np.load(depth)["classes"])
        regressors.append(attributes(row))
        colours.append(np.mean(maps, axis=0) if maps else np.full((MAP_SIZE, MAP_SIZE, 3), np.nan, np.float32))
    print(len(regressors), "heads,", len(clips), "clips")
    return Heads(np.array(regressors), np.array(owners), clips, np.stack(colours), classes)


def fit(heads: Heads) -> dict[str, np.ndarray]:
    """Return the arrays of the file."""
    seen = np.isfinite(heads.colours).all((1, 2, 3))
    regressors, tones = heads.regressors[seen], heads.colours[seen]
    middle = slice(MAP_SIZE // 4, 3 * MAP_SIZE // 4)
    tones = tones - tones[:, middle, middle].mean((1, 2), keepdims=True)  # the skin's own colour and the exposure
    change = regress(regressors, tones)
    tone, beard = change[0], -change[1].mean(-1)
    tone, beard = (tone + tone[:, ::-1]) / 2, ((beard + beard[:, ::-1]) / 2).clip(0)
    tone = high_pass(tone)
    beard *= ((map_axis(FACE_HALF) - BEARD_TOP) / 0.15).clip(0, 1)[:, None]  # not brows and nostrils
    classes = cv2.GaussianBlur(heads.classes + heads.classes[:, ::-1], (0, 0), 1.0)
    classes += 1e-3 * classes.max()
    return {
        "shape": fit_shape(heads.clips, heads.owners, heads.regressors).astype(np.float16),
        "tone": tone.astype(np.float16),
        "beard": (beard / np.percentile(beard, 99)).clip(0, 1).astype(np.float16),
        "classes": (255 * classes / classes.sum(-1, keepdims=True)).round().astype(np.uint8),
    }


if __name__ == "__main__":
    pairs = [(Path(a), Path(b)) for a, b in (text.split(":") for text in sys.argv[2:])]
    np.savez_compressed(Path(sys.argv[1]), **fit(measure(pairs)))
