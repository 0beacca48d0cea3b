"""MediaPipe's Face Landmarker (BlazeFace, 478 points, 52 blendshapes) on LiteRT, without MediaPipe.

A call runs the three networks of the `face_landmarker.task` bundle:

    image -> letterbox 128 -> face_detector -> anchors, weighted NMS -> Detection
          -> rotated square around the face, 256 -> face_landmarks_detector -> 478 points, presence
          -> 146 of the points, in pixels -> face_blendshapes -> 52 coefficients

That detector is made for faces that fill much of the picture; where it finds none, YuNet searches (`detector.py`).
The arithmetic follows MediaPipe's graph (half-pixel conventions, border modes, regions of interest), because the
networks were trained behind it. The One-Euro smoothing of its video mode is left out: smoothing is the caller's choice.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.face.detector import SEARCH_SIDES_PX, Detection, FaceDetector
from export3d_cli.core.face.landmarks import BLENDSHAPE_POINTS, LEFT_EYE_OUTER, RIGHT_EYE_OUTER
from export3d_cli.core.face.litert import LiteRTNetwork
from export3d_cli.core.runtime.errors import InputError, WeightsError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS

_DETECTOR_SIDE_PX = 128  # input side of the detector
_LANDMARK_SIDE_PX = 256  # input side of the landmark network
_MIN_SCORE = 0.5  # of the detector and of the presence output, MediaPipe's default
_NMS_IOU = 0.3
_ROI_SCALE = 1.5  # margin around the box of a detection or of a set of landmarks
_YUNET_KEYPOINTS = 5
_SAME_FACE_IOU = 0.5  # two landmark boxes that overlap more are one face


@dataclass(frozen=True)
class Face:
    """A face's landmarks and expression."""

    landmarks: np.ndarray  # (478, 3) float32; x, y in pixels, z on the scale of x, negative towards the camera
    blendshapes: np.ndarray  # (52,) float32 in [0, 1], in the order of ARKIT_NAMES; tongueOut is always 0
    score: float  # presence probability of the landmark network, in [0.5, 1]

    @property
    def roll(self) -> float:
        """Rotation in the picture, clockwise, in degrees in (-180, 180]; 180 is upside down."""
        dx, dy = (self.landmarks[LEFT_EYE_OUTER, :2] - self.landmarks[RIGHT_EYE_OUTER, :2]).tolist()
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

    Images are uint8 (H, W, 3) RGB. Keeps no state between calls, and threads may share it; `FaceTrack` follows a face
    through a video.
    """

    def __init__(self, bundle: Path, *, detector: FaceDetector | None = None, threads: int = 1) -> None:
        """Load the networks of a `face_landmarker.task` bundle; raises `WeightsError` if they do not load.

        Args:
            bundle: the file.
            detector: a second detector for faces that the bundle's detector misses, such as small or turned ones.
            threads: for each network.
        """
        short_range, mesh, blendshapes = read_bundle(
            bundle, "face_detector.tflite", "face_landmarks_detector.tflite", "face_blendshapes.tflite"
        )
        self._detector_network = LiteRTNetwork(short_range, bundle, threads)
        self._landmark_network = LiteRTNetwork(mesh, bundle, threads)
        self._blendshape_network = LiteRTNetwork(blendshapes, bundle, threads)
        self._anchors = _make_anchors()  # (896, 2)
        self._second_detector = detector

    def detect(self, image: np.ndarray) -> list[Detection]:
        """Return the detections of all faces, the largest first."""
        return next((detections for detections in self._detection_stages(_check_image(image)) if detections), [])

    def find(self, image: np.ndarray, *, thorough: bool = True) -> Face | None:
        """Return the largest face, or None; `thorough` also searches for small faces."""
        return next(self._confirmed_faces(_check_image(image), thorough=thorough), None)

    def find_near(self, image: np.ndarray, face: Face) -> Face | None:
        """Return the face near the place of `face`, which another image showed, or None."""
        return self._predict_face(_check_image(image), _roi_from_landmarks(face.landmarks))

    def find_all(self, image: np.ndarray) -> list[Face]:
        """Return every face, the largest first."""
        image = _check_image(image)
        faces: list[Face] = []
        for detections in self._detection_stages(image):  # each stage finds faces that the others miss
            for detection in detections:
                face = self._face_from_detection(image, detection)
                if face is not None:
                    boxes = np.array([_bounding_box(other.landmarks) for other in faces]).reshape(-1, 4)
                    if (_iou(_bounding_box(face.landmarks), boxes) <= _SAME_FACE_IOU).all():
                        faces.append(face)
        return sorted(faces, key=lambda face: -float(np.prod(np.ptp(face.landmarks[:, :2], axis=0))))

    def rotation_to_upright(self, image: np.ndarray) -> int | None:
        """Return the clockwise degrees (0, 90, 180, 270) that turn a photo so that its largest face is upright.

        None if no rotation shows a face. Asks the second detector: the landmark network often finds an upright face in
        one that is upside down.
        """
        image = _check_image(image)
        if self._second_detector is None:
            return None if self.find(image) is None else 0
        return self._second_detector.rotation_to_upright(image)

    def _confirmed_faces(self, image: np.ndarray, *, thorough: bool = True) -> Iterator[Face]:
        """Yield the faces that the landmark network confirms, from the first stage that has any."""
        for detections in self._detection_stages(image, thorough=thorough):
            faces = [self._face_from_detection(image, detection) for detection in detections]
            if any(face is not None for face in faces):
                yield from (face for face in faces if face is not None)
                return

    def _face_from_detection(self, image: np.ndarray, detection: Detection) -> Face | None:
        face = self._predict_face(image, _roi_from_detection(detection))
        if face is not None and len(detection.keypoints) == _YUNET_KEYPOINTS:  # its boxes differ: refine
            face = self._predict_face(image, _roi_from_landmarks(face.landmarks))
        return face

    def _detection_stages(self, image: np.ndarray, *, thorough: bool = True) -> Iterator[list[Detection]]:
        """Yield the detections of one detector, then of the other; lazy because the second is seldom needed."""
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
        """Run the detector on a 128 x 128 picture of the image's square at (x0, y0) with this side.

        Returns:
            Boxes (N, 4) and keypoints (N, 6, 2) in pixels of the image, and scores (N,) >= 0.5.
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
        """Return the face in `roi`; None if the network finds none there."""
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
            landmarks[list(BLENDSHAPE_POINTS), :2]
        )  # (52,): _neutral, then ARKit's without the last
        blendshapes = np.append(np.clip(values.reshape(-1)[1:], 0, 1), 0).astype(np.float32)
        return Face(landmarks=landmarks, blendshapes=blendshapes, score=score)


