"""Options of a reenactment, and the summary that every job returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from export3d_cli.core.animation.expression_controls import ExpressionEdit
from export3d_cli.core.animation.retargeting import DRIVABLE, Control, TravelLimits
from export3d_cli.core.animation.watermark import Watermark
from export3d_cli.core.face.smoothing import SmoothingLevel
from export3d_cli.core.face.tracker import TrackerName
from export3d_cli.core.media.image import has_image_suffix
from export3d_cli.core.runtime.errors import InputError

Progress = Callable[[str, int, "int | None"], None]  # stage, done, total (None: unknown)
Crop = Literal["auto", "none"]
Framing = Literal["photo", "face"]  # what frames show: the whole photo, or a square around the head
Quality = Literal["fast", "balanced", "best"]  # of the volume rendering
# Pose of the head. absolute: the driver's; relative: the source's own, moved as the driver's moves from its reference
# frame; auto: relative to the frame whose head rotation is nearest to the source's.
Pose = Literal["auto", "relative", "absolute"]
Length = Literal["source", "driver", "shortest", "loop"]  # loop: the source's, and the driver repeats
FACE_TRAVEL = TravelLimits(0.15, 0.15, 0.1, 0.15)  # the head of a driver who walks past stays in the crop


@dataclass(frozen=True)
class PortraitOptions:
    """How a portrait is read, and how its frames are written; options of all jobs."""

    crf: int | None = None  # constant rate factor, 0 to 51; None: 18
    overwrite: bool = False
    face: str = "largest"  # which face of the source: largest | left | right | index:N; in `reenact` also all
    landmarks: Path | None = None  # of that face, if none is found, see `read_landmarks`
    framing: Framing = "photo"  # the whole photo, or a square around the head
    crop: Crop = "auto"  # of the source: auto: a square around the face; none: the whole photo
    size: int = 0  # longer side of the frames, pixels; 0: the photo's, at most 1080, or 512 in a contact sheet
    also: tuple[Path, ...] = ()  # more photos of the person, see `Animator.portrait`
    force: bool = False  # use them even if they seem to show somebody else
    expression: ExpressionEdit = field(default_factory=ExpressionEdit)  # added to every frame, or swept over them
    watermark: Watermark = "invisible"  # in the picture; the metadata always carry a mark


@dataclass(frozen=True)
class ReenactOptions(PortraitOptions):
    """How the driver is read, which of its motion is used, and how the result is written."""

    audio: str = "auto"  # auto (the driver's, or the source's if that is a video) | driver | source | none | a file
    fps: Fraction | None = None  # frames/s; None: exactly the driver's
    start: float = 0.0  # seconds
    duration: float | None = None  # seconds
    max_frames: int | None = None
    length: Length = "source"  # of the result, if the source is a video
    on_missing: Literal["hold", "skip", "fail"] = "hold"  # frames without a face
    compare: bool = False  # source | driver | result side by side
    background: str = "source"  # source | transparent | #rrggbb | path of an image
    pairs: tuple[tuple[str, Path], ...] = ()  # more faces of the source, each with a driver of its own
    driver_face: str = "largest"  # which face of the driver, likewise
    tracker: TrackerName = "landmarker"  # for the driver; the source is always tracked by the landmarker
    drive: tuple[str, ...] = DRIVABLE  # eyes, gaze, brows, mouth, head: which of the driver's motion is used
    scales: tuple[tuple[str, float], ...] = ()  # of regions, on top of the two scales below
    expression_scale: float = 1.0  # 0: the source's expression, 1: the driver's, above 1: exaggerated
    pose_scale: float = 1.0  # of the head pose, likewise
    pose: Pose = "auto"
    torso: float | None = None  # fraction of the neck's motion that the torso follows; None: as torsos usually do
    relative_expression: bool = False  # the source's expression plus the driver's change
    eyes_to_camera: bool = False  # the gaze is at the camera
    lips_shut_when_silent: bool = False  # where the result's sound is silent
    reference_frame: int | None = None  # of the used driver frames, from 0; None: automatic with pose auto, else 0
    smooth: SmoothingLevel = "light"

    def __post_init__(self) -> None:
        _ = self.control  # checks regions and scales before anything is read
        whole_photo = self.framing == "photo" and self.crop == "auto" and self.background == "source"
        if (self.face == "all" or self.pairs) and not (whole_photo and not self.compare):
            raise InputError(
                "several faces are animated in their whole photo: leave out other framings, --compare and --background"
            )
        if self.face == "all" and self.pairs:
            raise InputError("--face all gives one driver to all faces: leave it out with --pair")
        if not self.expression.is_constant:
            raise InputError("a range A:B sweeps in edit-basis and novel-view: give reenact one number per control")

    def for_driver(self, driver: Path) -> ReenactOptions:
        """Return the options for a driver: pose `auto` of a picture, which shows no movement, is absolute."""
        return replace(self, pose="absolute") if self.pose == "auto" and has_image_suffix(driver) else self

    @property
    def control(self) -> Control:
        """The part of these options that controls the motion."""
        pose: Literal["absolute", "relative"] = "absolute" if self.pose == "absolute" else "relative"
        limits = None if pose == "absolute" else FACE_TRAVEL
        return Control(
            self.drive, self.expression_scale, self.pose_scale, self.scales, pose, self.relative_expression, limits,
            self.torso, self.eyes_to_camera,
        )  # fmt: skip

    @property
    def reference(self) -> int | Literal["auto"] | None:
        """The driver's reference frame, see `DriverStream`."""
        if not self.control.needs_reference:
            return None
        if self.reference_frame is not None:
            return self.reference_frame
        return "auto" if self.pose == "auto" else 0


@dataclass(frozen=True)
class Summary:
    """Result of a job."""

    out: Path
    frames: int
    missing: int  # driver frames without a face
    fps: Fraction
    seconds: float  # wall-clock
    device: str
    notes: tuple[str, ...] = field(default=())


def choose_sound(audio: str, source: Path | None, driver: Path | None) -> Path | None:
    """Return the file that an option `audio` means, for a source that is a video, else None, and a driver."""
    if audio == "source" and source is None:
        raise InputError("--audio source needs a video as source: use driver, none or a file with sound")
    silent = driver is None or driver.suffix.lower() in (".npz", ".csv") or has_image_suffix(driver)
    sound = None if silent else driver
    return {"auto": source or sound, "source": source, "driver": sound, "none": None}.get(audio, Path(audio))


def check_overwrite(out: Path, overwrite: bool) -> None:
    """Raise `InputError` where an existing output would be replaced without `overwrite`."""
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"{out} exists: choose another output or pass --overwrite")
