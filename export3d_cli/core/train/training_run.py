"""The bookkeeping of one training run: clock, log, training state. What is trained lives in the stages."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export3d_cli.core.config.schema import STAGES, TrainConfig
from export3d_cli.core.model.checkpoint import load_state, save_state, write_text
from export3d_cli.core.runtime.device import has_fast_bf16, pick_device
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.train.distributed import World
from export3d_cli.core.train.tensorboard_logger import TensorBoardLogger
from export3d_cli.core.train.training_plots import plot_losses

WARM_RESTART_PROGRESS = (
    0.4  # where the second decay by time of a run begins whose first has ended: at two thirds of the learning rate
)


@dataclass(frozen=True)
class TrainEvent:
    """What a progress callback is told."""

    stage: str  # "data" or one of `config.STAGES`
    step: int  # steps done in this stage
    steps: int  # steps this stage will take
    values: dict[str, float] = field(default_factory=dict)  # the newest log line
    message: str = ""
    seconds_left: float | None = None  # seconds until the stage, or the time of this call, is over


@dataclass
class TrainingRun:
    """One run folder and the clock of this call."""

    config: TrainConfig
    folder: Path
    device: torch.device
    bf16: bool
    progress: Callable[[TrainEvent], None] | None
    world: World = field(default_factory=World)
    started: float = field(default_factory=time.monotonic)
    decay_progress: float = 0.0  # how far earlier calls took a decay by time, 0..1
    resumed_state: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    last_saved: tuple[str, int] | None = None  # stage and step of the newest training state
    tensorboard: TensorBoardLogger | None = None

    @classmethod
    def open(
        cls, config: TrainConfig, progress: Callable[[TrainEvent], None] | None, world: World | None = None
    ) -> TrainingRun:
        """Make or reopen the run folder; where it holds a training state, the run goes on from there."""
        folder = Path(config.run)
        folder.mkdir(parents=True, exist_ok=True)
        world = world or World(device=pick_device(config.device))
        device = world.device
        bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))
        run = cls(config, folder, device, bf16, progress, world, resumed_state=load_state(folder))
        if run.resumed_state is not None:
            run.decay_progress = float(run.resumed_state[1].get("decayed", 0.0))
            if run.decay_progress >= 1:  # more time was given: a warm restart, since the rate's end would teach little
                run.decay_progress = WARM_RESTART_PROGRESS
            run.last_saved = (run.resumed_state[1]["stage"], int(run.resumed_state[1]["step"]))
        world.barrier()  # all have read before the first one writes
        if world.is_main:
            for left in folder.glob(".*.part.*"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
            if run.resumed_state is not None:
                run._truncate_log(run.resumed_state[1])
            else:  # killed before the first state: all its steps are taken again
                (folder / "stats.jsonl").unlink(missing_ok=True)
            first = run._global_step(*run.last_saved) + 1 if run.last_saved else 0
            run.tensorboard = TensorBoardLogger(folder / "tensorboard", enabled=config.tensorboard, first_step=first)
        return run

    def seed_step(self, stage: int, step: int) -> None:
        """Make every random number of this step a function of (seed, stage, step), so that a resumed run repeats."""
        torch.manual_seed((self.config.seed * 1_000_003 + stage * 500_000_003 + step) % 2**63)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 where the configuration asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def elapsed_minutes(self) -> float:
        """Minutes since this call began."""
        return (time.monotonic() - self.started) / 60

    def out_of_time(self) -> bool:
        """Whether `max_minutes` have passed."""
        limit = self.config.max_minutes
        return limit > 0 and bool(self.world.broadcast(float(limit <= self.elapsed_minutes())))

    def time_fraction(self, start_minute: float) -> float:
        """How far a decay by time is, 0..1, for a stage that began at minute `since` of this call."""
        passed = (self.elapsed_minutes() - start_minute) / max(self.config.max_minutes - start_minute, 1e-6)
        return self.world.broadcast(min(self.decay_progress + (1 - self.decay_progress) * max(passed, 0.0), 1.0))

    def report_progress(
        self, stage: str, step: int, steps: int, values: dict[str, float] | None = None, message: str = ""
    ) -> None:
        """Call the progress callback."""
        if self.progress is None or not self.world.is_main:
            return
        left = None
        if values and "seconds_a_step" in values:
            left = (steps - step) * values["seconds_a_step"]
            if self.config.max_minutes > 0:
                left = max(min(left, (self.config.max_minutes - self.elapsed_minutes()) * 60), 0.0)
        self.progress(TrainEvent(stage, step, steps, values or {}, message, left))

    def log(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        """Append a line to stats.jsonl and tell the callback."""
        if not self.world.is_main:
            return
        line = {"stage": stage, "step": step, "minutes": round(self.elapsed_minutes(), 3)}
        line |= {k: float(f"{v:.5g}") for k, v in values.items()}
        with (self.folder / "stats.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            self.tensorboard.write(stage, self._global_step(stage, step), values)
        self.report_progress(stage, step, steps, values)

    def save(self, stage: str, step: int, tensors: dict[str, Tensor], decayed: float = 0.0) -> None:
        """Write the training state."""
        self.last_saved = (stage, step)
        if not self.world.is_main:
            return
        info = {"stage": stage, "step": step, "seed": self.config.seed, "decayed": decayed}
        save_state(self.folder, tensors, info, keep=self.config.keep_checkpoints)

    def close(self) -> None:
        """Draw the log as `loss.png`, finish what TensorBoard reads."""
        if self.world.is_main:
            plot_losses(self.folder / "stats.jsonl", self.folder / "loss.png")
        if self.tensorboard is not None:
            self.tensorboard.close()

    def check_finite(self, value: float, stage: str, step: int, parts: dict[str, float]) -> None:
        """Stop on a loss or gradient that is no number."""
        if math.isfinite(value):
            return
        shown = ", ".join(f"{k} {v:.3g}" for k, v in parts.items())
        good = "there is no checkpoint yet: the same command starts again"
        if self.last_saved is not None:
            stage_saved, step_saved = self.last_saved
            good = (
                f"the same command goes on from the last good checkpoint, {self.folder / 'state.safetensors'} "
                f"(stage {stage_saved}, step {step_saved})"
            )
        raise TrainingError(
            f"the loss of stage {stage} is {value} at step {step} ({shown}): lower lr, set precision to fp32, or let "
            f"--skip-nonfinite leave such steps out; {good}"
        )

    def _global_step(self, stage: str, step: int) -> int:
        """Steps since the run began, over all stages."""
        stages = self.config.stages
        before = stages[: stages.index(stage)] if stage in stages else ()
        return sum(self.config.stage_steps(s) for s in before) + step

    def _truncate_log(self, info: dict[str, Any]) -> None:
        """Forget log lines of steps that will be taken again."""
        path = self.folder / "stats.jsonl"
        if not path.exists():
            return
        order = {stage: number for number, stage in enumerate(STAGES)}
        kept = []
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError):  # a line cut off by a crash
                line = json.loads(text)
                if (order[line["stage"]], line["step"]) <= (order[info["stage"]], info["step"]):
                    kept.append(text)
        write_text(path, "".join(f"{text}\n" for text in kept))
