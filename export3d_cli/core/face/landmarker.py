"""MediaPipe's Face Landmarker (BlazeFace, 478 points, 52 blendshapes) on LiteRT, without MediaPipe.

A call walks the three networks of the `face_landmarker.task` bundle:

    image -> letterbox 128 -> face_detector -> anchors, weighted NMS -> Detection
          -> rotated square around the face, 256 -> face_landmarks_detector -> 478 points, presence
          -> 146 of the points, in pixels -> face_blendshapes -> 52 coefficients

That detector is made for faces that fill a good part of the picture; where it sees none, YuNet looks (`detector.py`).
The arithmetic follows MediaPipe's own graph (half-pixel conventions, border modes, regions of interest), because the
networks were trained behind it. What we leave out on purpose is the One Euro smoothing of its video mode: smoothing is
the caller's choice.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.face.detector import SEARCH_SIDES_PX, Detection, FaceDetector
from export3d_cli.core.face.litert import LiteRTNetwork, quiet_stderr
from export3d_cli.core.runtime.errors import InputError, NoFaceError, WeightsError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS

WARMUP_PASSES = 3  # times a first frame is tracked: tracking settles on the region of interest that it keeps in videos
_DETECTOR_SIDE_PX = 128  # input side of the detector, pixels
_LANDMARK_SIDE_PX = 256  # input side of the landmark network, pixels
_MIN_SCORE = 0.5  # both the detector's and the presence threshold, MediaPipe's defaults
_NMS_IOU = 0.3
_ROI_SCALE = 1.5  # margin around the box of a detection or of a set of landmarks
_THOROUGH_INTERVAL = 8  # lost frames of a video between thorough looks for small faces
_YUNET_KEYPOINTS = 5
_UPRIGHT_MARGIN = 0.04  # by which the score of an upright face exceeds that of one that is not; 0.06 or more is usual
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
class Face:
    """One face's points and expression."""

    landmarks: np.ndarray  # (478, 3) float32; x, y in pixels, z on the scale of x, negative towards the camera
    blendshapes: np.ndarray  # (52,) float32 in [0, 1], in the order of ARKIT_NAMES; tongueOut is always 0
    score: float  # presence probability of the landmark network, in [0.5, 1]

    @property
    def roll(self) -> float:
        """How far the face is turned in the picture, in degrees in (-180, 180], clockwise; 180 is upside down."""
        dx, dy = (self.landmarks[_LEFT_EYE_CORNER, :2] - self.landmarks[_RIGHT_EYE_CORNER, :2]).tolist()
        return math.degrees(math.atan2(dy, dx))


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

    def __init__(self, bundle: Path, *, detector: FaceDetector | None = None, threads: int = 1) -> None:
        """Load the networks of a `face_landmarker.task` bundle; raises WeightsError when it cannot be used.

        Args:
            bundle: the file.
            detector: finds the faces that the bundle's own detector misses, small and turned ones; None: nobody does.
            threads: of each network.
        """
        short_range, mesh, blendshapes = read_bundle(
            bundle, "face_detector.tflite", "face_landmarks_detector.tflite", "face_blendshapes.tflite"
        )
        with quiet_stderr():
            self._detector_network = LiteRTNetwork(short_range, bundle, threads)
            self._landmark_network = LiteRTNetwork(mesh, bundle, threads)
            self._blendshape_network = LiteRTNetwork(blendshapes, bundle, threads)
        self._anchors = _make_anchors()  # (896, 2)
        self._second_detector = detector
        self._lost_frames = 0  # frames since `track` saw a face
        self._roi: _Roi | None = None
        self._tracked_size: tuple[int, int] | None = None

    def detect(self, image: np.ndarray) -> list[Detection]:
        """All faces of the image, the largest first."""
        return next((detections for detections in self._detection_stages(_check_image(image)) if detections), [])

    def find(self, image: np.ndarray) -> Face | None:
        """The largest face of the image, or None."""
        return next(self._confirmed_faces(_check_image(image)), None)

    def find_all(self, image: np.ndarray) -> list[Face]:
        """Every face of the image, the largest first."""
        image = _check_image(image)
        faces: list[Face] = []
        for look in self._detection_stages(image):  # each detector sees some that the others miss
            for detection in look:
                face = self._face_from_detection(image, detection)
                if face is not None:
                    boxes = np.array([_bounding_box(known.landmarks) for known in faces]).reshape(-1, 4)
                    if (_iou(_bounding_box(face.landmarks), boxes) <= _SAME_FACE_IOU).all():
                        faces.append(face)
        return sorted(faces, key=lambda face: -float(np.prod(np.ptp(face.landmarks[:, :2], axis=0))))

    def rotation_to_upright(self, image: np.ndarray) -> int | None:
        """By how many degrees clockwise a photo must be turned for its largest face to stand upright: 0, 90, 180, 270.

        None where no face is seen whichever way it is turned. The landmark network cannot tell: it finds an upright
        face in many a face that is upside down; the score of the second detector drops there.
        """
        image = _check_image(image)
        if self._second_detector is None:
            return None if self.find(image) is None else 0
        scores = []
        for quarters in range(4):
            found = self._second_detector(np.rot90(image, -quarters), max_side=SEARCH_SIDES_PX[0])
            scores.append(found[0].score if found else 0.0)
        best = int(np.argmax(scores))
        if not scores[best]:
            return None
        return 90 * best if scores[best] > scores[0] + _UPRIGHT_MARGIN else 0

    def track(self, image: np.ndarray) -> Face | None:
        """The face of the next frame of a video, looked for where the last frame's was; None if there is none.

        When the face has gone from there, or at the first frame, the detector looks at the whole frame.
        """
        image = _check_image(image)
        if image.shape[:2] != self._tracked_size:
            self.reset()
        face = None if self._roi is None else self._predict_face(image, self._roi)
        if face is None:
            face = next(self._confirmed_faces(image, thorough=self._lost_frames % _THOROUGH_INTERVAL == 0), None)
        self._lost_frames = 0 if face is not None else self._lost_frames + 1
        self._roi = None if face is None else _roi_from_landmarks(face.landmarks)
        self._tracked_size = image.shape[:2]
        return face

    def follow(self, face: Face, image: np.ndarray) -> None:
        """Let `track` look for this face of `image` from now on."""
        self._roi, self._tracked_size = _roi_from_landmarks(face.landmarks), image.shape[:2]

    def reset(self) -> None:
        """Forget the tracked face; call it between two videos."""
        self._roi = None
        self._lost_frames = 0
        self._tracked_size = None

    def _confirmed_faces(self, image: np.ndarray, *, thorough: bool = True) -> Iterator[Face]:
        """The detections that the landmark network confirms, from the first look that has any."""
        for detections in self._detection_stages(image, thorough=thorough):
            faces = [self._face_from_detection(image, detection) for detection in detections]
            if any(face is not None for face in faces):
                yield from (face for face in faces if face is not None)
                return

    def _face_from_detection(self, image: np.ndarray, detection: Detection) -> Face | None:
        face = self._predict_face(image, _roi_from_detection(detection))
        if face is not None and len(detection.keypoints) == _YUNET_KEYPOINTS:  # its boxes lie otherwise: look again
            face = self._predict_face(image, _roi_from_landmarks(face.landmarks))
        return face

    def _detection_stages(self, image: np.ndarray, *, thorough: bool = True) -> Iterator[list[Detection]]:
        """Detections by one detector, then by the other; lazy, because the second is seldom needed."""
        h, w = image.shape[:2]
        side = max(h, w)
        letterbox = _warp_roi(image, _Roi(w / 2, h / 2, side, side, 0.0), _DETECTOR_SIDE_PX, cv2.BORDER_CONSTANT)
        yield _weighted_nms(*self._detect_candidates(letterbox, (w - side) / 2, (h - side) / 2, side))
        if self._second_detector is not None:
            yield self._second_detector(image, max_side=SEARCH_SIDES_PX[0])
            if thorough and side > SEARCH_SIDES_PX[0]:
                yield self._second_detector(image, max_side=SEARCH_SIDES_PX[1])

    def _detect_candidates(
        self, square: np.ndarray, x0: float, y0: float, side: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the detector on a 128 x 128 picture of the image's square at (x0, y0).

        Returns:
            boxes (N, 4), keypoints (N, 6, 2), both in pixels of the image, and scores (N,), all at least 0.5.
        """
        regressors, logits = self._detector_network(square.astype(np.float32) * (2 / 255) - 1)
        scores = _sigmoid(logits.reshape(-1))  # (896,)
        keep = scores >= _MIN_SCORE
        raw = regressors.reshape(-1, 8, 2)[keep] / _DETECTOR_SIDE_PX  # (N, 8, 2): centre, size, 6 keypoints
        raw[:, [0, *range(2, 8)]] += self._anchors[keep, None]
        raw *= side
        raw[:, [0, *range(2, 8)]] += (x0, y0)
        centre, half = raw[:, 0], raw[:, 1] / 2
        return np.hstack([centre - half, centre + half]), raw[:, 2:], scores[keep]

    def _predict_face(self, image: np.ndarray, roi: _Roi) -> Face | None:
        """Landmarks and blendshapes of the face in `roi`; None when the network sees no face there."""
        crop = _warp_roi(image, roi, _LANDMARK_SIDE_PX, cv2.BORDER_REPLICATE)
        outputs = self._landmark_network(crop.astype(np.float32) * (1 / 255))
        score = float(_sigmoid(outputs[1].reshape(-1))[0])
        if score < _MIN_SCORE:
            return None
        points = outputs[0].reshape(-1, 3) / _LANDMARK_SIDE_PX  # (478, 3)
        x, y = (points[:, 0] - 0.5) * roi.width, (points[:, 1] - 0.5) * roi.height
        z = points[:, 2] * roi.width
        cos, sin = math.cos(roi.rotation), math.sin(roi.rotation)
        landmarks = np.stack([cos * x - sin * y + roi.x, sin * x + cos * y + roi.y, z], axis=1).astype(np.float32)

        (values,) = self._blendshape_network(
            landmarks[_BLENDSHAPE_POINTS, :2]
        )  # (52,): _neutral, then ARKit's but the last
        blendshapes = np.append(np.clip(values.reshape(-1)[1:], 0, 1), 0).astype(np.float32)
        return Face(landmarks=landmarks, blendshapes=blendshapes, score=score)


def read_bundle(bundle: Path, *names: str) -> list[bytes]:
    """The named files of a bundle; raises `WeightsError` when it is missing or damaged."""
    bundle = Path(bundle)
    if not bundle.is_file():
        raise WeightsError(f"no face landmarker at {bundle}; it comes with the program's weights")
    try:
        with zipfile.ZipFile(bundle) as archive:
            return [archive.read(name) for name in names]
    except DAMAGED_ZIP_ERRORS as error:
        raise WeightsError(f"{bundle} is not a whole face landmarker bundle ({error}); fetch it again") from error


def _check_image(image: np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"a face is looked for in a uint8 (H, W, 3) RGB array, got {got}")
    if not image.size:
        raise InputError(f"the image is empty: its shape is {image.shape}")
    return np.ascontiguousarray(image)


def _make_anchors() -> np.ndarray:
    """(896, 2) anchor centres in [0, 1]: two per cell of a 16 x 16 grid, then six per cell of an 8 x 8 grid."""
    parts = []
    for cells, per_cell in ((16, 2), (8, 6)):
        centres = (np.arange(cells, dtype=np.float32) + 0.5) / cells
        y, x = np.meshgrid(centres, centres, indexing="ij")
        parts.append(np.repeat(np.stack([x, y], axis=-1).reshape(-1, 2), per_cell, axis=0))
    return np.concatenate(parts)


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


def _roi_from_detection(detection: Detection) -> _Roi:
    """The box with its margin, turned so that the line through the eyes is level."""
    (x0, y0), (x1, y1) = detection.box.reshape(2, 2).tolist()
    dx, dy = (detection.keypoints[1] - detection.keypoints[0]).tolist()
    width, height = x1 - x0, y1 - y0
    if len(detection.keypoints) == _YUNET_KEYPOINTS:  # a rectangle, where the bundle's own detector gives squares
        width = height = max(width, height)
    return _Roi((x0 + x1) / 2, (y0 + y1) / 2, width * _ROI_SCALE, height * _ROI_SCALE, rotation=math.atan2(dy, dx))


def _bounding_box(landmarks: np.ndarray) -> np.ndarray:
    return np.concatenate([landmarks[:, :2].min(axis=0), landmarks[:, :2].max(axis=0)])


def _roi_from_landmarks(landmarks: np.ndarray) -> _Roi:
    """The square around all points with its margin, turned so that the outer eye corners are level."""
    x0, y0, x1, y1 = _bounding_box(landmarks).tolist()
    dx, dy = (landmarks[_LEFT_EYE_CORNER, :2] - landmarks[_RIGHT_EYE_CORNER, :2]).tolist()
    side = max(x1 - x0, y1 - y0) * _ROI_SCALE
    return _Roi((x0 + x1) / 2, (y0 + y1) / 2, side, side, rotation=math.atan2(dy, dx))


def _warp_roi(image: np.ndarray, roi: _Roi, size: int, border: int) -> np.ndarray:
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


def hold_missing_faces(faces: Sequence[Face | None]) -> tuple[list[Face], np.ndarray, np.ndarray]:
    """The faces that are there, which frames those are (T,), and each frame's row among them, the last one held (T,).

    Raises `NoFaceError` when there is none.
    """
    found = np.array([face is not None for face in faces], dtype=bool)
    if not found.any():
        raise NoFaceError("no face was found in any frame")
    return [face for face in faces if face is not None], found, (np.cumsum(found) - 1).clip(0)
