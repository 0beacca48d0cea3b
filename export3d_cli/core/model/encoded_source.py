"""An encoded photo: everything the network needs of it, whatever the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from export3d_cli.core.model.face_cover import FaceCover
from export3d_cli.core.model.photo_colours import PhotoColours


def map_rows(value: Any, tensor: Callable[[Tensor], Tensor], rows: Callable[[list[Any]], list[Any]]) -> Any:
    """Apply `tensor` to tensors (B, ...), also in tuples, and `rows` to lists of B items; keep other values."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, tuple):
        items = (map_rows(item, tensor, rows) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return rows(value) if isinstance(value, list) else value


def expand_batch(value: Any, batch: int) -> Any:
    """Expand tensors (1, ...), also in tuples, to (batch, ...) without copying memory; repeat lists."""
    return map_rows(value, lambda x: x.expand(batch, *x.shape[1:]), lambda items: items * batch)


def take_row(value: Any, row: int) -> Any:
    """Return one row of tensors (B, ...), also in tuples, and of lists."""
    return map_rows(value, lambda x: x[row : row + 1], lambda items: items[row : row + 1])


@dataclass(frozen=True)
class Source:
    """A photo, encoded: everything that depends on it alone. Encode once, drive many times."""

    image: Tensor  # (B, 3, H, W) in [-1, 1], in white light
    camera: Tensor  # (B, 25), head frame
    landmarks: Tensor  # (B, 478, 3), head frame
    lam: Tensor  # (B, n) expression coefficients lambda
    wink: Tensor  # (B, 1) how far one eye is shut alone, see `one_sided`
    stem: list[Tensor]  # features at H/2, H/4, H/8
    tokens: Tensor  # (B, N, h)
    margins: Tensor | None = None  # (B, 3) how far a larger photo continues, see `Export3D.encode_source`
    # Source view and background (`config.source_plane`):
    view_plane: Tensor | None = None  # (B, C, H/4, W/4) features in the source camera
    background: Tensor | None = None  # (B, C', H/4, W/4) features behind the head, RGB first
    # Basis flow (`config.flow`):
    visibility: Tensor | None = None  # (B, 2, m, m) what the photo shows of the mesh, `BasisFlow.source_visibility`
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
    view_tables: list[Tensor] | None = None  # `make_feature_table` of each view plane
    others: tuple[Source, ...] = ()  # additional photos of the person, in the colours of this one

    def collect(self, name: str) -> list[Tensor]:
        """Return a field of this photo and of the additional ones."""
        return [getattr(photo, name) for photo in (self, *self.others)]

    @property
    def coefficients(self) -> Tensor:
        """Lambda and the wink, (B, n + 1), as `Export3D.coefficients` gives them."""
        return torch.cat([self.lam, self.wink], dim=1)

    def expand(self, batch: int) -> Source:
        """Expand a single source to a batch of drivers, without copying memory."""
        return self._map(lambda value: expand_batch(value, batch))

    def row(self, row: int) -> Source:
        """Return one of a batch."""
        return self._map(lambda value: take_row(value, row))

    def _map(self, change: Callable[[Any], Any]) -> Source:
        names = vars(self).keys() - {"stem", "basis", "others"}
        parts = {name: change(getattr(self, name)) for name in names}
        others = tuple(photo._map(change) for photo in self.others)
        return replace(self, **parts, others=others, stem=[change(x) for x in self.stem])
