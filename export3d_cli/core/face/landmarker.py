"""MediaPipe's Face Landmarker (BlazeFace, 478 points, 52 blendshapes) on LiteRT, without MediaPipe.

A call walks the three networks of the `face_landmarker.task` bundle:

    image -> letterbox 128 -> face_detector -> anchors, weighted NMS -> Detection
          -> rotated square around the face, 256 -> face_landmarks_detector -> 478 points, presence
          -> 146 of the points, in pixels -> face_blendshapes -> 52 coefficients

The arithmetic follows MediaPipe's own graph (half-pixel conventions, border modes, regions of interest), because the
networks were trained behind it. What we leave out on purpose is the One Euro smoothing of its video mode: smoothing is
the caller's choice.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter

from export3d_cli.core.errors import InputError, WeightsError

ARKIT_NAMES: tuple[str, ...] = (
    *("browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight"),
    *("cheekPuff", "cheekSquintLeft", "cheekSquintRight"),
    *("eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight", "eyeLookInLeft", "eyeLookInRight"),
    *("eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight"),
    *("eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight"),
    *("jawForward", "jawLeft", "jawOpen", "jawRight"),
    *("mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight", "mouthFunnel"),
    *("mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker"),
    *("mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper"),
    *("mouthSmileLeft", "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight"),
    *("mouthUpperUpLeft", "mouthUpperUpRight", "noseSneerLeft", "noseSneerRight", "tongueOut"),
)

_DETECTOR_SIZE = 128  # input side of the detector, pixels
_MESH_SIZE = 256  # input side of the landmark network, pixels
_MIN_SCORE = 0.5  # both the detector's and the presence threshold, MediaPipe's defaults
_NMS_IOU = 0.3
_ROI_SCALE = 1.5  # margin around the box of a detection or of a set of landmarks
_TILE = 0.6  # side of a tile of the second look, as a part of the image's shorter side
_SAME_FACE_IOU = 0.5  # two landmark boxes that overlap more are one face

# Outer eye corners: the line between them gives the roll of the head.
_RIGHT_EYE_CORNER, _LEFT_EYE_CORNER = 33, 263

# The points the blendshape network reads, in its order.
_BLENDSHAPE_POINTS = np.fromstring(
    """
    0 1 4 5 6 7 8 10 13 14 17 21 33 37 39 40 46 52 53 54 55 58 61 63 65 66 67 70 78 80 81 82 84 87 88 91 93 95 103 105
    107 109 127 132 133 136 144 145 146 148 149 150 152 153 154 155 157 158 159 160 161 162 163 168 172 173 176 178 181
    185 191 195 197 234 246 249 251 263 267 269 270 276 282 283 284 285 288 291 293 295 296 297 300 308 310 311 312 314
    317 318 321 323 324 332 334 336 338 356 361 362 365 373 374 375 377 378 379 380 381 382 384 385 386 387 388 389 390
    397 398 400 402 405 409 415 454 466 468 469 470 471 472 473 474 475 476 477
    """,
    dtype=np.intp,
    sep=" ",
)


@dataclass(frozen=True)
class Detection:
    """A face as the detector sees it, in pixels of the image given."""

    box: np.ndarray  # (4,) float32: x0, y0, x1, y1; may reach past the image's border
    keypoints: np.ndarray  # (6, 2) float32: eye on the image's left, other eye, nose tip, mouth, the two ears
    score: float  # in [0.5, 1]


@dataclass(frozen=True)
class Face:
    """One face's points and expression."""

    landmarks: np.ndarray  # (478, 3) float32; x, y in pixels, z on the scale of x, negative towards the camera
    blendshapes: np.ndarray  # (52,) float32 in [0, 1], in the order of ARKIT_NAMES; tongueOut is always 0
    score: float  # presence probability of the landmark network, in [0.5, 1]


@dataclass(frozen=True)
class _Roi:
    """A rotated rectangle of the image, in pixels; rotation in radians, clockwise on screen."""

    x: float
    y: float
    width: float
    height: float
    rotation: float


