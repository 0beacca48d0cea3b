"""Data sets as the trainer reads them: each clip decoded once into a memory-mapped cache beside its numbers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from export3d_cli.core.config.schema import BETA_DIM, CAMERA_DIM, NUM_LANDMARKS, DataConfig
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import Export3DError, InputError
from export3d_cli.core.runtime.files import (
    MAX_MANIFEST_BYTES,
    check_file,
    driver_track_id,
    ensure_relative,
    folder_lock,
)
from export3d_cli.core.runtime.weights import resolve_weights

MASK_SIZE = 64  # side of the masks kept


@dataclass(frozen=True)
class Clip:
    """Rows `start` to `start + count` of a data set's arrays."""

    id: str
    person: str
    start: int
    count: int
    still: bool

    @property
    def track(self) -> str:
        """See `shared_track`."""
        return driver_track_id(self.id)


@dataclass(frozen=True)
class FaceDataset:
    """One data set in memory, its pictures memory-mapped."""

    name: str
    frames: np.ndarray  # (F, size, size, 3) uint8
    beta: np.ndarray  # (F, 64)
    camera: np.ndarray  # (F, 25)
    landmarks: np.ndarray  # (F, 478, 3) crop units
    person_mask: np.ndarray  # (F, MASK_SIZE, MASK_SIZE) uint8, how much of each cell is the person's
    frame_index: np.ndarray  # (F,) index of the frame in its clip's file
    clips: tuple[Clip, ...]

    def points(self, rows: np.ndarray) -> np.ndarray:
        """Landmarks of `rows` in the head frame, (N, 478, 3) float32."""
        return landmarks_to_head_frame(self.landmarks[rows], self.camera[rows]).astype(np.float32)


def load_datasets(config: DataConfig, size: int, *, progress: Callable[[str], None] | None = None) -> list[FaceDataset]:
    """Open every data set of `config`, building caches of pictures of side `size` that are not there yet."""
    if not config.path:
        raise InputError("data.path is empty: name at least one data set folder written by `export3d preprocess`")
    return [load_dataset(Path(p), size, config.cache_stride, config.cache, progress=progress) for p in config.path]


def load_dataset(
    folder: Path, size: int, stride: int = 1, cache: str = "", *, progress: Callable[[str], None] | None = None
) -> FaceDataset:
    """Open one data set folder; decodes it into its cache first when the cache is missing or stale."""
    entries = _read_manifest(folder)
    name = f"cache-{size}" + (f"-every{stride}" if stride > 1 else "")
    place = folder / name
    if cache:  # two data sets may share a folder name, not a path
        place = Path(cache) / f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}-{name}"
    stamp = hashlib.sha256(json.dumps([entries, size, stride], sort_keys=True).encode()).hexdigest()
    if _read_stamp(place) != stamp:
        with folder_lock(place.parent, wait=True):
            if _read_stamp(place) != stamp:  # nobody has built it while we waited
                _build_cache(folder, entries, place, size, stride, stamp, progress)
    try:
        index = json.loads((place / "index.json").read_text(encoding="utf-8"))
        count = index["count"]
        found = FaceDataset(
            name=folder.name,
            frames=np.load(place / "frames.npy", mmap_mode="r")[:count],
            beta=np.load(place / "beta.npy"),
            camera=np.load(place / "camera.npy"),
            landmarks=np.load(place / "landmarks.npy"),
            person_mask=np.load(place / "person.npy", mmap_mode="r"),
            frame_index=np.load(place / "number.npy"),
            clips=tuple(Clip(**clip) for clip in index["clips"]),
        )
        _validate_dataset(found, count, size)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(f"the cache {place} is damaged ({error}): remove it, it is made again") from error
    return found


def _validate_dataset(found: FaceDataset, count: int, size: int) -> None:
    """A cache comes with a data set that may be a stranger's: raises `ValueError` unless all fits together."""
    shapes = {
        "frames": (count, size, size, 3), "beta": (count, BETA_DIM), "camera": (count, CAMERA_DIM),
        "landmarks": (count, NUM_LANDMARKS, 3), "person_mask": (count, MASK_SIZE, MASK_SIZE), "frame_index": (count,),
    }  # fmt: skip
    for name, shape in shapes.items():
        array = getattr(found, name)
        kind = {"frames": "u", "person_mask": "u", "frame_index": "i"}.get(name, "f")
        if array.shape != shape or array.dtype.kind != kind:
            raise ValueError(f"{name} are {array.dtype} {array.shape}, not {shape}")
        if kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} are not finite")
    for clip in found.clips:
        if not (
            isinstance(clip.id, str)
            and isinstance(clip.person, str)
            and 0 <= clip.start < clip.start + clip.count <= count
        ):
            raise ValueError(f"clip {clip.id!s:.60} lies outside its frames")


