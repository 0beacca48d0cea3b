"""The loop that all stages share: draw a batch, take a step, skip non-finite steps, log, sample and save."""

import contextlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export3d_cli.core.model.checkpoint import load_into, pack_optimizer, unpack_optimizer
from export3d_cli.core.runtime.errors import TrainingError
from export3d_cli.core.train.pair_sampler import prefetch
from export3d_cli.core.train.training_run import TrainingRun

Part = nn.Module | torch.optim.Optimizer | dict[str, Tensor]
MAX_SKIPPED_GRADIENTS = 20  # consecutive steps with a finite loss and non-finite gradients before giving up


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
                    load_into(part, saved, "the training state")
                elif isinstance(part, torch.optim.Optimizer):
                    unpack_optimizer(part, saved)
                else:
                    part.update({k: v.to(part[k].device) for k, v in saved.items()})
            self.step = int(info["step"])
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise TrainingError(f"the state in {self.run.folder} does not fit its configuration: {error}") from error


def _pack(part: Part) -> dict[str, Tensor]:
    if isinstance(part, torch.optim.Optimizer):
        return pack_optimizer(part)
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
