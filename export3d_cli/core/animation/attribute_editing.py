"""Facial attribute editing of a photo: age, weight, hair colour, beard. The changed photo is then animated like any.

Shape and skin change as `look_basis.npz` tells, linear regressions over rendered heads: landmarks move, and the photo
with them; skin gets the low-frequency colours of another age, and its own fine detail stronger or weaker. Coordinates
`where` of the maps are those of the mean face, in `FACE_UNIT`.
"""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np

from export3d_cli.core.animation.photo_canvas import FrameLayers, PhotoCanvas, VolumeRender
from export3d_cli.core.face.crop import ClipCalibration, fit_clip_crop
from export3d_cli.core.face.face_track import find_photo_face
from export3d_cli.core.face.given_landmarks import complete_landmarks
from export3d_cli.core.face.head_pose import landmarks_to_head_frame, load_canonical_face
from export3d_cli.core.face.landmarks import FACE_OVAL, LEFT_BROW, LEFT_EYE, NUM_MESH_VERTICES, OUTER_LIPS, RIGHT_EYE
from export3d_cli.core.face.matting import PersonMatting, face_positions, refine_alpha
from export3d_cli.core.face.tracker import LandmarkerTracker
from export3d_cli.core.model.masks import smooth_step
from export3d_cli.core.model.warp.photo_flow import CELL, FLOW_SIZE, WINDOW_MARGIN
from export3d_cli.core.runtime.camera import project_points
from export3d_cli.core.runtime.errors import Export3DWarning, InputError
from export3d_cli.core.runtime.weights import load_arrays, resolve_weights

# At each limit a face embedder's cosine to the photo is .79 or more on 12 people; it is .23 or less between them. 60
# years would give .74.
RANGES = {"age": (-20.0, 40.0), "weight": (-1.0, 1.0), "beard": (0.0, 1.0)}
FACE_UNIT = 0.15  # head-frame units: about half of the face's height
FACE_HALF, HEAD_HALF = 1.2, 3.0  # half sides of the maps of the face and of the head, in these units
MAP_SIZE = 96  # cells of their sides
DETAIL_SD = 1.5  # of the high-pass filter whose output counts as the skin's own lines, cells of the face's map
DETAIL_GAIN = 0.09  # change of their log contrast per decade, chosen by eye: the rendered heads tell nothing of it
SMOOTHING, FLOW_SMOOTHING, FLOW_REACH = 0.05, 0.1, 0.8  # of `spread`, half face heights
MAX_WINDOW_PX = 4_000_000  # of a head with its surroundings, at about 250 bytes each; larger photos are reduced
MOVED_FADE_PX = (0.1, 0.4)  # displacements over which the moved photo takes over
MAX_COVER = 0.56  # of the skin by a beard of 1
MASK_BLUR = 0.07  # of the skin's mask, half face heights: changes fade out inside the outline over twice as much
GRID_CELLS = 64  # of a crop side, at which maps are placed
HAIR_SIDE_PX = 320  # longer side at which hair is looked for
MIN_HAIR_PRIOR = 0.012  # probability of hair at a place below which none is looked for
FOREHEAD = -0.5  # height of the brows in the maps' coordinates
MAX_COLOUR_DISTANCE = 2.0  # standard deviations within which colours count as alike
MIN_LIKELY_SHARE = 0.1  # of a part's pixels, where hair is the likeliest
MIN_HAIR_AREA = 0.05  # of the face's area
MIN_HAIR_CONTRAST = 9.0  # Lab distance from the skin's colour, with half of L, below which it is a bald head


