"""The whole photo as the frame: the person moves, the background stands still, uncovered background is filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from export3d_cli.core.animation.background_fill import fill_hole, find_loose_hair
from export3d_cli.core.animation.retargeting import TravelLimits
from export3d_cli.core.face.crop import Square, crop_image
from export3d_cli.core.face.matting import FacePosition, estimate_foreground, refine_alpha
from export3d_cli.core.media.image import to_uint8
from export3d_cli.core.model.export3d import Output
from export3d_cli.core.model.masks import smooth_step
from export3d_cli.core.model.warp.mesh_flow import resize
from export3d_cli.core.model.warp.photo_flow import CELL, FLOW_SIZE, WINDOW_MARGIN, PhotoFlow

AlphaFn = Callable[[np.ndarray, Sequence[FacePosition]], np.ndarray]  # image, faces in it -> alpha matte
CLOSE_UP_SCALES = (1.7, 1.0)  # crops, in sides of the face crop, whose mattes refine the whole photo's
CLOSE_UP_SIZE_PX = 512
CLOSE_UP_FADE = 0.12  # fraction of a close-up's side over which its matte takes over
HOLE_ALPHA = 0.03  # alpha from which a pixel does not show the background
HOLE_MARGIN = 0.02  # crop sides around the person that its colours reach: 2 pixels at least
LOOSE_HAIR_MARGIN_PX = 3  # around loose hair, which is removed from the background
BORDER_SLOPE = 0.45  # largest displacement towards a border that cuts the person, over the distance from it
# Crop sides along a border, averaged twice, for the fraction of it that cuts the person, and fractions over which the
# displacement becomes limited: of the head, which may leave the border, and of the body, which must not.
HEAD_BORDER, BODY_BORDER = (0.4, (0.5, 1.0)), (0.1, (0.05, 0.5))
BODY_FADE = (0.7, 0.9)  # heights in the crop over which left and right borders cut the body instead of the head
EXTENSION = 0.06  # crop sides beyond the photo over which a person that its border cuts ends in a rounded outline
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
    copied: float  # fraction of the crop that is the photo's pixels, moved


class FrameLayers(NamedTuple):
    """One rendered frame before it is composed into the photo."""

    image: np.ndarray  # uint8 (S, S, 3) of the network, for the crop; undefined outside a window around the face
    displacement: np.ndarray  # float32 (n, n, 2) see `PhotoFlow`, crop units
    face_weight: np.ndarray  # float32 (n, n)
    volume: VolumeRender

    @classmethod
    def from_output(cls, images: np.ndarray, flow: PhotoFlow, output: Output) -> list[FrameLayers]:
        """Split a batch: images uint8 (B, S, S, 3) of the network, their flow, and the network's output."""
        displacement = flow.displacement.permute(0, 2, 3, 1).float().cpu().numpy()
        weight = flow.face_weight[:, 0].float().cpu().numpy()
        depth, opacity = (x[:, 0].float().cpu().numpy() for x in (output.depth, output.opacity))
        copied = [0.0] * len(images)
        if output.blend_weights is not None:
            margin = round(WINDOW_MARGIN / CELL)  # cells around the crop
            shown = flow.face_weight[..., margin:-margin, margin:-margin]
            synthesised = 1 - output.blend_weights.float().sum(1, keepdim=True)
            copied = (1 - shown * resize(synthesised, shown.shape[-1])).mean((1, 2, 3)).tolist()
        volumes = map(VolumeRender, to_uint8(output.raw), depth, opacity, copied)
        return [cls(*layers) for layers in zip(images, displacement, weight, volumes, strict=True)]


