"""Marks that say a picture is synthetic: a visible badge, an invisible pattern, and the search for them.

The invisible mark is spread-spectrum: one fixed pattern of pseudo-random phases in a band of middle frequencies, added
to the luma of every frame, stronger where the picture is busy. It is laid out for a short side of 256 pixels and
stretched with the frame, so that it survives a resize. To find it, frames are brought back to that size, levelled by
their local contrast, averaged, folded onto one tile and correlated with the pattern at every offset, by phase alone.
The score is the height of the peak in standard deviations of the rest; see README.md for the rates that were measured.

It tells what was made here from what was not, and no more: it carries no message and no key, so whoever reads this file
can remove or forge it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.runtime.errors import InputError

Watermark = Literal["none", "visible", "invisible"]
PATTERN_SHORT_SIDE_PX = 256  # short side, pixels, for which the pattern is laid out
TILE_PX = 128  # side of the pattern, which repeats
BAND = (8, 26)  # its frequencies, periods a tile
STRENGTH = (0.5, 1.9)  # root mean square of what is added at least and at most, grey levels of 255
GAIN = 0.25  # strength for each grey level of local deviation
THRESHOLD = 7.0  # score from which the pattern counts as found
MAX_FRAMES = 250  # looked at, at most
SCALES = (1.0, *(round(0.8 * 1.005**k, 4) for k in range(98)))  # of the pattern, to 1.3: where borders were cut off
BADGE_TEXT = "SYNTHETIC"


@dataclass(frozen=True)
class MarkReport:
    """What says that a file is synthetic."""

    file: Path
    found: bool  # either of the two
    metadata: bool
    invisible: bool
    score: float  # of the invisible mark: standard deviations
    threshold: float
    frames: int  # looked at


def get_watermarker(kind: Watermark) -> Callable[[np.ndarray], np.ndarray]:
    """What puts the mark on a frame, uint8 (H, W, 3) or (H, W, 4); alpha is left alone. Raises `InputError`."""
    marks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "none": lambda frame: frame, "visible": _add_badge, "invisible": _add_pattern,
    }  # fmt: skip
    if kind not in marks:
        raise InputError(f"watermark {kind!r} is unknown: use none, visible or invisible")
    return marks[kind]


def find_marks(path: Path) -> MarkReport:
    """Look for both marks in an image, or in the first `FRAMES` frames of a video.

    Raises:
        InputError: the file is neither.
    """
    path = Path(path)
    total, count = np.zeros((1, 1), np.float32), 0
    if has_image_suffix(path):
        total, count = _normalize_contrast(read_image(path)), 1
    else:
        with VideoReader(path) as reader:
            for frame in itertools.islice(reader, MAX_FRAMES):
                total, count = total + _normalize_contrast(frame), count + 1
    score = 0.0
    for scale in SCALES:
        score = max(score, _detection_score(total, scale))
        if score >= THRESHOLD:
            break
    tagged, seen = _has_metadata_mark(path), score >= THRESHOLD
    return MarkReport(path, tagged or seen, tagged, seen, round(score, 2), THRESHOLD, count)


def _add_badge(frame: np.ndarray) -> np.ndarray:
    """A copy with a badge in the lower right corner, a quarter of the short side wide."""
    H, W = frame.shape[:2]
    (width, height), low = cv2.getTextSize(BADGE_TEXT, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 1)
    scale = min(H, W) / 4 / width
    thick, pad = max(1, round(min(H, W) / 400)), max(2, round(min(H, W) / 85))
    width, height, low = (round(value * scale) for value in (width, height, low))
    out = frame.copy()
    x, y = W - width - 2 * pad, H - low - pad
    plate = out[max(0, y - height - pad) : H - pad // 2, max(0, x - pad) : W - pad // 2]
    plate[..., :3] = plate[..., :3] // 3
    plate[..., 3:] = 255
    text = np.zeros((H, W), np.uint8)
    cv2.putText(text, BADGE_TEXT, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thick, cv2.LINE_AA)
    share = text[..., None] / 255
    out[..., :3] = np.rint(out[..., :3] * (1 - share) + 255 * share)
    return out


def _add_pattern(frame: np.ndarray) -> np.ndarray:
    """A copy with the pattern in its luma: what is added is the same in red, green and blue."""
    H, W = frame.shape[:2]
    deviation = _local_std(_resize_canonical(_luma(frame)))
    # the least of a neighbourhood: what is smooth beside an edge would show it
    calm = cv2.GaussianBlur(cv2.erode(deviation, np.ones((7, 7), np.uint8)), (0, 0), 2)
    strength = cv2.resize(np.clip(STRENGTH[0] + GAIN * calm, *STRENGTH), (W, H), interpolation=cv2.INTER_LINEAR)
    out = frame.copy()
    out[..., :3] = np.clip(np.rint(frame[..., :3] + (strength * _pattern_frame(H, W))[..., None]), 0, 255)
    return out


@functools.cache
def _band_mask() -> np.ndarray:
    radius = np.hypot(np.fft.fftfreq(TILE_PX)[:, None], np.fft.rfftfreq(TILE_PX)[None]) * TILE_PX
    return (radius >= BAND[0]) & (radius <= BAND[1])


@functools.cache
def _pattern() -> np.ndarray:
    """One tile, (TILE, TILE), mean 0, variance 1; from a hash, which is the same everywhere and always."""
    data = hashlib.shake_256(b"export3d: synthetic media, mark 1").digest(2 * _band_mask().size)
    phases = np.frombuffer(data, "<u2").reshape(_band_mask().shape) * (2 * np.pi / 65536)
    tile = np.fft.irfft2(np.exp(1j * phases) * _band_mask(), s=(TILE_PX, TILE_PX))
    return tile / tile.std()


@functools.cache
def _matched_filter() -> np.ndarray:
    """What a tile's spectrum is multiplied by to find the pattern in it."""
    return np.asarray(np.conj(np.fft.rfft2(_pattern())) * _band_mask())