@dataclass(frozen=True)
class Look:
    """Changes of a look; raises `InputError` for values out of range."""

    age: float = 0.0  # years to add, -20 to 40
    weight: float = 0.0  # -1, much leaner, to 1, much heavier
    hair: str = ""  # #rrggbb, the colour that the hair shows on average; empty: its own
    beard: float = 0.0  # stubble, 0 to 1

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} must be {low:g} to {high:g}, got {getattr(self, name):g}")
        if self.hair and not re.fullmatch("#[0-9a-fA-F]{6}", self.hair):
            raise InputError(f"hair must be a colour such as #5b3a1e, got {self.hair[:40]!r}")

    def __bool__(self) -> bool:
        return self != Look()

    @classmethod
    def parse(cls, text: str) -> Look:
        """Return the look of a text such as `age=15,weight=-.3,hair=#5b3a1e`; raises `InputError`."""
        values: dict[str, str | float] = {}
        for name, _, value in (part.partition("=") for part in text.split(",")):
            names = [field.name for field in fields(cls)]
            if name not in names:
                near = difflib.get_close_matches(name, names, 1, 0)[0]
                raise InputError(f"there is no attribute {name[:40]!r}: did you mean {near}?")
            try:
                values[name] = value if name == "hair" else float(value)
            except ValueError:
                raise InputError(f"{name} must be a number, got {value[:40]!r}") from None
        return cls(**values)  # type: ignore[arg-type]


class _Basis(NamedTuple):
    """The arrays of `look_basis.npz`, made by `weights/make_look_basis.py`."""

    shape: np.ndarray  # (2, 478, 3) change of the landmarks per decade, and per unit of weight, head frame
    tone: np.ndarray  # (n, n, 3) change of log colours of the skin per decade
    beard: np.ndarray  # (n, n) density of stubble, 0 to 1
    classes: np.ndarray  # (n, n, 3) uint8 probability, / 255, that a place of the person shows hair, skin and clothes


@functools.lru_cache(maxsize=1)
def _load_basis() -> _Basis:
    arrays = load_arrays(resolve_weights("look_basis"))
    return _Basis(**{name: arrays[name].astype(np.float32) for name in _Basis._fields})


def change_look(photo: np.ndarray, look: Look, tracker: LandmarkerTracker, matting: PersonMatting, *,
                face: str = "largest", landmarks: np.ndarray | None = None,
                name: str = "the photo") -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return a photo, uint8 (H, W, 3), with another look of one person, and that person's landmarks in it.

    The landmarks are (478, 3) in pixels; the arguments are those of `Animator.portrait`. Pixels that show neither the
    person nor what the person uncovers keep their values. Photos of a very large head are reduced, with a warning.
    """
    target = (find_photo_face(tracker, photo, name=name, face=face) if landmarks is None
              else tracker.face_at(complete_landmarks(landmarks)))  # fmt: skip
    size = (photo.shape[1], photo.shape[0])
    x0, y0, side = (float(round(v)) for v in fit_clip_crop(target.landmarks[None], size))
    area = float(np.prod([min(length, (1 + 2 * WINDOW_MARGIN) * side) for length in size]))
    if area > 1.1 * MAX_WINDOW_PX:  # so that one reduction suffices
        scale = (MAX_WINDOW_PX / area) ** 0.5
        photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        warnings.warn(f"the head in {name} is large: the photo is reduced to {photo.shape[1]}x{photo.shape[0]} pixels",
                      Export3DWarning, stacklevel=2)  # fmt: skip
        return change_look(photo, look, tracker, matting, landmarks=scale * target.landmarks, name=name)
    motion = tracker.make_motion([target], Fraction(25), size, clip=ClipCalibration((x0, y0, side)))
    faces = tuple(face_positions(target, tracker.find_all(photo), (x0, y0, side)))
    canvas = PhotoCanvas.from_photo(photo.copy(), (x0, y0, side), partial(matting.alpha, hair_strands=True), faces)
    basis, rows, columns = _load_basis(), *canvas.window
    points = landmarks_to_head_frame(motion.landmarks, motion.camera)[0]
    change = look.age / 10 * basis.shape[0] + look.weight * basis.shape[1]
    before, new = (project_points(motion.camera[0], p) for p in (points, points + change))
    before, after = before[:NUM_MESH_VERTICES], new[:NUM_MESH_VERTICES]
    part, alpha = (
        _move_person(canvas, before, after) if change.any() else (photo[canvas.window], canvas.alpha[canvas.window])
    )
    skin = _Skin.place(after * side + [x0 - columns.start, y0 - rows.start], part.shape[:2], side)
    part = part.astype(np.float32)
    hair = _find_hair(part, alpha, skin) if look.hair or look.beard else None
    if look.age:
        part = _age_skin(part, skin, basis.tone, look.age / 10)
    if look.hair and hair is None:
        warnings.warn(f"no hair was found in {name}: its colour stays as it is", Export3DWarning, stacklevel=2)
    if look.hair and hair is not None:
        part = _dye(part, hair, look.hair)
    if look.beard:
        part = _grow_beard(part, skin, basis.beard, look.beard, hair)
    result = photo.copy()
    result[canvas.window] = np.rint(part.clip(0, 255))
    moved = target.landmarks.copy()
    moved[:, :2] -= side * _shift_at(new, before, after)
    return result, moved


def spread(nodes: np.ndarray, values: np.ndarray, at: np.ndarray, smooth: float, reach: float) -> np.ndarray:
    """Continue values (N, C) at nodes (N, 2) smoothly to positions (..., 2).

    They are averaged over about `smooth`, and fade to 0 farther than `reach` from the nodes.
    """
    points, result = at.reshape(-1, 2).astype(np.float32), []
    for part in np.array_split(points, max(1, len(points) // 4096)):
        squared = np.square(part[:, None] - nodes[None].astype(np.float32)).sum(-1)
        weight = 1 / np.square(squared + np.float32(smooth**2))
        result.append(weight @ values.astype(np.float32) / (weight.sum(1, keepdims=True) + len(nodes) / reach**4))
    return np.concatenate(result).reshape(*at.shape[:-1], -1)


def spread_affine(nodes: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Do `spread` for positions as values: far from the nodes they follow the best affine map."""
    basis = np.hstack([nodes, np.ones((len(nodes), 1))])
    affine = np.linalg.lstsq(basis, values, rcond=None)[0]  # (3, C)
    return at @ affine[:2] + affine[2] + spread(nodes, values - basis @ affine, at, SMOOTHING, 1.0)


