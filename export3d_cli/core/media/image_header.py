"""What a picture's bytes say without being decoded: how large it is, and whether it is there to its end."""

from __future__ import annotations

import re
import struct

_SEGMENT_MARKER = re.compile(rb"\xff+[^\xff\0\x01\xd0-\xd7]")  # in coded data; not escaped, nor a restart
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # frames whose data may be followed by other bytes; arithmetic coding reads on
PROGRESSIVE = 0xC2


def read_header_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header of a JPEG, PNG, WebP, BMP or TIFF; None for other formats and broken headers."""
    readers = {
        b"\xff\xd8": _jpeg,
        b"\x89PNG\r\n\x1a\n": _png,
        b"RIFF": _webp,
        b"BM": _bmp,
        b"II*\0": _tiff,
        b"MM\0*": _tiff,
    }
    for magic, reader in readers.items():
        if data.startswith(magic):
            try:
                return reader(data)
            except (struct.error, IndexError):
                return None
    return None


def _png(data: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    for _ in range(10_000):  # segments
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD9:  # padding, or a marker without a length
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 2 + max(2, int(struct.unpack_from(">H", data, at + 2)[0]))
    return None


def _webp(data: bytes) -> tuple[int, int] | None:
    kind = data[8:16]
    if kind == b"WEBPVP8X":
        low = [int.from_bytes(data[at : at + 3], "little") for at in (24, 27)]
        return low[0] + 1, low[1] + 1
    if kind == b"WEBPVP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"WEBPVP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _bmp(data: bytes) -> tuple[int, int] | None:
    (length,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if length == 12 else "<ii", data, 18)
    return abs(width), abs(height)  # rows from the top have a height below 0


def _tiff(data: bytes) -> tuple[int, int] | None:
    order = "<" if data[:1] == b"I" else ">"
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    sides: dict[int, int] = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if tag in (256, 257) and kind in (3, 4):  # a side as 16 or 32 bits
            (sides[tag],) = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", data, entry + 8)
    return (sides[256], sides[257]) if len(sides) == 2 else None


def is_truncated(data: bytes) -> bool:
    """Whether a PNG or WebP file ends before it says so; other formats are left to their decoders."""
    if data.startswith(b"RIFF"):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    at = 8
    while data.startswith(b"\x89PNG\r\n\x1a\n"):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        at += 12 + length
        if at > len(data):
            return True
        if kind == b"IEND":  # what follows is no part of the picture
            return False
    return False


def find_jpeg_end(data: bytes) -> tuple[int, int] | None:
    """Where the coded data of a JPEG file ends, be it by its end marker or that of the file; and its kind of frame.

    None for what is no JPEG of Huffman codes, or has no coded data.
    """
    at, frame, coded = 2, 0, False
    while data.startswith(b"\xff\xd8") and at < len(data):
        found = _SEGMENT_MARKER.search(data, at)  # what lies between segments is skipped, as decoders do
        if found is None or data[found.end() - 1] == 0xD9:
            end = found.start() if found else len(data)
            return (end, frame) if coded and frame in _HUFFMAN_FRAMES else None
        kind, at = data[found.end() - 1], found.end()
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            frame = kind
        coded |= kind == 0xDA
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return None
