"""The whole photo as the frame: the person moves, the background stands still, uncovered background is filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from export3d_cli.core.animation.background_fill import fill_hole
from export3d_cli.core.animation.retargeting import TravelLimits
from export3d_cli.core.face.crop import Square, crop_image
from export3d_cli.core.face.matting import FacePosition, estimate_foreground, refine_alpha
from export3d_cli.core.media.image import to_uint8
from export3d_cli.core.model.export3d import Output
from export3d_cli.core.model.masks import smooth_step
from export3d_cli.core.model.warp.photo_flow import CROP_FADE, FLOW_SIZE, WINDOW_MARGIN, PhotoFlow

AlphaFn = Callable[[np.ndarray, Sequence[FacePosition]], np.ndarray]  # image, faces in it -> alpha matte
CLOSE_UP_SCALES = (1.7, 1.0)  # crops, in sides of the face crop, whose mattes refine the whole photo's
CLOSE_UP_SIZE_PX = 512
CLOSE_UP_FADE = 0.12  # fraction of a close-up's side over which its matte takes over
HOLE_ALPHA = 0.03  # alpha from which a pixel does not show the background
HOLE_MARGIN = 0.012  # crop sides around the person that its colours reach: 2 pixels at least
SUPPORT_RADIUS = 0.012  # crop sides that the person may reach beyond the network's head layer: stray hair
GAP_RADIUS = 0.05  # crop sides: gaps in the head layer up to twice as wide are closed
SUPPORT_FADE = (0.2, 0.6)  # head weights over which the person becomes visible above the jaw
ABOVE_JAW_FADE = (0.1, 0.3)  # face heights above the chin over which only the head layer shows the person
# Below that the network's image is shown with its background: a turned jaw uncovers neck, which the photo hides.
BELOW_JAW_FADE = (-0.35, -0.15)  # face heights above the chin
JAW_RADIUS = 0.1  # crop sides around the head layer
EDGE_ALPHA_FADE = (0.6, 1.0)  # alpha over which the network's image takes over at the person's outline
CUT_BAND = 0.005  # fraction of the photo's side next to its border where a cut head is looked for
CUT_ALPHA = 0.1  # mean alpha in the band from which the head counts as cut
HEAD_EXTENT = (0.12, 0.1, 0.88, 0.8)  # left, top, right and bottom of the usual head in the crop
TRAVEL_RANGE = (0.08, 0.22)  # crop sides: least and largest limit of the head's travel; between, its room in the photo
MAX_TRAVEL_CUT = 0.06  # the same away from a border that cuts the head: more would show where the hair ends


class VolumeRender(NamedTuple):
    """What the volume contributes to a frame, at the size at which it is rendered."""

    colours: np.ndarray  # uint8 (h, w, 3) before super-resolution and without the photo's pixels
    depth: np.ndarray  # float32 (h, w) along the camera's axis, head-frame units; transparency counts as the far end
    opacity: np.ndarray  # float32 (h, w) in [0, 1]
    copied: float  # fraction of the network's image that is the photo's pixels, moved


class FrameLayers(NamedTuple):
    """One rendered frame before it is composed into the photo."""

    image: np.ndarray  # uint8 (S, S, 3) of the network, for the crop
    displacement: np.ndarray  # float32 (n, n, 2) see `PhotoFlow`, crop units
    head_weight: np.ndarray  # float32 (n, n)
    height: np.ndarray  # float32 (n, n) above the chin, face heights
    volume: VolumeRender

    @classmethod
    def from_output(cls, images: np.ndarray, flow: PhotoFlow, output: Output) -> list[FrameLayers]:
        """Split a batch: images uint8 (B, S, S, 3) of the network, their flow, and the network's output."""
        displacement = flow.displacement.permute(0, 2, 3, 1).float().cpu().numpy()
        weight, height = (x[:, 0].float().cpu().numpy() for x in (flow.head_weight, flow.height))
        depth, opacity = (x[:, 0].float().cpu().numpy() for x in (output.depth, output.opacity))
        weights = output.blend_weights
        copied = [0.0] * len(images) if weights is None else weights.float().sum(1).mean((1, 2)).tolist()
        volumes = map(VolumeRender, to_uint8(output.raw), depth, opacity, copied)
        return [cls(*layers) for layers in zip(images, displacement, weight, height, volumes, strict=True)]