def _shift_at(places: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the way (..., 2) from places of the moved photo to what they show, by landmarks (468, 2)."""
    unit = np.ptp(after, axis=0).max() / 2
    return spread(after / unit, before - after, places / unit, FLOW_SMOOTHING, FLOW_REACH)


def _move_person(canvas: PhotoCanvas, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the canvas's window, uint8 (h, w, 3), and alpha, with landmarks moved, (468, 2) both in crop units."""
    axis = (np.arange(FLOW_SIZE) + 0.5) * CELL - WINDOW_MARGIN
    shift = _shift_at(np.stack(np.meshgrid(axis, axis), axis=-1), before, after)
    nothing = np.zeros((FLOW_SIZE, FLOW_SIZE), np.float32)
    blank = np.zeros((1, 1, 3), np.uint8)
    colours, alpha = canvas.person(FrameLayers(blank, shift, nothing, VolumeRender(blank, nothing, nothing, 1.0)))
    moved = cv2.blendLinear(colours, canvas.plate, alpha, 1 - alpha)
    (x0, y0, side), (rows, columns) = canvas.square, canvas.window
    x, y = (
        ((np.arange(s.start, s.stop) + 0.5 - o) / side + WINDOW_MARGIN) / CELL - 0.5
        for s, o in ((columns, x0), (rows, y0))
    )
    distance = (side * np.linalg.norm(shift, axis=-1)).astype(np.float32)
    columns_of, rows_of = (part.astype(np.float32) for part in np.meshgrid(x, y))
    weight = smooth_step(cv2.remap(distance, columns_of, rows_of, cv2.INTER_LINEAR), *MOVED_FADE_PX)
    return cv2.blendLinear(moved, np.ascontiguousarray(canvas.photo[canvas.window]), weight, 1 - weight), alpha


class _Skin(NamedTuple):
    """A face in a window of h x w pixels."""

    where: np.ndarray  # float32 (h, w, 2) coordinates of the maps
    mask: np.ndarray  # float32 (h, w) 1 on the skin of the face, 0 in eyes, lips and outside
    lower: np.ndarray  # bool (h, w) the face from the brows down
    unit: float  # half of the face's height, pixels

    @classmethod
    def place(cls, landmarks: np.ndarray, shape: tuple[int, int], side: float) -> _Skin:
        """Place the maps by landmarks (468, 2) in pixels of the window; `side` is that of the face crop."""
        canonical = load_canonical_face().points[:NUM_MESH_VERTICES, :2] / FACE_UNIT
        unit = float(np.ptp(landmarks, axis=0).max()) / 2
        height, width = (max(2, round(n / side * GRID_CELLS)) for n in shape)
        y, x = ((np.arange(n) + 0.5) * length / n for n, length in ((height, shape[0]), (width, shape[1])))
        where = spread_affine(landmarks / unit, canonical, np.stack(np.meshgrid(x, y), axis=-1) / unit)
        where = cv2.resize(where.astype(np.float32), shape[::-1], interpolation=cv2.INTER_LINEAR)
        mask = np.zeros(shape, np.uint8)
        for points, value in ((FACE_OVAL, 255), (LEFT_EYE, 0), (RIGHT_EYE, 0), (OUTER_LIPS, 0)):
            cv2.fillPoly(mask, [np.int32(landmarks[list(points)].round())], value)
        soft = _blur(mask.astype(np.float32) / 255, MASK_BLUR * unit)
        below = canonical[:, 1] > canonical[list(LEFT_BROW), 1].min()
        lower = cv2.fillConvexPoly(np.zeros(shape, np.uint8), cv2.convexHull(np.int32(landmarks[below].round())), 1)
        return cls(where, (2 * soft - 1).clip(0), lower > 0, unit)

    def sample(self, values: np.ndarray, half: float) -> np.ndarray:
        """Return a map (n, n, ...) of `half` side in the window, (h, w, ...)."""
        index = (self.where / half + 1) / 2 * len(values) - 0.5
        return cv2.remap(values, index[..., 0], index[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _blur(image: np.ndarray, sd: float) -> np.ndarray:
    """Blur an image (h, w) by a Gaussian, a wide one at a smaller size."""
    scale = min(1.0, 4 / sd)
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), scale * sd)
    return cv2.resize(small, image.shape[::-1], interpolation=cv2.INTER_LINEAR)


def _age_skin(part: np.ndarray, skin: _Skin, tone: np.ndarray, decades: float) -> np.ndarray:
    """Return a window with the skin's colours and contrast of detail of another age."""
    log = np.log(part + 8)
    luma = log.mean(-1)
    cell = skin.unit * 2 * FACE_HALF / MAP_SIZE
    fine = luma - _blur(luma, DETAIL_SD * cell)
    fine *= np.exp(-((fine / 0.2) ** 2))  # not edges: brows, nostrils, strands of hair
    tone = skin.sample(tone, FACE_HALF)
    face = part[skin.mask > 0.5]
    saturation = float(np.ptp(face, axis=-1).mean() / max(1.0, face.max(-1).mean())) if len(face) else 0.0
    grey = tone.mean(-1, keepdims=True)
    tone = grey + (tone - grey) * min(1.0, saturation / 0.3)  # a grey photo stays grey
    change = tone * decades + ((np.exp(DETAIL_GAIN * decades) - 1) * fine)[..., None]
    return np.exp(log + change * skin.mask[..., None]) - 8


def _find_hair(part: np.ndarray, alpha: np.ndarray, skin: _Skin) -> np.ndarray | None:
    """Return where a window shows the person's hair, float32 (h, w), or None if there is none."""
    scale = min(1.0, HAIR_SIDE_PX / max(part.shape[:2]))

    def shrink(image: np.ndarray) -> np.ndarray:
        return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)

    prior = shrink(skin.sample(_load_basis().classes, HEAD_HALF))[..., 0] / 255
    person, lower = shrink(alpha) > 0.5, shrink(skin.lower.astype(np.float32)) > 0.5
    small = shrink(part).clip(0, 255).astype(np.uint8)
    cheeks = shrink(skin.mask) > 0.9
    if cheeks.sum() < 9:
        return None
    small[~person] = np.median(small[cheeks], axis=0)
    forehead = (prior < MIN_HAIR_PRIOR) & (shrink(skin.where)[..., 1] < FOREHEAD)  # which strands may cover
    possible = person & ~lower & ((prior >= MIN_HAIR_PRIOR) | forehead)
    lab = cv2.cvtColor(np.float32(small) / 255, cv2.COLOR_RGB2LAB)
    seeds = lab[possible & (prior > 0.5)]
    if len(seeds) < max(9, MIN_HAIR_AREA * lower.sum()):
        return None
    likely, alike = prior > 0.5, _is_alike(lab, seeds)
    skinlike = _is_alike(lab, lab[cheeks]) & ~likely & ~alike
    labels = np.where(likely | alike, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    labels = np.where(possible & ~skinlike & (alike | ~forehead), labels, cv2.GC_BGD)
    labels = labels.astype(np.uint8)
    cv2.setRNGSeed(0)  # of this thread; nothing else of this package draws from it
    cv2.grabCut(small, labels, [0, 0, 1, 1], np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_MASK)
    found = labels == cv2.GC_PR_FGD
    parts = cv2.connectedComponents(found.astype(np.uint8))[1]
    share = np.bincount(parts.ravel(), likely.ravel()) / np.bincount(parts.ravel())
    hair = found & (share > MIN_LIKELY_SHARE)[parts]  # other parts are clothes of the hair's colour
    if hair.sum() < MIN_HAIR_AREA * lower.sum():
        return None
    if np.linalg.norm((lab[hair].mean(0) - lab[cheeks].mean(0)) * (0.5, 1, 1)) < MIN_HAIR_CONTRAST:
        return None
    mask = cv2.GaussianBlur(hair.astype(np.float32), (0, 0), 1.0)
    mask = cv2.resize(mask, part.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return refine_alpha(part.clip(0, 255).astype(np.uint8), mask, max(2, round(0.06 * skin.unit))) * alpha


def _is_alike(lab: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return which Lab colours (h, w, 3) are like those of samples (N, 3), bool (h, w)."""
    offset = lab - np.median(samples, axis=0)
    precision = np.linalg.inv(np.cov(samples.T) + np.eye(3))
    return np.einsum("hwi,ij,hwj->hw", offset, precision, offset) < MAX_COLOUR_DISTANCE**2


def _dye(part: np.ndarray, hair: np.ndarray, colour: str) -> np.ndarray:
    """Return a window with another mean colour of the hair, #rrggbb; its lights and shades stay."""
    lab = cv2.cvtColor((part.clip(0, 255) / 255).astype(np.float32), cv2.COLOR_RGB2LAB)
    rgb = np.array([[list(bytes.fromhex(colour[1:]))]], np.float32) / 255
    target = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0, 0]
    mean = (lab * hair[..., None]).sum((0, 1)) / hair.sum()
    contrast = np.clip(np.sqrt(max(target[0], 5) / max(mean[0], 5)), 0.6, 1.7)
    change = (lab[..., 0] - mean[0]) * contrast
    room = max(1.0, 0.6 * (100 - target[0]))  # of highlights, which are compressed
    lightness = target[0] + np.where(change > 0, room * (1 - np.exp(-change / room)), change).clip(-target[0])
    paler = np.minimum(lightness / max(target[0], 5), (100 - lightness) / max(100 - target[0], 5)).clip(0.2, 1)
    dyed = np.dstack([lightness, paler[..., None] * target[1:] + 0.3 * (lab[..., 1:] - mean[1:])]).astype(np.float32)
    return part + (255 * cv2.cvtColor(dyed, cv2.COLOR_LAB2RGB) - part) * hair[..., None]


def _grow_beard(part: np.ndarray, skin: _Skin, density: np.ndarray, strength: float,
                hair: np.ndarray | None) -> np.ndarray:  # fmt: skip
    """Return a window with stubble in the hair's colour."""
    cover = skin.sample(density, FACE_HALF) * skin.mask * (MAX_COVER * strength)
    shade = _blur(part.mean(-1), 0.1 * skin.unit)
    face = skin.mask > 0.5
    colour = 0.25 * np.median(part[face], axis=0) if face.any() else np.zeros(3)
    if hair is not None:
        colour = np.minimum((part * hair[..., None]).sum((0, 1)) / hair.sum() * 0.8, 90)
    light = shade / max(1.0, float(shade[face].mean()) if face.any() else 1.0)
    noise = np.random.default_rng(0).normal(size=part.shape[:2]).astype(np.float32)
    strokes = cv2.GaussianBlur(noise, (0, 0), sigmaX=max(0.5, 0.005 * skin.unit), sigmaY=max(0.8, 0.014 * skin.unit))
    cover = (cover * (1 + 0.3 / float(strokes.std()) * strokes)).clip(0, 1)[..., None]
    return part * (1 - cover) + (colour * light[..., None]) * cover