class Landmarker:
    """Finds faces, their 478 landmarks and their 52 blendshape coefficients.

    Images are uint8 (H, W, 3) RGB. `detect`, `find` and `find_all` keep no state; `track` follows one face from frame
    to frame and is the cheaper and steadier choice for a video. An instance is not safe to share between threads.
    """

    def __init__(self, bundle: Path, *, threads: int = 1) -> None:
        """Load the networks of a `face_landmarker.task` bundle; raises WeightsError when it cannot be used."""
        detector, mesh, blendshapes = _read_bundle(
            bundle, "face_detector.tflite", "face_landmarks_detector.tflite", "face_blendshapes.tflite"
        )
        with _quiet_stderr():
            self._detector = _Network(detector, bundle, threads)
            self._mesh = _Network(mesh, bundle, threads)
            self._blendshapes = _Network(blendshapes, bundle, threads)
        self._anchors = _anchors()  # (896, 2)
        self._roi: _Roi | None = None
        self._tracked_size: tuple[int, int] | None = None

    def detect(self, image: np.ndarray) -> list[Detection]:
        """All faces of the image, the largest first.

        The detector is made for faces that fill a good part of the picture. When it sees none, it looks again at the
        middle square and at overlapping tiles (2 x 2 for a square picture), where a small face is larger.
        """
        return next((detections for detections in self._looks(_checked(image)) if detections), [])

    def find(self, image: np.ndarray) -> Face | None:
        """The largest face of the image, or None."""
        return next(self._faces(_checked(image)), None)

    def find_all(self, image: np.ndarray) -> list[Face]:
        """Every face of the image, the largest first."""
        faces: list[Face] = []
        boxes = np.zeros((0, 4), np.float32)
        for face in self._faces(_checked(image)):
            box = _box_of(face.landmarks)
            if (_iou(box, boxes) <= _SAME_FACE_IOU).all():
                faces.append(face)
                boxes = np.vstack([boxes, box])
        return faces

    def track(self, image: np.ndarray) -> Face | None:
        """The face of the next frame of a video, looked for where the last frame's was; None if there is none.

        When the face has gone from there, or at the first frame, the detector looks at the whole frame.
        """
        image = _checked(image)
        if image.shape[:2] != self._tracked_size:
            self.reset()
        face = None if self._roi is None else self._landmarks(image, self._roi)
        if face is None:
            face = next(self._faces(image), None)
        self._roi = None if face is None else _roi_of_landmarks(face.landmarks)
        self._tracked_size = image.shape[:2]
        return face

    def follow(self, face: Face, image: np.ndarray) -> None:
        """Let `track` look for this face of `image` from now on."""
        self._roi, self._tracked_size = _roi_of_landmarks(face.landmarks), image.shape[:2]

    def reset(self) -> None:
        """Forget the tracked face; call it between two videos."""
        self._roi = None
        self._tracked_size = None

    def _faces(self, image: np.ndarray) -> Iterator[Face]:
        """The detections that the landmark network confirms, from the first look that has any."""
        for detections in self._looks(image):
            confirmed = False
            for detection in detections:
                face = self._landmarks(image, _roi_of_detection(detection))
                if face is not None:
                    confirmed = True
                    yield face
            if confirmed:
                return

    def _looks(self, image: np.ndarray) -> Iterator[list[Detection]]:
        """Detections in the whole picture, then in its parts; lazy, because the parts are seldom needed."""
        h, w = image.shape[:2]
        side = max(h, w)
        letterbox = _crop(image, _Roi(w / 2, h / 2, side, side, 0.0), _DETECTOR_SIZE, cv2.BORDER_CONSTANT)
        yield _weighted_nms(*self._candidates(letterbox, (w - side) / 2, (h - side) / 2, side))

        parts = []
        for x, y, side in _second_look(h, w):
            part = image[y : y + side, x : x + side]
            part = cv2.resize(part, (_DETECTOR_SIZE, _DETECTOR_SIZE), interpolation=cv2.INTER_AREA)
            parts.append(self._candidates(part, x, y, side))
        boxes, keypoints, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        yield _weighted_nms(boxes, keypoints, scores)

    def _candidates(
        self, square: np.ndarray, x0: float, y0: float, side: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the detector on a 128 x 128 picture of the image's square at (x0, y0).

        Returns:
            boxes (N, 4), keypoints (N, 6, 2), both in pixels of the image, and scores (N,), all at least 0.5.
        """
        regressors, logits = self._detector(square.astype(np.float32) * (2 / 255) - 1)
        scores = _sigmoid(logits.reshape(-1))  # (896,)
        keep = scores >= _MIN_SCORE
        raw = regressors.reshape(-1, 8, 2)[keep] / _DETECTOR_SIZE  # (N, 8, 2): centre, size, 6 keypoints
        raw[:, [0, *range(2, 8)]] += self._anchors[keep, None]
        raw *= side
        raw[:, [0, *range(2, 8)]] += (x0, y0)
        centre, half = raw[:, 0], raw[:, 1] / 2
        return np.hstack([centre - half, centre + half]), raw[:, 2:], scores[keep]

    def _landmarks(self, image: np.ndarray, roi: _Roi) -> Face | None:
        """Landmarks and blendshapes of the face in `roi`; None when the network sees no face there."""
        crop = _crop(image, roi, _MESH_SIZE, cv2.BORDER_REPLICATE)
        outputs = self._mesh(crop.astype(np.float32) * (1 / 255))
        score = float(_sigmoid(outputs[1].reshape(-1))[0])
        if score < _MIN_SCORE:
            return None
        points = outputs[0].reshape(-1, 3) / _MESH_SIZE  # (478, 3)
        x, y = (points[:, 0] - 0.5) * roi.width, (points[:, 1] - 0.5) * roi.height
        z = points[:, 2] * roi.width
        cos, sin = math.cos(roi.rotation), math.sin(roi.rotation)
        landmarks = np.stack([cos * x - sin * y + roi.x, sin * x + cos * y + roi.y, z], axis=1).astype(np.float32)

        (values,) = self._blendshapes(landmarks[_BLENDSHAPE_POINTS, :2])  # (52,): _neutral, then ARKit's but the last
        blendshapes = np.append(np.clip(values.reshape(-1)[1:], 0, 1), 0).astype(np.float32)
        return Face(landmarks=landmarks, blendshapes=blendshapes, score=score)


class _Network:
    """One tflite network with a single float32 input."""

    def __init__(self, content: bytes, bundle: Path, threads: int) -> None:
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise WeightsError(
                f"{bundle} holds a network that does not load ({error}); fetch the file again"
            ) from error
        self._input = self._interpreter.get_input_details()[0]
        self._outputs = [detail["index"] for detail in self._interpreter.get_output_details()]

    def __call__(self, array: np.ndarray) -> list[np.ndarray]:
        self._interpreter.set_tensor(self._input["index"], array[None])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere for a moment: LiteRT announces its delegate there, past every logger."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed: quiet already
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _read_bundle(bundle: Path, *names: str) -> list[bytes]:
    bundle = Path(bundle)
    if not bundle.is_file():
        raise WeightsError(f"no face landmarker at {bundle}; it comes with the program's weights")
    try:
        with zipfile.ZipFile(bundle) as archive:
            return [archive.read(name) for name in names]
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightsError(f"{bundle} is not a whole face landmarker bundle ({error}); fetch it again") from error


def _checked(image: np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"a face is looked for in a uint8 (H, W, 3) RGB array, got {got}")
    if not image.size:
        raise InputError(f"the image is empty: its shape is {image.shape}")
    return np.ascontiguousarray(image)


def _anchors() -> np.ndarray:
    """(896, 2) anchor centres in [0, 1]: two per cell of a 16 x 16 grid, then six per cell of an 8 x 8 grid."""
    parts = []
    for cells, per_cell in ((16, 2), (8, 6)):
        centres = (np.arange(cells, dtype=np.float32) + 0.5) / cells
        y, x = np.meshgrid(centres, centres, indexing="ij")
        parts.append(np.repeat(np.stack([x, y], axis=-1).reshape(-1, 2), per_cell, axis=0))
    return np.concatenate(parts)


def _second_look(h: int, w: int) -> list[tuple[int, int, int]]:
    """Squares (x, y, side) where a face too small for the whole picture may be found: the middle, then tiles."""
    short = min(h, w)
    squares = [((w - short) // 2, (h - short) // 2, short)]
    side = max(1, round(_TILE * short))
    step = short - side  # two tiles along the shorter side, as many as that step needs along the longer
    xs, ys = (np.linspace(0, n - side, 1 + math.ceil((n - side) / step) if step else 1).astype(int) for n in (w, h))
    return squares + [(int(x), int(y), side) for y in ys for x in xs]


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box (4,) with boxes (N, 4) -> (N,)."""
    overlap = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = np.prod(np.maximum(overlap, 0), axis=1)
    area = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    iou: np.ndarray = shared / np.maximum(area - shared, 1e-9)
    return iou


def _weighted_nms(boxes: np.ndarray, keypoints: np.ndarray, scores: np.ndarray) -> list[Detection]:
    """Each best box becomes the score-weighted mean of the boxes it suppresses (as BlazeFace does); largest first."""
    detections = []
    left = np.argsort(-scores, kind="stable")
    while len(left):
        best = left[0]
        same = _iou(boxes[best], boxes[left]) > _NMS_IOU
        same[0] = True
        group, left = left[same], left[~same]
        weights = scores[group] / scores[group].sum()
        detections.append(
            Detection(
                box=np.einsum("n,nc->c", weights, boxes[group]),
                keypoints=np.einsum("n,nkc->kc", weights, keypoints[group]),
                score=float(scores[best]),
            )
        )
    return sorted(detections, key=lambda d: -float(np.prod(d.box[2:] - d.box[:2])))


def _roi_of_detection(detection: Detection) -> _Roi:
    """The box with its margin, turned so that the line through the eyes is level."""
    (x0, y0), (x1, y1) = detection.box.reshape(2, 2).tolist()
    dx, dy = (detection.keypoints[1] - detection.keypoints[0]).tolist()
    return _Roi(
        (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * _ROI_SCALE, (y1 - y0) * _ROI_SCALE, rotation=math.atan2(dy, dx)
    )


def _box_of(landmarks: np.ndarray) -> np.ndarray:
    return np.concatenate([landmarks[:, :2].min(axis=0), landmarks[:, :2].max(axis=0)])


def _roi_of_landmarks(landmarks: np.ndarray) -> _Roi:
    """The square around all points with its margin, turned so that the outer eye corners are level."""
    x0, y0, x1, y1 = _box_of(landmarks).tolist()
    dx, dy = (landmarks[_LEFT_EYE_CORNER, :2] - landmarks[_RIGHT_EYE_CORNER, :2]).tolist()
    side = max(x1 - x0, y1 - y0) * _ROI_SCALE
    return _Roi((x0 + x1) / 2, (y0 + y1) / 2, side, side, rotation=math.atan2(dy, dx))


def _crop(image: np.ndarray, roi: _Roi, size: int, border: int) -> np.ndarray:
    """(size, size, 3) uint8 bilinear view of `roi`; corner to corner, not centre to centre, as MediaPipe does."""
    cos, sin = math.cos(roi.rotation), math.sin(roi.rotation)
    a, b = cos * roi.width / size, -sin * roi.height / size
    c, d = sin * roi.width / size, cos * roi.height / size
    to_image = np.array([[a, b, roi.x - (a + b) * size / 2], [c, d, roi.y - (c + d) * size / 2]])
    return cv2.warpAffine(
        image, to_image, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=border
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    y: np.ndarray = 1 / (1 + np.exp(-np.clip(x, -80, 80)))  # beyond 80 it is 0 or 1, and exp overflows soon after
    return y
