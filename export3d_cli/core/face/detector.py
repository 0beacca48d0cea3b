"""YuNet on OpenCV: finds faces from about 20 pixels up, several at once, turned to the side or cut by the border."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.files import quiet_stderr

SEARCH_SIDES_PX = (640, 1280)  # longer side of the picture in a quick look and in a thorough one, pixels
_MIN_SCORE, _NMS_IOU, _MAX_CANDIDATES = 0.6, 0.3, 1000


@dataclass(frozen=True)
class Detection:
    """A face as a detector sees it, in pixels of the image given."""

    box: np.ndarray  # (4,) float32: x0, y0, x1, y1; may reach past the image's border
    keypoints: np.ndarray  # (K, 2) float32: eye on the image's left, other eye, nose tip, then what the detector has
    score: float  # in [0.5, 1]


class FaceDetector:
    """Faces of an image, uint8 (H, W, 3) RGB. The network is loaded when it is first needed."""

    def __init__(self, network: Path) -> None:
        self.network = Path(network)
        self._net: cv2.FaceDetectorYN | None = None

    def __call__(self, image: np.ndarray, *, max_side: int = SEARCH_SIDES_PX[1]) -> list[Detection]:
        """All faces, the largest first, in the image shrunk to `longest` pixels where it is larger.

        Raises `WeightsError` when the network cannot be loaded.
        """
        net = self._load()
        h, w = image.shape[:2]
        scale = min(1.0, max_side / max(h, w))
        size = max(1, round(w * scale)), max(1, round(h * scale))
        if scale < 1:
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        net.setInputSize(size)
        _, rows = net.detect(np.ascontiguousarray(image[..., ::-1]))  # (N, 15): box, 5 keypoints, score
        found = []
        for row in [] if rows is None else rows:
            x, y, width, height = row[:4] / scale
            box = np.array([x, y, x + width, y + height], dtype=np.float32)
            found.append(Detection(box, row[4:14].reshape(5, 2) / scale, float(row[14])))
        return sorted(found, key=lambda d: -float(np.prod(d.box[2:] - d.box[:2])))

    def _load(self) -> cv2.FaceDetectorYN:
        if self._net is None:
            if not self.network.is_file():
                raise WeightsError(f"no face detector at {self.network}; it comes with the program's weights")
            try:
                with quiet_stderr():
                    self._net = cv2.FaceDetectorYN.create(
                        str(self.network), "", SEARCH_SIDES_PX[:1] * 2, _MIN_SCORE, _NMS_IOU, _MAX_CANDIDATES
                    )
            except cv2.error as error:
                told = f"does not load in OpenCV {cv2.__version__}: install export3d-cli again, with OpenCV 5 or later"
                raise WeightsError(f"{self.network} {told}") from error
        return self._net
