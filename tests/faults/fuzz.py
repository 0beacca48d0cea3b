"""Mutation fuzzer for all readers: `python tests/faults/fuzz.py --executions 2000 --seed 1 [READER...]`.

Mutates valid files (bits, bytes, slices, numbers, tokens), also inside zip members and safetensors headers with correct
checksums and lengths, and reads them. A crash is anything but a result or an `Export3DError`: another exception, more
than 10 s of CPU time, or 512 MiB of memory that is not freed.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from bad_media import clip, encoded, y4m
from bad_numbers import npz, safetensors, zipped
from faultkit import TookTooLongError, memory_mib, time_limit

from export3d_cli.core.animation.compositor import read_portrait
from export3d_cli.core.animation.expression_controls import ExpressionEdit, read_preset
from export3d_cli.core.animation.person import FORMAT
from export3d_cli.core.config.loading import load_train_config, to_dict
from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.dataset.preprocess import DatasetManifest
from export3d_cli.core.face import arkit
from export3d_cli.core.face.given_landmarks import complete_landmarks, read_landmarks
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.speech import read_cues
from export3d_cli.core.media.content_credentials import has_metadata_mark, read_credentials, sign_file
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.model.checkpoint import load_state, load_weights
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.errors import Export3DError
from export3d_cli.core.runtime.weights import example_path, weights_info
from export3d_cli.core.train.training_data import load_dataset

NUMBERS = [0, 1, -1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, -(2**31), 2**32 - 1, 2**62, 2**63 - 1]
TOKENS = [b"nan",
         b"-1", b"1e999", b"null", b"{", b"[", b"}", b'"', b",", b"\n", b"\0", b"!!python/name:os.system", b"&a",
         b"*a", b"9" * 400, b"../" * 9, b"\xff", b"=1+1", b"'", b"(" * 90, b"true", b"<f8", b"F64",
         b"__metadata__"]  # fmt: skip
CPU_LIMIT_S, MAX_LEAK_MIB = 10, 512  # per file


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Apply one to sixteen random changes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        size = len(changed) if rng.random() < 0.6 else min(len(changed), 400)  # headers more often
        offset = rng.randrange(size + 1)
        kind = rng.randrange(8)
        if kind == 0 and changed:
            changed[offset % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1 and changed:
            changed[offset % len(changed)] = rng.randrange(256)
        elif kind == 2:
            order = rng.choice("<>") + rng.choice("bhiq")
            number = rng.choice(NUMBERS)
            width = struct.calcsize(order)
            byte_order: Literal["little", "big"] = "little" if order[0] == "<" else "big"
            changed[offset : offset + width] = (number % 256**width).to_bytes(width, byte_order)
        elif kind == 3:
            del changed[offset : offset + rng.choice((1, 4, 64, 4096))]
        elif kind == 4:
            changed[offset:offset] = changed[offset : offset + rng.choice((1, 4, 64, 1024))] * rng.choice((1, 2, 9))
        elif kind == 5:
            changed[offset:offset] = rng.choice(TOKENS)
        elif kind == 6:
            changed[offset : offset + 4] = rng.choice(TOKENS)
        elif kind == 7 and rng.random() < 0.3:
            del changed[offset:]
    return bytes(changed)


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Mutate a member and pack the archive again, or mutate the archive itself."""
    if rng.random() < 0.3:
        return mutate(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    members[name] = mutate(members[name][:200], rng) + members[name][200:] if rng.random() < 0.7 else b""
    return zipped(members)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mutate the header and keep its length field correct, or mutate the whole file."""
    if rng.random() < 0.3:
        return mutate(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    return safetensors(mutate(data[8 : 8 + length], rng), data[8 + length :])


@dataclass(frozen=True)
class Reader:
    """A reader: valid files, the mutation, and the function that reads a file."""

    seeds: list[bytes]
    suffix: str
    read: Callable[[Path], object]
    mutate: Callable[[bytes, random.Random], bytes] = mutate
    cost: int = 1  # an execution counts as this many


def readers() -> dict[str, Reader]:
    """Return all readers by name."""
    jpeg = cv2.imencode(".jpg", cv2.resize(cv2.imread(str(example_path("source.jpg"))), (96, 96)))[1].tobytes()
    motion, still = _motion(2), _motion(1)
    tensors = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    meta = {"format": "export3d-1", "config": json.dumps(to_dict(PRESETS["tiny"])), "record": "{}"}
    weights = safetensors({**tensors, "__metadata__": meta}, bytes(16))
    state = safetensors({**tensors, "__metadata__": {"info": '{"stage": "clebs", "step": 1}'}}, bytes(16))
    face = {"photo.0": {"dtype": "U8", "shape": [16, 16, 3], "data_offsets": [0, 768]},
            "tuned.flow.basis": {"dtype": "F32", "shape": [2], "data_offsets": [768, 776]}}  # fmt: skip
    about = {"format": FORMAT, "weights": "0" * 64, "made_from": '{"0": "a.jpg"}', "version": "1"}
    person = safetensors({**face, "__metadata__": about}, bytes(776))
    columns = ",".join(["Timecode", *arkit.ARKIT_NAMES, *arkit.ANGLE_COLUMNS])
    take = "\n".join([columns, *(f"10:00:00:{i:02d}.000" + ",0.1" * 55 for i in range(4))]).encode()
    line = {"id": "a", "source": "a", "file": "clips/a.mp4", "motion": "clips/a.motion.npz", "frames": 2}
    manifest = (json.dumps(line) + "\n" + json.dumps({**line, "id": "b"}) + "\n").encode()
    photo = {**line, "file": "clips/a.png", "frames": 1}
    photos = (json.dumps(photo) + "\n" + json.dumps({**photo, "id": "b"}) + "\n").encode()
    yaml = b"preset: tiny\nlr: 1e-4\nstages: [clebs, reconstruction]\nmodel: {width: 64, stem: [8, 8, 16]}\n"
    yaml += b"data:\n  path: [x]\n"
    camera = orbit_camera(0, 0)

    points = [(8 + 6 * (k % 8), 8 + 6 * (k // 8)) for k in range(68)]
    subtitles = b"1\n00:00:01,500 --> 00:00:03,000\n<i>Hello</i> there\n\n2\n00:00:03,000 --> 00:00:04,000\n7 words\n"
    signed = _signed_photo()

    def video(path: Path) -> None:
        with VideoReader(path) as reader:
            for number, _ in enumerate(reader):
                if number > 20:
                    break

    return {
        "image": Reader([jpeg, *(encoded(s) for s in (".png", ".webp", ".bmp", ".tif")), encoded(".png", alpha=True)],
                        ".img", read_image),
        "video": Reader([clip(), clip(".mkv"), clip(".gif"), y4m("W64 H64", "F25:1", 3, b"\x80" * 6144)], ".vid", video,
                        cost=20),
        "motion": Reader([motion], ".motion.npz", Motion.load, mutate_zip),
        "weights": Reader([weights], ".safetensors", load_weights, mutate_safetensors),
        "weights info": Reader([weights], ".safetensors", weights_info, mutate_safetensors),
        "person": Reader([person], ".person.safetensors", read_portrait, mutate_safetensors),
        "state": Reader([state], "/state.safetensors", lambda path: load_state(path.parent), mutate_safetensors),
        "config": Reader([yaml], ".yaml", load_train_config),
        "preset": Reader([b"grin: {smile: 0.8, jaw: .2, mouthPucker: 0}\nsad: {brows: -1, gaze-x: 0.5}\n"], ".yaml",
                         lambda path: [ExpressionEdit(read_preset(f"{path}#{name}")) for name in ("grin", "sad")]),
        "manifest of preprocess": Reader([manifest], "/manifest.jsonl",
                                         lambda path: DatasetManifest(path.parent).write()),
        "manifest of train": Reader([photos], "/manifest.jsonl", lambda path: _train(path.parent, still)),
        "csv": Reader([take], ".csv", lambda path: arkit.read_csv(path, camera)),
        "landmarks": Reader([json.dumps(points).encode(), json.dumps([{"x": x, "y": y} for x, y in points]).encode()],
                            ".json", lambda path: complete_landmarks(read_landmarks(path, (64, 64)))),
        "landmarks in csv": Reader([b"x,y\n" + b"\n".join(b"%d,%d" % point for point in points)],
                                   ".csv", lambda path: complete_landmarks(read_landmarks(path, (64, 64)))),
        "subtitles": Reader([subtitles, b"plain words, 2 of them"], ".srt", read_cues),
        "credentials": Reader([signed], ".jpg", lambda path: (read_credentials(path), has_metadata_mark(path)), cost=5),
    }  # fmt: skip


@functools.cache
def _signed_photo() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jpg"
        write_image(path, np.zeros((64, 64, 3), np.uint8), comment=SYNTHETIC_COMMENT)
        sign_file(path)
        return path.read_bytes()


def _motion(frames: int) -> bytes:
    pose = np.tile(orbit_camera(0, 0), (frames, 1))
    return npz({"beta": np.zeros((frames, 64)), "camera": pose, "landmarks": np.zeros((frames, 478, 3)),
                "found": np.ones(frames, bool), "fps": np.array([25, 1]), "crop": np.array([0.0, 0, 64]),
                "size": np.array([64, 64])})  # fmt: skip


def _train(data: Path, motion: bytes) -> None:
    """Load a data set whose listed photos exist, so that its other fields are read."""
    (data / "clips").mkdir()
    (data / "clips/a.png").write_bytes(cv2.imencode(".png", np.zeros((64, 64, 3), np.uint8))[1].tobytes())
    (data / "clips/a.motion.npz").write_bytes(motion)
    try:
        load_dataset(data, 64)
    finally:
        shutil.rmtree(data / "cache-64", ignore_errors=True)


def fuzz(name: str, executions: int, seed: int) -> tuple[int, list[str]]:
    """Read mutated files; return how many were readable and a line per crash."""
    reader, rng, crashes, read = readers()[name], random.Random(f"{name} {seed}"), [], 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for number in range(max(1, executions // reader.cost)):
            data = reader.mutate(rng.choice(reader.seeds), rng)
            path = Path(folder) / f"{number}{reader.suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            before = memory_mib()
            try:
                with time_limit(CPU_LIMIT_S):
                    reader.read(path)
                read += 1
            except Export3DError as error:
                if len(str(error)) > 2000:
                    crashes.append(f"{name} {number}: message of {len(str(error))} characters")
            except (Exception, TookTooLongError) as error:
                crashes.append(f"{name} {number}: {type(error).__name__}: {str(error)[:200]}")
                Path(f"crash-{name.replace(' ', '-')}-{seed}-{number}").write_bytes(data) if KEEP else None
            if memory_mib() - before > MAX_LEAK_MIB:
                crashes.append(f"{name} {number}: {memory_mib() - before} MiB not freed")
            path.unlink(missing_ok=True)
    return read, crashes


KEEP = False  # whether to write crashing files to the current folder


def main() -> int:
    """Run the fuzzer; return exit code 1 after a crash."""
    global KEEP
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="READER")
    parser.add_argument("--executions", type=int, default=1000, help="per reader; a video counts as 20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write crashing files to the current folder")
    args = parser.parse_args()
    KEEP, total = args.keep, 0
    for name in args.names or readers():
        start = time.monotonic()
        read, crashes = fuzz(name, args.executions, args.seed)
        count = max(1, args.executions // readers()[name].cost)
        print(
            f"{name}: {count} executions, {read} readable, {len(crashes)} crashes, {time.monotonic() - start:.0f} s",
            flush=True,
        )
        for line in crashes:
            print(f"  {line}")
        total += len(crashes)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
