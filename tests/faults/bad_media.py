"""Damaged and hostile images and videos, reproducible."""

from __future__ import annotations

import functools
import os
import random
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from faultkit import BadFile

from export3d_cli.core.media.probe import ffmpeg_path
from export3d_cli.core.runtime.weights import example_path

Make = Callable[[Path], None]


def holding(data: bytes) -> Make:
    """Return a function that writes these bytes."""
    return lambda path: path.write_bytes(data) and None


def flipped(data: bytes, seed: object, count: int = 8) -> bytes:
    """Return `data` with flipped bits, half of them in the first 600 bytes, where headers are."""
    rng = random.Random(str(seed))
    changed = bytearray(data)
    for number in range(count):
        end = len(changed) if number % 2 else min(len(changed), 600)
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def not_plain(file: str) -> Iterator[tuple[str, Make]]:
    """Yield paths that are no regular files."""
    yield "folder", lambda path: path.mkdir()
    yield "cycle of links", lambda path: path.symlink_to(path.name)
    yield "link to nothing", lambda path: path.symlink_to("nothing")
    yield "pipe", os.mkfifo
    yield "zeros without end", lambda path: path.symlink_to("/dev/zero")
    yield "nowhere", lambda path: path.symlink_to("/dev/null")
    yield "empty", holding(b"")
    yield "sparse", lambda path: path.touch() or os.truncate(path, 3 << 30)


@functools.lru_cache
def encoded(suffix: str, *, alpha: bool = False, depth: type = np.uint8) -> bytes:
    """Return the example portrait in another format."""
    picture = cv2.resize(cv2.imread(str(example_path("source.jpg"))), (192, 192)).astype(depth)
    if alpha:
        picture = np.dstack([picture, np.full(picture.shape[:2], 255, depth)])
    return cv2.imencode(suffix, picture)[1].tobytes()


def png(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2, crc: int = 0) -> bytes:
    """Return a PNG of the stated size with `data` as compressed pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ crc)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    """Return a BMP header of the stated size without pixels."""
    return (
        struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 200, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + b"\0" * 90
    )


def tiff(width: int, height: int) -> bytes:
    """Return a TIFF of the stated size without pixels."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, 100)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0" * 104


def with_jpeg_size(width: int, height: int) -> bytes:
    """Return the example portrait with another size in its header."""
    data = bytearray(example_path("source.jpg").read_bytes())
    at = next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def with_exif(body: bytes) -> bytes:
    """Return the example portrait with this EXIF data."""
    data = example_path("source.jpg").read_bytes()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 8) + b"Exif\0\0" + body + data[2:]