def read_bundle(bundle: Path, *names: str) -> list[bytes]:
    """Read the named files of a bundle; raises `WeightsError` if it is missing or damaged."""
    try:
        with zipfile.ZipFile(bundle) as archive:
            return [archive.read(name) for name in names]
    except DAMAGED_ZIP_ERRORS as error:
        raise WeightsError(f"{bundle} is not a whole face landmarker bundle ({error}): fetch it again") from error


def _check_image(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(f"an image must be a uint8 (H, W, 3) RGB array, got {image.dtype} {image.shape}")
    return np.ascontiguousarray(image)


def _make_anchors() -> np.ndarray:
    """Return anchor centres in [0, 1], (896, 2): two per cell of a 16 x 16 grid, then six per cell of an 8 x 8 grid."""
    parts = []
    for cells, per_cell in ((16, 2), (8, 6)):
        centres = (np.arange(cells, dtype=np.float32) + 0.5) / cells
        y, x = np.meshgrid(centres, centres, indexing="ij")
        parts.append(np.repeat(np.stack([x, y], axis=-1).reshape(-1, 2), per_cell, axis=0))
    return np.concatenate(parts)


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the intersection over union of one box (4,) with boxes (N, 4), (N,)."""
    overlap = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = np.prod(np.maximum(overlap, 0), axis=1)
    area = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    iou: np.ndarray = shared / np.maximum(area - shared, 1e-9)
    return iou


def _weighted_nms(boxes: np.ndarray, keypoints: np.ndarray, scores: np.ndarray) -> list[Detection]:
    """Replace each best box by the score-weighted mean of the boxes it suppresses, as BlazeFace does; largest first."""
    detections = []
    remaining = np.argsort(-scores, kind="stable")
    while len(remaining):
        best = remaining[0]
        overlaps = _iou(boxes[best], boxes[remaining]) > _NMS_IOU
        overlaps[0] = True
        group, remaining = remaining[overlaps], remaining[~overlaps]
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
    """Return the box with its margin, rotated so that the line through the eyes is level."""
    (x0, y0), (x1, y1) = detection.box.reshape(2, 2).tolist()
    dx, dy = (detection.keypoints[1] - detection.keypoints[0]).tolist()
    width, height = x1 - x0, y1 - y0
    if len(detection.keypoints) == _YUNET_KEYPOINTS:  # a rectangle; the bundle's detector gives squares
        width = height = max(width, height)
    return _Roi((x0 + x1) / 2, (y0 + y1) / 2, width * _ROI_SCALE, height * _ROI_SCALE, rotation=math.atan2(dy, dx))


def _bounding_box(landmarks: np.ndarray) -> np.ndarray:
    return np.concatenate([landmarks[:, :2].min(axis=0), landmarks[:, :2].max(axis=0)])


def _roi_from_landmarks(landmarks: np.ndarray) -> _Roi:
    """Return the square around all points with its margin, rotated so that the outer eye corners are level."""
    x0, y0, x1, y1 = _bounding_box(landmarks).tolist()
    dx, dy = (landmarks[LEFT_EYE_OUTER, :2] - landmarks[RIGHT_EYE_OUTER, :2]).tolist()
    side = max(x1 - x0, y1 - y0) * _ROI_SCALE
    return _Roi((x0 + x1) / 2, (y0 + y1) / 2, side, side, rotation=math.atan2(dy, dx))


def _warp_roi(image: np.ndarray, roi: _Roi, size: int, border: int) -> np.ndarray:
    """Return a bilinear view of `roi`, (size, size, 3) uint8, aligned at the corners, as MediaPipe does."""
    cos, sin = math.cos(roi.rotation), math.sin(roi.rotation)
    a, b = cos * roi.width / size, -sin * roi.height / size
    c, d = sin * roi.width / size, cos * roi.height / size
    to_image = np.array([[a, b, roi.x - (a + b) * size / 2], [c, d, roi.y - (c + d) * size / 2]])
    return cv2.warpAffine(
        image, to_image, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=border
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    y: np.ndarray = 1 / (1 + np.exp(-np.clip(x, -80, 80)))  # exp overflows not far beyond 80
    return y