@dataclass(frozen=True, eq=False)
class PhotoCanvas:
    """A photo taken apart into person and background, in the window that moves; immutable, its arrays are read-only."""

    photo: np.ndarray = field(repr=False)  # uint8 (H, W, 3)
    alpha: np.ndarray = field(repr=False)  # float32 (H, W) the person's matte
    square: Square  # the face crop: x0, y0, side, whole pixels of the photo
    window: tuple[slice, slice]  # rows and columns that change
    foreground: np.ndarray = field(repr=False)  # uint8 (h + 2m, w + 2m, 4) the person's own colours, extended; alpha
    plate: np.ndarray = field(repr=False)  # uint8 (h, w, 3) the background in the window, filled in behind the person
    room: np.ndarray = field(repr=False)  # float32 (4, n, n) of the flow's cells before each border, see `_border_room`
    limits: TravelLimits

    @classmethod
    def from_photo(cls, photo: np.ndarray, square: Square, alpha_of: AlphaFn,
                   faces: Sequence[FacePosition] = ()) -> PhotoCanvas:  # fmt: skip
        """Take a photo, uint8 (H, W, 3), apart; `faces` in the crop are those of `PersonMatting.alpha`."""
        height, width = photo.shape[:2]
        alpha = _photo_alpha(photo, square, alpha_of, faces)
        x0, y0, side = square
        margin = WINDOW_MARGIN * side
        columns = slice(max(0, round(x0 - margin)), min(width, round(x0 + side + margin)))
        window = slice(max(0, round(y0 - margin)), min(height, round(y0 + side + margin))), columns
        part, matte = np.ascontiguousarray(photo[window]), np.ascontiguousarray(alpha[window])
        hole = _grow(matte > HOLE_ALPHA, max(2, round(HOLE_MARGIN * side)))
        hole |= _grow(find_loose_hair(part, hole, side), LOOSE_HAIR_MARGIN_PX)
        plate = fill_hole(part, hole)
        colours = np.where(matte[..., None] > 0.98, part, estimate_foreground(part, matte))
        person = np.dstack([colours, np.rint(255 * matte).astype(np.uint8)])
        foreground = _extend_foreground(person, round(EXTENSION * side))
        room = _border_room(alpha, square)
        for array in (photo, alpha, foreground, plate, room):
            array.flags.writeable = False
        return cls(photo, alpha, square, window, foreground, plate, room, _travel_limits(alpha, square))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames, pixels."""
        return self.photo.shape[1], self.photo.shape[0]

    def compose(self, layers: FrameLayers) -> np.ndarray:
        """Return a frame, uint8 (H, W, 3), from layers that were rendered for this photo's crop."""
        colours, alpha = self.person(layers)
        frame = self.photo.copy()
        frame[self.window] = cv2.blendLinear(colours, self.plate, alpha, 1 - alpha)
        return frame

    def person(self, layers: FrameLayers) -> tuple[np.ndarray, np.ndarray]:
        """Return the person in the window: colours uint8 (h, w, 3) and alpha, float32 (h, w).

        The photo's pixels are moved, except for the face, which the network shows.
        """
        rows, columns = self.window
        shape = (columns.stop - columns.start, rows.stop - rows.start)
        near, far = self.room[:2], self.room[2:]
        shift = layers.displacement.transpose(2, 0, 1)
        # where a border cuts most of the person, what is there stays, and what is next to it is stretched
        shift = shift / (1 + (shift / np.where(shift < 0, near, far)) ** 4) ** 0.25
        x0, y0, side = self.square
        cells = np.dstack([*(side * shift), layers.face_weight]).astype(np.float32)
        cell = side * CELL  # pixels; the map is from indices of the window's pixels to those of the flow's cells
        offset = [(s.start + 0.5 - o + WINDOW_MARGIN * side) / cell - 0.5 for s, o in ((columns, x0), (rows, y0))]
        matrix, flags = np.array([[1 / cell, 0, offset[0]], [0, 1 / cell, offset[1]]]), cv2.INTER_LINEAR
        flags |= cv2.WARP_INVERSE_MAP
        pixels = cv2.warpAffine(cells, matrix, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        margin = (len(self.foreground) - shape[1]) // 2  # see `_extend_foreground`
        x = pixels[..., 0] + np.arange(margin, margin + shape[0], dtype=np.float32)
        y = pixels[..., 1] + np.arange(margin, margin + shape[1], dtype=np.float32)[:, None]
        moved = cv2.remap(self.foreground, x, y, cv2.INTER_CUBIC)
        face = cv2.extractChannel(pixels, 2)
        alpha = np.maximum(cv2.extractChannel(moved, 3) * np.float32(1 / 255), face)
        colours = cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB)
        self._blend_network(colours, layers.image, face / alpha.clip(1e-3))
        return colours, alpha

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
        close = alpha_of(crop_image(photo, (left, top, size), CLOSE_UP_SIZE_PX),
                         _to_frame(faces, square, (left, top, size, size)))  # fmt: skip
        step = size / CLOSE_UP_SIZE_PX
        matrix = np.array([[1 / step, 0, (0.5 - left) / step - 0.5], [0, 1 / step, (0.5 - top) / step - 0.5]])
        close = cv2.warpAffine(close, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        ramps = []
        for start, length in ((top, height), (left, width)):
            position = (np.arange(length) + 0.5 - start) / size
            ramps.append(smooth_step(np.minimum(position, 1 - position), 0, CLOSE_UP_FADE))
        alpha = alpha + np.outer(*ramps).astype(np.float32) * (close - alpha)
    return refine_alpha(photo, alpha.astype(np.float32), max(2, round(0.012 * side)))


def _to_frame(faces: Sequence[FacePosition], square: Square,
              frame: tuple[float, float, float, float]) -> list[FacePosition]:  # fmt: skip
    """Convert face positions from units of the crop to units of another frame: x0, y0, width, height."""
    x0, y0, side = square
    left, top, width, height = frame
    return [((x0 + x * side - left) / width, (y0 + y * side - top) / height, s * side / max(width, height))
            for x, y, s in faces]  # fmt: skip


def _extend_foreground(foreground: np.ndarray, margin: int) -> np.ndarray:
    """Add a mirrored margin, in which what a border cuts ends in a rounded outline, to uint8 (h, w, 4)."""
    extended = cv2.copyMakeBorder(foreground, *(margin,) * 4, cv2.BORDER_REFLECT_101)
    for image in (extended, extended[::-1], extended.transpose(1, 0, 2), extended[:, ::-1].transpose(1, 0, 2)):
        border = image[margin, :, 3].astype(np.float32) / 255
        cut = cv2.blur(cv2.blur(border[None], (2 * margin + 1, 1)), (2 * margin + 1, 1))[0]
        reach = margin * np.sqrt((2 * cut - 1).clip(0, 1))
        distance = np.arange(margin, 0, -1, dtype=np.float32)[:, None]
        image[:margin, :, 3] = image[:margin, :, 3] * ((reach - distance) / 2 + 0.5).clip(0, 1)
    return extended


def _grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilate a mask, bool (h, w), by a disc of `radius` pixels."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)
    return cv2.dilate(mask.astype(np.uint8), disc) > 0


def _border_room(alpha: np.ndarray, square: Square) -> np.ndarray:
    """Return the largest displacements of the flow's cells to the left, up, right and down: float32 (4, n, n).

    They are in crop sides. Where a border cuts the person they are proportional to the distance from it.
    """
    x0, y0, side = square
    centres = (np.arange(FLOW_SIZE, dtype=np.float32) + 0.5) * CELL - WINDOW_MARGIN
    room, below = [], smooth_step(centres, *BODY_FADE)[:, None]
    for start, along, edges, body in ((x0, y0, alpha[:, [0, -1]], below), (y0, x0, alpha[[0, -1]].T, np.arange(2))):
        length = alpha.size // len(edges)  # between the two borders, pixels
        cells = (along + side * centres).astype(int).clip(0, len(edges) - 1)
        cuts = []
        for size, fade in (HEAD_BORDER, BODY_BORDER):
            window, cut = (1, 2 * round(size * side / 2) + 1), np.ascontiguousarray(edges)
            for _ in range(2):
                cut = cv2.blur(cut, window, borderType=cv2.BORDER_REPLICATE)
            cuts.append(smooth_step(cut[cells], *fade))  # (n, 2)
        cut = np.maximum(cuts[0], body * cuts[1])
        distance = np.stack([start / side + centres, (length - start) / side - centres])  # (2, n)
        room.append(1 - cut.T[..., None] + BORDER_SLOPE * distance.clip(1e-3)[:, None])
    (left, right), (up, down) = room[0], room[1].transpose(0, 2, 1)
    return np.stack([left, up, right, down]).astype(np.float32)


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
