"""Motion: what a face does over the frames of a clip; its file, its mirror image, and its frames at another rate."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli import __version__
from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.head_pose import head_frame_to_landmarks, landmarks_to_head_frame, load_canonical_face
from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS, check_file, write_atomic

_READ_ERRORS: tuple[type[Exception], ...] = (InputError, *DAMAGED_ZIP_ERRORS)
MAX_BYTES = 2**31  # of an unpacked motion file: about four hours at 25 frames a second
FPS_RANGE = (Fraction(1, 1000), Fraction(1000))  # accepted frames a second
MAX_VALUE = 1e6  # largest absolute value accepted in a motion file
_ROWS = ("beta", "camera", "landmarks", "found")  # fields of a file with a row for each frame


@dataclass(frozen=True, eq=False)
class Motion:
    """What a face does over T frames.

    A driver needs only `beta` and `camera`; frames show its 478 landmarks, if any, where beta tells less. So leave the
    landmarks out, (T, 0, 3), where `beta` is changed.
    """

    beta: np.ndarray  # (T, 64) float32
    camera: np.ndarray  # (T, 25) float32, head frame
    landmarks: np.ndarray  # (T, N, 3) float32, crop units (see `head_pose`); N is 478, for drivers also 68 or 0
    found: np.ndarray  # (T,) bool: whether the frame shows a face; rows without one repeat the last face found
    fps: Fraction
    crop: tuple[float, float, float]  # x0, y0, side in pixels of the frames; may reach outside them
    size: tuple[int, int]  # width, height of the frames
    # (T, 4) float32, x and y in crop units, roll, log size, see `TorsoTracker`; NaN: not seen. Files do not hold it.
    torso: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))  # without rows: all NaN
    # (T, d) float32, motion code read from pixels, see `PlaneDict`; (T, 0): not read. Files do not hold it.
    code: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def __post_init__(self) -> None:
        if not len(self.code):
            object.__setattr__(self, "code", np.zeros((len(self.beta), 0), np.float32))
        if not len(self.torso):
            object.__setattr__(self, "torso", np.full((len(self.beta), 4), np.nan, np.float32))

    def __len__(self) -> int:
        return len(self.beta)

    @property
    def head_landmarks(self) -> np.ndarray:
        """The landmarks in the head frame, (T, 478, 3) float32; (T, 0, 3) without 478 landmarks."""
        if self.landmarks.shape[1] != NUM_LANDMARKS:
            return np.zeros((len(self), 0, 3), np.float32)
        return landmarks_to_head_frame(self.landmarks, self.camera)

    def with_head(self, camera: np.ndarray, head_landmarks: np.ndarray) -> Motion:
        """Return the motion with other cameras (T, 25) and `head_landmarks`; (T, 0, 3) leaves the landmarks."""
        landmarks = head_frame_to_landmarks(head_landmarks, camera) if head_landmarks.size else self.landmarks
        return replace(self, camera=camera, landmarks=landmarks)

    def select(self, rows: np.ndarray) -> Motion:
        """Return the motion of some frames only; `rows` are their indices."""
        return replace(self, **{key: getattr(self, key)[rows] for key in (*_ROWS, "torso", "code")})

    @staticmethod
    def concatenate(motions: Sequence[Motion]) -> Motion:
        """Join motions one after another; rate, crop and size are those of the first."""
        rows = {key: np.concatenate([getattr(m, key) for m in motions]) for key in (*_ROWS, "torso", "code")}
        return replace(motions[0], **rows)  # type: ignore[arg-type]

    def save(self, path: Path) -> None:
        """Write a `.motion.npz` file atomically."""
        arrays = {
            **{key: getattr(self, key) for key in _ROWS},
            "fps": np.array([self.fps.numerator, self.fps.denominator], dtype=np.int64),
            "crop": np.array(self.crop, dtype=np.float64), "size": np.array(self.size, dtype=np.int64),
            "version": np.array(__version__),
        }  # fmt: skip
        with write_atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub of its flag

    @classmethod
    def load(cls, path: Path, *, landmark_counts: tuple[int, ...] = (NUM_LANDMARKS,)) -> Motion:
        """Read a `.motion.npz` file with an accepted number of landmarks; raises `InputError` for any other file."""
        path = Path(path)

        def numbers(name: str, kind: type) -> np.ndarray:
            array = data[name]
            if array.dtype.kind not in "biuf":
                raise TypeError(f"{name} is not an array of numbers")
            with np.errstate(all="ignore"):  # values too large for float32 become infinite, which is refused below
                return array.astype(kind, copy=False)

        try:
            check_file(path, MAX_BYTES)
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES >> 20} MiB when unpacked")
            with warnings.catch_warnings(), np.load(path, allow_pickle=False) as data:
                warnings.simplefilter("ignore")  # about headers written by Python 2: an error is one line
                beta, camera, landmarks = (numbers(name, np.float32) for name in ("beta", "camera", "landmarks"))
                fps, crop = Fraction(*numbers("fps", int).tolist()), tuple(numbers("crop", float).tolist())
                found, size = numbers("found", bool), tuple(numbers("size", int).tolist())
        except _READ_ERRORS as error:
            raise InputError(f"{path} is not a motion file ({error}): make one with `export3d preprocess`") from error
        T = len(beta) if beta.ndim else 0
        shapes = (beta.shape, camera.shape, landmarks.shape, found.shape)
        if T == 0 or shapes not in [((T, 64), (T, 25), (T, count, 3), (T,)) for count in landmark_counts]:
            expected = f"(T, 64), (T, 25), (T, {landmark_counts[0]}, 3), (T,)"
            raise InputError(f"{path} is a motion file of shapes {shapes}: expected {expected}")
        if len(crop) != 3 or len(size) != 2:
            raise InputError(f"{path} holds a crop {crop} of frames {size}: expected 3 and 2 numbers")
        if not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:
            raise InputError(f"{path} has a rate of {float(fps):.3g} frames/s: it must be 1/1000 to 1000")
        rotation = camera[:, :16].reshape(-1, 4, 4)[:, :3, :3]
        arrays = (beta, camera, landmarks, crop)
        is_valid = all(np.abs(array).max(initial=0) <= MAX_VALUE for array in arrays)  # False for NaN
        if not is_valid or np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max() > 0.01:
            raise InputError(f"{path} holds numbers not finite or beyond {MAX_VALUE:g}, or cameras without a rotation")
        return cls(beta, camera, landmarks, found, fps, crop, size)


def resample_rows(count: int, source_fps: Fraction, fps: Fraction, start: float, duration: float | None) -> np.ndarray:
    """Return the row shown in each frame at `fps`, of `count` rows at `source_fps` from `start` s for `duration` s."""
    first = round(start * source_fps)
    last = count if duration is None else min(count, first + round(duration * source_fps))
    if first >= last:
        return np.zeros(0, dtype=np.int64)
    frames = max(1, round((last - first) * fps / source_fps))
    return first + np.array([int(t * source_fps / fps) for t in range(frames)]).clip(max=last - first - 1)


_OTHER_SIDE = {"Left": "Right", "Right": "Left"}
MIRROR_ORDER = np.array([
    BETA_NAMES.index(re.sub("(Left|Right)$", lambda side: _OTHER_SIDE[side[0]], name)) for name in BETA_NAMES
])  # fmt: skip
_MIRROR_SIGN = np.array([-1.0 if name.startswith("irisX") else 1.0 for name in BETA_NAMES], dtype=np.float32)


def mirror_beta(beta: np.ndarray) -> np.ndarray:
    """Return beta (..., 64) of the mirrored face."""
    return beta[..., MIRROR_ORDER] * _MIRROR_SIGN


def mirror_camera(camera: np.ndarray) -> np.ndarray:
    """Return the camera (..., 25) that sees the mirrored head in the mirrored image."""
    flip = np.array([-1.0, 1.0, 1.0, 1.0], dtype=np.float32)
    mirrored = camera.copy()
    pose = camera[..., :16].reshape(*camera.shape[:-1], 4, 4)
    mirrored[..., :16] = (pose * flip[:, None] * flip).reshape(*camera.shape[:-1], 16)
    return mirrored


def mirror_motion(motion: Motion) -> Motion:
    """Return the motion of the mirrored face in the mirrored image."""
    beta, camera, landmarks = mirror_beta(motion.beta), mirror_camera(motion.camera), motion.landmarks
    if landmarks.shape[1] == NUM_LANDMARKS:
        landmarks = mirror_landmarks(landmarks)
    torso = (motion.torso * (-1, 1, -1, 1) + (1, 0, 0, 0)).astype(np.float32)
    return replace(motion, beta=beta, camera=camera, landmarks=landmarks, torso=torso)


def mirror_landmarks(landmarks: np.ndarray) -> np.ndarray:
    """Return the landmarks (..., 478, 3), crop units, of the mirrored image."""
    mirrored = landmarks[..., load_canonical_face().mirror, :].copy()
    mirrored[..., 0] = 1 - mirrored[..., 0]
    return mirrored
