"""Detection of scene changes: cuts, dissolves and fades."""

from collections import deque

import cv2
import numpy as np

THUMBNAIL_SIDE_PX = 32  # frames are compared at this size
DISSOLVE_SPANS = (64, 48, 32, 24, 16)  # lengths, in frames, of the dissolves that are searched
MIN_DISSOLVE_CHANGE = 18.0  # mean difference, in grey levels, of the scenes before and after a dissolve
MAX_LINEARITY_ERROR = 0.24  # of a frame from the linear blend of both scenes, as a fraction of their difference
MIN_RELIT_RESIDUAL = 12.0  # mean difference, in grey levels, that a change of exposure does not explain


class SceneCutDetector:
    """Detects scene changes in consecutive frames. Keeps thumbnails of the last 65 frames."""

    def __init__(self) -> None:
        self._recent_changes: deque[float] = deque(maxlen=12)
        self._thumbnails: deque[np.ndarray] = deque(maxlen=DISSOLVE_SPANS[0] + 1)
        self._colour_histogram = np.zeros(64)

    def __call__(self, frame: np.ndarray) -> int | None:
        """Add the next frame, uint8 (H, W, 3); return None, 0 after a cut, or the length of the dissolve before it."""
        thumbnail = cv2.resize(frame, (THUMBNAIL_SIDE_PX, THUMBNAIL_SIDE_PX), interpolation=cv2.INTER_AREA)
        bins = (thumbnail // 64).astype(np.int64) @ [16, 4, 1]
        histogram = np.bincount(bins.ravel(), minlength=64) / bins.size
        changed_fraction = float(np.abs(histogram - self._colour_histogram).sum() / 2)
        self._colour_histogram = histogram
        self._thumbnails.append(thumbnail.astype(np.float32))
        if len(self._thumbnails) < 2:
            return None
        mixed_count = 0 if self._is_cut(changed_fraction) else self._find_dissolve()
        if mixed_count is not None:
            self._recent_changes.clear()
            self._thumbnails.clear()
            self._thumbnails.append(thumbnail.astype(np.float32))
        return mixed_count

    def _is_cut(self, changed_fraction: float) -> bool:
        """Return whether the frame differs far more than recent ones; `changed_fraction`: pixels of other colour."""
        change = float(np.abs(self._thumbnails[-1] - self._thumbnails[-2]).mean())
        typical_change = float(np.median(self._recent_changes)) if self._recent_changes else 0.0
        self._recent_changes.append(change)
        return change > max(12.0, 4 * typical_change) and (changed_fraction > 0.25 or change > 40)

    def _find_dissolve(self) -> int | None:
        """Return the length of a dissolve that ends here, or None; its frames are linear blends of two scenes."""
        current = self._thumbnails[-1]
        for span in DISSOLVE_SPANS:
            if len(self._thumbnails) <= span:
                continue
            first = self._thumbnails[-span - 1]
            change = current - first
            if np.abs(change).mean() < MIN_DISSOLVE_CHANGE:
                continue
            differences = np.stack(list(self._thumbnails)[-span - 1 :]) - first
            progress = np.einsum("thwc,hwc->t", differences, change) / (change**2).sum()  # 0 before, 1 after
            residual = np.abs(differences - progress[:, None, None, None] * change).mean((1, 2, 3))
            max_speed = (progress[8:] - progress[:-8]).max() / 8
            has_ended = (progress[-1] - progress[-5]) / 4 < 0.4 * max_speed
            is_linear = residual.max() < MAX_LINEARITY_ERROR * np.abs(change).mean()
            if has_ended and is_linear and _is_other_scene(first, current):
                return span - int(np.argmax(progress > 0.07))
        return None


def _is_other_scene(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether exposure and white balance do not explain the difference, or one image is nearly uniform."""
    a, b = (x.reshape(-1, 3) - x.reshape(-1, 3).mean(0) for x in (first, second))
    gain = (a * b).sum(0) / np.maximum((a**2).sum(0), 1e-3)
    residual = np.abs(b - gain * a).mean()
    is_uniform = min(a.std(), b.std()) < 0.15 * max(a.std(), b.std())
    return bool(residual > MIN_RELIT_RESIDUAL or is_uniform)
