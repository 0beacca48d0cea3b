"""A training run (folder, clock, log, training state) and the loop that all its stages share.

The loop draws a batch, takes a step, skips non-finite steps, logs, samples and saves.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export3d_cli.core.config.schema import STAGES, TrainConfig
from export3d_cli.core.media.image import to_uint8, write_image
from export3d_cli.core.model import checkpoint
from export3d_cli.core.runtime.device import has_fast_bf16, pick_device
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.runtime.files import write_text
from export3d_cli.core.train.distributed import World
from export3d_cli.core.train.training_data import prefetch

STAGE_SEEDS = {  # must not change: a run is repeated exactly
    "clebs": 0, "reconstruction": 1, "adversarial": 2, "mouth": 3, "eyes": 4, "pose_debias": 5, "lids": 6, "sampler": 7,
    "planedict": 8,
}  # fmt: skip
WARM_RESTART_PROGRESS = 0.4  # decay progress at which a run with a finished decay by time restarts: at 2/3 of the rate
MAX_SKIPPED_GRADIENTS = 20  # consecutive steps with a finite loss and non-finite gradients before giving up
Part = nn.Module | torch.optim.Optimizer | dict[str, Tensor]


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
        self.weights = self.folder / "weights.safetensors"  # inference weights
        self.folder.mkdir(parents=True, exist_ok=True)
        self.world = world or World(device=pick_device(config.device))
        self.device = self.world.device
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(self.device))
        self.started = time.monotonic()
        self.decay_progress = 0.0  # progress of a decay by time at the start of this call, 0..1
        self.last_saved: tuple[str, int] | None = None  # stage and step of the newest training state
        self.record: dict[str, Any] = {}  # training record for the header of the weights
        self.resumed_state = checkpoint.load_state(self.folder)
        if self.resumed_state is not None:
            info = self.resumed_state[1]
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
                seconds_left = max(min(seconds_left, (self.config.max_minutes - self.elapsed_minutes()) * 60), 0.0)
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
        checkpoint.save_state(self.folder, tensors, info, keep=self.config.keep_checkpoints)

    def save_weights(self, state: dict[str, Tensor], **record: Any) -> None:
        """Write the inference weights, with the training record, updated by `record`, in their header."""
        self.record |= record
        if self.world.is_main:
            checkpoint.save_weights(self.weights, state, self.config.model, self.record, licence=self.config.license)

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


class Stage:
    """One stage of a run. Subclasses build their modules in `__init__` and say how to draw a batch and take a step."""

    images_per_step = 0  # over all processes, for the logged speed

    def __init__(self, run: TrainingRun, name: str) -> None:
        self.run, self.name, self.step = run, name, 0
        self.start_minute = 0.0  # of this call, when the stage began
        self.values: dict[str, float] = {}  # the last log line
        self.saved_parts: dict[str, Part] = {}  # what the training state holds, by the prefix of its tensors' names

    @property
    def steps(self) -> int:
        """Number of steps of the stage."""
        return self.run.config.stage_steps(self.name)

    def draw(self, step: int) -> Any:
        """Draw the batch of a step, a pure function of the step; called by loader threads."""
        raise NotImplementedError

    def take_step(self, batch: Any) -> dict[str, float]:
        """Update the modules if loss and gradients are finite; return values to log, equal on all processes."""
        raise NotImplementedError

    def decay_progress(self) -> float:
        """Return the progress of a decay by time, 0..1, for the training state."""
        return 0.0

    def write_samples(self) -> None:
        """Write a sample picture of the present weights."""

    def finish(self) -> None:
        """Complete the stage after its last step."""

    def train(self) -> bool:
        """Take the remaining steps; return whether the stage is finished."""
        run, config = self.run, self.run.config
        if run.resumed_state is not None:
            self.resume(*run.resumed_state)
        self.start_minute = clock = run.elapsed_minutes()
        sums: dict[str, list[float]] = {}
        taken = skipped = 0
        threads = config.data.workers or (1 if run.device.type == "cpu" else 4)
        with contextlib.closing(prefetch(self.draw, range(self.step, self.steps), threads)) as batches:
            while self.step < self.steps and not run.out_of_time():
                run.seed_step(self.name, self.step)
                terms = self.take_step(next(batches))
                if is_finite(terms):
                    skipped, taken = 0, taken + 1
                    for key, term in terms.items():
                        sums.setdefault(key, []).append(term)
                else:
                    skipped += 1
                    self.check_skipped(terms, skipped)
                self.step += 1
                if (self.step % config.log_every == 0 or self.step == self.steps) and taken:
                    self.values = {key: float(np.mean(terms)) for key, terms in sums.items()}
                    self.values["seconds_a_step"] = seconds = (run.elapsed_minutes() - clock) * 60 / taken
                    if self.images_per_step:
                        self.values["images_a_second"] = self.images_per_step / max(seconds, 1e-9)
                    run.log(self.name, self.step, self.steps, self.values)
                    sums, taken, clock = {}, 0, run.elapsed_minutes()
                if config.sample_every and self.step % config.sample_every == 0:
                    self.write_samples()
                if self.step % config.checkpoint_every == 0:
                    self.save()
        self.save()
        self.write_samples()
        if self.step < self.steps:
            return False
        self.finish()
        return True

    def check_skipped(self, terms: dict[str, float], skipped: int) -> None:
        """Raise `TrainingError` after too many consecutive steps that were not finite."""
        run, limit = self.run, self.run.config.skip_nonfinite
        bad = [key for key, value in terms.items() if not math.isfinite(value)]
        if bad == ["grad"]:
            limit = max(limit, MAX_SKIPPED_GRADIENTS)
        if skipped <= limit:
            return
        name = "loss" if "loss" in bad else bad[0]
        hint = "there is no checkpoint yet: the same command starts again"
        if run.last_saved is not None:
            state = f"{run.folder / 'state.safetensors'} (stage {run.last_saved[0]}, step {run.last_saved[1]})"
            hint = f"the same command continues from the last good checkpoint, {state}"
        values = ", ".join(f"{key} {value:.3g}" for key, value in terms.items())
        raise TrainingError(f"the {name} of stage {self.name} is {terms[name]} at step {self.step} ({values}): lower "
                            f"lr, set precision to fp32, or skip such steps with --skip-nonfinite; {hint}")  # fmt: skip

    def save(self) -> None:
        """Write the training state."""
        decayed = self.decay_progress()  # collective
        tensors = {f"{prefix}{k}": v for prefix, part in self.saved_parts.items() for k, v in _pack(part).items()}
        self.run.save(self.name, self.step, tensors, decayed)

    def resume(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Continue from a training state."""
        try:
            for prefix, part in self.saved_parts.items():
                saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if isinstance(part, nn.Module):
                    checkpoint.load_into(part, saved, "the training state")
                elif isinstance(part, torch.optim.Optimizer):
                    checkpoint.unpack_optimizer(part, saved)
                else:
                    part.update({k: v.to(part[k].device) for k, v in saved.items()})
            self.step = int(info["step"])
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise TrainingError(f"the state in {self.run.folder} does not fit its configuration: {error}") from error


def _pack(part: Part) -> dict[str, Tensor]:
    if isinstance(part, torch.optim.Optimizer):
        return checkpoint.pack_optimizer(part)
    return part.state_dict() if isinstance(part, nn.Module) else part


def is_finite(terms: dict[str, float]) -> bool:
    """Whether all values of a step are finite."""
    return all(map(math.isfinite, terms.values()))


@torch.no_grad()
def update_ema(average: dict[str, Tensor], state: dict[str, Tensor], decay: float, step: int) -> None:
    """Update an exponential moving average after `step` steps, with a faster decay at first; integers are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    names = [k for k, v in state.items() if v.is_floating_point()]
    torch._foreach_lerp_([average[k] for k in names], [state[k] for k in names], 1 - decay)
    for name in state.keys() - set(names):
        average[name].copy_(state[name])