def _read_manifest(folder: Path) -> list[dict[str, Any]]:
    path = folder / "manifest.jsonl"
    try:
        check_file(path, MAX_MANIFEST_BYTES)
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.strip()]
        kept = [e for e in entries if e.get("split", "train") in ("train", "", None)]
        for entry in kept:
            entry["id"], entry["file"], entry["motion"] = str(entry["id"]), str(entry["file"]), str(entry["motion"])
            ensure_relative(entry["file"])
            ensure_relative(entry["motion"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise InputError(f"cannot read the data set's list {path} ({why}); was it written by preprocess?") from error
    if not kept:
        raise InputError(f"{path} lists no clip of the split 'train'")
    return kept


def _read_stamp(place: Path) -> str:
    try:
        if not (place / "person.npy").is_file():  # made before masks were kept
            return ""
        return str(json.loads((place / "index.json").read_text(encoding="utf-8"))["stamp"])
    except (OSError, ValueError, KeyError):
        return ""


def _build_cache(
    folder: Path,
    entries: list[dict[str, Any]],
    place: Path,
    size: int,
    stride: int,
    stamp: str,
    progress: Callable[[str], None] | None,
) -> None:
    """Decode every clip into `place`: made in a temporary folder, which takes its name only when complete."""
    beside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    for left in place.parent.glob(f"{place.name}.*.tmp"):  # of a process that was killed: we hold the folder alone
        shutil.rmtree(left, ignore_errors=True)
    try:
        beside.mkdir(parents=True, exist_ok=True)
        motions = [Motion.load(folder / e["motion"]) for e in entries]
        room = sum(int(np.asarray(m.found)[::stride].sum()) for m in motions)
        frames = np.lib.format.open_memmap(
            beside / "frames.npy", mode="w+", dtype=np.uint8, shape=(max(room, 1), size, size, 3)
        )
        tracks: dict[str, list[np.ndarray]] = {"beta": [], "camera": [], "landmarks": [], "person": [], "number": []}
        segment = PersonMatting(resolve_weights("selfie_segmentation"))
        clips: list[dict[str, Any]] = []
        row = 0
        for i, (entry, motion) in enumerate(zip(entries, motions, strict=True)):
            still = Path(entry["file"]).suffix.lower() != ".mp4"
            good = np.asarray(motion.found, bool) & np.isfinite(motion.landmarks).all((1, 2))
            used: list[int] = []
            for number, picture in _decode_frames(folder / entry["file"], still, stride):
                if number >= len(good):
                    break
                if good[number]:
                    frames[row + len(used)] = resize_square(picture, size)
                    used.append(number)
            if not used:
                continue
            rows = np.array(used)
            for key in ("beta", "camera", "landmarks"):
                tracks[key].append(np.asarray(getattr(motion, key), np.float32)[rows])
            tracks["person"].append(_person_masks(segment, frames[row : row + len(used)]))
            tracks["number"].append(rows.astype(np.int32))
            person = str(entry.get("person") or entry["id"])
            clips.append({"id": entry["id"], "person": person, "start": row, "count": len(used), "still": still})
            row += len(used)
            if progress is not None and (i % 20 == 19 or i + 1 == len(entries)):
                progress(f"{folder.name}: {i + 1} of {len(entries)} clips decoded, {row} frames")
        if not clips:
            raise InputError(f"data set {folder} has no frame in which a face was found")
        frames.flush()
        del frames
        for key, parts in tracks.items():
            np.save(beside / f"{key}.npy", np.concatenate(parts))
        index = {"stamp": stamp, "count": row, "clips": clips}
        (beside / "index.json").write_text(json.dumps(index), encoding="utf-8")
        if place.exists():
            shutil.rmtree(place)
        os.replace(beside, place)
    except OSError as error:
        reason = error.strerror or error
        raise Export3DError(f"cannot write the cache {place} ({reason}): make room, or set data.cache") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _person_masks(segment: PersonMatting, pictures: np.ndarray) -> np.ndarray:
    """Pictures (N, H, W, 3) -> `FaceSet.person` of them."""
    alphas = (
        cv2.resize(segment.alpha(p, hair_strands=True), (MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_AREA)
        for p in pictures
    )
    return np.stack([np.rint(255 * alpha).astype(np.uint8) for alpha in alphas])


def _decode_frames(path: Path, still: bool, stride: int) -> Iterator[tuple[int, np.ndarray]]:
    if still:
        yield 0, read_image(path)
        return
    with VideoReader(path) as reader:
        for number, picture in enumerate(reader):
            if number % stride == 0:
                yield number, picture


def resize_square(picture: np.ndarray, size: int) -> np.ndarray:
    """A square picture (., ., 3) resized to (size, size, 3), uint8."""
    if picture.shape[:2] == (size, size):
        return picture
    shrinks = picture.shape[0] > size
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
