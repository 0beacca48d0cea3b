"""Sampler of people who do not exist: a linear model of the shape and the texture of faces (beyond the paper).

Shapes are landmarks in the head frame, textures are faces warped to the mean shape, both as principal components of
rendered heads, with scores of unit variance. A sampled face is put into the picture of one of these heads, an exemplar,
which supplies hair, neck, clothes, background and light: its picture is warped to the new shape, and the difference of
the textures is added, so that no seam can appear.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.model.checkpoint import read_tensors, write_tensors
from export3d_cli.core.runtime.camera import project_points
from export3d_cli.core.runtime.errors import InputError, WeightsError

FORMAT = "export3d-sampler-1"
# Landmarks that move pictures: outline, brows, eyes, lips, and the ridge and the wings of the nose.
CONTROL_POINTS = [
    *mesh.FACE_OVAL[::2], *mesh.RIGHT_BROW[::2], *mesh.LEFT_BROW[::2], *mesh.RIGHT_EYE[::2], *mesh.LEFT_EYE[::2],
    *mesh.OUTER_LIPS[::2], 1, 2, 4, 5, 6, 48, 64, 98, 168, 195, 278, 294, 327,
]  # fmt: skip
WARP_RADIUS = 0.16  # standard deviation of the kernels that interpolate their displacements, in widths of the face
WARP_RIDGE = 0.02  # of the interpolation, since tracked landmarks are noisy
WARP_STEP = 4  # pixels between computed positions
SHARED_TEXTURES = 6  # first components, the colour of the skin and the light, which must be the exemplar's
SKIN_HUES = (0.4, 0.8)  # radians from the skin's hue up to which colours are kept and from which they are turned
MAX_SIDE = 1024  # of an exemplar's picture, pixels
AGE_TOLERANCE = 12.0  # years by which an exemplar's age may differ from a sampled one's


@dataclass(frozen=True)
class SampledFace:
    """Code of a person who does not exist."""

    exemplar: int
    shape: np.ndarray  # (K,) scores
    texture: np.ndarray  # (K',) scores
    mirrored: bool
    hue: float  # radians by which the colours of clothes, dyed hair and background are turned


class HeadSampler:
    """The linear model and its exemplars, read from weights of the stage `sampler`."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        # shape_mean (478, 3), shape_basis (K, 478, 3), texture_basis (K', h, w, 3) in 0..1, texture_points (478, 2) in
        # its pixels; age (3 + K + K'): lowest, mean and highest age of the heads, then its gradient, 0 if not known; of
        # E exemplars: pictures (bytes of JPEG files) and their ends (E,), landmarks (E, 478, 2) in pixels,
        # camera (E, 25), shape (E, K), texture (E, K'), years (E,)
        self.arrays = {name: x if x.dtype.kind in "iu" else x.astype(np.float32) for name, x in arrays.items()}
        _check_arrays(self.arrays)

    @classmethod
    def load(cls, path: Path) -> HeadSampler:
        """Read a weights file; raises `WeightsError`."""
        tensors, header = read_tensors(path)
        if header.get("format") != FORMAT:
            raise WeightsError(f"{path} holds no sampler: format is {header.get('format')!r}, not {FORMAT!r}")
        return cls({name: tensor.numpy() for name, tensor in tensors.items()})

    @staticmethod
    def save(path: Path, arrays: dict[str, np.ndarray], record: dict[str, Any], *, licence: str) -> None:
        """Write a weights file atomically; floating-point arrays are stored as float16."""
        header = {"format": FORMAT, "config": "{}", "record": json.dumps(record), "licence": licence}
        halves = {name: x.astype(np.float16) if x.dtype.kind == "f" else x for name, x in arrays.items()}
        write_tensors(path, {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in halves.items()}, header)

    @property
    def ages(self) -> tuple[float, float]:
        """Lowest and highest age that can be sampled; (0, 0) if ages are not known."""
        low, _, high = self.arrays["age"][:3]
        return float(low), float(high)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        photo = self._photo(0)
        return photo.shape[1], photo.shape[0]

    def draw(self, seed: int, truncation: float = 0.75, age: tuple[float, float] | None = None) -> SampledFace:
        """Sample a person; `truncation` scales the distance from the mean face, `age` is in years."""
        a, rng = self.arrays, np.random.default_rng(seed)
        allowed, years = np.arange(len(a["years"])), 0.0
        if age is not None:
            low, high = self.ages
            if not low <= age[0] <= age[1] <= high:
                known = f"{low:.0f}:{high:.0f} or a part of it" if high else "no --age, these weights know no ages"
                raise InputError(f"age {age[0]:g}:{age[1]:g} cannot be sampled: give {known}")
            years = rng.uniform(*age)
            distance = np.abs(a["years"] - years)
            allowed = allowed[distance <= max(AGE_TOLERANCE, distance.min())]
        exemplar = int(rng.choice(allowed))
        own = np.concatenate([a["shape"][exemplar], a["texture"][exemplar]])
        count, free = a["shape"].shape[1], np.ones(len(own))
        free[count : count + SHARED_TEXTURES] = 0
        code = free * truncation * rng.standard_normal(len(own)) + (1 - free) * own
        if age is not None:  # the nearest code of that age
            gradient = a["age"][3:]
            direction = gradient * free
            code = code + direction * (years - a["age"][1] - code @ gradient) / max(float(direction @ gradient), 1e-6)
        mirrored, hue = bool(rng.random() < 0.5), rng.uniform(-np.pi, np.pi)
        return SampledFace(exemplar, code[:count], code[count:], mirrored, hue)

    def mix(self, first: SampledFace, second: SampledFace, at: float) -> SampledFace:
        """Return the person at `at`, 0..1, between two: the face moves steadily, the exemplar changes in the middle."""
        count = SHARED_TEXTURES
        outer = first if at < 0.5 else second
        shape = (1 - at) * first.shape + at * second.shape
        texture = (1 - at) * first.texture + at * second.texture
        texture[:count] = outer.texture[:count]
        return replace(outer, shape=shape, texture=texture)

    def render(self, face: SampledFace) -> np.ndarray:
        """Return the picture of a person, uint8 (H, W, 3)."""
        a, e = self.arrays, face.exemplar
        photo = self._photo(e)
        camera, side = a["camera"][e], photo.shape[0]
        with np.errstate(all="ignore"):
            own, new = (
                project_points(camera, a["shape_mean"] + np.tensordot(scores, a["shape_basis"], 1))
                for scores in (a["shape"][e], face.shape)
            )
            landmarks = a["landmarks"][e] + (new - own) * side
            sets = np.stack([landmarks, a["landmarks"][e], a["texture_points"]])
            if not ((np.abs(sets) < 10 * MAX_SIDE).all() and (np.ptp(sets, axis=1) > 1).all()):
                raise WeightsError(f"the sampler's weights are damaged (landmarks of exemplar {e}): "
                                   "download them again")  # fmt: skip
        difference = np.tensordot(face.texture - a["texture"][e], a["texture_basis"], 1).astype(np.float32)
        difference = warp_picture(difference, landmarks, a["texture_points"], side)
        photo = warp_picture(photo.astype(np.float32), landmarks, a["landmarks"][e], side, sharp=True)
        photo = turn_hues(photo, landmarks, face.hue)
        picture = (photo + 255 * difference).clip(0, 255).round().astype(np.uint8)
        return np.ascontiguousarray(picture[:, ::-1] if face.mirrored else picture)

    def _photo(self, exemplar: int) -> np.ndarray:
        start, end = (0, *self.arrays["ends"].tolist())[exemplar : exemplar + 2]
        try:
            with Image.open(io.BytesIO(self.arrays["pictures"][start:end].tobytes()), formats=["JPEG"]) as photo:
                if photo.width == photo.height <= MAX_SIDE:
                    return np.asarray(photo.convert("RGB"))
                reason = f"it has {photo.width} x {photo.height} pixels, not a square of at most {MAX_SIDE}"
        except (OSError, ValueError, Image.DecompressionBombError):
            reason = "it is no JPEG"
        raise WeightsError(f"a picture in the sampler's weights is damaged ({reason}): download them again")