def pictures() -> Iterator[BadFile]:
    """Yield unusable photos."""
    jpeg, text = example_path("source.jpg").read_bytes(), b"This is not a picture.\n" * 50

    def bad(name: str, data: bytes | Make, file: str = "bad.jpg", *, harmless: bool = False) -> BadFile:
        return BadFile("image", name, data if callable(data) else holding(data), file, harmless)

    for name, make in not_plain("bad.jpg"):
        yield bad(name, make)
    for suffix in (".jpg", ".png", ".webp", ".bmp", ".tif"):
        whole = jpeg if suffix == ".jpg" else encoded(suffix)
        for part in (0.0001, 0.02, 0.7):
            cut = whole[: max(1, int(len(whole) * part))]
            yield bad(f"{suffix} cut at {part}", cut, f"bad{suffix}")
        for seed in range(2):
            yield bad(f"{suffix} flipped {seed}", flipped(whole, seed), f"bad{suffix}", harmless=True)
        yield bad(f"text as {suffix}", text, f"bad{suffix}")
        yield bad(f"{suffix} head and zeros", whole[:64] + b"\0" * 5000, f"bad{suffix}")
    yield bad("jpeg cut and closed", jpeg[: len(jpeg) // 2] + b"\xff\xd9")
    yield bad("jpeg as png", jpeg, "bad.png", harmless=True)
    yield bad("upper case and no suffix", jpeg, "BAD", harmless=True)
    yield bad("video as jpg", clip())
    yield bad("html", b"<!doctype html><html><body>404</body></html>")
    yield bad("svg that includes a file", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>')
    yield bad("zip", b"PK\3\4" + bytes(300))
    yield bad("one pixel", png(1, 1, b"\0\xff\0\0"), "bad.png")
    yield bad("one pixel high", png(30_000, 1, b"\0" + b"\x80" * 90_000), "bad.png")
    yield bad("one pixel wide", png(1, 30_000, b"\0\x80\x80\x80" * 30_000), "bad.png")
    yield bad("30k pixels, lying", png(30_000, 30_000, b"\0" * 100), "bad.png")
    yield bad("decompression bomb", png(30_000, 30_000, bytes(90_001 * 3000)), "bad.png")
    yield bad("largest png", png(2**31 - 1, 2**31 - 1, b""), "bad.png")
    yield bad("png without width", png(0, 10, b""), "bad.png")
    yield bad("png of no known colour", png(8, 8, bytes(300), colour=5), "bad.png")
    yield bad("png of 16 bits, grey, alpha", png(8, 8, bytes(8 * 33), depth=16, colour=4), "bad.png")
    yield bad("png with wrong checksums", png(8, 8, bytes(8 * 25), crc=1), "bad.png")
    yield bad("png with a giant chunk", png(8, 8, bytes(200))[:33] + b"\x7f\xff\xff\xffzTXt" + bytes(99), "bad.png")
    yield bad("png with two headers", png(8, 8, bytes(200))[:33] + png(30_000, 30_000, b"")[8:], "bad.png")
    yield bad("jpeg of 65k pixels", with_jpeg_size(65_535, 65_535))
    yield bad("jpeg of no pixels", with_jpeg_size(0, 0))
    yield bad("jpeg of 20k pixels", with_jpeg_size(20_000, 3_000), harmless=True)
    yield bad("jpeg with two sizes", with_jpeg_size(64, 64)[:-2] + with_jpeg_size(30_000, 30_000)[2:], harmless=True)
    for size in (30_000, 100_000):
        yield bad(f"bmp of {size} pixels", bmp(size, size), "bad.bmp")
        yield bad(f"tiff of {size} pixels", tiff(size, size), "bad.tif")
        yield bad(f"ppm of {size} pixels", b"P6\n%d %d\n255\n" % (size, size) + bytes(100))
        yield bad(f"pfm of {size} pixels", b"PF\n%d %d\n-1.0\n" % (size, size) + bytes(100))
    yield bad("bmp turned upside down", bmp(-30_000, -30_000), "bad.bmp")
    yield bad("sun raster", struct.pack(">8I", 0x59A66A95, 30_000, 30_000, 24, 0, 1, 0, 0) + bytes(100))
    yield bad("radiance", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 30000 +X 30000\n" + bytes(100))
    riff = b"RIFF" + struct.pack("<I", 40) + b"WEBPVP8L" + struct.pack("<I", 20) + b"\x2f" + b"\xff\xff\xff\x0f"
    yield bad("webp of 16k pixels", riff + bytes(40), "bad.webp")
    yield bad(
        "exif of no orientation",
        with_exif(struct.pack("<2sHIHHHIHH", b"II", 42, 8, 1, 274, 3, 1, 99, 0)),
        harmless=True,
    )
    yield bad("exif that ends early", with_exif(b"II*\0\xff\xff\xff\x7f"), harmless=True)
    yield bad(
        "exif that points at itself", with_exif(struct.pack("<2sHIHI", b"II", 42, 8, 65535, 8) * 3), harmless=True
    )
    yield bad(
        "jpeg with alpha of 16 bits", encoded(".png", alpha=True, depth=np.uint16)[:-30], "bad.png", harmless=True
    )
    yield bad("line break in the name", text, "a\nb\x1b[31m.jpg")
    yield bad("name that is no text", text, os.fsdecode(b"\xff\xfe.jpg"))
    yield bad("name like an option", text, "-o.jpg")
    yield bad("long name", text, "n" * 240 + ".jpg")
    yield bad("grey wall", lambda path: cv2.imwrite(str(path), np.full((200, 200, 3), 128, np.uint8)) and None)
    yield bad("black", lambda path: cv2.imwrite(str(path), np.zeros((200, 200, 3), np.uint8)) and None)
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    yield bad("noise", lambda path: cv2.imwrite(str(path), noise) and None)


@functools.lru_cache
def clip(suffix: str = ".mp4", *args: str) -> bytes:
    """Return eight frames of the bundled driver with audio, 256 x 256."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip{suffix}"
        inputs = ["-i", str(example_path("drive.mp4")), "-f", "lavfi", "-i", "sine=d=1", "-map", "0:v", "-map", "1:a"]
        inputs = inputs[:-2] if suffix == ".gif" else inputs
        options = ["-frames:v", "8", "-t", "0.32", "-vf", "scale=256:256", *args]
        subprocess.run([ffmpeg_path(), "-loglevel", "error", *inputs, *options, str(path)], check=True)
        return path.read_bytes()


def y4m(size: str, rate: str = "F25:1", frames: int = 1, data: bytes = bytes(6)) -> bytes:
    """Return a raw video (YUV4MPEG2) with this header."""
    return f"YUV4MPEG2 {size} {rate} Ip A1:1 C420jpeg\n".encode() + (b"FRAME\n" + data) * frames


def patched(data: bytes, mark: bytes, at: int, value: bytes) -> bytes:
    """Return `data` with `value` written `at` bytes after the start of the first `mark`."""
    start = data.index(mark) + at
    return data[:start] + value + data[start + len(value) :]


def videos() -> Iterator[BadFile]:
    """Yield unusable driving videos."""

    def bad(name: str, data: bytes | Make, file: str = "bad.mp4", *, harmless: bool = False) -> BadFile:
        return BadFile("video", name, data if callable(data) else holding(data), file, harmless)

    for name, make in not_plain("bad.mp4"):
        yield bad(name, make)
    for suffix, args in ((".mp4", ()), (".mkv", ()), (".webm", ("-deadline", "realtime")), (".gif", ())):
        whole = clip(suffix, *args)
        for part in (0.001, 0.5):
            yield bad(f"{suffix} cut at {part}", whole[: max(1, int(len(whole) * part))], f"bad{suffix}", harmless=True)
        for seed in range(3):
            yield bad(f"{suffix} flipped {seed}", flipped(whole, seed), f"bad{suffix}", harmless=True)
        yield bad(f"text as {suffix}", b"This is not a video.\n" * 90, f"bad{suffix}")
    whole = clip()
    tone = ("-f", "lavfi", "-i", "sine=d=1")
    yield bad("sound alone", lambda path: _ffmpeg(*tone, path), "bad.m4a", harmless=True)
    yield bad("subtitles alone", b"1\n00:00:00,000 --> 00:00:01,000\nhello\n", "bad.srt")
    yield bad("no frames", lambda path: _ffmpeg(*_test("64x64"), "-frames:v", "0", path), harmless=True)
    yield bad("one pixel", lambda path: _ffmpeg(*_test("1x1"), "-frames:v", "3", "-c:v", "ffv1", path), "bad.mkv")
    yield bad(
        "30k pixels wide", lambda path: _ffmpeg(*_test("30000x2"), "-frames:v", "2", "-c:v", "ffv1", path), "bad.mkv"
    )
    yield bad("no face", lambda path: _ffmpeg(*_test("128x128"), "-frames:v", "4", path))
    for size in ("W30000 H30000", "W2147483647 H1", "W0 H0", "W-5 H-5", "W64 H2147483647"):
        yield bad(f"raw {size}", y4m(size), "bad.y4m")
    for rate in ("F0:0", "F-25:1", "F25:0", "F1000000000:1", "F1:1000000000", "F25:-1"):
        yield bad(f"raw {rate}", y4m("W64 H64", rate, 3, b"\x80" * 6144), "bad.y4m")
    yield bad("raw that stops", y4m("W64 H64", "F25:1", 1, bytes(100)), "bad.y4m")
    yield bad("mp4 of 65k pixels", patched(whole, b"avc1", 28, b"\xff\xff\xff\xff"), harmless=True)
    yield bad("mp4 of a long life", patched(whole, b"mvhd", 20, b"\x7f\xff\xff\xff"), harmless=True)
    yield bad("mp4 of a tick of 0", patched(whole, b"mdhd", 16, bytes(4)), harmless=True)
    yield bad("mp4 of endless samples", patched(whole, b"stsz", 12, b"\x7f\xff\xff\xff"), harmless=True)
    yield bad("mp4 of negative times", patched(whole, b"stts", 12, b"\xff\xff\xff\xf0"), harmless=True)
    yield bad("mp4 with a giant box", struct.pack(">I4s", 0xFFFFFFF0, b"ftyp") + whole[8:], harmless=True)
    yield bad("gif of 65k pixels", patched(clip(".gif"), b"GIF89a", 6, b"\xff\xff\xff\xff"), "bad.gif")
    yield bad("playlist", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "bad.m3u8")
    yield bad("playlist as video", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    yield bad("list of other files", b"ffconcat version 1.0\nfile /etc/passwd\n", "bad.ffconcat")
    yield bad("session of a stream", b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n", "bad.sdp")
    yield bad(
        "dash", b'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>', "bad.mpd"
    )
    yield bad("name like an address", whole[:100], "http:..x.mp4")
    yield bad("name like an option", whole[:100], "-i.mp4")
    yield bad("name that is no text", whole[:100], os.fsdecode(b"\xff.mp4"))
    yield bad("folder of nothing", lambda path: path.mkdir(), "frames")
    yield bad("folder of bad pictures", _folder(holding(b"no")), "frames")
    yield bad("folder of two sizes", _folder(None), "frames")


def _test(size: str) -> tuple[str, ...]:
    return "-f", "lavfi", "-i", f"testsrc=s={size}:r=25"


def _ffmpeg(*args: str | Path) -> None:
    subprocess.run([ffmpeg_path(), "-loglevel", "quiet", "-y", *map(str, args)], check=False)


def _folder(make: Make | None) -> Make:
    def fill(path: Path) -> None:
        path.mkdir()
        for number in range(3):
            picture = path / f"{number}.png"
            if make is not None:
                make(picture)
            else:
                picture.write_bytes(cv2.imencode(".png", np.full((64, 64 + number, 3), 9, np.uint8))[1].tobytes())

    return fill
