"""Images: files <-> uint8 RGB arrays, and the only conversion between those and float tensors in [-1, 1]."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export3d_cli.core.media.image_header import PROGRESSIVE, find_jpeg_end, is_truncated, read_header_size
from export3d_cli.core.runtime.errors import InputError, MediaError
from export3d_cli.core.runtime.files import check_file, quiet_stderr, write_atomic

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 64_000_000  # of one image or frame; more is refused before it is decoded
MAX_FILE_BYTES = 512 * 2**20  # of an image file
_PADDING_SCANS = b"".join(bytes(n * k % 251 for n in range(64)) + bytes([0xFF, 0xD0 + k % 8]) for k in range(89, 105))
_JPEG_END_MARKER = b"\xff\xd9"  # end of a JPEG picture; above: coded data that means anything, with restarts
_UNSUPPORTED_BRANDS = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"mif1": "HEIC",
    b"msf1": "HEIC",
    b"avif": "AVIF",
    b"avis": "AVIF",
}
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def has_image_suffix(path: Path) -> bool:
    """Whether the name is that of a still image."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: Path) -> np.ndarray:
    """A still image as uint8 (H, W, 3) RGB; EXIF orientation applied, alpha composited on white."""
    import cv2

    path = Path(path)
    data = _read_bytes(path)
    declared = read_header_size(data)
    if declared is None:  # OpenCV knows more formats, but would make room for whatever size such a file claims
        kind = _UNSUPPORTED_BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
        if kind is not None:
            raise InputError(f"{path} is {kind}, which is not read: save it as JPEG, PNG or WebP")
        raise InputError(f"{path} is not an image that can be read: give a JPEG, PNG or WebP file")
    check_pixel_count(*declared, path)
    end = find_jpeg_end(data)
    if end is not None:  # many a camera leaves out the marker of the end, and OpenCV does not go without
        data = data[: end[0]] + _JPEG_END_MARKER
    try:
        if is_truncated(data) or (end is not None and _is_truncated_jpeg(data[:-2], progressive=end[1] == PROGRESSIVE)):
            raise InputError(f"{path} ends before its picture does: copy or download it again")
        buffer = np.frombuffer(data, dtype=np.uint8)
        image = None
        with quiet_stderr():  # what is wrong is told by us, on one line
            if not data.startswith(b"\xff\xd8"):  # JPEG has no alpha; and only IMREAD_COLOR applies EXIF
                image = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED)
            if image is not None and image.ndim == 3 and image.shape[2] == 4:
                image = _apply_orientation(_composite_on_white(image), _png_orientation(data))
            else:
                image = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise InputError(f"{path} cannot be decoded: {str(error).strip().splitlines()[-1]}") from error
    if image is None:
        raise InputError(f"{path} is not an image that can be read: give a JPEG, PNG or WebP file")
    check_pixel_count(image.shape[1], image.shape[0], path)
    return np.ascontiguousarray(image[..., ::-1])


def write_image(path: Path, image: np.ndarray, *, comment: str = "") -> None:
    """Write uint8 (H, W, 3) RGB, or (H, W, 4) RGBA as PNG; the format follows the suffix, JPEG at quality 95.

    PNG and JPEG take a comment.
    """
    import cv2

    path = Path(path)
    channels = (3, 4) if path.suffix.lower() == ".png" else (3,)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in channels:
        raise InputError(f"an image is uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if not has_image_suffix(path):
        raise InputError(f"cannot write images of type {path.suffix!r}: use .png, .jpg or .webp")
    jpeg = path.suffix.lower() in (".jpg", ".jpeg")  # OpenCV 5 warns of a setting that the format does not have
    settings = [cv2.IMWRITE_JPEG_QUALITY, 95] if jpeg else []
    ok, data = cv2.imencode(path.suffix.lower(), image[..., [2, 1, 0, 3][: image.shape[2]]], settings)
    if not ok:
        raise MediaError(f"{path} could not be encoded")
    with write_atomic(path) as temporary:
        temporary.write_bytes(_add_comment(data.tobytes(), comment.encode("ascii", "replace")))


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) in 0..255 -> float32 (..., 3, H, W) in [-1, 1]."""
    import torch

    if image.dtype != np.uint8 or image.ndim < 3 or image.shape[-1] != 3:
        raise InputError(f"an image is uint8 (..., H, W, 3), got {image.dtype} {image.shape}")
    planar = np.ascontiguousarray(np.moveaxis(image, -1, -3))
    return torch.from_numpy(planar).float().div_(127.5).sub_(1.0)


def to_uint8(tensor: torch.Tensor) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1] (clamped) -> uint8 (..., H, W, 3), rounded; the inverse of `to_tensor`."""
    scaled = tensor.detach().float().clamp(-1.0, 1.0).add_(1.0).mul_(127.5).round_().byte()
    return np.asarray(scaled.movedim(-3, -1).contiguous().cpu().numpy())