def _check_arrays(arrays: dict[str, np.ndarray]) -> None:
    """Raise `WeightsError` unless all arrays are there and fit together: the file may come from anyone."""
    try:
        K, T, E = len(arrays["shape_basis"]), len(arrays["texture_basis"]), len(arrays["ends"])
        shapes = {
            "shape_mean": (mesh.NUM_LANDMARKS, 3), "shape_basis": (K, mesh.NUM_LANDMARKS, 3), "age": (3 + K + T,),
            "texture_basis": (T, *arrays["texture_basis"].shape[1:3], 3), "texture_points": (mesh.NUM_LANDMARKS, 2),
            "landmarks": (E, mesh.NUM_LANDMARKS, 2), "camera": (E, 25), "shape": (E, K), "texture": (E, T),
            "years": (E,), "ends": (E,), "pictures": (int(arrays["ends"][-1]),),
        }  # fmt: skip
        wrong = [name for name, shape in shapes.items() if arrays[name].shape != shape]
        wrong += [name for name, x in arrays.items() if not np.isfinite(x).all()]
    except (KeyError, IndexError, TypeError) as error:
        wrong = [str(error)]
    if wrong:
        raise WeightsError(f"the sampler's weights are damaged ({', '.join(wrong)}): download them again")


def turn_hues(photo: np.ndarray, landmarks: np.ndarray, angle: float) -> np.ndarray:
    """Turn the hues of a photo (H, W, 3) in 0..255, float32, by an angle, but not on the face and near its hue."""
    oval = landmarks[list(mesh.FACE_OVAL)].round().astype(np.int32)
    face = cv2.fillPoly(np.zeros(photo.shape[:2], np.float32), [oval], 1.0)
    colours = cv2.cvtColor(photo.clip(0, 255) / 255, cv2.COLOR_RGB2YCrCb)
    chroma = (colours[..., 1:] - 0.5) @ np.array([1, 1j], np.complex64)
    relative = chroma * np.exp(-1j * np.angle((chroma * face).sum()))
    share = ((np.abs(np.angle(relative)) - SKIN_HUES[0]) / (SKIN_HUES[1] - SKIN_HUES[0])).clip(0, 1)
    share = cv2.blur((share * (1 - cv2.GaussianBlur(face, (0, 0), 2))).astype(np.float32), (3, 3))
    chroma = chroma * (1 + share * (np.exp(1j * angle) - 1))  # turning edges by a part of the angle would colour them
    colours[..., 1], colours[..., 2] = chroma.real + 0.5, chroma.imag + 0.5
    return np.asarray(cv2.cvtColor(colours, cv2.COLOR_YCrCb2RGB) * 255)


