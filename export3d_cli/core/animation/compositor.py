"""From what is rendered to the frame that is written: another background, and the comparison with the driver."""

import time
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.attribute_editing import change_look
from export3d_cli.core.animation.frame_writer import is_image_output
from export3d_cli.core.animation.options import PortraitOptions, Progress, Summary
from export3d_cli.core.animation.person import Person, is_person_file, main_photo
from export3d_cli.core.animation.photo_canvas import FrameLayers
from export3d_cli.core.animation.watermark import get_watermarker
from export3d_cli.core.face.given_landmarks import read_landmarks
from export3d_cli.core.face.matting import PersonMatting, estimate_foreground
from export3d_cli.core.face.tracker import LandmarkerTracker, open_landmarker_tracker
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT, VIDEO_SUFFIXES
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import resolve_weights

_VIDEO_SUFFIXES = (*VIDEO_SUFFIXES, ".avi", ".flv", ".m4v", ".mpeg", ".mpg", ".mts", ".ts", ".wmv", ".3gp")


def is_video(path: Path) -> bool:
    """Return whether the suffix is that of a video."""
    return path.suffix.lower() in _VIDEO_SUFFIXES


def read_portrait(path: Path) -> np.ndarray | Person:
    """Read the photo of a portrait, uint8 (H, W, 3) RGB, or a person file; raise `InputError` for a video."""
    if is_video(path):
        raise InputError(f"{path} is a video, and the portrait must be a photo: save one of its frames as .png")
    return Person.load(path) if is_person_file(path) else read_image(path)


def read_photo(path: Path) -> np.ndarray:
    """Read a photo as `read_portrait` does; raise `InputError` for a person file, too."""
    photo = read_portrait(path)
    if isinstance(photo, Person):
        raise InputError(f"{path} is a person file, which stands for the main photo alone: give a photo here")
    return photo


def load_photo(animator: Animator, source: Path | Portrait, options: PortraitOptions, *, max_side: int = 0) -> Portrait:
    """Read and encode a photo unless it is; frames of a larger one have `max_side` pixels if `options` has no size."""
    if isinstance(source, Portrait):
        return source
    photo = read_portrait(source)
    shape = main_photo(photo).shape
    size = options.size or (max_side if max(shape[:2]) > max_side else 0)
    landmarks = None if options.landmarks is None else read_landmarks(options.landmarks, shape[1::-1])
    also = {str(path): read_photo(path) for path in options.also}
    if options.look:
        if isinstance(photo, Person):
            raise InputError(f"{source} is tuned to the person's own look: give a photo, or leave out the other look")
        tracker = animator.tracker()
        assert isinstance(tracker, LandmarkerTracker)
        change = partial(change_look, look=options.look, tracker=tracker, matting=animator.matting)
        photo, moved = change(photo, face=options.face, landmarks=landmarks, name=str(source))
        landmarks = None if landmarks is None else moved
        also = {name: change(other, name=name)[0] for name, other in also.items()}
    return animator.portrait(photo, name=str(source), face=options.face, framing=options.framing, crop=options.crop,
                             size=size, also=also, force=options.force, landmarks=landmarks)  # fmt: skip


def write_look(source: Path, out: Path, options: PortraitOptions, *, progress: Progress | None = None) -> Summary:
    """Write a photo with `options.look` at its own size into a picture; `progress` is not called."""
    began = time.monotonic()
    options.check_outputs(out)
    if not is_image_output(out):
        raise InputError(f"a changed photo is a picture: the output must end in .png or .jpg, got {out.name!r}")
    if not options.look:
        raise InputError("nothing to change: give age, weight, hair or beard")
    photo = read_photo(source)
    landmarks = None if options.landmarks is None else read_landmarks(options.landmarks, photo.shape[1::-1])
    photo, _ = change_look(photo, options.look, open_landmarker_tracker(),
                           PersonMatting(resolve_weights("selfie_segmentation")), face=options.face,
                           landmarks=landmarks, name=str(source))  # fmt: skip
    write_image(out, get_watermarker(options.watermark)(photo), comment=SYNTHETIC_COMMENT)
    return Summary(out, 1, 0, Fraction(0), time.monotonic() - began, "cpu")


class Compositor:
    """Composes the animated persons of one photo into frames: uint8 (H, W, 3), or (H, W, 4) if they are transparent.

    Only a single person can have another background than the photo's. With `compare`, frames are source | driver |
    result; the driver's crop is square and as high as the others. `size` is (width, height) of the frames.
    """

    def __init__(self, portraits: Sequence[Portrait], *, background: str = "source", compare: bool = False) -> None:
        canvases = self._canvases = [portrait.canvas for portrait in portraits]
        self._order = sorted(range(len(canvases)), key=lambda k: canvases[k].square[2])  # smallest first
        self._photo = canvases[0].photo
        width, height = canvases[0].size
        self.size = (2 * width + height, height) if compare else (width, height)
        self.transparent = background == "transparent"
        if background == "source":
            self._still = self._photo.copy()  # without the persons
            for canvas in canvases:
                part, own = self._still[canvas.window], canvas.photo[canvas.window]
                np.copyto(part, canvas.plate, where=(canvas.plate != own).any(-1, keepdims=True))
        else:
            (canvas,) = canvases
            backdrop = None if self.transparent else load_backdrop(background, (width, height))
            person = estimate_foreground(self._photo, canvas.alpha)  # which also shows outside the window
            self._still = composite_over(person, canvas.alpha, backdrop)
            self._still[canvas.window] = 0 if backdrop is None else backdrop[canvas.window]

    def __call__(self, *layers: FrameLayers, driver: np.ndarray | None = None) -> np.ndarray:
        """Return the next frame from each portrait's layers; `driver` is its crop (H, H, 3) if they are compared."""
        frame = self._still.copy()
        for k in self._order:
            part = frame[self._canvases[k].window]
            part[:] = composite_over(*self._canvases[k].person(layers[k]), None if self.transparent else part)
        if driver is None:
            return frame
        left = np.concatenate([self._photo, driver], axis=1)
        if self.transparent:
            left = np.dstack([left, np.full(left.shape[:2], 255, np.uint8)])
        return np.concatenate([left, frame], axis=1)


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
