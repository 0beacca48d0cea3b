"""Bookkeeping of one training run: run folder, clock, log, training state. The stages do the training."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export3d_cli.core.config.renamed_keys import RENAMED_KEYS
from export3d_cli.core.config.schema import STAGES, TrainConfig
from export3d_cli.core.media.image import to_uint8, write_image
from export3d_cli.core.model.checkpoint import load_state, save_state, save_weights
from export3d_cli.core.runtime.device import has_fast_bf16, pick_device
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.runtime.files import write_text
from export3d_cli.core.train.distributed import World

STAGE_SEEDS = {  # must not change: a run is repeated exactly
    "clebs": 0, "reconstruction": 1, "adversarial": 2, "mouth": 3, "eyes": 4, "pose_debias": 5, "lids": 6, "sampler": 7,
}  # fmt: skip
WARM_RESTART_PROGRESS = 0.4  # decay progress at which a run with a finished decay by time restarts: at 2/3 of the rate


@dataclass(frozen=True)
class TrainEvent:
    """Argument of a progress callback."""

    stage: str  # "data" or one of `config.STAGES`
    step: int  # steps done in this stage
    steps: int  # steps of this stage
    values: dict[str, float] = field(default_factory=dict)  # the newest log line
    message: str = ""
    seconds_left: float | None = None  # until the stage, or the time of this call, ends


class TrainingRun:
    """One run folder, created or reopened, where a training state in it continues, and the clock of this call."""

    def __init__(self, config: TrainConfig, progress: Callable[[TrainEvent], None] | None = None,
                 world: World | None = None) -> None:  # fmt: skip
        self.config, self.progress, self.folder = config, progress, Path(config.run)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.world = world or World(device=pick_device(config.device))
        self.device = self.world.device
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(self.device))
        self.started = time.monotonic()
        self.decay_progress = 0.0  # progress of a decay by time at the start of this call, 0..1
        self.last_saved: tuple[str, int] | None = None  # stage and step of the newest training state
        self.record: dict[str, Any] = {}  # training record for the header of the weights
        self.resumed_state = load_state(self.folder)
        if self.resumed_state is not None:
            info = self.resumed_state[1]
            info["stage"] = RENAMED_KEYS.get(info["stage"], info["stage"])
            if info["stage"] not in config.stages:
                raise TrainingError(f"{self.folder} stopped in the stage {info['stage']}, which is not one of this "
                                    f"run's ({', '.join(config.stages)}): set run to another folder, or add the "
                                    "stage")  # fmt: skip
            self.decay_progress = float(info.get("decayed", 0.0))
            if self.decay_progress >= 1:  # the run got more time: restart warm, the final rate would learn little
                self.decay_progress = WARM_RESTART_PROGRESS
            self.last_saved = (info["stage"], int(info["step"]))
        self.world.barrier()  # all processes read before the first one writes
        if self.world.is_main:
            for temporary in self.folder.glob(".*.part.*"):  # left by a process that was killed while writing
                temporary.unlink(missing_ok=True)
            self._truncate_log()

    def seed_step(self, stage: str, step: int) -> None:
        """Seed all random numbers of a step by (seed, stage, step), so that a resumed run repeats exactly."""
        torch.manual_seed((self.config.seed * 1_000_003 + STAGE_SEEDS[stage] * 500_000_003 + step) % 2**63)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for bfloat16, if the configuration enables it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def elapsed_minutes(self) -> float:
        """Return the minutes since this call began."""
        return (time.monotonic() - self.started) / 60

    def out_of_time(self) -> bool:
        """Whether `max_minutes` have passed."""
        limit = self.config.max_minutes
        return limit > 0 and bool(self.world.broadcast(float(limit <= self.elapsed_minutes())))

    def time_fraction(self, start_minute: float) -> float:
        """Return the progress, 0..1, of a decay by time in a stage that began at minute `start_minute` of this call."""
        elapsed = (self.elapsed_minutes() - start_minute) / max(self.config.max_minutes - start_minute, 1e-6)
        return self.world.broadcast(min(self.decay_progress + (1 - self.decay_progress) * max(elapsed, 0.0), 1.0))

    def report_progress(self, stage: str, step: int, steps: int, values: dict[str, float] | None = None,
                        message: str = "") -> None:  # fmt: skip
        """Call the progress callback, on the first process."""
        if self.progress is None or not self.world.is_main:
            return
        seconds_left = None
        if values and "seconds_a_step" in values:
            seconds_left = (steps - step) * values["seconds_a_step"]
            if self.config.max_minutes > 0:
                remaining = (self.config.max_minutes - self.elapsed_minutes()) * 60
                seconds_left = max(min(seconds_left, remaining), 0.0)
        self.progress(TrainEvent(stage, step, steps, values or {}, message, seconds_left))

    def report_message(self, message: str) -> None:
        """Report a message of the preparation."""
        self.report_progress("data", 0, 0, message=message)

    def log(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        """Append a line to stats.jsonl and report it."""
        if not self.world.is_main:
            return
        line = {"stage": stage, "step": step, "minutes": round(self.elapsed_minutes(), 3)}
        line |= {k: float(f"{v:.5g}") for k, v in values.items()}
        with (self.folder / "stats.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.report_progress(stage, step, steps, values)

    def save(self, stage: str, step: int, tensors: dict[str, Tensor], decayed: float = 0.0) -> None:
        """Write the training state."""
        self.last_saved = (stage, step)
        if not self.world.is_main:
            return
        info = {"stage": stage, "step": step, "seed": self.config.seed, "decayed": decayed}
        save_state(self.folder, tensors, info, keep=self.config.keep_checkpoints)

    def save_weights(self, state: dict[str, Tensor], **record: Any) -> None:
        """Write the inference weights, with the training record, updated by `record`, in their header."""
        self.record |= record
        if self.world.is_main:
            save_weights(self.weights, state, self.config.model, self.record, licence=self.config.license)

    @property
    def weights(self) -> Path:
        """File of the inference weights."""
        return self.folder / "weights.safetensors"

    def write_sample(self, name: str, columns: list[Tensor]) -> None:
        """Write a picture of columns of images (B, 3, h, w) in [-1, 1] into the folder of samples."""
        folder, grid = self.folder / "samples", torch.cat([torch.cat(list(x), dim=1) for x in columns], dim=2)
        folder.mkdir(exist_ok=True)
        write_image(folder / name, to_uint8(grid.cpu()))

    def _truncate_log(self) -> None:
        """Drop the log lines of steps that will be repeated; all of them if there is no training state."""
        path = self.folder / "stats.jsonl"
        if not path.exists():
            return
        stage, step = self.last_saved or (STAGES[0], -1)
        kept = []
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError):  # a line truncated by a crash
                line = json.loads(text)
                if (STAGES.index(line["stage"]), line["step"]) <= (STAGES.index(stage), step):
                    kept.append(text)
        write_text(path, "".join(f"{text}\n" for text in kept))
