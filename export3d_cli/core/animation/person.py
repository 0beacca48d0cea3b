"""A person file: photos of one person and an expression basis tuned to them; accepted wherever a photo is."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export3d_cli import __version__
from export3d_cli.core.media.image import MAX_PIXELS
from export3d_cli.core.model.checkpoint import read_tensors, write_tensors
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.errors import InputError, WeightsError
from export3d_cli.core.runtime.files import check_file

FORMAT = "export3d-person-1"
SUBJECT = "a real person, who must agree to every use"
MAX_PHOTOS = 12
MAX_BYTES = 256 * 2**20  # of a file
_PHOTO, _BASIS = "photo.", "tuned.flow.basis"  # names of tensors; photos are numbered


@dataclass(frozen=True, eq=False)
class Person:
    """Photos of a person, and the expression basis that was tuned to them; its photos are read-only."""

    photos: tuple[np.ndarray, ...] = field(repr=False)  # uint8 (H, W, 3) RGB; frames show the first one
    basis: Tensor | None = field(repr=False)  # float32 (n, 478, 3) instead of the network's `flow.basis`
    weights: str  # `fingerprint` of the weights that it was made with
    made_from: Mapping[str, str]  # sha256 of the files that it was made from, with their names

    def __post_init__(self) -> None:
        for photo in self.photos:
            photo.flags.writeable = False

    def check(self, name: str, model: Export3D, weights: str) -> None:
        """Raise `InputError` if the file `name` does not match a network with the fingerprint `weights`."""
        if self.weights != weights:
            raise InputError(f"{name} was made with other weights: pass those by --weights, or make it again with "
                             "these by `export3d personalize`")  # fmt: skip
        expected = None if model.flow is None else tuple(model.flow.basis.shape)
        if self.basis is not None and tuple(self.basis.shape) != expected:
            raise InputError(f"{name} is damaged: the basis is {tuple(self.basis.shape)}, the network's {expected}")

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        tensors = {f"{_PHOTO}{k}": torch.from_numpy(photo.copy()) for k, photo in enumerate(self.photos)}
        tensors |= {} if self.basis is None else {_BASIS: self.basis}
        header = {
            "format": FORMAT, "shows": SUBJECT, "made_from": json.dumps(self.made_from), "weights": self.weights,
            "version": __version__,
        }  # fmt: skip
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> Person:
        """Read a person file; raises `InputError` for any other file."""
        path = Path(path)
        remedy = "make it again with `export3d personalize`"
        check_file(path, MAX_BYTES)
        try:
            tensors, header = read_tensors(path)
        except WeightsError as error:
            raise InputError(f"{path} is not a readable person file: {remedy}") from error
        if header.get("format") != FORMAT:
            raise InputError(f"{path} is no person file: format is {header.get('format')!r}, must be {FORMAT!r}")
        try:
            made_from = json.loads(header["made_from"])
            if not isinstance(made_from, dict) or not all(isinstance(v, str) for v in made_from.values()):
                raise ValueError("made_from must be names of files by their sha256")
            if not re.fullmatch("[0-9a-f]{64}", header["weights"]):
                raise ValueError("weights must be a sha256")
            names = [f"{_PHOTO}{k}" for k in range(sum(name.startswith(_PHOTO) for name in tensors))]
            if not 1 <= len(names) <= MAX_PHOTOS:
                raise ValueError(f"it must hold 1 to {MAX_PHOTOS} photos, got {len(names)}")
            photos = tuple(_check_photo(tensors.pop(name)) for name in names)
            basis = tensors.pop(_BASIS, None)
            if tensors or (basis is not None and basis.dtype != torch.float32):
                raise ValueError("it holds other tensors than photos and a basis")
            if basis is not None and not basis.isfinite().all():
                raise ValueError("its basis contains values that are not finite")
        except (KeyError, ValueError, TypeError, RuntimeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({str(error)[:200]}): {remedy}") from error
        return cls(photos, basis, header["weights"], made_from)


def is_person_file(path: Path) -> bool:
    """Return whether a file is to be read as a person file: by its suffix, or its first bytes if it has none."""
    if path.suffix or not path.is_file():
        return path.suffix.lower() == ".safetensors"
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def main_photo(photo: np.ndarray | Person) -> np.ndarray:
    """Return the photo that frames show, uint8 (H, W, 3)."""
    return photo.photos[0] if isinstance(photo, Person) else photo


def fingerprint(model: Export3D) -> str:
    """Return a sha256 of all tensors of a network in fp32."""
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hasher.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def apply_person(model: Export3D, person: Person) -> Export3D:
    """Return a network with the person's basis, which shares all other parts with `model`."""
    if person.basis is None or model.flow is None:
        return model
    shared = (*(part for part in model.children() if part is not model.flow), *model.parameters(), *model.buffers())
    changed = copy.deepcopy(model, {id(part): part for part in shared})
    assert changed.flow is not None
    changed.flow.basis = person.basis.to(model.flow.basis.device)
    return changed


def _check_photo(value: Tensor) -> np.ndarray:
    if value.dtype != torch.uint8 or value.ndim != 3 or value.shape[2] != 3:
        raise ValueError(f"a photo must be uint8 (H, W, 3), got {value.dtype} {tuple(value.shape)}")
    height, width = value.shape[:2]
    if not 16 <= min(height, width) <= max(height, width) <= 8192 or height * width > MAX_PIXELS:
        raise ValueError(f"a photo has {width}x{height} pixels")
    return value.numpy()
