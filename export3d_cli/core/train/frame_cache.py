"""Datasets as the trainer reads them: every clip is decoded once into a memory-mapped cache."""

import contextlib
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from export3d_cli.core.config.schema import BETA_DIM, CAMERA_DIM, DataConfig
from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import check_file, folder_lock, read_manifest, write_folder
from export3d_cli.core.runtime.weights import resolve_weights

MASK_SIZE = 64  # side of the cached person masks and depths
MAX_DEPTH_BYTES = 2**28  # of a file of depths
MAPPED_ARRAYS = ("frames", "person", "depth")  # too large for memory


@dataclass(frozen=True)
class Clip:
    """Rows `start` to `start + count` of a dataset's arrays."""

    id: str
    person: str
    start: int
    count: int
    still: bool


@dataclass(frozen=True)
class FaceDataset:
    """One dataset in memory, with memory-mapped images."""

    frames: np.ndarray  # (F, size, size, 3) uint8
    beta: np.ndarray  # (F, 64)
    camera: np.ndarray  # (F, 25)
    landmarks: np.ndarray  # (F, 478, 3) crop units
    person_mask: np.ndarray  # (F, MASK_SIZE, MASK_SIZE) uint8, the person's coverage of each cell
    depth: np.ndarray  # (F, MASK_SIZE, MASK_SIZE) float16, see `exact_views.crop_depth`; all 0 where it is not known
    frame_index: np.ndarray  # (F,) index of the frame in its clip's video
    clips: tuple[Clip, ...]


def load_datasets(config: DataConfig, size: int, *, progress: Callable[[str], None] | None = None) -> list[FaceDataset]:
    """Open all datasets of `config`; builds missing caches of images of side `size`."""
    if not config.path:
        raise InputError("data.path is empty: name at least one dataset folder written by `export3d preprocess`")
    return [load_dataset(Path(p), size, config.cache_stride, config.cache, progress=progress) for p in config.path]


