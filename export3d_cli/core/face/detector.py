"""The YuNet face detector on OpenCV: small faces (from about 20 px), several, in profile, cut by the border."""

import threading
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.runtime.errors import Export3DError, WeightsError, find_opencv_problem

SEARCH_SIDES_PX = (160, 320, 640, 1280)  # longer sides at which an image is searched; the last two if thoroughly
_UPRIGHT_MARGIN = 0.04  # an upright face must score this much more than as given; 0.06 or more is usual
_MIN_SCORE, _NMS_IOU, _MAX_CANDIDATES = 0.6, 0.3, 1000


@dataclass(frozen=True)
class Detection:
    """A detected face, in pixels of the image."""

    box: np.ndarray  # (4,) float32: x0, y0, x1, y1; may reach outside the image
    keypoints: np.ndarray  # (K, 2) float32: eye at the image's left, other eye, nose tip, others of the detector
    score: float  # in [0.5, 1]


class FaceDetector:
    """Detects faces in an image, uint8 (H, W, 3) RGB. Loads its network at the first call. Threads may share it."""

    def __init__(self, network: Path) -> None:
        self.network = Path(network)
        self._net: cv2.FaceDetectorYN | None = None
        self._lock = threading.Lock()

    def __call__(self, image: np.ndarray, *, max_side: int = SEARCH_SIDES_PX[3], rotation: int = 0,
                 margin: float = 0.0) -> list[Detection]:  # fmt: skip
        """Return all faces, the largest first; raises `WeightsError` if the network does not load.

        For the search the image is rotated clockwise by a multiple of 90 degrees, gets a black `margin` of this
        fraction of its longer side, which shows faces larger than the image, and is shrunk to `max_side` pixels.
        """
        image = np.rot90(image, -rotation // 90)
        h, w = image.shape[:2]
        scale = min(1.0, max_side / ((1 + 2 * margin) * max(h, w)))
        size = max(1, round(w * scale)), max(1, round(h * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
        added = round(margin * max(size))
        image = cv2.copyMakeBorder(image, *(4 * (added,)), cv2.BORDER_CONSTANT)
        with self._lock:
            net = self._load()
            net.setInputSize(image.shape[1::-1])
            _, rows = net.detect(np.ascontiguousarray(image[..., ::-1]))  # (N, 15): box, 5 keypoints, score
        detections = []
        for row in [] if rows is None else rows:
            points = np.concatenate([[row[:2], row[:2] + row[2:4]], row[4:14].reshape(5, 2)])
            points = (points - added) / scale
            width, height = w, h
            for _ in range(rotation // 90):  # back, a quarter at a time
                points = np.stack([points[:, 1], width - points[:, 0]], axis=1)
                width, height = height, width
            box = np.concatenate([points[:2].min(0), points[:2].max(0)]).astype(np.float32)
            detections.append(Detection(box, points[2:], float(row[14])))
        return sorted(detections, key=lambda d: -float(np.prod(d.box[2:] - d.box[:2])))

    def rotation_to_upright(self, image: np.ndarray, *, max_side: int = SEARCH_SIDES_PX[2]) -> int | None:
        """Return the clockwise degrees (0, 90, 180, 270) at which the largest face scores best; None without a face."""
        scores = []
        for quarters in range(4):
            detections = self(image, max_side=max_side, rotation=90 * quarters)
            scores.append(detections[0].score if detections else 0.0)
        best = int(np.argmax(scores))
        if not scores[best]:
            return None
        return 90 * best if scores[best] > scores[0] + _UPRIGHT_MARGIN else 0

    def _load(self) -> cv2.FaceDetectorYN:
        if self._net is None:
            try:
                self._net = cv2.FaceDetectorYN.create(str(self.network), "", SEARCH_SIDES_PX[:1] * 2, _MIN_SCORE,
                                                      _NMS_IOU, _MAX_CANDIDATES)  # fmt: skip
            except cv2.error as error:
                if problem := find_opencv_problem():
                    raise Export3DError(problem) from error
                raise WeightsError(f"{self.network} does not load: install export3d-cli again") from error
        return self._net