@dataclass(frozen=True, eq=False)
class PhotoCanvas:
    """A photo taken apart into person and background, within a window around the face crop; immutable.

    All arrays are read-only. Outside the window the photo does not move.
    """

    photo: np.ndarray = field(repr=False)  # uint8 (H, W, 3)
    alpha: np.ndarray = field(repr=False)  # float32 (H, W) the person's matte
    square: Square  # the face crop: x0, y0, side, whole pixels of the photo
    window: tuple[slice, slice]  # rows and columns that change
    foreground: np.ndarray = field(repr=False)  # uint8 (h, w, 4) the person's own colours in the window, and alpha
    plate: np.ndarray = field(repr=False)  # uint8 (h, w, 3) the background in the window, filled in behind the person
    in_crop: np.ndarray = field(repr=False)  # float32 (h, w) 1 in the face crop, 0 from its border on
    limits: TravelLimits

    @classmethod
    def from_photo(
        cls, photo: np.ndarray, square: Square, alpha_of: AlphaFn, faces: Sequence[FacePosition] = ()
    ) -> PhotoCanvas:
        """Take a photo, uint8 (H, W, 3), apart; `faces` in the crop are those of `PersonMatting.alpha`."""
        height, width = photo.shape[:2]
        alpha = _photo_alpha(photo, square, alpha_of, faces)
        x0, y0, side = square
        margin = WINDOW_MARGIN * side
        columns = slice(max(0, round(x0 - margin)), min(width, round(x0 + side + margin)))
        rows = slice(max(0, round(y0 - margin)), min(height, round(y0 + side + margin)))
        window = (rows, columns)
        part, matte = np.ascontiguousarray(photo[window]), np.ascontiguousarray(alpha[window])
        kernel = np.ones((2 * max(2, round(HOLE_MARGIN * side)) + 1,) * 2, np.uint8)
        hole = cv2.dilate(np.uint8(matte > HOLE_ALPHA), kernel) > 0  # type: ignore[call-overload]
        plate = fill_hole(part, hole)
        colours = np.where(matte[..., None] > 0.98, part, estimate_foreground(part, matte))
        foreground = np.dstack([colours, np.rint(255 * matte).astype(np.uint8)])
        in_crop = _inside(square, window, CROP_FADE)
        for array in (photo, alpha, foreground, plate, in_crop):
            array.flags.writeable = False
        return cls(photo, alpha, square, window, foreground, plate, in_crop, _travel_limits(alpha, square))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames, pixels."""
        return self.photo.shape[1], self.photo.shape[0]

    def compose(self, layers: FrameLayers) -> np.ndarray:
        """Return a frame, uint8 (H, W, 3), from layers that were rendered for this photo's crop."""
        colours, alpha = self.person(layers, cut_out=False)
        frame = self.photo.copy()
        frame[self.window] = cv2.blendLinear(colours, self.plate, alpha, 1 - alpha)
        return frame

    def person(self, layers: FrameLayers, *, cut_out: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Return the person in the window: colours uint8 (h, w, 3) and alpha, float32 (h, w).

        Without `cut_out` the background around the jaw is kept.
        """
        rows, columns = self.window
        shape = (columns.stop - columns.start, rows.stop - rows.start)
        place = self._window_matrix()

        def to_pixels(cells: np.ndarray) -> np.ndarray:
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            return cv2.warpAffine(cells, place, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE)

        x, y = self._sample_positions(to_pixels(layers.displacement * np.float32(self.square[2])))
        moved = cv2.remap(self.foreground, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        alpha = cv2.extractChannel(moved, 3) * np.float32(1 / 255)
        head = _fill_holes(layers.head_weight)
        kernel = _disc(SUPPORT_RADIUS)
        support = cv2.morphologyEx(cv2.morphologyEx(head, cv2.MORPH_OPEN, kernel), cv2.MORPH_CLOSE, _disc(GAP_RADIUS))
        support = smooth_step(cv2.dilate(support, kernel), *SUPPORT_FADE)
        above_jaw = smooth_step(layers.height, *ABOVE_JAW_FADE)
        alpha *= 1 - self.in_crop * to_pixels(above_jaw * (1 - support))
        colours = cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB)
        jaw = smooth_step(layers.height, *BELOW_JAW_FADE) * (1 - above_jaw)
        jaw *= cv2.blur(cv2.dilate(head, _disc(JAW_RADIUS)), (5, 5))
        inside = smooth_step(cv2.erode(alpha, np.ones((3, 3), np.uint8)), *EDGE_ALPHA_FADE)
        weight = inside * to_pixels(np.maximum(head, support))
        weight = self.in_crop * (weight if cut_out else np.maximum(weight, to_pixels(jaw)))
        alpha = np.maximum(alpha, weight)
        self._blend_network(colours, layers.image, weight / alpha.clip(1e-3))
        return colours, alpha

    def _window_matrix(self) -> np.ndarray:
        """Return the affine map from pixel indices of the window to cell indices of the flow."""
        rows, columns = self.window
        x0, y0, side = self.square
        cell = side * (1 + 2 * WINDOW_MARGIN) / FLOW_SIZE  # pixels
        offset = [(s.start + 0.5 - o + WINDOW_MARGIN * side) / cell - 0.5 for s, o in ((columns, x0), (rows, y0))]
        return np.array([[1 / cell, 0, offset[0]], [0, 1 / cell, offset[1]]])

    def _sample_positions(self, displacement: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return window pixels to sample; where the photo ends displacements shrink instead of reaching beyond it."""
        rows, columns = self.window
        positions = []
        for axis, (part, length) in enumerate(((columns, self.size[0]), (rows, self.size[1]))):
            index = np.arange(part.start, part.stop, dtype=np.float32)
            index = index[None, :] if axis == 0 else index[:, None]
            shift = displacement[..., axis]
            room = np.where(shift > 0, length - 1 - index, index) + np.float32(1e-3)
            beyond = np.abs(shift) - room / 2  # half the way to the border stays as it is
            position, far = index - part.start + shift, beyond > 0
            shift, room, beyond = shift[far], room[far], beyond[far]
            position[far] += np.sign(shift) * room / 2 * (1 + np.tanh(2 * beyond / room)) - shift
            positions.append(position)
        return positions[0], positions[1]

    def _blend_network(self, frame: np.ndarray, image: np.ndarray, weight: np.ndarray) -> None:
        """Blend the network's image of the crop into a window, in place."""
        rows, columns = self.window
        x0, y0, side = (round(v) for v in self.square)
        if len(image) != side:
            image = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)
        left, top = max(x0, columns.start), max(y0, rows.start)
        right, bottom = min(x0 + side, columns.stop), min(y0 + side, rows.stop)
        target = slice(top - rows.start, bottom - rows.start), slice(left - columns.start, right - columns.start)
        part = np.ascontiguousarray(image[top - y0 : bottom - y0, left - x0 : right - x0])
        share = np.ascontiguousarray(weight[target])
        frame[target] = cv2.blendLinear(part, np.ascontiguousarray(frame[target]), share, 1 - share)


