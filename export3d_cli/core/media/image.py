"""Still images: reading and writing files as uint8 RGB arrays, folders of them, and conversion from and to tensors."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from export3d_cli.core.media.colour_profile import convert_to_srgb
from export3d_cli.core.runtime.errors import Export3DWarning, InputError
from export3d_cli.core.runtime.files import DECODE_ERRORS, check_file, write_atomic

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 64_000_000  # of a video frame, and of an image after it is reduced; checked before decoding
MAX_STORED_PIXELS = 256_000_000  # of an image file; phones have up to 200 megapixels
_MAX_PIXELS_PER_BYTE = 200  # of larger images than MAX_PIXELS; files that claim more hold no photo
MAX_FILE_BYTES = 512 * 2**20
WRITABLE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
IMAGE_SUFFIXES = WRITABLE_SUFFIXES | {".heic", ".heif", ".avif"}
if Image.MAX_IMAGE_PIXELS is not None:  # above it Pillow warns, above twice as much it raises an error
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_STORED_PIXELS)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # and no others: Pillow runs programs for some
_HEADER_BYTES = 2**16
_ANIMATED_FORMATS = ("PNG", "WEBP", "GIF", "AVIF")
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"  # markers
# entropy-coded data with restart markers, which changes the image if its own data is incomplete
_PADDING_SCANS = b"".join(bytes(n * k % 251 for n in range(64)) + bytes([0xFF, 0xD0 + k % 8]) for k in range(89, 105))


def has_image_suffix(path: Path) -> bool:
    """Return whether the suffix is that of a still image that `read_image` reads."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def list_images(folder: Path) -> list[Path]:
    """Return the images of a folder in natural sort order (numbers by value); raise `InputError` if it has none."""

    def sort_key(path: Path) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"(\d+)", path.name)  # text and digits alternate
        return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], path.name

    try:
        paths = [path for path in Path(folder).iterdir() if has_image_suffix(path) and not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read folder {folder}: {error.strerror}") from error
    if not paths:
        raise InputError(f"{folder} is a folder without images (.png, .jpg, .webp): give a video file or images")
    return sorted(paths, key=sort_key)


def read_image(path: Path) -> np.ndarray:
    """Read a still image as uint8 (H, W, 3) sRGB, with EXIF orientation applied and transparency composited on white.

    Issues an `Export3DWarning` if the image is reduced to `MAX_PIXELS`, its colour profile is ignored, or it is the
    first of an animation. Raises `InputError` if the file is missing, of another format, damaged, truncated or larger
    than `MAX_STORED_PIXELS`.
    """
    path = Path(path)
    data = _read_bytes(path)
    formats: tuple[str, ...] = _FORMATS
    if data[4:8] == b"ftyp":
        import pi_heif

        pi_heif.register_heif_opener()  # adds HEIC, the format of iPhone photos, to Pillow
        formats = ("HEIF", "AVIF")
    try:
        if data.startswith(b"\xff\xd8"):
            data = _complete_jpeg(data)
        with Image.open(io.BytesIO(data), formats=formats) as image:
            reduction = _choose_reduction(image.size, len(data), path)
            if image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False):
                text = f"{path} is an animation, and only its first picture is used: convert it to a video to use all"
                warnings.warn(text, Export3DWarning, stacklevel=2)
            if image.format == "PNG":  # decoding alone ignores missing and damaged chunks at the end
                Image.open(io.BytesIO(data), formats=["PNG"]).verify()
            header = data[:_HEADER_BYTES] if image.format in ("PNG", "AVIF") else b""
            return _to_rgb(convert_to_srgb(_decode(image, reduction), path, header))
    except Image.DecompressionBombError as error:
        limit = MAX_STORED_PIXELS // 1_000_000
        raise InputError(f"{path} has more than {limit} megapixels: reduce its size") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that can be read: give a JPEG, PNG, WebP or HEIC file") from error
    except DECODE_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "truncated" in reason.lower():
            raise InputError(f"{path} is truncated: copy or download it again") from error
        raise InputError(f"{path} is damaged ({reason}): give another JPEG, PNG, WebP or HEIC file") from error


