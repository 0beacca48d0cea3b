"""Still images: reading and writing files as uint8 RGB arrays, and their conversion to and from float tensors."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from export3d_cli.core.media.colour_profile import convert_to_srgb
from export3d_cli.core.runtime.errors import Export3DWarning, InputError, MediaError
from export3d_cli.core.runtime.files import check_file, write_atomic

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
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # and no others: Pillow runs programs for some
_DECODE_ERRORS = (  # what Pillow raises for damaged files
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, EOFError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_MARKER = re.compile(rb"\xff+[^\xff\0\x01\xd0-\xd7]")  # start of a segment; not an escaped 0xFF or a restart
_JPEG_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # their decoders ignore bytes after the last scan; arithmetic ones do not
_JPEG_PROGRESSIVE_FRAME = 0xC2
_JPEG_END_MARKER = b"\xff\xd9"
# entropy-coded data with restart markers, which changes the image if its own data is incomplete
_PADDING_SCANS = b"".join(bytes(n * k % 251 for n in range(64)) + bytes([0xFF, 0xD0 + k % 8]) for k in range(89, 105))


def has_image_suffix(path: Path) -> bool:
    """Return whether the suffix is that of a still image that `read_image` reads."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: Path) -> np.ndarray:
    """Read a still image as uint8 (H, W, 3) sRGB, with EXIF orientation applied and transparency composited on white.

    Issues an `Export3DWarning` if the image is reduced to `MAX_PIXELS`, or its colour profile is ignored.

    Raises:
        InputError: the file is missing, no JPEG, PNG, WebP, BMP, TIFF, HEIC or AVIF image, damaged, truncated or larger
            than `MAX_STORED_PIXELS`.
    """
    path = Path(path)
    data = _read_bytes(path)
    formats: tuple[str, ...] = _FORMATS
    if data[4:8] == b"ftyp":
        import pi_heif

        pi_heif.register_heif_opener()  # adds HEIC, the format of iPhone photos, to Pillow
        formats = ("HEIF", "AVIF")
    jpeg_end, jpeg_frame = _find_jpeg_end(data)
    if jpeg_end:  # many cameras omit the end marker or append other data
        data = data[:jpeg_end] + _JPEG_END_MARKER
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            reduction = _choose_reduction(image.size, len(data), path)
            if image.format == "PNG":  # decoding alone ignores missing and damaged chunks at the end
                Image.open(io.BytesIO(data), formats=["PNG"]).verify()
            if (image.format == "PNG" and _PNG_END not in data) or (jpeg_end and _is_truncated_jpeg(data, jpeg_frame)):
                raise InputError(f"{path} is truncated: copy or download it again")
            return _to_rgb(convert_to_srgb(_decode(image, reduction), path))
    except Image.DecompressionBombError as error:
        limit = MAX_STORED_PIXELS // 1_000_000
        raise InputError(f"{path} has more than {limit} megapixels: reduce its size") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that can be read: give a JPEG, PNG, WebP or HEIC file") from error
    except _DECODE_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "truncated" in reason.lower():
            raise InputError(f"{path} is truncated: copy or download it again") from error
        raise InputError(f"{path} is damaged ({reason}): give another JPEG, PNG, WebP or HEIC file") from error


def write_image(path: Path, image: np.ndarray, *, comment: str = "") -> None:
    """Write uint8 (H, W, 3) RGB, or (H, W, 4) RGBA for PNG. The suffix selects the format; JPEG has quality 95.

    `comment` is stored in PNG and JPEG files.
    """
    import cv2

    path = Path(path)
    channels = (3, 4) if path.suffix.lower() == ".png" else (3,)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in channels:
        raise InputError(f"an image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        raise InputError(f"cannot write images of type {path.suffix!r}: use .png, .jpg or .webp")
    is_jpeg = path.suffix.lower() in (".jpg", ".jpeg")  # OpenCV 5 warns of a setting that the format does not have
    settings = [cv2.IMWRITE_JPEG_QUALITY, 95] if is_jpeg else []
    ok, data = cv2.imencode(path.suffix.lower(), image[..., [2, 1, 0, 3][: image.shape[2]]], settings)
    if not ok:
        raise MediaError(f"{path} could not be encoded")
    with write_atomic(path) as temporary:
        temporary.write_bytes(_add_comment(data.tobytes(), comment.encode("ascii", "replace")))


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Convert uint8 (..., H, W, 3) in 0..255 to float32 (..., 3, H, W) in [-1, 1]."""
    import torch

    if image.dtype != np.uint8 or image.ndim < 3 or image.shape[-1] != 3:
        raise InputError(f"an image must be uint8 (..., H, W, 3), got {image.dtype} {image.shape}")
    planar = np.ascontiguousarray(np.moveaxis(image, -1, -3))
    return torch.from_numpy(planar).float().div_(127.5).sub_(1.0)


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
    with contextlib.suppress(*_DECODE_ERRORS):  # damaged EXIF data: keep the stored orientation
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
    rgba = np.asarray(image.convert("RGBA")).astype(np.float32)
    alpha = rgba[..., 3:] / 255.0
    blended: np.ndarray = np.rint(rgba[..., :3] * alpha + 255.0 * (1.0 - alpha)).astype(np.uint8)
    return blended


def _find_jpeg_end(data: bytes) -> tuple[int, int]:
    """Return where the scans of a JPEG file end (at the end marker or the end of the file), and its type of frame.

    Returns (0, 0) for other formats, JPEG files without a scan, and those with arithmetic coding.
    """
    position, frame, has_scan = 2, 0, False
    while data.startswith(b"\xff\xd8") and position < len(data):
        found = _JPEG_MARKER.search(data, position)  # skips junk between segments, as decoders do
        if found is None or data[found.end() - 1] == 0xD9:
            end = found.start() if found else len(data)
            return (end, frame) if has_scan and frame in _JPEG_HUFFMAN_FRAMES else (0, 0)
        marker, position = data[found.end() - 1], found.end()
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = marker
        has_scan |= marker == 0xDA
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return 0, 0


def _is_truncated_jpeg(data: bytes, frame: int) -> bool:
    """Return whether the scans are incomplete, which decoders hide by filling the rest with grey.

    Scans appended to a complete image are ignored; appended to an incomplete one, they change it. Baseline images are
    compared at 1/8 of their size.
    """

    def decode(jpeg: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
        if frame != _JPEG_PROGRESSIVE_FRAME:  # at 1/8, the last scans of progressive images make no difference
            image.draft(None, (1, 1))
        return np.asarray(image)

    original = decode(data)
    try:
        padded = decode(data.removesuffix(_JPEG_END_MARKER) + _PADDING_SCANS + _JPEG_END_MARKER)
    except _DECODE_ERRORS:
        return True
    return not np.array_equal(original, padded)


def _add_comment(data: bytes, text: bytes) -> bytes:
    """Return a PNG or JPEG file with a comment in its metadata, and files of other formats unchanged."""
    if text and data.startswith(b"\xff\xd8"):  # COM segment, before all others
        return data[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + data[2:]
    if text and data.startswith(b"\x89PNG"):  # tEXt chunk after signature (8 bytes) and header chunk (25 bytes)
        chunk = b"tEXtComment\0" + text
        block = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return data[:33] + block + data[33:]
    return data
