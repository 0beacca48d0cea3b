"""Changed expressions in frames of a video: only pixels of the face change, at the frame's own resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.face.crop import crop_with_padding
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import to_tensor
from export3d_cli.core.model.expression_warp import ExpressionWarp, warp_expression
from export3d_cli.core.model.inpaint.inpainter import INPAINT_SIZE_PX
from export3d_cli.core.runtime.device import autocast
from export3d_cli.core.runtime.errors import InputError

WINDOW_SCALE = 1.7  # side of the window that can change, in face boxes: the first ring of the face mesh lies inside
MIN_SHIFT_PX = 1 / 64  # displacements below half of the step of `cv2.remap`, 1/32 pixel, are ignored
PixelSquare = tuple[int, int, int]  # x0, y0, side in pixels; may reach outside the frame


class FaceWindows(NamedTuple):
    """The surroundings of the face in T frames."""

    frames: Sequence[np.ndarray]  # uint8 (H, W, 3)
    windows: list[PixelSquare]
    images: np.ndarray  # uint8 (T, size, size, 3) the windows
    cameras: np.ndarray  # (T, 25) for the windows
    landmarks: np.ndarray  # (T, 478, 3), head frame
    positions: np.ndarray  # (T, 478, 2) of the landmarks, in windows

    @classmethod
    def cut(cls, frames: Sequence[np.ndarray], rows: Sequence[Motion], size: int) -> FaceWindows:
        """Cut the windows of frames with their motion, one row each, and resize them to `size`."""
        landmarks = np.concatenate([row.landmarks for row in rows])
        camera = np.concatenate([row.camera for row in rows])
        crops = np.array([row.crop for row in rows])
        pixels = landmarks[..., :2] * crops[:, None, 2:] + crops[:, None, :2]  # (T, 478, 2)
        low, high = pixels.min(1), pixels.max(1)
        sides = np.rint(WINDOW_SCALE * (high - low).max(1, keepdims=True)).clip(2)  # (T, 1)
        origins = np.rint((low + high - sides) / 2)  # (T, 2)
        windows = [(x, y, side) for x, y, side in np.hstack([origins, sides]).astype(int).tolist()]
        images = [crop_with_padding(frame, window, size) for frame, window in zip(frames, windows, strict=True)]
        cameras = camera.copy()
        cameras[:, [16, 20]] *= crops[:, 2:] / sides
        cameras[:, [18, 21]] = (camera[:, [18, 21]] * crops[:, 2:] + crops[:, :2] - origins) / sides
        positions = (pixels - origins[:, None]) / sides[:, None]
        landmarks = landmarks_to_head_frame(landmarks, camera)
        return cls(frames, windows, np.stack(images), cameras, landmarks, positions.astype(np.float32))


def retouch(animator: Animator, faces: FaceWindows, own: np.ndarray, changes: np.ndarray,
            still: np.ndarray) -> list[np.ndarray]:  # fmt: skip
    """Return the frames, uint8 (H, W, 3), with `changes` (T, n + m) of their `own` lambda and measures, likewise.

    `still` (T, 3) tells how far mouth, the person's right eye and left eye stay as they are, [0, 1]. Raises
    `InputError` for weights without a flow.
    """
    model = animator.model
    if model.flow is None:
        raise InputError("these weights have no flow, which moves the pixels of a video: use other weights")
    n, changes = model.config.num_coefficients, changes * model.config.expression_gain
    measures = own[:, n:] + changes[:, n:], own[:, n:]
    arrays = faces.landmarks, faces.cameras, changes[:, :n], *measures, still
    tensors = to_tensor(faces.images), *(torch.from_numpy(np.float32(x)) for x in arrays)
    with torch.inference_mode(), autocast(animator.device, animator.precision):
        result = warp_expression(model, *(x.to(animator.device) for x in tensors))
    displacement = result.displacement.permute(0, 2, 3, 1).float().cpu().numpy()
    places = enumerate(zip(faces.frames, faces.windows, strict=True))
    return [_compose(frame, window, displacement[row], result, row) for row, (frame, window) in places]


def _compose(frame: np.ndarray, window: PixelSquare, displacement: np.ndarray, result: ExpressionWarp,
             row: int) -> np.ndarray:  # fmt: skip
    """Move the pixels of a frame by a displacement (h, h, 2) of its window, and paste the patches."""
    x0, y0, side = window
    frame = frame.copy()
    shift = cv2.resize(displacement * np.float32(side), (side, side), interpolation=cv2.INTER_LINEAR)
    left, top = max(0, -x0), max(0, -y0)
    shift = shift[top : frame.shape[0] - y0, left : frame.shape[1] - x0]
    moves = np.abs(shift).max(-1) >= MIN_SHIFT_PX
    x, y, width, height = cv2.boundingRect(moves.view(np.uint8))
    if width:
        part = shift[y : y + height, x : x + width]
        column, line = x0 + left + x, y0 + top + y
        columns = np.arange(column, column + width, dtype=np.float32) + part[..., 0]
        lines = np.arange(line, line + height, dtype=np.float32)[:, None] + part[..., 1]
        moved = cv2.remap(frame, columns, lines, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        target = frame[line : line + height, column : column + width]
        np.copyto(target, moved, where=moves[y : y + height, x : x + width, None])
    for crop, colours, mask in result.patches:
        centre, axes = (t[row].float().cpu().numpy() for t in (crop.centre, crop.axes))
        _paste(frame, np.array(window[:2]) + centre * side, axes, float(crop.side[row]) * side, colours[row], mask[row])
    return frame


def _paste(frame: np.ndarray, centre: np.ndarray, axes: np.ndarray, side: float, colours: Tensor, mask: Tensor) -> None:
    """Blend a patch, colours (3, n, n) in [-1, 1] and mask (1, n, n), into a frame around a position in pixels."""
    if not mask.any():
        return
    reach = np.abs(axes).sum(0) * side / 2
    low = np.floor(centre - reach).astype(int).clip(0, frame.shape[1::-1])
    high = np.ceil(centre + reach).astype(int).clip(0, frame.shape[1::-1])
    if (low >= high).any():
        return
    patch = torch.cat([(colours + 1) * 127.5 * mask, mask]).float().permute(1, 2, 0).cpu().numpy()
    matrix = axes * INPAINT_SIZE_PX / side
    offset = matrix @ (low + 0.5 - centre) + (INPAINT_SIZE_PX - 1) / 2
    width, height = (int(n) for n in high - low)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    placed = cv2.warpAffine(patch, np.column_stack([matrix, offset]), (width, height), flags=flags)
    target = frame[low[1] : high[1], low[0] : high[0]]
    target[:] = np.rint((target * (1 - placed[..., 3:]) + placed[..., :3]).clip(0, 255))
