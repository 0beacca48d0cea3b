"""An encoded photo: everything the network needs of it, whatever the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from export3d_cli.core.model.face_cover import FaceCover
from export3d_cli.core.model.photo_colours import PhotoColours


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to tensors (B, ...), also in tuples, lists and a `Source`; keep other values."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Source):
        return replace(value, **{k: map_tensors(v, change) for k, v in vars(value).items() if k != "basis"})
    if isinstance(value, tuple | list):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def expand_batch(value: Any, batch: int) -> Any:
    """Expand tensors (1, ...) to (batch, ...) without copying memory, see `map_tensors`."""
    return map_tensors(value, lambda x: x.expand(batch, *x.shape[1:]))


def take_row(value: Any, row: int) -> Any:
    """Return one row of tensors (B, ...), see `map_tensors`."""
    return map_tensors(value, lambda x: x[row : row + 1])


@dataclass(frozen=True)
class Source:
    """A photo, encoded: everything that depends on it alone. Encode once, drive many times."""

    image: Tensor  # (B, 3, H, W) in [-1, 1], in white light
    camera: Tensor  # (B, 25), head frame
    landmarks: Tensor  # (B, 478, 3), head frame
    lam: Tensor  # (B, n) expression coefficients lambda
    measures: Tensor  # (B, m) what beta tells beyond lambda, see `motion_beyond_lambda`
    stem: list[Tensor]  # features at H/2, H/4, H/8
    tokens: Tensor  # (B, N, h)
    motion: Tensor | None = None  # (B, d) motion code, see `PlaneDict`
    # Source view and background (`config.source_plane`):
    view_plane: Tensor | None = None  # (B, C, H/4, W/4) features in the source camera
    background: Tensor | None = None  # (B, C', H/4, W/4) features behind the head, RGB first
    # Basis flow (`config.flow`):
    proximity: Tensor | None = None  # (B, 1, m, m) to the face, see `BasisFlow.source_proximity`
    outline: Tensor | None = None  # (B, 36) of the person around the face, see `BasisFlow.find_outline`
    head_mask: Tensor | None = None  # (B, 1, m, m) 1 on the head, hair included
    body_mask: Tensor | None = None  # (B, 1, m, m) 1 on the rest of the person
    image_half: Tensor | None = None  # (B, 3, H/2, W/2) the photo, downsampled
    features_half: Tensor | None = None  # (B, 16, H/2, W/2) stem features for super-resolution
    features_quarter: Tensor | None = None  # (B, 16, H/4, W/4) stem features for super-resolution
    cover: FaceCover | None = None  # what is before mouth or eyes
    # Set without gradients only:
    colours: PhotoColours | None = None  # of a photo in coloured light or of one tint
    highpass: Tensor | None = None  # (B, 1, H, W) luminance detail, see `layer_warp.highpass`
    basis: Tensor | None = None  # (n, d) expression basis of the weights
    others: tuple[Source, ...] = ()  # additional photos of the person, in the colours of this one

    def collect(self, name: str) -> list[Tensor]:
        """Return a field of this photo and of the additional ones."""
        return [getattr(photo, name) for photo in (self, *self.others)]

    @property
    def coefficients(self) -> Tensor:
        """Lambda and the measures, (B, n + m), as `Export3D.coefficients` gives them."""
        return torch.cat([self.lam, self.measures], dim=1)

    def expand(self, batch: int) -> Source:
        """Expand a single source to a batch of drivers, without copying memory."""
        return expand_batch(self, batch)