def _photo_alpha(photo: np.ndarray, square: Square, alpha_of: AlphaFn, faces: Sequence[FacePosition]) -> np.ndarray:
    """Matte the whole photo; close-ups around the face see more detail."""
    height, width = photo.shape[:2]
    x0, y0, side = square
    alpha = alpha_of(photo, _to_frame(faces, square, (0.0, 0.0, float(width), float(height))))
    for scale in CLOSE_UP_SCALES:
        size = scale * side
        left, top = x0 + (side - size) / 2, y0 + (side - size) / 2
        close = alpha_of(
            crop_image(photo, (left, top, size), CLOSE_UP_SIZE_PX), _to_frame(faces, square, (left, top, size, size))
        )
        step = size / CLOSE_UP_SIZE_PX
        matrix = np.array([[1 / step, 0, (0.5 - left) / step - 0.5], [0, 1 / step, (0.5 - top) / step - 0.5]])
        close = cv2.warpAffine(close, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        whole = (slice(0, height), slice(0, width))
        alpha = alpha + _inside((left, top, size), whole, CLOSE_UP_FADE) * (close - alpha)
    return refine_alpha(photo, alpha.astype(np.float32), max(2, round(0.012 * side)))


def _inside(square: Square, window: tuple[slice, slice], fade: float) -> np.ndarray:
    """Return a mask of pixels, float32 (h, w): 1 inside a square, falling to 0 at its border over `fade` sides."""
    ramps = []
    for part, start in zip(window, square[1::-1], strict=True):
        position = (np.arange(part.start, part.stop) + 0.5 - start) / square[2]
        ramps.append(smooth_step(np.minimum(position, 1 - position), 0, fade))
    return np.outer(*ramps).astype(np.float32)


def _to_frame(
    faces: Sequence[FacePosition], square: Square, frame: tuple[float, float, float, float]
) -> list[FacePosition]:
    """Convert face positions from units of the crop to units of another frame: x0, y0, width, height."""
    x0, y0, side = square
    left, top, width, height = frame
    return [((x0 + x * side - left) / width, (y0 + y * side - top) / height, s * side / max(width, height))
            for x, y, s in faces]  # fmt: skip


def _travel_limits(alpha: np.ndarray, square: Square) -> TravelLimits:
    """Return how far the head may move: into the photo's room, hardly away from a border that cuts the head."""
    height, width = alpha.shape
    x0, y0, side = square
    columns = slice(max(0, round(x0 + 0.15 * side)), max(0, round(x0 + 0.85 * side)))
    rows = slice(max(0, round(y0)), max(0, round(y0 + 0.6 * side)))
    band_x, band_y = max(2, round(CUT_BAND * width)), max(2, round(CUT_BAND * height))
    left, top, right, bottom = (
        position + extent for position, extent in zip((x0 / side, y0 / side) * 2, HEAD_EXTENT, strict=True)
    )

    def limit(room: float, cut: np.ndarray | None = None) -> float:
        """Limit the travel with this room before the head; `cut` is the alpha at the border behind it."""
        if cut is not None and cut.size and cut.mean() > CUT_ALPHA:
            return MAX_TRAVEL_CUT
        return float(np.clip(room, *TRAVEL_RANGE))

    return TravelLimits(
        left=limit(left, alpha[rows, -band_x:] if right > width / side else None),
        right=limit(width / side - right, alpha[rows, :band_x] if left < 0 else None),
        up=limit(top),
        down=limit(height / side - bottom, alpha[:band_y, columns] if y0 < 0.5 * side else None),
    )


def _disc(radius: float) -> np.ndarray:
    """Return a kernel for the flow's cells; `radius` in crop sides."""
    cells = max(1, round(radius * FLOW_SIZE / (1 + 2 * WINDOW_MARGIN)))
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * cells + 1,) * 2)


def _fill_holes(weight: np.ndarray) -> np.ndarray:
    """Fill what the head layer surrounds, such as an open mouth: float32 (n, n)."""
    outside = np.pad(np.uint8(weight < 0.5), 1, constant_values=1)  # type: ignore[call-overload]
    cv2.floodFill(outside, None, (0, 0), 2)  # type: ignore[call-overload]
    inside = (outside != 2)[1:-1, 1:-1]
    return np.where(inside & (weight < 0.5), np.float32(1), weight).astype(np.float32)
