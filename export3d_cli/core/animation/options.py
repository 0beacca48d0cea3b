"""What one run is asked for, what it tells while it runs, and what it has done in the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from export3d_cli.core.animation.driver_stream import OnMissing
from export3d_cli.core.animation.retargeting import DRIVABLE, Control
from export3d_cli.core.animation.watermark import Watermark
from export3d_cli.core.face.smoothing import SmoothingLevel
from export3d_cli.core.face.tracker import TrackerName
from export3d_cli.core.runtime.errors import InputError

Progress = Callable[[str, int, "int | None"], None]  # stage, done, total (None: unknown)
Crop = Literal["auto", "none"]
Quality = Literal["fast", "balanced", "best"]  # of the volume rendering
PASTE_BACK_MAX_TRAVEL = (
    0.03  # of the crop's side: how far the head may leave its place where the photograph goes on around it
)


@dataclass(frozen=True)
class ReenactOptions:
    """How a driver is read, what of it reaches the source, and how the result is written."""

    audio: str = "driver"  # driver | none | a file
    crf: int | None = None  # constant rate factor, 0 to 51; None: 18
    fps: Fraction | None = None  # None: the driver's, exactly
    start: float = 0.0  # seconds
    duration: float | None = None  # seconds
    max_frames: int | None = None
    on_missing: OnMissing = "hold"  # frames without a face
    overwrite: bool = False
    compare: bool = False  # source | driver | result side by side
    crop: Crop = "auto"  # of the source: a square around the face, or none: the picture as it is
    size: int = 0  # side of the frames, pixels; 0: as the photo allows, see `frames.frame_size`
    paste_back: bool = False  # the result within the whole photograph
    background: str = "source"  # or transparent, #rrggbb, a picture's path
    face: str = "largest"  # of the source, where it shows several: largest | left | right | index:N
    driver_face: str = "largest"  # of the driver
    tracker: TrackerName = "landmarker"  # reads the driver; the source is always read by the landmarker
    drive: tuple[str, ...] = DRIVABLE  # what of the driver is followed
    expression_scale: float = 1.0  # 0: the source's own, 1: the driver's
    pose_scale: float = 1.0
    pose: Literal["absolute", "relative"] = "absolute"  # the driver's camera, or the source's moved by the driver's
    relative_expression: bool = False  # the source's expression changed by the driver's change
    reference_frame: int = 0  # of the driver's frames that are used: what relative control counts from
    smooth: SmoothingLevel = "light"
    watermark: Watermark = "none"  # beside the mark in the metadata

    @property
    def control(self) -> Control:
        """What of the driver reaches the source."""
        limit = PASTE_BACK_MAX_TRAVEL if self.paste_back else None
        return Control(self.drive, self.expression_scale, self.pose_scale, self.pose, self.relative_expression, limit)


@dataclass(frozen=True)
class Summary:
    """What was written."""

    out: Path
    frames: int
    missing: int  # driver frames without a face
    fps: Fraction
    seconds: float  # wall-clock
    device: str
    notes: tuple[str, ...] = field(default=())


def check_overwrite(out: Path, overwrite: bool) -> None:
    """Raise `InputError` where something would be replaced that must not be."""
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"{out} exists: choose another output or pass --overwrite")
