"""Compositing: from the animated crop to the frame that is written, with paste-back, background and comparison."""

from __future__ import annotations

import math
import re
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.face.matting import PersonMatting, VideoMatting, estimate_foreground
from export3d_cli.core.media.encoder_settings import VIDEO_SUFFIXES, check_crf, check_output_suffix
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import resolve_weights

FEATHER = 0.08  # of the crop's side: width over which the result fades into the photo
_VIDEO_SUFFIXES = (*VIDEO_SUFFIXES, ".avi", ".flv", ".m4v", ".mpeg", ".mpg", ".mts", ".ts", ".wmv", ".3gp")
Square = tuple[float, float, float]


def read_portrait(path: Path) -> np.ndarray:
    """Read the photo of a portrait, uint8 (H, W, 3) RGB; raise `InputError` for a video."""
    if path.suffix.lower() in _VIDEO_SUFFIXES:
        raise InputError(f"{path} is a video, and the portrait must be a photo: save one of its frames as .png")
    return read_image(path)


def check_outputs(outputs: list[Path], background: str, crf: int | None = None) -> None:
    """Raise `InputError` for output names, backgrounds or a crf that cannot be used, or not together."""
    for out in outputs:
        check_output_suffix(out, alpha=background == "transparent")
        check_crf(out, crf, alpha=background == "transparent")
    if background in ("source", "transparent"):
        return
    if background.startswith("#"):
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", background):
            raise InputError(
                f"background {background!r} is not a colour: give six hexadecimal digits, for example #00ff00"
            )
    else:
        path = Path(background)
        if not path.exists():
            raise InputError(f"background {background!r} does not exist: use source, transparent, #rrggbb or an image")
        if not has_image_suffix(path):
            raise InputError(f"background {background} is not an image: give a .jpg, .png or .webp file")


class Compositor:
    """Turns each result (K, K, 3) into the frame to write: uint8 (H, W, 3), or (H, W, 4) with transparency.

    Args:
        photo: the source, uint8 (H, W, 3) RGB.
        source: the animated crop of it, uint8 (K, K, 3).
        square: x0, y0, side of that crop in pixels of the photo; may reach outside the photo.
        paste_back: the frame is the whole photo, else the crop.
        background: source, transparent, #rrggbb or the path of an image.
        compare: the frame is source | driver | result; the driver's image is square and as high as the others.

    Attributes:
        size: (width, height) of the frames.
        source_frame: the source without animation, (H, W, 3).
        transparent: whether frames have an alpha channel.
    """

    def __init__(
        self, photo: np.ndarray, source: np.ndarray, square: Square, *, paste_back: bool = False,
        background: str = "source", compare: bool = False,
    ) -> None:  # fmt: skip
        self.source_frame = photo if paste_back else source
        height, width = self.source_frame.shape[:2]
        self.size = (2 * width + height, height) if compare else (width, height)
        self.transparent = background == "transparent"
        self._paste = PasteBack(photo, square, len(source)) if paste_back else None
        self._matting: VideoMatting | None = None
        if background == "source":
            return
        matting = PersonMatting(resolve_weights("selfie_segmentation"))
        self._matting = VideoMatting(matting)
        self._backdrop = None if self.transparent else load_backdrop(background, (width, height))
        if self._paste is None:
            return
        alpha, inner = matting.alpha(photo), matting.alpha(source)  # the crop shows more detail
        self._alpha = self._paste.blend(inner, alpha)
        self._colours = estimate_foreground(photo, self._alpha)
        self._canvas = composite_over(self._colours, self._alpha, self._backdrop)

    def __call__(self, result: np.ndarray, driver: np.ndarray | None = None) -> np.ndarray:
        """Return the next frame; `driver` (H, H, 3) is the driver's image for a comparison."""
        frame = self._frame(result)
        if driver is None:
            return frame
        left = np.concatenate([self.source_frame, driver], axis=1)
        if self.transparent:
            left = np.dstack([left, np.full(left.shape[:2], 255, np.uint8)])
        return np.concatenate([left, frame], axis=1)

    def _frame(self, result: np.ndarray) -> np.ndarray:
        paste = self._paste
        if self._matting is None:
            return result if paste is None else paste.blend(result, paste.photo)
        alpha = self._matting(result)
        colours = estimate_foreground(result, alpha)
        if paste is None:
            return composite_over(colours, alpha, self._backdrop)
        region = paste.region
        frame = self._canvas.copy()
        backdrop = None if self._backdrop is None else self._backdrop[region]
        frame[region] = composite_over(
            paste.blend_region(colours, self._colours), paste.blend_region(alpha, self._alpha), backdrop
        )
        return frame


