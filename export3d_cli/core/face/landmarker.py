"""MediaPipe's Face Landmarker (478 points, 52 blendshapes) on LiteRT, without MediaPipe.

A call runs YuNet (`detector.py`) and two networks of the `face_landmarker.task` bundle:

    image -> YuNet -> rotated square around the face, 256 -> face_landmarks_detector -> 478 points, presence
          -> 146 of the points, in pixels -> face_blendshapes -> 52 coefficients

The bundle's own detector is not used: it misses faces that are small, turned or cut by the border. The arithmetic
follows MediaPipe's graph (half-pixel conventions, border modes, regions of interest), because the networks were trained
behind it. The One-Euro smoothing of its video mode is left out: smoothing is the caller's choice.
"""

from __future__ import annotations

import math
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter

from export3d_cli.core.face.detector import SEARCH_SIDES_PX, Detection, FaceDetector
from export3d_cli.core.face.landmarks import BLENDSHAPE_POINTS, LEFT_EYE_OUTER, RIGHT_EYE_OUTER
from export3d_cli.core.runtime.errors import InputError, WeightsError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS

_LANDMARK_SIDE_PX = 256  # input side of the landmark network
_MIN_SCORE = 0.5  # of the presence output, MediaPipe's default
_ROI_SCALE = 1.5  # margin around the box of a detection or of a set of landmarks
SEARCH_MARGIN = 0.25  # around an image that shows no face without it
_SAME_FACE_DISTANCE = 0.3  # face boxes; faces that are nearer are one


@dataclass(frozen=True)
class Face:
    """A face's landmarks and expression."""

    landmarks: np.ndarray  # (478, 3) float32; x, y in pixels, z on the scale of x, negative towards the camera
    blendshapes: np.ndarray  # (52,) float32 in [0, 1], in the order of ARKIT_NAMES; tongueOut is always 0
    score: float  # presence probability of the landmark network, in [0.5, 1]

    def distance_to(self, other: Face) -> float:
        """Return the distance of the centres of two faces, in boxes of the smaller one."""
        sizes = [float(np.ptp(face.landmarks[:, :2], axis=0).max()) for face in (self, other)]
        distance = np.linalg.norm(self.landmarks[:, :2].mean(0) - other.landmarks[:, :2].mean(0))
        return float(distance / max(1e-6, min(sizes)))


@dataclass(frozen=True)
class _Roi:
    """A rotated square of the image, in pixels; x, y of its centre; rotation in radians, clockwise on screen."""

    x: float
    y: float
    side: float
    rotation: float


