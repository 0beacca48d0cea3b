"""What an evaluation is asked to do, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from export3d_cli.core.face.smoothing import SmoothingLevel
from export3d_cli.core.runtime.errors import InputError

DEFAULT_PAIRS = 5


@dataclass(frozen=True)
class EvaluateOptions:
    """What is compared and how it is measured. None stands for the default; one that does not apply is refused."""

    max_frames: int | None = 50  # frames of each clip; None: all
    take: Literal["spread", "first"] = "spread"  # which frames: spread evenly, or the first
    cross: bool = False  # another person drives
    pairs: int | None = None  # with `cross`: pairs of source and driver; default 5
    seed: int = 0  # of the pairs and of the bootstrap
    identity: str | None = None  # `dlib` or a TorchScript file, see `face_embedding`; None: not measured
    perceptual: Path | None = None  # backbone file (VGG16 or MobileNetV2); None: perceptual distance is not measured
    lpips: Path | None = None  # LPIPS' learned weights for that VGG16, if they are a file of their own
    results: tuple[Path, ...] = ()  # folders of finished videos: `<case>.mp4`, or pictures in `<case>/`
    model: bool = True  # False: score only `results` and `repeat`
    smooth: SmoothingLevel | None = None  # smoothing of the driver; default "light", as in `reenact`
    views: bool | None = None  # novel views too; default: yes in self-reenactment

    def __post_init__(self) -> None:
        """Refuse options without effect."""
        if self.pairs is not None and not self.cross:
            raise InputError("--pairs applies to --cross only: remove it, or add --cross")
        if self.views and self.cross:
            raise InputError("--views applies to self-reenactment only: remove --views or --cross")
        for name in ("views", "smooth"):
            if getattr(self, name) and not self.model:
                raise InputError(f"--{name} applies to the model only: remove it, or --no-model")
        if self.lpips is not None and self.perceptual is None:
            raise InputError(f"{self.lpips} has only LPIPS' linear weights: give the VGG16 file with --perceptual")
        if not (self.model or self.results):
            raise InputError("--no-model leaves nothing to score: add --results FOLDER")

    def resolve(self) -> EvaluateOptions:
        """Return the options with the defaults that apply filled in."""
        return replace(
            self,
            pairs=(self.pairs or DEFAULT_PAIRS) if self.cross else None,
            smooth=(self.smooth or "light") if self.model else None,
            views=self.model and not self.cross if self.views is None else self.views,
        )


@dataclass(frozen=True)
class Evaluation:
    """Scores by method and metric; None means not measured, and means over clips ignore it."""

    dataset: Path
    protocol: Literal["self", "cross"]
    cases: int
    frames: int
    mean: dict[str, dict[str, float | None]]
    interval: dict[str, dict[str, tuple[float, float] | None]]  # 95 % interval of the mean, by bootstrap over clips
    clips: list[dict[str, Any]]  # case, method, frames and metrics: one row per case and method
    views: list[dict[str, float | None]]  # requested yaw and the `view_*` metrics there; empty: not measured
    options: EvaluateOptions  # resolved
    quality: str | None  # of the rendering; None without a model
    seconds: float  # wall-clock
    device: str
    files: list[Path] = field(default_factory=list)  # written files
