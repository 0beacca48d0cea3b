"""BadFile files of numbers and text: motion, weights, configurations, manifests, CSV; the same every time."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bad_media import Make, flipped, holding, not_plain
from faultkit import BadFile

TEXT = b"This is not what it should be.\n" * 40


def npz(arrays: dict[str, Any]) -> bytes:
    """Arrays as a motion file holds them."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(shape: str, descr: str = "<f4", body: bytes = bytes(64)) -> bytes:
    """An array that says it is of this shape and type."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def zipped(members: dict[str, bytes]) -> bytes:
    """A zip file of these members, compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def motions(whole: Path) -> Iterator[BadFile]:
    """Everything that is no usable motion file."""
    with np.load(whole) as file:
        arrays = dict(file)

    def bad(name: str, data: bytes | Make, *, harmless: bool = False) -> BadFile:
        make = data if callable(data) else holding(data)
        return BadFile("motion", name, make, "bad.motion.npz", harmless)

    def changed(**new: Any) -> bytes:
        kept = {key: value for key, value in {**arrays, **new}.items() if value is not None}
        return npz(kept)

    def spoilt(key: str, value: float) -> bytes:
        array = arrays[key].copy()
        array.flat[len(array.flat) // 2] = value
        return changed(**{key: array})

    data = whole.read_bytes()
    for name, make in not_plain("bad.motion.npz"):
        yield bad(name, make)
    for part in (0.001, 0.3, 0.9, 0.999):
        yield bad(f"cut at {part}", data[: int(len(data) * part)])
    for seed in range(6):
        yield bad(f"flipped {seed}", flipped(data, seed), harmless=True)
    yield bad("text", TEXT)
    yield bad("pickle", pickle.dumps({"beta": 1}))
    yield bad("bare array", npy("(8, 64)", body=bytes(2048)))
    for key in ("beta", "camera", "landmarks", "crop"):
        for value in (np.nan, np.inf, -np.inf):
            yield bad(f"{key} {value}", spoilt(key, value))
        yield bad(f"{key} missing", changed(**{key: None}))
    for key in ("beta", "camera", "landmarks"):
        yield bad(f"{key} of 1e38", spoilt(key, 1e38))
    frames = len(arrays["beta"])
    shapes = {
        "no frames": (0, 64),
        "63 wide": (frames, 63),
        "flat": (frames * 64,),
        "deep": (1, frames, 64),
        "bare": (),
    }
    for name, shape in shapes.items():
        yield bad(f"beta {name}", changed(beta=np.zeros(shape, np.float32)))
    yield bad("every array empty", changed(**{k: arrays[k][:0] for k in ("beta", "camera", "landmarks", "found")}))
    yield bad("camera shorter", changed(camera=arrays["camera"][:-1]))
    yield bad("seven points", changed(landmarks=np.zeros((frames, 7, 3), np.float32)))
    yield bad("cameras of zeros", changed(camera=np.zeros((frames, 25), np.float32)))
    yield bad("cameras that shear", changed(camera=np.ones((frames, 25), np.float32)))
    kinds = {"text": "U5", "bytes": "S3", "complex": "c16", "time": "M8[s]"}
    for name, kind in kinds.items():
        yield bad(f"beta of {name}", changed(beta=np.zeros((frames, 64), kind)))
    yield bad("beta of objects", changed(beta=np.full((frames, 64), None)))
    yield bad("beta of records", changed(beta=np.zeros((frames, 64), [("a", "f4")])))
    for fps in ((-25, 1), (25, -1), (0, 1), (25, 0), (2**62, 1), (1, 2**62)):
        yield bad(f"rate {fps[0]}/{fps[1]}", changed(fps=np.array(fps)))
    yield bad("rate of three numbers", changed(fps=np.array([1, 2, 3])))
    yield bad("rate of nan", changed(fps=np.array([np.nan, 1])))
    yield bad("rate of infinity", changed(fps=np.array([np.inf, 1])))
    yield bad("crop of two numbers", changed(crop=np.zeros(2)))
    yield bad("size of one number", changed(size=np.array([3])))
    yield bad("size that is negative", changed(size=np.array([-3, -4])), harmless=True)
    raw = {f"{key}.npy": npy(str(value.shape), value.dtype.str, value.tobytes()) for key, value in arrays.items()}
    for name, shape in {"lying": "(99999999999, 64)", "overflowing": f"({2**62}, 64)", "negative": "(-8, 64)"}.items():
        yield bad(f"beta of a {name} shape", zipped({**raw, "beta.npy": npy(shape)}))
    yield bad("beta with code in its header", zipped({**raw, "beta.npy": npy("__import__('os').getpid()")}))
    yield bad("decompression bomb", lambda path: _bomb(path, raw))
    yield bad("nested header", zipped({**raw, "beta.npy": npy("(" * 60 + ")" * 60)}))


def _bomb(path: Path, raw: dict[str, bytes]) -> None:
    """More than two gigabytes of zeros, in a few megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in raw.items():
            if name != "beta.npy":
                archive.writestr(name, data)
        with archive.open("beta.npy", "w", force_zip64=True) as file:
            file.write(npy("(8400000, 64)", body=b""))
            for _ in range(129):
                file.write(bytes(1 << 24))


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (JSON-able, or bytes)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def weights(whole: Path) -> Iterator[BadFile]:
    """Everything that is no usable weights file."""
    data = whole.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    meta = header["__metadata__"]
    config = json.loads(meta["config"])
    names = [name for name in header if name != "__metadata__"]

    def bad(name: str, content: bytes | Make, *, harmless: bool = False) -> BadFile:
        make = content if callable(content) else holding(content)
        return BadFile("weights", name, make, "bad.safetensors", harmless)

    def changed(name: str, **new: Any) -> bytes:
        return safetensors({**header, name: {**header[name], **new}}, body)

    def sized(**new: Any) -> bytes:
        return safetensors({**header, "__metadata__": {**meta, "config": json.dumps({**config, **new})}}, body)

    for name, make in not_plain("bad.safetensors"):
        yield bad(name, make)
    for part in (0.0001, 0.01, 0.5, 0.999):
        yield bad(f"cut at {part}", data[: max(1, int(len(data) * part))])
    for seed in range(8):
        yield bad(f"flipped {seed}", flipped(data, seed), harmless=True)
    yield bad("text", TEXT)
    yield bad("pickle", pickle.dumps({"state_dict": {}}))
    yield bad("torch zip", zipped({"archive/data.pkl": pickle.dumps({})}))
    for size in (2**63, 2**40, len(data), 0, 1):
        yield bad(f"header of {size} bytes", safetensors(header, body, size))
    yield bad("header of 90 MB", safetensors(b'{"a":"' + b"x" * 90_000_000 + b'"}'))
    yield bad("nested header", safetensors(b"[" * 100_000))
    yield bad("nested metadata", sized(expression={"a": 1}))
    deep = "[" * 100_000 + "]" * 100_000
    yield bad("nested config", safetensors({**header, "__metadata__": {**meta, "config": deep}}, body))
    yield bad("header that is a list", safetensors([1, 2]))
    yield bad("no metadata", safetensors({k: v for k, v in header.items() if k != "__metadata__"}, body))
    yield bad("another format", safetensors({**header, "__metadata__": {**meta, "format": "pt"}}, body))
    for key in ("config", "record"):
        for value in ("", "[]" if key == "config" else "{", "null" if key == "config" else "[", "NaN,"):
            yield bad(f"{key} {value!r}", safetensors({**header, "__metadata__": {**meta, key: value}}, body))
    first, second = names[:2]
    yield bad("overlapping tensors", changed(second, data_offsets=header[first]["data_offsets"]))
    yield bad("offsets past the end", changed(first, data_offsets=[0, 2**50]))
    yield bad("offsets backwards", changed(first, data_offsets=[8, 0]))
    yield bad("offsets below 0", changed(first, data_offsets=[-8, 8]))
    yield bad("shape too large", changed(first, shape=[2**40, 2**40]))
    yield bad("shape below 0", changed(first, shape=[-1]))
    yield bad("unknown type", changed(first, dtype="F7"))
    yield bad("type of another size", changed(first, dtype="F64"))
    yield bad("renamed tensor", safetensors({("x" if k == first else k): v for k, v in header.items()}, body))
    yield bad("hole in the data", safetensors(header, body + bytes(64)))
    for key, value in (
        ("width", 10**9), ("image_size", 10**6), ("plane_size", 10**6), ("eadaln_blocks", 10**9), ("heads", 0),
        ("heads", 3), ("plain_width", 3), ("width", 0), ("width", -32), ("basis", 10**9), ("stem", [8]),
        ("stem", [8, 8, 10**9]),
        ("mesh_size", 0), ("raw_size", 0), ("coarse_samples", 0), ("code_dim", -1), ("image_size", 63),
        ("expression", "pickle"), ("unknown", 1), ("width", "32"), ("width", None), ("superres", []),
    ):  # fmt: skip
        yield bad(f"{key} of {value}", sized(**{key: value}))
    spoilt = np.frombuffer(body, np.uint8).copy()
    spoilt[:] = 0xFF  # every float16 and float32 is NaN then
    yield bad("every number nan", safetensors(header, spoilt.tobytes()))


def configs() -> Iterator[BadFile]:
    """Everything that is no usable configuration."""

    def bad(name: str, data: bytes | str | Make) -> BadFile:
        content = data.encode() if isinstance(data, str) else data
        return BadFile("config", name, content if callable(content) else holding(content), "bad.yaml")

    for name, make in not_plain("bad.yaml"):
        if name not in ("empty", "nowhere"):  # an empty configuration is that of the defaults
            yield bad(name, make)
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
    )
    for key in ("lr", "steps", "stages", "model", "data", "preset"):
        yield bad(f"alias bomb in {key}", bomb.replace("m: &m", f"{key}: &m"))
    yield bad("alias of itself", "data: &a {path: *a}")
    yield bad("list of itself", "stages: &a [*a]")
    yield bad("merge bomb", "a: &a {x: 1}\nmodel:\n  <<: [*a, *a]\n")
    for name, tag in (
        ("a call", "!!python/object/apply:os.system ['true']"), ("an object", "!!python/object/new:str [x]"),
        ("a name", "!!python/name:os.system"), ("a tag", "!unknown 3"), ("binary", "!!binary zzz"),
        ("a set", "!!set {1, 2}"), ("pairs", "!!pairs [a: 1]"), ("a date", "2026-11-21"), ("no date", "2001-99-99"),
        ("no time", "2001-12-14t99:99:99Z"), ("a long number", "9" * 5000), ("sixties", "1:99:99"),
        ("nan", ".nan"), ("infinity", ".inf"), ("less than nothing", "-1"), ("a list", "[1, 2]"), ("text", "much"),
        ("a truth", "yes"), ("nothing", "null"), ("a mapping", "{a: b}"), ("1e400", "1e400"),
    ):  # fmt: skip
        yield bad(f"lr of {name}", f"lr: {tag}\n")
    for line in (
        "batch: 0", "batch: -4", "batch: 3\naccumulate: 2", "steps: -1", "preset: huge", "preset: [tiny]",
        "stages: [gan]", "stages: [reconstruction, clebs]", "stages: [clebs, clebs]", "model: 3", "model: {heads: 0}",
        "model: {width: 0}",
        "model: {width: -32}", "model: {image_size: 0}", "model: {image_size: -64}", "model: {basis: -1}",
        "model: {image_size: 1600000}", "model: {width: 4000000000}", "model: {plane_size: 0}", "model: {raw_size: 0}",
        "model: {stem: [1]}", "model: {stem: []}", "model: {superres: [8, 8, 8]}", "model: {coarse_samples: -1}",
        "model: {eadaln_blocks: 100000000}", "model: {mesh_size: -1}", "model: {plane_ema: .nan}",
        "keep_checkpoints: 0",
        "skip_nonfinite: -1", "data: {weight: [1, 2]}", "data: {path: {a: 1}}", "data: 7", "loss: {adversarial: 3}",
        "adversarial: {group: 0}", "adversarial: {betas: [0]}", "adversarial: {base: 0}", "learning_rate: 3", "1: 2",
        "[1]: 2", "? {a: 1}\n: 2", "ema: 7", "log_every: 0", "checkpoint_every: 0", "clebs: {negatives: 0}",
        "threads: -3",
        "max_minutes: .nan", "clip_grad: -1", "warmup: -5", "decay: maybe", "device: quantum", "precision: fp8",
        "clebs: {image_size: 0}", "clebs: {temperature: 0}", "data: {cache_stride: 0}", "seed: 1.5",
    ):  # fmt: skip
        yield bad(line.replace("\n", ", "), f"{line}\n" if line.startswith("preset") else f"preset: tiny\n{line}\n")
    yield bad("list", "- 1\n- 2\n")
    yield bad("two documents", "lr: 1\n---\nlr: 2\n")
    yield bad("tabs", "data:\n\tpath: x\n")
    yield bad("not closed", "stages: [clebs\n")
    yield bad("nested", "lr: " + "[" * 5000)
    yield bad("nested mappings", "lr: " + "{a: " * 3000)
    yield bad("utf-16", "lr: 1\n".encode("utf-16"))
    yield bad("not text", bytes(range(256)))
    yield bad("zeros", bytes(1000))
    yield bad("large", b"# " + b"x" * 30_000_000 + b"\nlr: [1]\n")


def manifests() -> Iterator[BadFile]:
    """Everything that is no usable list of clips; the clips a, b and c that it may name are there."""
    line = {"id": "a_t00", "person": "a", "file": "clips/a_t00.mp4", "motion": "clips/a_t00.motion.npz", "frames": 8}

    def bad(name: str, data: bytes | str | Make, *, harmless: bool = False) -> BadFile:
        content = data.encode() if isinstance(data, str) else data
        make = content if callable(content) else holding(content)
        return BadFile("manifest", name, make, "manifest.jsonl", harmless)

    for name, make in not_plain("manifest.jsonl"):
        yield bad(name, make)
    for name, text in {
        "text": "not json", "a list": "[1]", "a number": "3", "null": "null", "cut": json.dumps(line)[:-9],
        "nested": "[" * 100_000, "nan": "NaN", "two on a line": json.dumps(line) * 2, "blank": "\n\n\n",
        "long number": '{"id": ' + "9" * 5000 + "}", "utf-16": "\ufeff{}",
    }.items():  # fmt: skip
        yield bad(name, text)
    yield bad("not text", bytes(range(256)))
    for key in ("id", "file", "motion"):
        yield bad(f"no {key}", json.dumps({k: v for k, v in line.items() if k != key}))
    for key, value in (
        ("file", "clips/nothing.mp4"), ("file", "clips"), ("file", ""), ("file", "clips/a_t00.motion.npz"),
        ("file", "a\0b.mp4"), ("motion", "clips/nothing.npz"), ("motion", "clips"), ("motion", "clips/a_t00.mp4"),
        ("motion", "/dev/zero"), ("motion", 7), ("file", ["x"]), ("file", "x" * 5000), ("split", "test"),
        ("split", {"a": 1}),
    ):  # fmt: skip
        yield bad(f"{key} {str(value)[:40]!r}", json.dumps({**line, key: value}))


def arkit_csvs(whole: Path) -> Iterator[BadFile]:
    """Everything that is no usable CSV of Live Link Face."""
    text = whole.read_text()
    rows = text.splitlines()
    cells = rows[3].split(",")

    def bad(name: str, data: bytes | str | Make, *, harmless: bool = False) -> BadFile:
        content = data.encode() if isinstance(data, str) else data
        return BadFile("csv", name, content if callable(content) else holding(content), "bad.csv", harmless)

    def row(at: int, cell: str) -> str:
        return "\n".join([*rows[:3], ",".join([*cells[:at], cell, *cells[at + 1 :]]), *rows[4:]]) + "\n"

    for name, make in not_plain("bad.csv"):
        yield bad(name, make)
    yield bad("cut", text[: len(text) // 2])
    yield bad("header alone", rows[0])
    yield bad("no header", "\n".join(rows[1:]))
    yield bad("text", TEXT)
    yield bad("not text", bytes(range(256)) * 9)
    yield bad("utf-16", text.encode("utf-16"))
    yield bad("zeros", bytes(5000))
    for cell in (
        "=cmd|'/c calc'!A1", "+1+1", "@SUM(A1)", '=HYPERLINK("http://127.0.0.1")', "nan", "inf", "-inf", "1e999", "",
        "0x1F",
        "1,5", '"', "true", "9" * 6000, "\x00", "\x1b[31m",
    ):  # fmt: skip
        yield bad(f"coefficient {cell[:20]!r}", row(5, cell))
    for cell in (
        "",
        "10:00:00",
        "10:00:00:x",
        "-1:00:00:00",
        "99:99:99:99",
        "10:00:00:00.000",
        "9" * 400 + ":0:0:0",
        "=1+1",
    ):
        yield bad(f"timecode {cell[:20]!r}", row(0, cell))
    for angle in ("1e300", "-1e300"):
        yield bad(f"angle {angle}", row(len(cells) - 3, angle))
    yield bad("shorter row", "\n".join([*rows[:3], ",".join(cells[:9]), *rows[4:]]))
    yield bad("quote that stays open", text.replace("0.1", '"0.1', 1))
    yield bad("a column missing", "\n".join(",".join(r.split(",")[:30]) for r in rows))
    yield bad("a very long cell", row(5, "x" * 400_000))
    yield bad("backwards", "\n".join([rows[0], *reversed(rows[1:])]))
    yield bad("twice the same time", "\n".join([*rows[:3], rows[2], *rows[3:]]))
    yield bad("a day apart", "\n".join([*rows[:5], rows[5].replace("10:00:00", "22:00:00"), *rows[6:]]))
