"""The face trackers: `landmarker` (478 points) for sources and drivers, `fan` (68 points) for drivers.

The landmarker is MediaPipe's Face Landmarker on LiteRT, without MediaPipe: YuNet (`detector.py`) and two networks of
the `face_landmarker.task` bundle:

    image -> YuNet -> rotated square around the face, 256 -> face_landmarks_detector -> 478 points, presence
          -> 146 of the points, in pixels -> face_blendshapes -> 52 coefficients

The bundle's own detector is not used: it misses faces that are small, turned or cut by the border. The arithmetic
follows MediaPipe's graph (half-pixel conventions, border modes, regions of interest), because the networks were trained
behind it. The One-Euro smoothing of its video mode is left out: smoothing is the caller's choice.
"""

import math
import threading
import zipfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter

from export3d_cli.core.face.crop import CROP_SCALE, ClipCalibration, fit_clip_crop
from export3d_cli.core.face.detector import SEARCH_SIDES_PX, Detection, FaceDetector
from export3d_cli.core.face.expression_coefficients import compute_measures
from export3d_cli.core.face.face_track import Face, FaceTrack, FaceTracker, check_image
from export3d_cli.core.face.fan_tracker import FanTracker
from export3d_cli.core.face.head_pose import fit_cameras, landmarks_to_head_frame
from export3d_cli.core.face.landmarks import BLENDSHAPE_POINTS, LEFT_EYE_OUTER, RIGHT_EYE_OUTER
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.files import DAMAGED_ZIP_ERRORS
from export3d_cli.core.runtime.weights import resolve_weights

TrackerName = Literal["landmarker", "fan"]
_LANDMARK_SIDE_PX = 256  # input side of the landmark network
_MIN_SCORE = 0.5  # of the presence output, MediaPipe's default
_ROI_SCALE = 1.5  # margin around the box of a detection or of a set of landmarks
SEARCH_MARGIN = 0.25  # around an image that shows no face without it


class _Roi(NamedTuple):
    """A rotated square of the image, in pixels; x, y of its centre; rotation in radians, clockwise on screen."""

    x: float
    y: float
    side: float
    rotation: float


