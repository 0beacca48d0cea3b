"""Watermarks of synthetic media: a visible badge, an invisible pattern, and their detection.

The invisible mark is spread-spectrum: one fixed pattern of pseudo-random phases in a band of middle frequencies, added
to the luma of every frame, stronger in textured areas. Its size follows the frame's short side, so that it survives a
resize. Detection normalises the local contrast of the frames, sums them, folds the sum (all of it, then windows of two
by two tiles) onto one tile and computes the phase correlation with the pattern at every offset and many scales: the
frame may have been cropped, or be a part of a larger picture. The score is the highest peak in standard deviations; see
README.md for measured rates.

The mark only says that a file was made with this program: it carries no message and no key, so anyone who reads this
file can remove or forge it.
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from export3d_cli.core.media.content_credentials import Credentials, has_metadata_mark, read_credentials
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import InputError

Watermark = Literal["none", "visible", "invisible"]
PATTERN_SHORT_SIDE_PX = 256  # short side of a frame at which the pattern has its own size
TILE_PX = 128  # side of the pattern, which is tiled
BAND = (8, 26)  # its frequencies, periods per tile
STRENGTH = (0.5, 1.9)  # least and greatest root mean square of the added pattern, in grey levels of 255
GAIN = 0.25  # strength per grey level of local standard deviation
STEPS = 16  # per grey level, in which the pattern is enlarged
THRESHOLD = 7.5  # score from which the pattern counts as detected
MAX_FRAMES = 100  # of a video that are examined
# short sides to which frames are resized for the search: of a whole frame, of a part of it, and of a picture in which
# the frame's short side is a half to all, or a quarter to a half of its own
SEARCH_SIDES_PX = (256, 128, 512, 1024)
SCALES = sorted((0.7 * 1.007**k for k in range(101)), key=lambda scale: abs(np.log(scale)))  # of the pattern in each
BADGE_TEXT = "SYNTHETIC"


@dataclass(frozen=True)
class MarkReport:
    """Marks that were found in a file."""

    file: Path
    found: bool  # metadata, invisible, or valid credentials that state synthetic media
    metadata: bool
    invisible: bool
    score: float  # of the invisible mark, in standard deviations
    threshold: float
    frames: int  # examined
    credentials: Credentials | None  # C2PA; None: none found, or `c2pa-python` is not installed


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
    score, frames = _search_pattern(path)
    has_metadata, has_pattern, credentials = has_metadata_mark(path), score >= THRESHOLD, read_credentials(path)
    found = has_metadata or has_pattern or (credentials is not None and credentials.valid and credentials.synthetic)
    return MarkReport(path, found, has_metadata, has_pattern, round(score, 2), THRESHOLD, frames, credentials)


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
    luma = _resize_luma(frame, PATTERN_SHORT_SIDE_PX)
    mean = cv2.blur(luma, (7, 7))
    local_std = np.sqrt(np.maximum(cv2.blur(luma * luma, (7, 7)) - mean * mean, 0))
    # the neighbourhood's minimum: the pattern would be visible in smooth areas next to an edge
    local_min = cv2.GaussianBlur(cv2.erode(local_std, np.ones((7, 7), np.uint8)), (0, 0), 2)
    change = np.clip(STRENGTH[0] + GAIN * local_min, *STRENGTH) * _pattern_frame(*luma.shape)
    steps = np.clip(change * STEPS + 128, 0, 255).round().astype(np.uint8)  # uint8 is several times as fast
    steps = cv2.resize(steps, (W, H), interpolation=cv2.INTER_CUBIC if luma.shape[1] < W else cv2.INTER_AREA)
    levels = ((np.arange(256) - 128) / STEPS).round()
    luts = (np.maximum(part, 0).astype(np.uint8) for part in (levels, -levels))
    brighter, darker = (cv2.cvtColor(cv2.LUT(steps, lut), cv2.COLOR_GRAY2RGB) for lut in luts)
    marked = cv2.add(np.ascontiguousarray(frame[..., :3]), brighter, dst=brighter)
    marked = cv2.subtract(marked, darker, dst=marked)
    return np.concatenate([marked, frame[..., 3:]], axis=2) if frame.shape[2] > 3 else marked


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
    return np.asarray(np.conj(np.fft.rfft2(_pattern())) * _band_mask(), np.complex64)


@functools.lru_cache(maxsize=2)
def _pattern_frame(height: int, width: int) -> np.ndarray:
    """Return the repeated pattern, float32 (height, width)."""
    return np.tile(_pattern(), (-(-height // TILE_PX), -(-width // TILE_PX)))[:height, :width].astype(np.float32)


def _resize_luma(frame: np.ndarray, short_side: int) -> np.ndarray:
    """Return a frame's luma at a size, float32 (h, w)."""
    luma = cv2.cvtColor(np.ascontiguousarray(frame[..., :3]), cv2.COLOR_RGB2GRAY)
    height, width = luma.shape
    scale = short_side / min(height, width)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(luma, (round(width * scale), round(height * scale)), interpolation=interpolation)
    return resized.astype(np.float32)


