"""Landmarks -> beta (64) and camera (25); the fixed clip crop; the Motion file.

beta is 52 ARKit blendshape coefficients (`ARKIT_NAMES`), then the 12 `MEASURES`, taken in the head frame and divided by
the inter-ocular distance. The camera is EG3D's intrinsics and the cam2world found by PnP of the canonical face's rigid
points. "Crop units" are positions divided by the crop's side: x, y in [0, 1] inside it, z at the same scale.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli import __version__
from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.face.beta import BETA_NAMES
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS, check_file, write_atomic

_READ_ERRORS: tuple[type[Exception], ...] = (InputError, *DAMAGED_ZIP_ERRORS)
MAX_BYTES = 2**31  # of a motion file, unpacked: about four hours at 25 frames a second
FPS_RANGE = (Fraction(1, 1000), Fraction(1000))  # frames a second, least and most
MAX_VALUE = 1e6  # of any number in a motion file


@dataclass(frozen=True)
class Motion:
    """What a face does over T frames. A driver needs only `beta` and `camera`."""

    beta: np.ndarray  # (T, 64) float32
    camera: np.ndarray  # (T, 25) float32, head frame
    landmarks: np.ndarray  # (T, 478, 3) float32, crop units; a driver's may be (T, 68, 3), or none, (T, 0, 3)
    found: np.ndarray  # (T,) bool; the other rows of a frame without a face repeat the last one found
    fps: Fraction
    crop: tuple[float, float, float]  # x0, y0, side in pixels of the frames; may reach outside them
    size: tuple[int, int]  # width, height of the frames

    def __len__(self) -> int:
        return len(self.beta)

    def select(self, rows: np.ndarray) -> Motion:
        """Return the motion of some rows only."""
        return replace(self, **{k: getattr(self, k)[rows] for k in ("beta", "camera", "landmarks", "found")})

    def save(self, path: Path) -> None:
        """Write a `.motion.npz`, atomically."""
        arrays = {
            "beta": self.beta, "camera": self.camera, "landmarks": self.landmarks, "found": self.found,
            "fps": np.array([self.fps.numerator, self.fps.denominator], dtype=np.int64),
            "crop": np.array(self.crop, dtype=np.float64), "size": np.array(self.size, dtype=np.int64),
            "version": np.array(__version__),
        }  # fmt: skip
        with write_atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub of its flag

    @classmethod
    def load(cls, path: Path, *, landmark_counts: tuple[int, ...] = (mesh.NUM_LANDMARKS,)) -> Motion:
        """Read a `.motion.npz` with as many landmarks a face; raises `InputError` for a file that is not one."""
        path = Path(path)
        try:
            check_file(path, MAX_BYTES)
            with path.open("rb") as file:
                with zipfile.ZipFile(file) as archive:
                    if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                        raise ValueError(f"more than {MAX_BYTES >> 20} MiB when unpacked")
                file.seek(0)
                with warnings.catch_warnings(), np.load(file, allow_pickle=False) as data:
                    warnings.simplefilter("ignore")  # of headers as Python 2 wrote them: errors are told on one line
                    motion = cls._from_arrays(data)
        except _READ_ERRORS as error:
            raise InputError(f"{path} is not a motion file ({error}): make one with `export3d preprocess`") from error
        T = len(motion.beta) if motion.beta.ndim else 0
        shapes = (motion.beta.shape, motion.camera.shape, motion.landmarks.shape, motion.found.shape)
        if T == 0 or shapes not in [((T, 64), (T, 25), (T, count, 3), (T,)) for count in landmark_counts]:
            expected = f"(T, 64), (T, 25), (T, {landmark_counts[0]}, 3), (T,)"
            raise InputError(f"{path} is a motion file of shapes {shapes}: expected {expected}")
        finite = all(np.isfinite(a).all() for a in (motion.beta, motion.camera, motion.landmarks, motion.crop))
        if not finite or motion.fps <= 0:
            raise InputError(f"{path} holds numbers that are not finite or a rate that is not positive")
        if len(motion.crop) != 3 or len(motion.size) != 2:
            raise InputError(f"{path} holds a crop {motion.crop} of frames {motion.size}: expected 3 and 2 numbers")
        if not FPS_RANGE[0] <= motion.fps <= FPS_RANGE[1]:
            raise InputError(f"{path} has a rate of {float(motion.fps):.3g} frames/s: it must be 1/1000 to 1000")
        turn = motion.camera[:, :16].reshape(-1, 4, 4)[:, :3, :3]
        arrays = (motion.beta, motion.camera, motion.landmarks, motion.crop)
        largest = max(float(np.abs(array).max(initial=0)) for array in arrays)
        if largest > MAX_VALUE or np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max() > 0.01:
            raise InputError(
                f"{path} holds numbers beyond {MAX_VALUE:g}, or cameras that are no rotation: make it again"
            )
        return motion

    @classmethod
    def _from_arrays(cls, data: Mapping[str, np.ndarray]) -> Motion:
        """What a file holds, its shapes not yet looked at."""

        def numbers(name: str) -> np.ndarray:
            array = data[name]
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
                raise TypeError(f"{name} is no array of numbers")
            return array

        def floats(name: str) -> np.ndarray:
            with np.errstate(all="ignore"):  # what is too large becomes infinite, and is refused for it
                return numbers(name).astype(np.float32)

        n, d = (int(v) for v in numbers("fps"))
        return cls(
            beta=floats("beta"), camera=floats("camera"), landmarks=floats("landmarks"),
            found=numbers("found").astype(bool), fps=Fraction(n, d), crop=tuple(float(v) for v in numbers("crop")),  # type: ignore[arg-type]
            size=tuple(int(v) for v in numbers("size")),  # type: ignore[arg-type]
        )  # fmt: skip


def _mirror_table() -> tuple[np.ndarray, np.ndarray]:
    """For each entry of beta, the entry it becomes in the mirror, and its sign."""

    def other(name: str) -> str:
        for a, b in (("Left", "Right"), ("Right", "Left")):
            if name.endswith(a):
                return name[: -len(a)] + b
        return name

    index = {name: i for i, name in enumerate(BETA_NAMES)}
    swap = {"jawLeft": "jawRight", "jawRight": "jawLeft", "mouthLeft": "mouthRight", "mouthRight": "mouthLeft"}
    order = np.array([index[swap.get(name, other(name))] for name in BETA_NAMES])
    sign = np.array([-1.0 if name.startswith("irisX") else 1.0 for name in BETA_NAMES], dtype=np.float32)
    return order, sign


_MIRROR_ORDER, _MIRROR_SIGN = _mirror_table()


def mirror_beta(beta: np.ndarray) -> np.ndarray:
    """beta (..., 64) of the mirrored face."""
    return beta[..., _MIRROR_ORDER] * _MIRROR_SIGN


def mirror_camera(camera: np.ndarray) -> np.ndarray:
    """Camera (..., 25) that sees the mirrored head in the mirrored image."""
    m = np.array([-1.0, 1.0, 1.0, 1.0], dtype=np.float32)
    out = camera.copy()
    pose = camera[..., :16].reshape(*camera.shape[:-1], 4, 4)
    out[..., :16] = (pose * m[:, None] * m).reshape(*camera.shape[:-1], 16)
    return out


def mirror_landmarks(landmarks: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Landmarks (..., 478, 3) in crop units of the mirrored image; `order` is `CanonicalFace.mirror`."""
    out = landmarks[..., order, :].copy()
    out[..., 0] = 1 - out[..., 0]
    return out


def resample_rows(count: int, source_fps: Fraction, fps: Fraction, start: float, duration: float | None) -> np.ndarray:
    """Rows of a motion of `count` frames at rate `own` that are seen at rate `fps`, from `start` for `duration` s."""
    first = round(start * source_fps)
    last = count if duration is None else min(count, first + round(duration * source_fps))
    if first >= last:
        return np.zeros(0, dtype=np.int64)
    frames = max(1, round((last - first) * fps / source_fps))
    return first + np.array([int(t * source_fps / fps) for t in range(frames)]).clip(max=last - first - 1)