def load_dataset(folder: Path, size: int, stride: int = 1, cache: str = "", *,
                 progress: Callable[[str], None] | None = None) -> FaceDataset:  # fmt: skip
    """Open one dataset folder; decodes it into its cache first if that is missing or stale."""
    entries = [row for row in read_manifest(folder) if row.get("split", "train") in ("train", "", None)]
    if not entries:
        raise InputError(f"{folder / 'manifest.jsonl'} lists no clip of the split 'train'")
    name = f"cache-{size}" + (f"-every{stride}" if stride > 1 else "")
    cache_folder = folder / name
    if cache:  # datasets may share a folder name, not a path
        path_hash = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        cache_folder = Path(cache) / f"{folder.name}-{path_hash}-{name}"
    stamp = hashlib.sha256(json.dumps([entries, size, stride, [*_shapes(size)]], sort_keys=True).encode()).hexdigest()
    if _read_stamp(cache_folder) != stamp:
        with folder_lock(cache_folder.parent, wait=True):
            if _read_stamp(cache_folder) != stamp:  # no other process has built it meanwhile
                shutil.rmtree(cache_folder, ignore_errors=True)
                with write_folder(cache_folder) as temporary:
                    _build_cache(folder, entries, temporary, size, stride, stamp, progress)
    try:
        index = json.loads((cache_folder / "index.json").read_text(encoding="utf-8"))
        arrays = {name: _load_array(cache_folder, name, index["count"], row) for name, row in _shapes(size).items()}
        clips = tuple(Clip(**clip) for clip in index["clips"])
        for clip in clips:
            if not (0 <= clip.start < clip.start + clip.count <= index["count"]):
                raise ValueError(f"clip {clip.id!s:.60} lies outside the frames")
        return FaceDataset(person_mask=arrays.pop("person"), frame_index=arrays.pop("number"), clips=clips, **arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(f"the cache {cache_folder} is damaged ({error}): remove it, it will be built again") from error


def _shapes(size: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return the shape of a row and the data type of each array of a cache of images of side `size`."""
    return {
        "frames": ((size, size, 3), np.uint8), "beta": ((BETA_DIM,), np.float32), "camera": ((CAMERA_DIM,), np.float32),
        "landmarks": ((NUM_LANDMARKS, 3), np.float32), "person": ((MASK_SIZE, MASK_SIZE), np.uint8),
        "number": ((), np.int32), "depth": ((MASK_SIZE, MASK_SIZE), np.float16),
    }  # fmt: skip


def _load_array(folder: Path, name: str, count: int, expected: tuple[tuple[int, ...], type]) -> np.ndarray:
    """Load an array of a cache; raise `ValueError` unless it is as expected, since a dataset may come from anyone."""
    array = np.load(folder / f"{name}.npy", mmap_mode="r" if name in MAPPED_ARRAYS else None)[:count]
    shape, dtype = expected
    if array.shape != (count, *shape) or array.dtype != dtype:
        raise ValueError(f"{name} are {array.dtype} {array.shape}, not {np.dtype(dtype)} {(count, *shape)}")
    if dtype is np.float32 and not np.isfinite(array).all():
        raise ValueError(f"{name} are not finite")
    return array


def _read_stamp(cache_folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((cache_folder / "index.json").read_text(encoding="utf-8"))["stamp"])
    return ""


def _build_cache(folder: Path, entries: list[dict[str, Any]], cache_folder: Path, size: int, stride: int, stamp: str,
                 progress: Callable[[str], None] | None) -> None:  # fmt: skip
    """Decode the frames with a face of all clips."""
    motions = [Motion.load(folder / e["motion"]) for e in entries]
    capacity = max(sum(int(np.asarray(m.found)[::stride].sum()) for m in motions), 1)
    arrays = {
        name: np.lib.format.open_memmap(cache_folder / f"{name}.npy", "w+", dtype=dtype, shape=(capacity, *shape))
        for name, (shape, dtype) in _shapes(size).items()
    }
    matting = PersonMatting(resolve_weights("selfie_segmentation"))
    clips: list[Clip] = []
    row = 0
    for i, (entry, motion) in enumerate(zip(entries, motions, strict=True), start=1):
        still = Path(entry["file"]).suffix.lower() != ".mp4"
        usable = np.asarray(motion.found, bool) & np.isfinite(motion.landmarks).all((1, 2))
        numbers: list[int] = []
        for number, image in _decode_frames(folder / entry["file"], still, stride):
            if number < len(usable) and usable[number]:
                arrays["frames"][row + len(numbers)] = resize_square(image, size)
                numbers.append(number)
        if not numbers:
            continue
        rows = slice(row, row + len(numbers))
        arrays["number"][rows] = numbers
        for name in ("beta", "camera", "landmarks"):
            arrays[name][rows] = np.asarray(getattr(motion, name))[numbers]
        if entry.get("depth"):
            arrays["depth"][rows], arrays["person"][rows] = _read_depth(folder / entry["depth"], numbers)
        else:
            alphas = (matting.alpha(image, hair_strands=True) for image in arrays["frames"][rows])
            masks = [cv2.resize(alpha, (MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_AREA) for alpha in alphas]
            arrays["person"][rows] = np.rint(255 * np.stack(masks))
        clips.append(Clip(entry["id"], str(entry.get("person") or entry["id"]), row, len(numbers), still))
        row += len(numbers)
        if progress is not None and (i % 20 == 0 or i == len(entries)):
            progress(f"{folder.name}: {i} of {len(entries)} clips decoded, {row} frames")
    if not clips:
        raise InputError(f"dataset {folder} has no frame with a detected face")
    for array in arrays.values():
        array.flush()
    index = {"stamp": stamp, "count": row, "clips": [vars(clip) for clip in clips]}
    (cache_folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _read_depth(path: Path, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return `FaceDataset.depth` and `person_mask` of some frames of a clip with exact views."""
    try:
        check_file(path, MAX_DEPTH_BYTES)
        with np.load(path) as file:
            pictures = (file[key][numbers].astype(np.float32) for key in ("depth", "person"))
            resize = partial(cv2.resize, dsize=(MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_NEAREST)
            depth, person = (np.stack([*map(resize, array)]) for array in pictures)
    except (OSError, KeyError, ValueError, IndexError, cv2.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}): run `export3d preprocess` again") from error
    return np.nan_to_num(depth).astype(np.float16), person.astype(np.uint8)


def _decode_frames(path: Path, still: bool, stride: int) -> Iterator[tuple[int, np.ndarray]]:
    if still:
        yield 0, read_image(path)
        return
    with VideoReader(path) as reader:
        for number, image in enumerate(reader):
            if number % stride == 0:
                yield number, image


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize a square image (., ., 3) to (size, size, 3), uint8."""
    if image.shape[:2] == (size, size):
        return image
    shrinks = image.shape[0] > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
