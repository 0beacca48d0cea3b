"""Training: the CLeBS stage, then reconstruction (sec. 6.3). To resume, run the same command again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export3d_cli.core import weights
from export3d_cli.core.checkpoint import load_into, load_weights, pack_optimizer, save_weights, unpack_optimizer
from export3d_cli.core.config import TrainConfig, save_yaml
from export3d_cli.core.errors import ConfigError, TrainingError
from export3d_cli.core.face.mesh import canonical_face, flow_triangles
from export3d_cli.core.media.image import to_uint8, write_image
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.train import losses
from export3d_cli.core.train.cache import load_sets
from export3d_cli.core.train.data import Batch, Prefetcher, Sampler
from export3d_cli.core.train.pretrain import clebs_stage
from export3d_cli.core.train.run import Run, TrainEvent, check_finite

SKIPPED_IN_A_ROW = 20  # updates with gradients that are no numbers, before giving up


@dataclass(frozen=True)
class TrainSummary:
    """What a call of `train` did."""

    run: Path
    weights: Path  # inference weights (moving average); absent while the first stage is unfinished
    stage: str  # the stage reached
    step: int  # its steps done
    finished: bool  # False: `max_minutes` ran out
    minutes: float
    values: dict[str, float]  # the last log line


def train(config: TrainConfig, *, progress: Callable[[TrainEvent], None] | None = None) -> TrainSummary:
    """Run the stages of `config` in its run folder, or go on with them where an earlier call stopped."""
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    run = Run.open(config, progress)
    save_yaml(config, run.folder / "config.yaml")
    sets = load_sets(config.data, config.model.image_size, progress=lambda m: run.tell("data", 0, 0, message=m))
    face = canonical_face(weights.weights_dir() / "face_landmarker.task")
    sampler = Sampler(sets, config.data, face.mirror)
    torch.manual_seed(config.seed)
    model = Export3D(config.model).to(run.device)
    if model.flow is not None:
        model.flow.triangles.copy_(torch.from_numpy(flow_triangles(face)))
    _start_from(model, config)
    basis = model.flow.basis if model.flow is not None else None

    resumed_stage = run.resumed[1]["stage"] if run.resumed is not None else ""
    if "clebs" in config.stages and resumed_stage != "reconstruction":
        done = clebs_stage(run, model.expression, basis, sampler)
        if done < config.clebs.warm + config.clebs.steps:
            return _summary(run, "clebs", done, finished=False, values={})
        run.resumed = None  # the state of the next stage starts empty
    if "reconstruction" not in config.stages:
        save_weights(run.folder / "weights.safetensors", model.state_dict(), config.model, _record(config, 0))
        return _summary(run, "clebs", config.clebs.warm + config.clebs.steps, finished=True, values={})
    return _Reconstruction(run, model, sampler).train()


def learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """Linear warm-up, then (with `decay`) a cosine to a tenth; `fraction` is how far the decay is, 0..1."""
    lr = config.lr * min(1.0, (step + 1) / config.warmup) if config.warmup else config.lr
    if config.decay or config.decay_by_time:
        lr *= 0.1 + 0.45 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
    return lr


def raw_size(config: TrainConfig, step: int) -> int:
    """Side of the raw render at a step: small at first, where `raw_start` says so."""
    return config.raw_start if config.raw_start > 0 and step < config.raw_grow else config.model.raw_size


def reconstruction_loss(
    output: Any, batch: Batch, config: TrainConfig, perceptual: losses.Perceptual | None
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 13, `L_rec = L2_raw + L2 + LPIPS_raw + LPIPS`, and the terms beyond the paper; each with its weight."""
    w = config.loss
    small = losses.downsample(batch.target, output.raw.shape[-1])
    terms = {"l2": w.l2 * losses.l2(output.image, batch.target), "l2_raw": w.raw * w.l2 * losses.l2(output.raw, small)}
    if w.l1 > 0:
        terms["l1"] = w.l1 * losses.l1(output.image, batch.target)
        terms["l1_raw"] = w.raw * w.l1 * losses.l1(output.raw, small)
    if perceptual is not None and w.perceptual > 0:
        terms["perceptual"] = w.perceptual * perceptual(output.image, batch.target)
        if w.raw > 0:
            terms["perceptual_raw"] = w.raw * w.perceptual * perceptual(output.raw, small, scales=1)
    if w.mask > 0:
        mask = losses.face_mask(batch.target_landmarks, batch.target.shape[-1])
        terms["mask"] = w.mask * losses.mask_loss(output.image, batch.target, mask)
    if w.offset > 0 and getattr(output, "offset", None) is not None:
        terms["offset"] = w.offset * output.offset.float().square().mean()
    loss = torch.stack([t.float() for t in terms.values()]).sum()
    return loss, {k: float(v.detach()) for k, v in terms.items()}


