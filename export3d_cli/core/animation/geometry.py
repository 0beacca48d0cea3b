"""Where a portrait's crop lies in its photo, and all sizes that follow from it; computed once per portrait."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from export3d_cli.core.face.crop import Square
from export3d_cli.core.runtime.errors import InputError

MAX_FRAME_SIZE_PX = 2048
PHOTO_MARGIN = 0.25  # of the crop's side: photo kept around the crop, for hair and shoulders that move into view
MIN_UPSCALE_RATIO = 1.5  # crop side over network size from which frames default to twice the network size


@dataclass(frozen=True)
class Geometry:
    """The crop in its photo, and the sizes of the images made from it."""

    square: Square  # x0, y0, side of the crop in pixels of the photo; may reach outside the photo
    photo_size: tuple[int, int]  # width, height
    network_size: int  # side of the network's image, pixels
    frame_size: int  # side of the crop image and of the frames, pixels
    margins: tuple[float, float, float] | None  # photo left of, above and right of the crop, in crop sides, at most
    # PHOTO_MARGIN; None: nothing is known around the crop

    @classmethod
    def from_photo(
        cls, photo_size: tuple[int, int], square: Square, network_size: int, frame_size: int = 0
    ) -> Geometry:
        """Return the geometry of a crop of a photo.

        Args:
            photo_size: width, height.
            square: x0, y0, side of the crop in pixels of the photo.
            network_size: side of the network's image.
            frame_size: side of the frames; 0: twice the network size where the crop is nearly as large, else
                the network size.

        Raises:
            InputError: `frame_size` is less than the network size or more than MAX_FRAME_SIZE_PX.
        """
        x0, y0, side = square
        if frame_size and not network_size <= frame_size <= MAX_FRAME_SIZE_PX:
            raise InputError(f"size must be {network_size} to {MAX_FRAME_SIZE_PX} with these weights, got {frame_size}")
        default = 2 * network_size if side >= MIN_UPSCALE_RATIO * network_size else network_size
        margins = np.array([x0, y0, photo_size[0] - x0 - side], np.float32).clip(0, PHOTO_MARGIN * side) / side
        left, top, right = margins.tolist()
        return cls(square, photo_size, network_size, frame_size or default, (left, top, right))

    @property
    def padding(self) -> int:
        """Pixels of the photo kept on each side of the crop image, at the frames' scale."""
        return 0 if self.margins is None else round(PHOTO_MARGIN * self.frame_size)

    @property
    def padded_size(self) -> int:
        """Side of the crop image with its padding, pixels."""
        return self.frame_size + 2 * self.padding

    @property
    def padded_square(self) -> Square:
        """x0, y0, side of the padded crop in pixels of the photo."""
        x0, y0, side = self.square
        padding = self.padding * side / self.frame_size
        return x0 - padding, y0 - padding, side + 2 * padding

    def mesh_size(self, base: int) -> int:
        """Return the side at which the face mesh is rasterised, `base` at the network's size.

        Larger frames need a larger one, up to twice `base`: otherwise the outline shows steps.
        """
        return base * min(self.frame_size, 2 * self.network_size) // self.network_size
