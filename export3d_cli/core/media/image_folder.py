"""Image sequences: a folder of images read as a video (in natural sort order), and frames written to a folder."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli.core.media.image import has_image_suffix, write_image
from export3d_cli.core.runtime.errors import InputError, MediaError

DEFAULT_FOLDER_FPS = Fraction(25)  # unless the caller gives a rate


def list_images(folder: Path) -> list[Path]:
    """Return the images of a folder in natural sort order; raise `InputError` if it has none."""
    try:
        paths = [path for path in Path(folder).iterdir() if has_image_suffix(path) and not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read folder {folder}: {error.strerror}") from error
    if not paths:
        raise InputError(f"{folder} is a folder without images (.png, .jpg, .webp): give a video file or images")
    return sorted(paths, key=_natural_sort_key)


class ImageSequenceWriter:
    """Writes frames as images `name%05d.png`, numbered from 0."""

    def __init__(self, pattern: Path) -> None:
        match = re.fullmatch(r"([^%]*)%0?([1-9]?)d([^%]*)", pattern.name)
        if not match:
            raise InputError(f"{pattern} names a single image: name one image per frame, for example %05d.png")
        self.folder, (self._prefix, self._digits, self._suffix) = pattern.parent, match.groups()
        numbered = re.compile(rf"{re.escape(self._prefix)}\d+{re.escape(self._suffix)}")
        if self.folder.is_dir() and any(numbered.fullmatch(path.name) for path in self.folder.iterdir()):
            raise InputError(f"{self.folder} already contains images of that name: choose another folder")
        self.temporary_folder: Path | None = None  # images are written here and moved to `folder` together
        self._count = 0

    def write(self, frame: np.ndarray, comment: str) -> None:
        """Write the next frame, uint8 (H, W, 3) RGB."""
        if self.temporary_folder is None:
            raise MediaError("the video writer is not open: use it in a `with` block")
        number = str(self._count).zfill(int(self._digits or 1))
        write_image(self.temporary_folder / f"{self._prefix}{number}{self._suffix}", frame, comment=comment)
        self._count += 1


def _natural_sort_key(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that orders numbers in names by value."""
    parts = re.split(r"(\d+)", path.name)  # text and digits alternate
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], path.name