@functools.lru_cache(maxsize=2)
def _pattern_frame(height: int, width: int) -> np.ndarray:
    """The pattern over a whole frame, float32 (height, width)."""
    scale = PATTERN_SHORT_SIDE_PX / min(height, width)
    rows, columns = round(height * scale), round(width * scale)
    tiled = np.tile(_pattern(), (-(-rows // TILE_PX), -(-columns // TILE_PX)))[:rows, :columns]
    return np.asarray(cv2.resize(tiled.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC))


def _luma(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(frame[..., :3]), cv2.COLOR_RGB2GRAY).astype(np.float32)


def _resize_canonical(image: np.ndarray) -> np.ndarray:
    """Resized to a short side of `SIDE`."""
    height, width = image.shape
    scale = PATTERN_SHORT_SIDE_PX / min(height, width)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=how))


def _local_std(luma: np.ndarray) -> np.ndarray:
    """Standard deviation of every 7 x 7 neighbourhood."""
    mean = cv2.blur(luma, (7, 7))
    return np.sqrt(np.maximum(cv2.blur(luma * luma, (7, 7)) - mean * mean, 0))


def _normalize_contrast(frame: np.ndarray) -> np.ndarray:
    """What is fine in a frame, at the canonical size and of the same contrast everywhere, float32 (h, w)."""
    luma = _resize_canonical(_luma(frame))
    fine = luma - cv2.GaussianBlur(luma, (0, 0), 3)
    contrast = np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 4))
    return np.clip(fine / (contrast + 2), -2.5, 2.5)


def _detection_score(fine: np.ndarray, scale: float) -> float:
    """How far the best offset of the pattern stands out from the others, if it is `scale` times its usual size."""
    height, width = fine.shape
    if scale != 1:
        fine = cv2.resize(fine, (round(width / scale), round(height / scale)), interpolation=cv2.INTER_LINEAR)
    rows, columns = (-(-side // TILE_PX) for side in fine.shape)
    padded = np.pad(fine, ((0, rows * TILE_PX - fine.shape[0]), (0, columns * TILE_PX - fine.shape[1])))
    tile = padded.reshape(rows, TILE_PX, columns, TILE_PX).sum((0, 2))
    spectrum = np.fft.rfft2(tile) * _matched_filter()
    surface = np.fft.irfft2(spectrum / np.maximum(np.abs(spectrum), 1e-9), s=(TILE_PX, TILE_PX))
    return float((surface.max() - surface.mean()) / max(float(surface.std()), 1e-9))


def _has_metadata_mark(path: Path) -> bool:
    """Whether the mark of the metadata is in a file; every format that is written keeps it as plain text."""
    wanted, kept = SYNTHETIC_COMMENT.encode(), b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if wanted in kept + block:
                return True
            kept = block[-len(wanted) :]
    return False