def warp_picture(picture: np.ndarray, target: np.ndarray, source: np.ndarray, side: int, *,
                 sharp: bool = False) -> np.ndarray:  # fmt: skip
    """Return a picture (h, w, C) with its landmarks `source` moved to `target`, (side, side, C).

    Outside it is 0, or with `sharp`, which interpolates by cubes, mirrored.
    """
    x, y = cv2.split(warp_grid(target, source, side))
    interpolation = cv2.INTER_CUBIC if sharp else cv2.INTER_LINEAR
    border = cv2.BORDER_REFLECT if sharp else cv2.BORDER_CONSTANT
    return np.asarray(cv2.remap(picture, x, y, interpolation, borderMode=border))


def warp_grid(target: np.ndarray, source: np.ndarray, side: int) -> np.ndarray:
    """Return for each pixel of a square the position (side, side, 2) that it shows if `source` moves to `target`.

    Landmarks (478, 2) are in pixels. A similarity, and on it Gaussian kernels at the control points, which fade outside
    the face.
    """
    target, source = target[CONTROL_POINTS].astype(np.float64), source[CONTROL_POINTS].astype(np.float64)
    radius = WARP_RADIUS * np.ptp(target[:, 0])
    complex_plane, centre = np.array([1, 1j]), target.mean(0)
    x, y = (target - centre) @ complex_plane, (source - source.mean(0)) @ complex_plane
    factor = (np.conj(x) * y).sum() / (np.abs(x) ** 2).sum()

    def kernels(points: np.ndarray) -> np.ndarray:
        squared = ((points[:, None] - target) ** 2).sum(-1)
        return np.asarray(np.exp(-0.5 / radius**2 * squared))

    def similarity(points: np.ndarray) -> np.ndarray:
        z = (points - centre) @ complex_plane * factor
        return np.stack([z.real, z.imag], axis=-1) + source.mean(0)

    matrix = kernels(target) + WARP_RIDGE * np.eye(len(target))
    weights = np.linalg.solve(matrix, source - similarity(target))
    cells = (np.arange(side // WARP_STEP) + 0.5) * WARP_STEP - 0.5
    points = np.stack(np.meshgrid(cells, cells), axis=-1).reshape(-1, 2)
    grid = similarity(points) + kernels(points) @ weights
    grid = grid.reshape(len(cells), len(cells), 2).astype(np.float32)
    return np.asarray(cv2.resize(grid, (side, side), interpolation=cv2.INTER_LINEAR))