def write_image(path: Path, image: np.ndarray, *, comment: str = "") -> None:
    """Write uint8 (H, W, 3) or, as PNG, (H, W, 4), by suffix; JPEG has quality 95, PNG and JPEG the `comment`."""
    path = Path(path)
    channels = (3, 4) if path.suffix.lower() == ".png" else (3,)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in channels:
        raise InputError(f"an image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        raise InputError(f"cannot write images of type {path.suffix!r}: use .png, .jpg or .webp")
    png_info = PngImagePlugin.PngInfo()
    if comment:
        png_info.add_text("Comment", comment)
    settings: dict[str, dict[str, Any]] = {
        ".jpg": {"quality": 95, "comment": comment}, ".png": {"compress_type": zlib.Z_RLE, "pnginfo": png_info},
        ".webp": {"lossless": True},
    }  # fmt: skip
    suffix = path.suffix.lower().replace(".jpeg", ".jpg")
    data = io.BytesIO()
    Image.fromarray(image).save(data, Image.registered_extensions()[suffix], **settings.get(suffix, {}))
    with write_atomic(path) as temporary:
        temporary.write_bytes(data.getbuffer())


def contact_sheet(images: Sequence[np.ndarray], columns: int, labels: Sequence[str] = ()) -> np.ndarray:
    """Return images of one size, uint8 (H, W, 3), row by row, each with its label in the lower left corner."""
    import cv2

    H, W = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.zeros((rows * H, columns * W, 3), dtype=np.uint8)
    for k, image in enumerate(images):
        cell = np.ascontiguousarray(image)
        if labels:
            x, y, scale = W // 32, H - H // 24, max(W / 512, 0.4)  # smaller letters cannot be read
            edge = [((x + dx, y + dy), (0, 0, 0)) for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1))]
            for origin, colour in (*edge, ((x, y), (255, 255, 255))):  # a dark edge around light letters
                cv2.putText(cell, labels[k], origin, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)
        row, column = divmod(k, columns)
        sheet[row * H : (row + 1) * H, column * W : (column + 1) * W] = cell
    return sheet


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Convert uint8 (..., H, W, 3) in 0..255 to float32 (..., 3, H, W) in [-1, 1]."""
    import torch

    if image.dtype != np.uint8 or image.ndim < 3 or image.shape[-1] != 3:
        raise InputError(f"an image must be uint8 (..., H, W, 3), got {image.dtype} {image.shape}")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, -3))).float().div_(127.5).sub_(1.0)


def to_uint8(tensor: torch.Tensor) -> np.ndarray:
    """Convert float (..., 3, H, W) in [-1, 1] (clamped) to uint8 (..., H, W, 3), rounded; inverse of `to_tensor`."""
    scaled = tensor.detach().float().clamp(-1.0, 1.0).add_(1.0).mul_(127.5).round_().byte()
    return np.asarray(scaled.movedim(-3, -1).contiguous().cpu().numpy())


def check_pixel_count(width: int, height: int, path: Path) -> None:
    """Raise `InputError` for images of more than `MAX_PIXELS` pixels."""
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise InputError(f"{path} is {width}x{height}, more than {limit} megapixels: reduce its size")


def _read_bytes(path: Path) -> bytes:
    check_file(path, MAX_FILE_BYTES)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not data:
        raise InputError(f"{path} is empty")
    return data


def _complete_jpeg(data: bytes) -> bytes:
    """Return a JPEG file with its end marker, which many cameras omit; raise `OSError` if its scans are incomplete.

    Decoders fill incomplete ones with grey. Data appended to complete scans changes nothing. Baseline images are
    compared at 1/8 of their size, at which the last scans of progressive ones make no difference.
    """
    end = data.find(_JPEG_END, data.rfind(_JPEG_SCAN))
    scans = data if end < 0 else data[:end]
    decoded = []
    for more in (b"", _PADDING_SCANS):
        image = Image.open(io.BytesIO(scans + more + _JPEG_END), formats=["JPEG"])
        if not image.info.get("progressive"):
            image.draft(None, (1, 1))
        decoded.append(np.asarray(image))
    if not np.array_equal(decoded[0], decoded[1]):
        raise OSError("truncated")
    return scans + _JPEG_END


def _choose_reduction(size: tuple[int, int], file_bytes: int, path: Path) -> int:
    """Return by how much an image's sides are to be divided: 1, or 2 above `MAX_PIXELS`; refuse decompression bombs."""
    width, height = size
    if width * height <= MAX_PIXELS:
        return 1
    if width * height > MAX_STORED_PIXELS or width * height > file_bytes * _MAX_PIXELS_PER_BYTE:
        check_pixel_count(width, height, path)  # raises
    text = f"{path} has {width}x{height} pixels and is read at half its size"
    warnings.warn(text, Export3DWarning, stacklevel=3)
    return 2


def _decode(image: Image.Image, reduction: int) -> Image.Image:
    """Decode an image upright, with 8 bits a sample, and its sides divided by `reduction`."""
    smaller = image.width // reduction, image.height // reduction
    if reduction > 1:
        image.draft(None, smaller)  # JPEG files are decoded at half the size
        reduction = image.width // smaller[0]
    image.load()
    with contextlib.suppress(*DECODE_ERRORS):  # damaged EXIF data: keep the stored orientation
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # 16-bit grey
        info, image = image.info, Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image.info = info
    if reduction == 1:
        return image
    if image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(reduction)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of any Pillow mode to uint8 (H, W, 3), transparency composited on white."""
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel")
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
