"""Options of all jobs and of a reenactment, checks of outputs, and the summary that every job returns."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from export3d_cli.core.animation.attribute_editing import Look
from export3d_cli.core.animation.expression_controls import ExpressionEdit
from export3d_cli.core.animation.retargeting import Control, Pose
from export3d_cli.core.animation.watermark import Watermark
from export3d_cli.core.face.smoothing import SmoothingLevel
from export3d_cli.core.face.tracker import TrackerName
from export3d_cli.core.media.image import has_image_suffix
from export3d_cli.core.media.probe import is_sound
from export3d_cli.core.media.writer import check_crf, check_output_suffix
from export3d_cli.core.runtime.errors import InputError

Progress = Callable[[str, int, "int | None"], None]  # stage, done, total (None: unknown)
Crop = Literal["auto", "none"]
Framing = Literal["photo", "face"]  # what frames show: the whole photo, or a square around the head
Quality = Literal["fast", "balanced", "best"]  # of the volume rendering
Length = Literal["source", "driver", "shortest", "loop"]  # loop: the source's, and the driver repeats
MOTION_SUFFIXES = (".npz", ".csv")  # files of numbers, without pictures and sound


@dataclass(frozen=True)
class PortraitOptions:
    """How a portrait is read, and how its frames are written; options of all jobs."""

    crf: int | None = None  # constant rate factor, 0 to 51; None: 18
    overwrite: bool = False
    face: str = "largest"  # which face of the source: largest | left | right | index:N; in `reenact` also all
    landmarks: Path | None = None  # of that face, if none is found, see `read_landmarks`
    framing: Framing = "photo"  # the whole photo, or a square around the head
    crop: Crop = "auto"  # for the network: auto: a square around the face; none: all that frames show
    size: int = 0  # longer side of the frames, pixels; 0: the photo's, at most 1080, or 512 in a contact sheet
    also: tuple[Path, ...] = ()  # more photos of the person, see `Animator.portrait`
    force: bool = False  # use them even if they seem to show somebody else
    look: Look = field(default_factory=Look)  # that the person has in the photos before they are encoded
    expression: ExpressionEdit = field(default_factory=ExpressionEdit)  # added to every frame, or swept over them
    watermark: Watermark = "invisible"  # in the picture; the metadata always carry a mark

    def check_outputs(self, *outputs: Path) -> None:
        """Raise `InputError` for outputs that exist, unless `overwrite` is set, or that do not fit the options."""
        for out in outputs:
            check_overwrite(out, self.overwrite)
            check_crf(out, self.crf)


@dataclass(frozen=True)
class ReenactOptions(PortraitOptions, Control):
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
    drive_by: Literal["auto", "sound"] = "auto"  # auto: by the driver's video, or its sound if it has no video
    text: Path | None = None  # what the driver's sound says, a text or SRT file, see `read_speech`
    tracker: TrackerName = "landmarker"  # for the driver; the source is always tracked by the landmarker
    pose: Pose = "auto"
    lips_shut_when_silent: bool = False  # where the result's sound is silent
    reference_frame: int | None = None  # of the used driver frames, from 0; None: automatic with pose auto, else 0
    smooth: SmoothingLevel = "light"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_photo = self.framing == "photo" and self.crop == "auto" and self.background == "source"
        if (self.face == "all" or self.pairs) and not (whole_photo and not self.compare):
            raise InputError("several faces need the whole photo: leave out --frame, --crop, --compare, --background")
        if self.face == "all" and self.pairs:
            raise InputError("--face all gives one driver to all faces: leave it out with --pair")
        if self.motion != "landmarks" and self.tracker == "fan":
            raise InputError("--motion pixels and both need 478 landmarks: leave out --tracker fan")
        if self.motion != "landmarks" and self.lips_shut_when_silent:
            raise InputError(f"--motion {self.motion} reads lips from pixels: leave out --lips-shut-when-silent")
        if self.motion == "pixels" and self.expression:
            raise InputError("--motion pixels shows expressions as they are: leave out the controls of the expression")
        if not self.expression.is_constant:
            raise InputError("a range A:B sweeps in edit-basis and novel-view: give reenact one number per control")

    def check_outputs(self, *outputs: Path) -> None:
        """Raise `InputError` for outputs that exist or do not fit the options, and for an unusable background."""
        background, is_transparent = self.background, self.background == "transparent"
        for out in outputs:
            check_output_suffix(out, alpha=is_transparent)
            check_crf(out, self.crf, alpha=is_transparent)
            check_overwrite(out, self.overwrite)
        if background.startswith("#"):
            if not re.fullmatch(r"#[0-9a-fA-F]{6}", background):
                raise InputError(f"background {background!r} is not a colour: give #rrggbb, for example #00ff00")
        elif not is_transparent and background != "source":
            if not Path(background).exists():
                raise InputError(f"background {background!r} does not exist: "
                                 "use source, transparent, #rrggbb or an image")  # fmt: skip
            if not has_image_suffix(Path(background)):
                raise InputError(f"background {background} is not an image: give a .jpg, .png or .webp file")

    def for_driver(self, driver: Path) -> ReenactOptions:
        """Return the options for a driver: a picture shows no movement, so its pose `auto` is absolute.

        Raise `InputError` if the torso is to move as that of a picture.
        """
        if not has_image_suffix(driver):
            return self
        if self.torso == "driver":
            raise InputError(f"{driver} is a picture, whose torso does not move: leave out --torso driver")
        return replace(self, pose="absolute") if self.pose == "auto" else self

    def uses_sound_of(self, driver: Path) -> bool:
        """Return whether the sound of a driver drives."""
        has_none = driver.suffix.lower() in MOTION_SUFFIXES or has_image_suffix(driver)
        return self.drive_by == "sound" or (not has_none and is_sound(driver))

    @property
    def reference(self) -> int | Literal["auto"] | None:
        """The driver's reference frame, see `DriverStream`."""
        if not self.needs_reference:
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


def choose_sound(options: ReenactOptions, source: Path | None, driver: Path | None) -> Path | None:
    """Return the file with the result's sound, for a source that is a video, else None, and a driver."""
    audio = options.audio
    if audio == "source" and source is None:
        raise InputError("--audio source needs a video as source: use driver, none or a file with sound")
    silent = driver is None or driver.suffix.lower() in MOTION_SUFFIXES or has_image_suffix(driver)
    sound = None if silent else driver
    if source is not None and driver is not None and audio == "auto" and options.uses_sound_of(driver):
        audio = "driver"  # whose words the lips speak
    return {"auto": source or sound, "source": source, "driver": sound, "none": None}.get(audio, Path(audio))


def check_overwrite(out: Path, overwrite: bool) -> None:
    """Raise `InputError` where an existing output would be replaced without `overwrite`."""
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"{out} exists: choose another output or pass --overwrite")