def _search_pattern(path: Path) -> tuple[float, int]:
    """Return the score of a file, and the number of frames that were examined."""
    score, frames = 0.0, 0
    for short_side in SEARCH_SIDES_PX:
        total, count = _sum_frames(path, short_side)
        frames = max(frames, count)
        for scale in SCALES if count else ():
            score = max(score, _detection_score(total, scale))
            if score >= THRESHOLD:
                return score, frames
    return score, frames


def _sum_frames(path: Path, short_side: int) -> tuple[np.ndarray, int]:
    """Return the sum of frames of equal local contrast, float32 (h, w), and their number: 0 if they are too small."""
    total, count = np.zeros((1, 1), np.float32), 0
    with contextlib.nullcontext([read_image(path)]) if has_image_suffix(path) else VideoReader(path) as frames:
        for frame in itertools.islice(frames, MAX_FRAMES):
            if short_side > max(PATTERN_SHORT_SIDE_PX, 1.5 * min(frame.shape[:2])):
                break
            luma = _resize_luma(frame, short_side)
            fine = luma - cv2.GaussianBlur(luma, (0, 0), 3)
            contrast = np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 4))
            total, count = total + np.clip(fine / (contrast + 2), -2.5, 2.5), count + 1
    return total, count


def _detection_score(fine: np.ndarray, scale: float) -> float:
    """Return the peak of the correlation with the pattern at `scale` times its size, in standard deviations."""
    height, width = fine.shape
    fine = cv2.resize(fine, (round(width / scale), round(height / scale)), interpolation=cv2.INTER_LINEAR)
    score = 0.0
    for start in (0, TILE_PX // 2):  # of the windows
        part = fine[start:, start:]
        rows, columns = (-(-side // TILE_PX) for side in part.shape)
        padded = np.pad(part, ((0, rows * TILE_PX - part.shape[0]), (0, columns * TILE_PX - part.shape[1])))
        tiles = padded.reshape(rows, TILE_PX, columns, TILE_PX).swapaxes(1, 2)
        folded = [tiles.sum((0, 1))[None]] if start == 0 else []
        if rows > 2 or columns > 2:
            tiles = tiles[:-1] + tiles[1:] if rows > 1 else tiles
            tiles = tiles[:, :-1] + tiles[:, 1:] if columns > 1 else tiles
            folded.append(tiles.reshape(-1, TILE_PX, TILE_PX))
        for windows in folded:
            spectrum = np.fft.rfft2(windows) * _matched_filter()
            surface = np.fft.irfft2(spectrum / np.maximum(np.abs(spectrum), 1e-9), s=(TILE_PX, TILE_PX))
            peak = (surface.max((1, 2)) - surface.mean((1, 2))) / np.maximum(surface.std((1, 2)), 1e-9)
            score = max(score, float(peak.max()))
    return score