class LandmarkerTracker(FaceTracker):
    """The tracker `landmarker`: 478 landmarks and 52 blendshape coefficients in each image."""

    def __init__(self, bundle: Path, detector: FaceDetector, *, threads: int = 1) -> None:
        """Load the networks of a `face_landmarker.task` bundle; raises `WeightsError` if they do not load."""
        mesh, blendshapes = read_bundle(bundle, "face_landmarks_detector.tflite", "face_blendshapes.tflite")
        self._landmark_network = LiteRTNetwork(mesh, bundle, threads)
        self._blendshape_network = LiteRTNetwork(blendshapes, bundle, threads)
        self.detector = detector

    def search(self, image: np.ndarray, *, thorough: bool) -> Iterator[Face]:
        """Search at each size of the image, as each shows faces that the others miss; large ones are found first."""
        for detection in self._detections(image, thorough):
            face = self._predict_face(image, _face_roi(detection.box.reshape(2, 2), *detection.keypoints[:2]))
            face = face and self.find_near(image, face)  # refined
            if face is not None:
                yield face

    def find_near(self, image: np.ndarray, face: Face) -> Face | None:
        """Look at the place of `face`."""
        roi = _face_roi(face.landmarks[:, :2], face.landmarks[RIGHT_EYE_OUTER, :2], face.landmarks[LEFT_EYE_OUTER, :2])
        return self._predict_face(check_image(image), roi)

    def _detections(self, image: np.ndarray, thorough: bool) -> Iterator[Detection]:
        rotation = self.detector.rotation_to_upright(image, max_side=SEARCH_SIDES_PX[0]) or 0 if thorough else 0
        for max_side in SEARCH_SIDES_PX[: None if thorough else 2]:
            yield from self.detector(image, max_side=max_side, rotation=rotation)
            if max_side >= max(image.shape[:2]):
                break
        if thorough:  # a face that fills the image, or more
            yield from self.detector(image, max_side=SEARCH_SIDES_PX[0], rotation=rotation, margin=SEARCH_MARGIN)

    def _predict_face(self, image: np.ndarray, roi: _Roi) -> Face | None:
        """Return the face in `roi`; None if the network finds none there."""
        cos, sin, half = math.cos(roi.rotation), math.sin(roi.rotation), _LANDMARK_SIDE_PX / 2
        # a bilinear view of the region, aligned at the corners, as MediaPipe does
        a, b = cos * roi.side / _LANDMARK_SIDE_PX, -sin * roi.side / _LANDMARK_SIDE_PX
        to_image = np.array([[a, b, roi.x - (a + b) * half], [-b, a, roi.y - (a - b) * half]])
        crop = cv2.warpAffine(image, to_image, (_LANDMARK_SIDE_PX,) * 2, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                              borderMode=cv2.BORDER_REPLICATE)  # fmt: skip
        outputs = self._landmark_network(crop.astype(np.float32) * (1 / 255))
        score = 0.5 + 0.5 * math.tanh(outputs[1].item() / 2)  # sigmoid
        if score < _MIN_SCORE:
            return None
        points = outputs[0].reshape(-1, 3) / _LANDMARK_SIDE_PX  # (478, 3)
        x, y, z = ((points - [0.5, 0.5, 0]) * roi.side).T
        return self.face_at(np.stack([cos * x - sin * y + roi.x, sin * x + cos * y + roi.y, z], axis=1), score)

    def face_at(self, landmarks: np.ndarray, score: float = 1.0) -> Face:
        """Return the face with these landmarks (478, 3), see `Face`: reads the coefficients from them."""
        landmarks = landmarks.astype(np.float32)
        (values,) = self._blendshape_network(landmarks[list(BLENDSHAPE_POINTS), :2])  # _neutral, ARKit's but the last
        blendshapes = np.append(np.clip(values.reshape(-1)[1:], 0, 1), 0).astype(np.float32)
        return Face(landmarks=landmarks, blendshapes=blendshapes, score=score)

    def track_crops(self, frames: Sequence[np.ndarray], *, independent: bool = False) -> Motion | None:
        """Track square frames that are the crop itself, perhaps `independent` of each other; None without a face."""
        side = len(frames[0])
        if independent:
            faces = [FaceTrack(self).settle(frame) for frame in frames]
        else:
            track = FaceTrack(self)
            track.settle(frames[0])
            faces = [track.track(frame) for frame in frames]
        if all(face is None for face in faces):
            return None
        return self.make_motion(faces, Fraction(25), (side, side), clip=ClipCalibration((0.0, 0.0, float(side))))

    def calibrate_clip(self, faces: Sequence[Face], size: tuple[int, int],
                       scale: tuple[float, float] = CROP_SCALE) -> ClipCalibration:  # fmt: skip
        """Choose the crop of the clip that shows these faces."""
        return ClipCalibration(fit_clip_crop(np.stack([face.landmarks for face in faces]), size, scale))

    def fit(self, faces: Sequence[Face], clip: ClipCalibration) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fit cameras to the landmarks, and measure the face in the head frame."""
        x0, y0, side = clip.crop
        points = (np.stack([face.landmarks for face in faces]).astype(np.float64) - [x0, y0, 0]) / side  # (F, 478, 3)
        cameras = fit_cameras(points)
        # at full relief: weights were trained on beta, so it must not change with RELIEF_SCALE
        measures = compute_measures(landmarks_to_head_frame(points, cameras, 1.0))
        beta = np.concatenate([[face.blendshapes for face in faces], measures], axis=1)
        return beta.astype(np.float32), cameras, points.astype(np.float32)


def open_landmarker_tracker(*, threads: int = 1) -> LandmarkerTracker:
    """Open the landmarker with its shipped networks, `threads` for each; raises `WeightsError`."""
    detector = FaceDetector(resolve_weights("yunet"))
    return LandmarkerTracker(resolve_weights("face_landmarker"), detector, threads=threads)


def open_tracker(name: TrackerName, *, device: str | None = None, threads: int = 1) -> FaceTracker:
    """Open a tracker for drivers; `fan` runs on `device` (None: CUDA if usable, else the CPU), others on `threads`.

    Raises `WeightsError` if a package or a file of weights is missing and cannot be fetched.
    """
    if name == "landmarker":
        return open_landmarker_tracker(threads=threads)
    if device is None:
        from export3d_cli.core.runtime.device import pick_device  # imports torch, which only fan needs

        device = str(pick_device("auto"))
    return FanTracker(resolve_weights("fan_basis"), FaceDetector(resolve_weights("yunet")), device=device)


class LiteRTNetwork:
    """A tflite network with a single float32 input; `origin` is its file, for errors. Threads may share one."""

    def __init__(self, content: bytes, origin: Path, threads: int) -> None:
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise WeightsError(f"{origin} has a network that does not load ({error}): fetch the file again") from error
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


def _face_roi(points: np.ndarray, right_eye: np.ndarray, left_eye: np.ndarray) -> _Roi:
    """Return the square around points (N, 2) with its margin, rotated so that the line through the eyes is level."""
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    dx, dy = (left_eye - right_eye).tolist()
    return _Roi((x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) * _ROI_SCALE, rotation=math.atan2(dy, dx))
