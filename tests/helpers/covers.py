"""Drawn covers before a face: masks, hands, phones, microphones, cups, scarves, dark and clear lenses."""

from __future__ import annotations

import cv2
import numpy as np

from export3d_cli.core.face.landmarks import (
    EYE_RIMS,
    FACE_OVAL,
    LEFT_EYE_OUTER,
    LEFT_MOUTH_CORNER,
    NOSE_TIP,
    RIGHT_EYE_OUTER,
    RIGHT_MOUTH_CORNER,
)

LOWER_FACE = FACE_OVAL[9:-8]  # from ear to ear below the cheek bones
MASK_BLUE = (165, 200, 225)


def draw_cover(photo: np.ndarray, points: np.ndarray, kind: str, *, eyes: tuple[int, ...] = (0, 1)) -> np.ndarray:
    """Return a photo, uint8 (H, W, 3), with a cover drawn at its landmarks (478, 2 or 3) in pixels."""
    points, unit = points[:, :2], float(np.linalg.norm(points[RIGHT_EYE_OUTER, :2] - points[LEFT_EYE_OUTER, :2]))
    mouth = points[[RIGHT_MOUTH_CORNER, LEFT_MOUTH_CORNER]].mean(0)
    out = photo.copy()

    def ellipse(centre: np.ndarray, width: float, height: float, colour: tuple[float, ...]) -> None:
        axes = (max(1, round(width * unit)), max(1, round(height * unit)))
        cv2.ellipse(out, np.rint(centre).astype(int).tolist(), axes, 0, 0, 360, colour, -1, cv2.LINE_AA)

    skin = tuple(float(x) for x in photo[tuple(np.rint(points[[50, 280, 151]]).astype(int).T[::-1])].mean(0))
    if kind in ("blue mask", "black mask", "scarf"):
        outline = np.concatenate([points[list(LOWER_FACE)], points[[NOSE_TIP]] - [0, 0.15 * unit]])
        inside = np.zeros(photo.shape[:2], np.uint8)
        cv2.fillPoly(inside, [np.rint(outline).astype(np.int32)], 1)
        pattern = np.random.default_rng(0).integers(40, 200, (20, 20, 3)).astype(np.uint8)
        cloth = cv2.resize(pattern, photo.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        colour = {"blue mask": MASK_BLUE, "black mask": (28, 28, 32)}.get(kind)
        out[inside > 0] = cloth[inside > 0] if colour is None else colour
    elif kind == "hand":
        for finger in range(4):
            centre = mouth + [0, (finger - 1.5) * 0.2 * unit]
            ellipse(centre + [0, 0.02 * unit], 0.62, 0.115, tuple(0.6 * x for x in skin))
            ellipse(centre, 0.61, 0.1, tuple((0.92 + 0.03 * finger) * x for x in skin))
    elif kind == "phone":  # before the person's right half of the face
        cv2.rectangle(out, *np.rint(mouth + unit * np.array([[-0.85, -1.45], [0, 0.6]])).astype(int), (24, 24, 28), -1)
    elif kind == "microphone":
        ellipse(mouth + [0, 0.03 * unit], 0.4, 0.37, (62, 60, 64))
    elif kind in ("cup", "lowered cup", "low microphone"):  # their edge crosses the lips, but for the lowered cup's
        top = mouth + [0, (0.35 if kind == "lowered cup" else 0.02) * unit]
        handle = 0.5 if kind == "low microphone" else 1
        body = top + np.array([[-0.36, 0], [0.36, 0], [0.3, 0.9], [-0.3, 0.9]]) * [handle * unit, unit]
        colour = (40, 40, 42) if kind == "low microphone" else (205, 200, 190)
        cv2.fillConvexPoly(out, np.rint(body).astype(np.int32), colour, cv2.LINE_AA)
        if kind == "low microphone":
            ellipse(top + [0, 0.3 * unit], 0.33, 0.33, (110, 110, 116))
        else:
            ellipse(top, 0.36, 0.05, (120, 115, 110))
    else:
        for eye in eyes:
            rim = EYE_RIMS[eye][1]
            centre = points[[rim[0], rim[8]]].mean(0) + [0, 0.06 * unit]
            before = out.copy()
            ellipse(
                centre, 0.3, 0.24, {"dark lenses": (16, 16, 18), "brown lenses": (70, 45, 30)}.get(kind, (225,) * 3)
            )
            if kind == "clear lenses":
                out = cv2.addWeighted(out, 0.1, before, 0.9, 0)
    return out