class _Reconstruction:
    """Phase 1 of sec. 6.3: source and driver are two frames of one clip."""

    def __init__(self, run: Run, model: Export3D, sampler: Sampler) -> None:
        config = run.config
        self.run, self.config, self.model, self.sampler = run, config, model, sampler
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on CPUs
        # f_e is frozen after its own stage; without one it is trained end to end (the paper's ablation)
        known = bool("clebs" in config.stages or config.init or config.expression)
        model.expression.requires_grad_(not known)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, fused=True)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.perceptual = losses.load_perceptual(config.loss.backbone).to(run.device) if config.loss.backbone else None
        self.record = _record(config, 0)
        self.step = 0
        if run.resumed is not None:
            tensors, info = run.resumed
            try:
                load_into(model, _part(tensors, "model."), "the training state")
                self.average = {k: v.to(run.device) for k, v in _part(tensors, "average.").items()}
                unpack_optimizer(self.optimizer, tensors)
            except (ValueError, RuntimeError) as error:
                raise TrainingError(
                    f"the training state in {run.folder} does not fit its configuration: {error}"
                ) from error
            self.step = int(info["step"])
        self.began = run.minutes()

    def train(self) -> TrainSummary:
        """Take the steps that are left."""
        config, run = self.config, self.run
        values: dict[str, float] = {}
        sums: dict[str, list[float]] = {}
        skipped = 0
        clock = run.minutes()

        def make(step: int) -> Batch:
            return self.sampler.batch(config.seed, step, config.batch)

        with Prefetcher(make, self.step, config.steps) as batches:
            while self.step < config.steps and not run.out_of_time():
                batch = batches.next().to(run.device)
                run.seed(1, self.step)
                lr = learning_rate(config, self.step, self.fraction())
                for group in self.optimizer.param_groups:
                    group["lr"] = lr

                # forward and backward
                self.model.train()
                with run.autocast():
                    output = self.forward(self.model, batch, raw_size(config, self.step))
                    loss, terms = reconstruction_loss(output, batch, config, self.perceptual)
                value = float(loss.detach())
                check_finite(value, "reconstruction", self.step, terms)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()

                # update, unless a gradient is no number
                norm = float(nn.utils.clip_grad_norm_(self.parameters, config.clip_grad or math.inf))
                skipped = 0 if math.isfinite(norm) else skipped + 1
                if skipped > SKIPPED_IN_A_ROW:
                    raise TrainingError(
                        f"gradients were not finite for {skipped} steps up to step {self.step}: lower lr or use fp32"
                    )
                if skipped == 0:
                    self.optimizer.step()
                self.step += 1
                self.update_average()

                # bookkeeping
                for key, term in {"loss": value, "grad": norm, **terms}.items():
                    sums.setdefault(key, []).append(term)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    values = {k: float(np.mean(v)) for k, v in sums.items()} | {"lr": lr}
                    values["seconds_a_step"] = (run.minutes() - clock) * 60 / len(sums["loss"])
                    run.log("reconstruction", self.step, config.steps, values)
                    sums, clock = {}, run.minutes()
                if config.sample_every and self.step % config.sample_every == 0:
                    self.sample()
                if self.step % config.checkpoint_every == 0:
                    self.save()
        self.save()
        self.sample()
        return _summary(run, "reconstruction", self.step, finished=self.step >= config.steps, values=values)

    @staticmethod
    def forward(model: nn.Module, batch: Batch, raw: int | None) -> Any:
        """The model on a batch."""
        return model(
            batch.source, batch.source_beta, batch.source_camera, batch.source_points,
            batch.target_beta, batch.target_camera, raw_size=raw,
        )  # fmt: skip

    def fraction(self) -> float:
        """How far the decay of the learning rate is."""
        if self.config.decay_by_time:
            return self.run.time_fraction(self.began)
        return self.step / max(self.config.steps, 1)

    @torch.no_grad()
    def update_average(self) -> None:
        """Exponential moving average of the weights, quick at first; integers are copied."""
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        own = self.model.state_dict()
        names = [k for k, v in own.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in names], [own[k] for k in names], 1 - keep)
        for name in own.keys() - set(names):
            self.average[name].copy_(own[name])

    def save(self) -> None:
        """Write training state and inference weights."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        decayed = self.fraction() if self.config.decay_by_time else 0.0
        self.run.save("reconstruction", self.step, tensors | pack_optimizer(self.optimizer), decayed)
        path = self.run.folder / "weights.safetensors"
        save_weights(path, self.average, self.config.model, {**self.record, "steps": self.step})

    @torch.no_grad()
    def sample(self, rows: int = 4) -> None:
        """Write a grid of source | driver | raw | result | depth, of pairs that stay the same over the run."""
        batch = self.sampler.batch(self.config.seed + 1, 2**31, rows).to(self.run.device)
        own = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        try:
            with self.run.autocast():
                output = self.forward(self.model, batch, raw_size(self.config, max(self.step - 1, 0)))
        finally:
            self.model.load_state_dict(own)
            self.model.train()
        side = batch.target.shape[-1]
        depth = output.depth.float()
        low, high = depth.amin((2, 3), keepdim=True), depth.amax((2, 3), keepdim=True)
        depth = (1 - 2 * (depth - low) / (high - low).clamp_min(1e-6)).expand(-1, 3, -1, -1)  # near is bright
        columns = [batch.source, batch.target, output.raw[:, :3], output.image, depth]
        fitted = [nn.functional.interpolate(c.float().cpu(), size=(side, side)) for c in columns]
        grid = torch.cat([torch.cat(list(c), dim=1) for c in fitted], dim=2)  # (3, rows * H, 5 * W)
        folder = self.run.folder / "samples"
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{self.step:07d}.png", to_uint8(grid))


def _start_from(model: Export3D, config: TrainConfig) -> None:
    """Fill a new model from `init`, or its expression code and basis flow from `expression`."""
    if config.init:
        state, found, _ = load_weights(weights.resolve(config.init))
        if found != config.model and replace(found, raw_size=config.model.raw_size) != config.model:
            raise ConfigError(f"init {config.init} holds a model of another size: use its configuration")
        load_into(model, state, f"the weights {config.init}")
    if config.expression:
        state, _, _ = load_weights(weights.resolve(config.expression))
        part = {k: v for k, v in state.items() if k.startswith("expression.") or k == "flow.basis"}
        load_into(model, {**model.state_dict(), **part}, f"the expression code of {config.expression}")


def _record(config: TrainConfig, step: int) -> dict[str, Any]:
    """The training record in the weights' header: enough to know what the weights saw, no paths."""
    own = "clebs" in config.stages
    record = {
        "stages": list(config.stages),
        "steps": step,
        "clebs_steps": config.clebs.steps if own else 0,
        "denominator": config.clebs.denominator if own else "",
        "batch": config.batch,
        "seed": config.seed,
        "data": [Path(p).name for p in config.data.path],
        "backbone": Path(config.loss.backbone).name,
    }
    for key in ("init", "expression"):  # what came from elsewhere keeps its own record
        if getattr(config, key):
            record[key] = load_weights(weights.resolve(getattr(config, key)))[2]
    return record


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _summary(run: Run, stage: str, step: int, *, finished: bool, values: dict[str, float]) -> TrainSummary:
    return TrainSummary(run.folder, run.folder / "weights.safetensors", stage, step, finished, run.minutes(), values)
