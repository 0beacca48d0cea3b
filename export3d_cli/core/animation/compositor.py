"""From what is rendered to the frame that is written: another background, and the comparison with the driver."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.options import PortraitOptions
from export3d_cli.core.animation.photo_canvas import FrameLayers
from export3d_cli.core.face.given_landmarks import read_landmarks
from export3d_cli.core.face.matting import PersonMatting, VideoMatting, estimate_foreground
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.writer import VIDEO_SUFFIXES, check_crf, check_output_suffix
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import resolve_weights

_VIDEO_SUFFIXES = (*VIDEO_SUFFIXES, ".avi", ".flv", ".m4v", ".mpeg", ".mpg", ".mts", ".ts", ".wmv", ".3gp")


def is_video(path: Path) -> bool:
    """Return whether the suffix is that of a video."""
    return path.suffix.lower() in _VIDEO_SUFFIXES


def read_portrait(path: Path) -> np.ndarray:
    """Read the photo of a portrait, uint8 (H, W, 3) RGB; raise `InputError` for a video."""
    if is_video(path):
        raise InputError(f"{path} is a video, and the portrait must be a photo: save one of its frames as .png")
    return read_image(path)


def load_photo(animator: Animator, source: Path, options: PortraitOptions, *, max_side: int = 0) -> Portrait:
    """Read and encode a photo; frames of a larger one have `max_side` pixels unless `options` has a size."""
    photo = read_portrait(source)
    size = options.size or (max_side if max(photo.shape[:2]) > max_side else 0)
    landmarks = None if options.landmarks is None else read_landmarks(options.landmarks, photo.shape[1::-1])
    return animator.portrait(
        photo, name=str(source), face=options.face, framing=options.framing, crop=options.crop, size=size,
        also={str(path): read_portrait(path) for path in options.also}, force=options.force,
        landmarks=landmarks,
    )  # fmt: skip


def check_outputs(outputs: list[Path], background: str, crf: int | None = None) -> None:
    """Raise `InputError` for output names, backgrounds or a crf that cannot be used, or not together."""
    for out in outputs:
        check_output_suffix(out, alpha=background == "transparent")
        check_crf(out, crf, alpha=background == "transparent")
    if background in ("source", "transparent"):
        return
    if background.startswith("#"):
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", background):
            raise InputError(
                f"background {background!r} is not a colour: give six hexadecimal digits, for example #00ff00"
            )
    else:
        path = Path(background)
        if not path.exists():
            raise InputError(f"background {background!r} does not exist: use source, transparent, #rrggbb or an image")
        if not has_image_suffix(path):
            raise InputError(f"background {background} is not an image: give a .jpg, .png or .webp file")


class Compositor:
    """Turns what an `Animator` renders of a portrait into the frames to write: uint8 (H, W, 3), or (H, W, 4).

    With `compare`, frames are source | driver | result; the driver's crop is square and as high as the others.
    `size` is (width, height) of the frames, `source_frame` shows the portrait itself.
    """

    def __init__(self, portrait: Portrait, *, background: str = "source", compare: bool = False) -> None:
        canvas = self._canvas = portrait.canvas
        self.source_frame = portrait.crop if canvas is None else canvas.photo
        height, width = self.source_frame.shape[:2]
        self.size = (2 * width + height, height) if compare else (width, height)
        self.transparent = background == "transparent"
        self._matting: VideoMatting | None = None
        self._backdrop = None
        self._replaced = background != "source"
        if not self._replaced:
            return
        if not self.transparent:
            self._backdrop = load_backdrop(background, (width, height))
        if canvas is None:
            self._matting = VideoMatting(PersonMatting(resolve_weights("selfie_segmentation")))
        else:
            colours = estimate_foreground(canvas.photo, canvas.alpha)
            self._still = composite_over(colours, canvas.alpha, self._backdrop)

    def __call__(self, rendered: np.ndarray | FrameLayers, driver: np.ndarray | None = None) -> np.ndarray:
        """Return the next frame; `driver` is the driver's crop (H, H, 3) if they are compared."""
        frame = self._frame(rendered)
        if driver is None:
            return frame
        left = np.concatenate([self.source_frame, driver], axis=1)
        if self.transparent:
            left = np.dstack([left, np.full(left.shape[:2], 255, np.uint8)])
        return np.concatenate([left, frame], axis=1)

    def _frame(self, rendered: np.ndarray | FrameLayers) -> np.ndarray:
        if isinstance(rendered, FrameLayers):
            assert self._canvas is not None
            if not self._replaced:
                return self._canvas.compose(rendered)
            window = self._canvas.window
            frame = self._still.copy()
            behind = None if self._backdrop is None else self._backdrop[window]
            frame[window] = composite_over(*self._canvas.person(rendered), behind)
            return frame
        if not self._replaced:
            return rendered
        assert self._matting is not None  # with a canvas, frames come as layers
        alpha = self._matting(rendered)
        return composite_over(estimate_foreground(rendered, alpha), alpha, self._backdrop)


class GroupCompositor:
    """Composes several animated persons into their photo, uint8 (H, W, 3), the smallest first."""

    def __init__(self, portraits: Sequence[Portrait]) -> None:
        canvases = [portrait.canvas for portrait in portraits if portrait.canvas is not None]
        self._order = sorted(range(len(canvases)), key=lambda k: canvases[k].square[2])
        self._canvases = canvases
        self._plate = canvases[0].photo.copy()  # without all of them
        for canvas in canvases:
            part, own = self._plate[canvas.window], canvas.photo[canvas.window]
            np.copyto(part, canvas.plate, where=(canvas.plate != own).any(-1, keepdims=True))

    def __call__(self, rendered: Sequence[FrameLayers]) -> np.ndarray:
        """Return the next frame from the layers of each portrait."""
        frame = self._plate.copy()
        for k in self._order:
            colours, alpha = self._canvases[k].person(rendered[k])
            window = self._canvases[k].window
            frame[window] = composite_over(colours, alpha, frame[window])
        return frame


def composite_over(colours: np.ndarray, alpha: np.ndarray, backdrop: np.ndarray | None) -> np.ndarray:
    """Composite colours (H, W, 3) with alpha (H, W) over a backdrop; None: return alpha as a fourth channel."""
    if backdrop is None:
        return np.dstack([colours, np.rint(255 * alpha).astype(np.uint8)])
    return cv2.blendLinear(colours, np.ascontiguousarray(backdrop), alpha, 1 - alpha)


def load_backdrop(background: str, size: tuple[int, int]) -> np.ndarray:
    """Return #rrggbb, or an image cropped to (width, height) around its centre, as uint8 (height, width, 3)."""
    width, height = size
    if background.startswith("#"):
        return np.full((height, width, 3), list(bytes.fromhex(background[1:])), np.uint8)
    return fill_frame(read_image(Path(background)), size)


def fill_frame(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale an image, uint8 (H, W, 3), to fill (width, height), and crop it around its centre."""
    width, height = size
    scale = max(width / image.shape[1], height / image.shape[0])
    if scale != 1:
        w, h = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
        image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4)
    x, y = (image.shape[1] - width) // 2, (image.shape[0] - height) // 2
    return np.ascontiguousarray(image[y : y + height, x : x + width])