def _add_comment(data: bytes, text: bytes) -> bytes:
    """A PNG or JPEG file with a comment in its metadata; other formats as they are."""
    if text and data.startswith(b"\xff\xd8"):  # a COM segment, first of all
        return data[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + data[2:]
    if text and data.startswith(b"\x89PNG"):  # a tEXt chunk behind the header, which is 8 + 25 bytes long
        chunk = b"tEXtComment\0" + text
        block = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return data[:33] + block + data[33:]
    return data


def check_pixel_count(width: int, height: int, path: Path) -> None:
    """Refuse pictures that would not fit into memory."""
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise InputError(f"{path} is {width}x{height}, more than {limit} megapixels: make it smaller first")


def _is_truncated_jpeg(jpeg: bytes, *, progressive: bool) -> bool:
    """Whether a JPEG picture lacks data at its end, which decoders fill with grey: then bytes put there change it.

    Behind a whole picture they are skipped. At an eighth of its size, where parts are missing and not merely details.
    """
    import cv2

    flag = cv2.IMREAD_COLOR if progressive else cv2.IMREAD_REDUCED_COLOR_8
    with quiet_stderr():
        made = cv2.imdecode(np.frombuffer(jpeg + _JPEG_END_MARKER, np.uint8), flag)
        filled = cv2.imdecode(np.frombuffer(jpeg + _PADDING_SCANS + _JPEG_END_MARKER, np.uint8), flag)
    return made is not None and (filled is None or not np.array_equal(made, filled))


def _read_bytes(path: Path) -> bytes:
    check_file(path, MAX_FILE_BYTES)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not data:
        raise InputError(f"{path} is empty")
    return data


def _png_orientation(data: bytes) -> int:
    """EXIF orientation of a PNG file, 1 to 8: OpenCV applies it only to pictures that it reads without alpha."""
    at = 8
    while data.startswith(b"\x89PNG") and at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            exif = data[at + 8 : at + 8 + length]
            order = "<" if exif.startswith(b"II") else ">"
            with contextlib.suppress(struct.error):
                (first,) = struct.unpack_from(order + "I", exif, 4)
                (entries,) = struct.unpack_from(order + "H", exif, first)
                for k in range(entries):
                    tag, _, _, value = struct.unpack_from(order + "HHIH", exif, first + 2 + 12 * k)
                    if tag == 0x112:
                        return int(value)
        at += 12 + length
    return 1


def _apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    """A picture as its EXIF orientation says that it is to be seen."""
    turn, mirror = {2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (1, 1), 6: (-1, 0), 7: (-1, 1), 8: (1, 0)}.get(
        orientation, (0, 0)
    )
    return np.rot90(image[:, ::-1] if mirror else image, turn)


def _composite_on_white(image: np.ndarray) -> np.ndarray:
    """BGRA of 8 or 16 bits -> uint8 BGR over white."""
    top = float(np.iinfo(image.dtype).max)
    alpha = image[..., 3:].astype(np.float32) / top
    colour = image[..., :3].astype(np.float32) * (255.0 / top)
    mixed: np.ndarray = np.rint(colour * alpha + 255.0 * (1.0 - alpha)).astype(np.uint8)
    return mixed