class Landmarker:
    """Finds faces, their 478 landmarks and their 52 blendshape coefficients.

    Images are uint8 (H, W, 3) RGB. Keeps no state between calls, and threads may share it; `FaceTrack` follows a face
    through a video.
    """

    def __init__(self, bundle: Path, detector: FaceDetector, *, threads: int = 1) -> None:
        """Load the networks of a `face_landmarker.task` bundle; raises `WeightsError` if they do not load."""
        mesh, blendshapes = read_bundle(bundle, "face_landmarks_detector.tflite", "face_blendshapes.tflite")
        self._landmark_network = LiteRTNetwork(mesh, bundle, threads)
        self._blendshape_network = LiteRTNetwork(blendshapes, bundle, threads)
        self._detector = detector

    def find(self, image: np.ndarray, *, thorough: bool = True) -> Face | None:
        """Return the largest face, or None; `thorough` also searches for small faces."""
        image = _check_image(image)
        detections = chain.from_iterable(self._detection_stages(image, thorough=thorough))
        faces = (self._face_from_detection(image, detection) for detection in detections)
        return next((face for face in faces if face is not None), None)

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
                if face is not None and all(face.distance_to(other) > _SAME_FACE_DISTANCE for other in faces):
                    faces.append(face)
        return sorted(faces, key=lambda face: -float(np.prod(np.ptp(face.landmarks[:, :2], axis=0))))

    def rotation_to_upright(self, image: np.ndarray) -> int | None:
        """Return the clockwise degrees (0, 90, 180, 270) that turn the largest face upright; None without a face.

        Asks the detector: the landmark network often finds an upright face in one that is upside down.
        """
        return self._detector.rotation_to_upright(_check_image(image))

    def _detection_stages(self, image: np.ndarray, *, thorough: bool = True) -> Iterator[list[Detection]]:
        """Yield the detections at each size of the image, the smallest first; large faces are found in small images."""
        rotation = self._detector.rotation_to_upright(image, max_side=SEARCH_SIDES_PX[0]) or 0 if thorough else 0
        for max_side in SEARCH_SIDES_PX[: None if thorough else 3]:
            yield self._detector(image, max_side=max_side, rotation=rotation)
            if max_side >= max(image.shape[:2]):
                break
        if thorough:  # a face that fills the image, or more
            yield self._detector(image, max_side=SEARCH_SIDES_PX[0], rotation=rotation, margin=SEARCH_MARGIN)

    def _face_from_detection(self, image: np.ndarray, detection: Detection) -> Face | None:
        face = self._predict_face(image, _face_roi(detection.box.reshape(2, 2), *detection.keypoints[:2]))
        return face and self._predict_face(image, _roi_from_landmarks(face.landmarks))  # refined

    def _predict_face(self, image: np.ndarray, roi: _Roi) -> Face | None:
        """Return the face in `roi`; None if the network finds none there."""
        crop = _warp_roi(image, roi, _LANDMARK_SIDE_PX)
        outputs = self._landmark_network(crop.astype(np.float32) * (1 / 255))
        score = 0.5 + 0.5 * math.tanh(outputs[1].item() / 2)  # sigmoid
        if score < _MIN_SCORE:
            return None
        points = outputs[0].reshape(-1, 3) / _LANDMARK_SIDE_PX  # (478, 3)
        x, y, z = ((points - [0.5, 0.5, 0]) * roi.side).T
        cos, sin = math.cos(roi.rotation), math.sin(roi.rotation)
        return self.face_at(np.stack([cos * x - sin * y + roi.x, sin * x + cos * y + roi.y, z], axis=1), score)

    def face_at(self, landmarks: np.ndarray, score: float = 1.0) -> Face:
        """Return the face with these landmarks (478, 3), see `Face`: reads the coefficients from them."""
        landmarks = landmarks.astype(np.float32)
        (values,) = self._blendshape_network(landmarks[list(BLENDSHAPE_POINTS), :2])  # _neutral, ARKit's but the last
        blendshapes = np.append(np.clip(values.reshape(-1)[1:], 0, 1), 0).astype(np.float32)
        return Face(landmarks=landmarks, blendshapes=blendshapes, score=score)


class LiteRTNetwork:
    """A tflite network with a single float32 input; `origin` is its file, for errors. Threads may share one."""

    def __init__(self, content: bytes, origin: Path, threads: int) -> None:
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise WeightsError(
                f"{origin} holds a network that does not load ({error}): fetch the file again"
            ) from error
        self._lock = threading.Lock()  # an interpreter serves one thread at a time
        self._input = self._interpreter.get_input_details()[0]
        self._outputs = [detail["index"] for detail in self._interpreter.get_output_details()]

    def __call__(self, array: np.ndarray) -> list[np.ndarray]:
        """Run the network on one input without batch axis; returns all outputs with their batch axis."""
        with self._lock:
            self._interpreter.set_tensor(self._input["index"], array[None])
            self._interpreter.invoke()
            return [self._interpreter.get_tensor(index) for index in self._outputs]  # copies


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


def _roi_from_landmarks(landmarks: np.ndarray) -> _Roi:
    return _face_roi(landmarks[:, :2], landmarks[RIGHT_EYE_OUTER, :2], landmarks[LEFT_EYE_OUTER, :2])


def _face_roi(points: np.ndarray, right_eye: np.ndarray, left_eye: np.ndarray) -> _Roi:
    """Return the square around points (N, 2) with its margin, rotated so that the line through the eyes is level."""
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    dx, dy = (left_eye - right_eye).tolist()
    return _Roi((x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) * _ROI_SCALE, rotation=math.atan2(dy, dx))


def _warp_roi(image: np.ndarray, roi: _Roi, size: int) -> np.ndarray:
    """Return a bilinear view of `roi`, (size, size, 3) uint8, aligned at the corners, as MediaPipe does."""
    cos, sin = math.cos(roi.rotation), math.sin(roi.rotation)
    a, b = cos * roi.side / size, -sin * roi.side / size
    c, d = sin * roi.side / size, cos * roi.side / size
    to_image = np.array([[a, b, roi.x - (a + b) * size / 2], [c, d, roi.y - (c + d) * size / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, to_image, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)
