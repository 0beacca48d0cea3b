"""An encoded photo: everything the network needs of it, whatever the driver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from export3d_cli.core.model.face_cover import FaceCover
from export3d_cli.core.model.photo_colours import PhotoColours


def expand_batch(value: Any, batch: int) -> Any:
    """Expand tensors (1, ...), also in named tuples, to (batch, ...) without copying memory; repeat lists."""
    if isinstance(value, Tensor):
        return value.expand(batch, *value.shape[1:])
    if isinstance(value, tuple):
        return type(value)(*(expand_batch(item, batch) for item in value))
    return value * batch if isinstance(value, list) else value


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
        names = vars(self).keys() - {"stem", "basis", "others"}
        parts = {name: expand_batch(getattr(self, name), batch) for name in names}
        others = tuple(photo.expand(batch) for photo in self.others)
        return replace(self, **parts, others=others, stem=[expand_batch(x, batch) for x in self.stem])