class PasteBack:
    """Blends results (K, K) or (K, K, 3) into their square of a photo with feathered borders."""

    def __init__(self, photo: np.ndarray, square: Square, size: int) -> None:
        height, width = photo.shape[:2]
        x0, y0, side = square
        self.photo = photo
        left, right = max(0, math.floor(x0)), min(width, math.ceil(x0 + side))
        top, bottom = max(0, math.floor(y0)), min(height, math.ceil(y0 + side))
        self.region = slice(top, bottom), slice(left, right)
        self._shape = (right - left, bottom - top)
        step = side / size  # photo pixels per pixel of the result
        self._grid = tuple(
            max(2, round(n / step)) for n in self._shape
        )  # size of the region in pixels of about the result's size
        fx, fy = (n / g / step for n, g in zip(self._shape, self._grid, strict=True))
        dx, dy = (left - x0) / step, (top - y0) / step
        self._matrix = np.array([[fx, 0, dx + 0.5 * fx - 0.5], [0, fy, dy + 0.5 * fy - 0.5]])
        columns = _feather(np.arange(left, right) + 0.5, x0, side, width)
        rows = _feather(np.arange(top, bottom) + 0.5, y0, side, height)
        self.weight = np.outer(rows, columns).astype(np.float32)
        self._photo_weight = 1 - self.weight

    def blend(self, result: np.ndarray, photo: np.ndarray) -> np.ndarray:
        """Return a copy of `photo`, (H, W) or (H, W, 3), with the result in its square."""
        frame = photo.copy()
        frame[self.region] = self.blend_region(result, photo)
        return frame

    def blend_region(self, result: np.ndarray, photo: np.ndarray) -> np.ndarray:
        """Return only the part of the photo that the square covers."""
        kind = cv2.INTER_LANCZOS4 if result.ndim == 3 else cv2.INTER_LINEAR  # a mask must not overshoot
        flags = kind | cv2.WARP_INVERSE_MAP
        # align at the result's size, then resize: several times as fast as one warp
        aligned = cv2.warpAffine(result, self._matrix, self._grid, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        smaller = self._grid[0] > self._shape[0]
        large = cv2.resize(aligned, self._shape, interpolation=cv2.INTER_AREA if smaller else kind)
        return cv2.blendLinear(large, np.ascontiguousarray(photo[self.region]), self.weight, self._photo_weight)


def composite_over(colours: np.ndarray, alpha: np.ndarray, backdrop: np.ndarray | None) -> np.ndarray:
    """Composite colours (H, W, 3) with alpha (H, W) over a backdrop; None: return alpha as a fourth channel."""
    if backdrop is None:
        return np.dstack([colours, np.rint(255 * alpha).astype(np.uint8)])
    return cv2.blendLinear(colours, np.ascontiguousarray(backdrop), alpha, 1 - alpha)


def load_backdrop(background: str, size: tuple[int, int]) -> np.ndarray:
    """Return #rrggbb, or an image cropped to (width, height) around its centre, as uint8 (height, width, 3)."""
    width, height = size
    if background.startswith("#"):
        return np.full((height, width, 3), list(bytes.fromhex(background[1:])), np.uint8)
    image = read_image(Path(background))
    scale = max(width / image.shape[1], height / image.shape[0])
    w, h = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
    image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4)
    x, y = (w - width) // 2, (h - height) // 2
    return np.ascontiguousarray(image[y : y + height, x : x + width])


def _feather(positions: np.ndarray, start: float, side: float, end: int) -> np.ndarray:
    """Return the result's weight at positions along one axis: 0 at the square's border, 1 inside.

    There is no fade where the square reaches the photo's border.
    """
    low = (positions - start) / (FEATHER * side) if start > 0 else np.ones_like(positions)
    high = (start + side - positions) / (FEATHER * side) if start + side < end else np.ones_like(positions)
    t = np.clip(np.minimum(low, high), 0, 1)
    return t * t * (3 - 2 * t)
