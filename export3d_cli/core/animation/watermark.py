"""Watermarks of synthetic media: a visible badge, an invisible pattern, and their detection.

The invisible mark is spread-spectrum: one fixed pattern of pseudo-random phases in a band of middle frequencies, added
to the luma of every frame, stronger in textured areas. Its size follows the frame's short side, so that it survives a
resize. Detection resizes frames to a short side of 256 pixels, normalises their local contrast, sums them, folds the
sum onto one tile and computes the phase correlation with the pattern at every offset. The score is the peak in
standard deviations; see README.md for measured rates.

The mark only says that a file was made with this program: it carries no message and no key, so anyone who reads this
file can remove or forge it.
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
PATTERN_SHORT_SIDE_PX = 256  # short side of a frame at which the pattern has its own size
TILE_PX = 128  # side of the pattern, which is tiled
BAND = (8, 26)  # its frequencies, periods per tile
STRENGTH = (0.5, 1.9)  # least and greatest root mean square of the added pattern, in grey levels of 255
GAIN = 0.25  # strength per grey level of local standard deviation
THRESHOLD = 7.0  # score from which the pattern counts as detected
MAX_FRAMES = 250  # of a video that are examined
# tried sizes of the pattern, up to 1.3 for cropped frames
SCALES = (1.0, *(round(0.8 * 1.005**k, 4) for k in range(98)))
BADGE_TEXT = "SYNTHETIC"


@dataclass(frozen=True)
class MarkReport:
    """Marks that were found in a file."""

    file: Path
    found: bool  # metadata or invisible
    metadata: bool
    invisible: bool
    score: float  # of the invisible mark, in standard deviations
    threshold: float
    frames: int  # examined


def get_watermarker(kind: Watermark) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that marks a frame, uint8 (H, W, 3) or (H, W, 4); alpha is unchanged. Raises `InputError`."""
    marks: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "none": lambda frame: frame, "visible": _add_badge, "invisible": _add_pattern,
    }  # fmt: skip
    if kind not in marks:
        raise InputError(f"watermark must be none, visible or invisible, got {kind!r}")
    return marks[kind]


def find_marks(path: Path) -> MarkReport:
    """Search an image, or the first `MAX_FRAMES` frames of a video, for both marks; raise `InputError` for others."""
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
    has_metadata, has_pattern = _has_metadata_mark(path), score >= THRESHOLD
    return MarkReport(path, has_metadata or has_pattern, has_metadata, has_pattern, round(score, 2), THRESHOLD, count)


def _add_badge(frame: np.ndarray) -> np.ndarray:
    """Return a copy with a badge in the lower right corner, a quarter of the short side wide."""
    H, W = frame.shape[:2]
    (width, height), baseline = cv2.getTextSize(BADGE_TEXT, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 1)
    scale = min(H, W) / 4 / width
    thickness, padding = max(1, round(min(H, W) / 400)), max(2, round(min(H, W) / 85))
    width, height, baseline = (round(value * scale) for value in (width, height, baseline))
    out = frame.copy()
    x, y = W - width - 2 * padding, H - baseline - padding
    plate = out[max(0, y - height - padding) : H - padding // 2, max(0, x - padding) : W - padding // 2]
    plate[..., :3] = plate[..., :3] // 3
    plate[..., 3:] = 255
    text = np.zeros((H, W), np.uint8)
    cv2.putText(text, BADGE_TEXT, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)
    alpha = text[..., None] / 255
    out[..., :3] = np.rint(out[..., :3] * (1 - alpha) + 255 * alpha)
    return out


def _add_pattern(frame: np.ndarray) -> np.ndarray:
    """Return a copy with the pattern in its luma: red, green and blue change alike."""
    H, W = frame.shape[:2]
    deviation = _local_std(_resize_canonical(_luma(frame)))
    # the neighbourhood's minimum: the pattern would be visible in smooth areas next to an edge
    local_min = cv2.GaussianBlur(cv2.erode(deviation, np.ones((7, 7), np.uint8)), (0, 0), 2)
    strength = cv2.resize(np.clip(STRENGTH[0] + GAIN * local_min, *STRENGTH), (W, H), interpolation=cv2.INTER_LINEAR)
    out = frame.copy()
    out[..., :3] = np.clip(np.rint(frame[..., :3] + (strength * _pattern_frame(H, W))[..., None]), 0, 255)
    return out


@functools.cache
def _band_mask() -> np.ndarray:
    radius = np.hypot(np.fft.fftfreq(TILE_PX)[:, None], np.fft.rfftfreq(TILE_PX)[None]) * TILE_PX
    return (radius >= BAND[0]) & (radius <= BAND[1])


@functools.cache
def _pattern() -> np.ndarray:
    """Return one tile, (TILE_PX, TILE_PX), mean 0, variance 1; from a hash, which is the same on every machine."""
    data = hashlib.shake_256(b"export3d: synthetic media, mark 1").digest(2 * _band_mask().size)
    phases = np.frombuffer(data, "<u2").reshape(_band_mask().shape) * (2 * np.pi / 65536)
    tile = np.fft.irfft2(np.exp(1j * phases) * _band_mask(), s=(TILE_PX, TILE_PX))
    return tile / tile.std()


@functools.cache
def _matched_filter() -> np.ndarray:
    """Return the factor of a tile's spectrum that gives the correlation with the pattern."""
    return np.asarray(np.conj(np.fft.rfft2(_pattern())) * _band_mask())


@functools.lru_cache(maxsize=2)
def _pattern_frame(height: int, width: int) -> np.ndarray:
    """Return the pattern for a whole frame, float32 (height, width)."""
    scale = PATTERN_SHORT_SIDE_PX / min(height, width)
    rows, columns = round(height * scale), round(width * scale)
    tiled = np.tile(_pattern(), (-(-rows // TILE_PX), -(-columns // TILE_PX)))[:rows, :columns]
    return np.asarray(cv2.resize(tiled.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC))


def _luma(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(frame[..., :3]), cv2.COLOR_RGB2GRAY).astype(np.float32)


def _resize_canonical(image: np.ndarray) -> np.ndarray:
    """Return an image resized to a short side of `PATTERN_SHORT_SIDE_PX`."""
    height, width = image.shape
    scale = PATTERN_SHORT_SIDE_PX / min(height, width)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=interpolation))


def _local_std(luma: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each 7 x 7 neighbourhood."""
    mean = cv2.blur(luma, (7, 7))
    return np.sqrt(np.maximum(cv2.blur(luma * luma, (7, 7)) - mean * mean, 0))


def _normalize_contrast(frame: np.ndarray) -> np.ndarray:
    """Return a frame's high frequencies at the canonical size, with equal local contrast, float32 (h, w)."""
    luma = _resize_canonical(_luma(frame))
    fine = luma - cv2.GaussianBlur(luma, (0, 0), 3)
    contrast = np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 4))
    return np.clip(fine / (contrast + 2), -2.5, 2.5)


def _detection_score(fine: np.ndarray, scale: float) -> float:
    """Return the peak of the correlation with the pattern at `scale` times its size, in standard deviations."""
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
    """Return whether a file has the metadata mark, which every output format stores as plain text."""
    mark, tail = SYNTHETIC_COMMENT.encode(), b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if mark in tail + block:
                return True
            tail = block[-len(mark) :]
    return False
