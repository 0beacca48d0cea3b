"""The image stages (sec. 6.3): reconstruction, then adversarial. Source and driver are two frames of one clip."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export3d_cli.core.config.schema import TrainConfig
from export3d_cli.core.media.image import to_uint8, write_image
from export3d_cli.core.model.checkpoint import load_into, pack_optimizer, save_weights, unpack_optimizer
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.volume_renderer import BatchRows
from export3d_cli.core.runtime.errors import ConfigError, TrainingError
from export3d_cli.core.runtime.weights import resolve_weights
from export3d_cli.core.train import discriminator as adversary
from export3d_cli.core.train.cuda_graph import StepGraph
from export3d_cli.core.train.distributed import no_sync
from export3d_cli.core.train.identity_loss import load_identity_loss
from export3d_cli.core.train.landmark_loss import LandmarkLoss, LandmarkNetwork
from export3d_cli.core.train.losses import PerceptualDistance
from export3d_cli.core.train.lpips import load_perceptual_term
from export3d_cli.core.train.objective import learning_rate, reconstruction_loss, scheduled_raw_size
from export3d_cli.core.train.pair_sampler import Batch, PairSampler, Prefetcher, num_loader_threads
from export3d_cli.core.train.training_run import TrainingRun

MAX_SKIPPED_STEPS = 20  # consecutive updates with non-finite gradients before giving up
STAGE_SEEDS = {"reconstruction": 1, "adversarial": 2}  # the stage's number in `TrainingRun.seed_step`


class ImageStages:
    """Model, moving average, discriminator and optimisers of the stages that train on whole images."""

    def __init__(self, run: TrainingRun, model: Export3D, sampler: PairSampler, record: dict[str, Any]) -> None:
        config = run.config
        self.run, self.config, self.model, self.sampler = run, config, model, sampler
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on CPUs
        model.expression.requires_grad_(not is_expression_frozen(config))
        self.local_rows = self._assign_rows()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, fused=True)
        self.ema_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.perceptual = self._load_perceptual()
        self.identity = load_identity_loss(config.loss.embedder, run.device) if config.loss.identity > 0 else None
        self.landmarks = None
        if config.loss.landmarks > 0:
            self.landmarks = LandmarkLoss(LandmarkNetwork(resolve_weights("face_landmarker"))).to(run.device)
        self.record = {**record, "perceptual": self.perceptual.name if self.perceptual is not None else "none"}
        self.discriminator: adversary.Discriminator | None = None
        self.skipped_discriminator_steps = 0  # consecutive
        self.stage, self.step, self.start_minute = "reconstruction", 0, 0.0
        self.skipped_steps = 0  # consecutive
        if run.resumed_state is not None:
            self._resume(*run.resumed_state)
        compiled = torch.compile(model, backend=config.compile) if config.compile else model
        self.wrapped: nn.Module = run.world.wrap_ddp(compiled)  # type: ignore[arg-type]
        self.term_names: tuple[str, ...] = ()  # of the loss terms of a step
        self.cuda_graph = self._make_cuda_graph()

    def _load_perceptual(self) -> PerceptualDistance | None:
        distance = load_perceptual_term(self.config.loss)
        title = f"perceptual term: {distance.title}" if distance else "no perceptual term: loss.backbone is empty"
        self.run.report_progress("reconstruction", 0, 0, message=title)
        return distance.to(self.run.device) if distance else None

    def _make_cuda_graph(self) -> StepGraph | None:
        """Return the CUDA graph of a step, if one device processes the whole batch at once."""
        config, run = self.config, self.run
        is_whole_batch = run.world.size == 1 and config.accumulate == 1 and not config.compile
        if not (config.cuda_graph and is_whole_batch and run.device.type == "cuda"):
            return None
        flow, generator = self.model.flow, self.model.generator
        windows = None if flow is None else flow.windows
        return StepGraph(self.accumulate_gradients, self.parameters, [generator.plane_ema], windows)

    def _assign_rows(self) -> range:
        """Return the rows of every batch that this process takes."""
        world, config = self.run.world, self.config
        if config.batch % (world.size * config.accumulate):
            raise ConfigError(
                f"batch ({config.batch}) must be a multiple of processes times accumulate "
                f"({world.size} x {config.accumulate})"
            )
        count = config.batch // world.size
        if count < config.batch or config.accumulate > 1:  # eq. 12 needs the mean over the whole batch
            self.model.generator.plane_means = []
        return range(world.rank * count, (world.rank + 1) * count)

    def _resume(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        try:
            load_into(self.model, tensors_with_prefix(tensors, "model."), "the training state")
            self.ema_weights = {k: v.to(self.run.device) for k, v in tensors_with_prefix(tensors, "average.").items()}
            unpack_optimizer(self.optimizer, tensors)
            self.stage, self.step = info["stage"], int(info["step"])
            if self.stage == "adversarial":
                self._make_discriminator()
                assert self.discriminator is not None
                load_into(self.discriminator, tensors_with_prefix(tensors, "discriminator."), "the training state")
                unpack_optimizer(self.discriminator_optimizer, tensors_with_prefix(tensors, "against."))
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise TrainingError(
                f"the training state in {self.run.folder} does not fit its configuration: {error}"
            ) from error

    def _make_discriminator(self) -> None:
        torch.manual_seed(self.config.seed + 29)
        adversarial = self.config.adversarial
        self.discriminator = adversary.Discriminator(self.config.model.image_size, adversarial).to(self.run.device)
        self.discriminator_optimizer = adversary.make_discriminator_optimizer(self.discriminator, adversarial)

    @property
    def steps(self) -> int:
        """Number of steps of the stage."""
        return self.config.stage_steps(self.stage)

    @property
    def global_step(self) -> int:
        """Steps done in both stages: the data, the moving average and the raw size continue across them."""
        return self.step + (self.config.steps if self.stage == "adversarial" else 0)

    def train(self, stage: str) -> dict[str, float]:
        """Take the remaining steps of `stage`; return the last log line."""
        config, run = self.config, self.run
        if stage != self.stage:
            self.stage, self.step = stage, 0
        if stage == "adversarial":
            if self.cuda_graph is not None:  # not used here, so the raster windows may vary again
                self.cuda_graph.release()
            if self.discriminator is None:
                self._make_discriminator()
        values: dict[str, float] = {}
        sums: dict[str, list[float]] = {}
        self.start_minute = clock = run.elapsed_minutes()
        first_step = self.global_step - self.step

        def draw_batch(step: int) -> list[Batch]:
            batch = self.sampler.draw_pairs(config.seed, first_step + step, config.batch, self.local_rows)
            return batch.split(len(self.local_rows) // config.accumulate)

        with Prefetcher(draw_batch, self.step, self.steps, num_loader_threads(config.data, run.device)) as batches:
            while self.step < self.steps and not run.out_of_time():
                parts = [batch.to(run.device) for batch in batches.next()]
                lr = learning_rate(config, self.step, self.decay_fraction())
                if stage == "adversarial":
                    lr = learning_rate(config, config.steps, 1.0)  # the final rate of reconstruction
                for group in self.optimizer.param_groups:
                    group["lr"] = lr

                # update, unless the loss or a gradient is not finite
                plane_ema = self.model.generator.plane_ema.clone()
                fakes, terms = self.backward(parts)
                terms["grad"] = float(nn.utils.clip_grad_norm_(self.parameters, config.clip_grad or math.inf))
                if self.is_finite(terms):
                    self.optimizer.step()
                    self.update_plane_ema()
                    if self.discriminator is not None:
                        terms |= self.train_discriminator(parts, fakes)
                else:
                    self.model.generator.plane_ema.copy_(plane_ema)  # undo the forward pass
                    self.update_plane_ema(drop=True)
                self.step += 1
                self.update_ema()

                # bookkeeping
                if self.skipped_steps == 0:
                    for key, term in terms.items():
                        sums.setdefault(key, []).append(term)
                if (self.step % config.log_every == 0 or self.step == self.steps) and sums:
                    values = {k: float(np.mean(v)) for k, v in sums.items()} | {"lr": lr}
                    values["seconds_a_step"] = (run.elapsed_minutes() - clock) * 60 / len(sums["loss"])
                    values["images_a_second"] = config.batch / max(values["seconds_a_step"], 1e-9)
                    run.log(stage, self.step, self.steps, values)
                    sums, clock = {}, run.elapsed_minutes()
                if config.sample_every and self.step % config.sample_every == 0:
                    self.write_samples()
                if self.step % config.checkpoint_every == 0:
                    self.save()
        self.save()
        self.write_samples()
        return values

    def backward(self, parts: list[Batch]) -> tuple[list[Tensor], dict[str, float]]:
        """Compute the gradients of eq. 13 or 14 for the batch, part by part; return the outputs and the terms."""
        config, fakes = self.config, []
        sums: dict[str, float] = {}
        first_row = self.local_rows.start
        raw_size = scheduled_raw_size(config, self.global_step)
        self.model.train()
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)

        def seed() -> None:
            self.run.seed_step(STAGE_SEEDS[self.stage], self.step)  # every part draws what the whole batch would

        if self.cuda_graph is not None and self.discriminator is None:
            try:
                image, values = self.cuda_graph(parts[0], raw_size, seed)
                return [image], dict(zip(self.term_names, values.tolist(), strict=True))
            except RuntimeError as error:
                self.cuda_graph.release()
                self.cuda_graph = None
                reason = str(error).partition("\n")[0]
                message = f"the step cannot be one CUDA graph ({reason}): training continues without, more slowly"
                self.run.report_progress(self.stage, self.step, self.steps, message=message)
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(parts, 1):
            seed()
            batch_rows = (first_row, first_row := first_row + len(batch.source), config.batch)
            with no_sync(self.wrapped, is_last=number == len(parts)):
                image, values = self.accumulate_gradients(batch, raw_size, len(parts), batch_rows)
            for key, term in zip(self.term_names, values.tolist(), strict=True):
                sums[key] = sums.get(key, 0.0) + term / len(parts)
            fakes.append(image)
        return fakes, dict(zip(sums, self.run.world.all_reduce_mean(list(sums.values())), strict=True))

    def accumulate_gradients(
        self, batch: Batch, raw_size: int, parts: int = 1, batch_rows: BatchRows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of one of `parts` parts, the rows `batch_rows`, without synchronising with the device.

        Returns the output images (B, 3, H, W) and the values of `term_names`.
        """
        config = self.config
        with self.run.autocast():
            output = self.forward(self.wrapped, batch, raw_size, batch_rows)
            loss, terms = reconstruction_loss(
                output, batch, config, self.perceptual, self.identity, self.landmarks, self.head_masks(batch)
            )
        if self.discriminator is not None:  # eq. 14
            adversarial_loss = adversary.generator_loss(self.discriminator(output.image, batch.target_camera))
            loss, terms["g_adv"] = loss + config.adversarial.weight * adversarial_loss, adversarial_loss.detach()
        (loss / parts if parts > 1 else loss).backward()
        self.term_names = ("loss", *terms)
        return output.image.detach(), torch.stack([loss.detach(), *terms.values()])

    @torch.no_grad()
    def head_masks(self, batch: Batch) -> Tensor | None:
        """Return where the targets show the head, (B, 1, m, m) in 0..1, if the silhouette term is on."""
        if self.config.loss.silhouette <= 0 or self.model.flow is None:
            return None
        return self.model.flow.head_mask(batch.target_points, batch.target_camera, batch.target_person_mask)

    def train_discriminator(self, parts: list[Batch], fakes: list[Tensor]) -> dict[str, float]:
        """Take one step of the discriminator, with lazy R1; return its terms."""
        assert self.discriminator is not None
        adversarial, discriminator = self.config.adversarial, self.discriminator
        discriminator.requires_grad_(True)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        sums = {"d_loss": 0.0, "d_real": 0.0, "d_fake": 0.0}
        for batch, fake in zip(parts, fakes, strict=True):
            camera = batch.target_camera
            real_logits, fake_logits = discriminator(batch.target, camera), discriminator(fake, camera)
            loss = adversary.discriminator_loss(real_logits, fake_logits)
            terms = {"d_loss": loss, "d_real": real_logits.mean(), "d_fake": fake_logits.mean()}
            if adversarial.r1_gamma > 0 and self.step % adversarial.r1_interval == 0:
                terms["r1"] = adversary.r1_penalty(discriminator, batch.target, camera)
                loss = loss + adversarial.r1_gamma / 2 * adversarial.r1_interval * terms["r1"]
            (loss / len(parts)).backward()
            for key, term in terms.items():
                sums[key] = sums.get(key, 0.0) + float(term.detach()) / len(parts)
        self.run.world.average_gradients(discriminator.parameters())
        values = dict(zip(sums, self.run.world.all_reduce_mean(list(sums.values())), strict=True))
        if not math.isfinite(values["d_loss"]):
            self.skipped_discriminator_steps += 1
            if self.skipped_discriminator_steps > self.config.skip_nonfinite:
                self.run.check_finite(values["d_loss"], self.stage, self.step, values)
            return {}
        self.skipped_discriminator_steps = 0
        self.discriminator_optimizer.step()
        return values

    def is_finite(self, terms: dict[str, float]) -> bool:
        """Whether loss and gradients are finite; raises `TrainingError` after too many consecutive failures."""
        finite = math.isfinite(terms["loss"]) and math.isfinite(terms["grad"])
        self.skipped_steps = 0 if finite else self.skipped_steps + 1
        if self.skipped_steps > self.config.skip_nonfinite:
            self.run.check_finite(terms["loss"], self.stage, self.step, terms)
        if self.skipped_steps > max(MAX_SKIPPED_STEPS, self.config.skip_nonfinite):
            raise TrainingError(
                f"gradients were not finite for {self.skipped_steps} steps up to step {self.step}: lower lr or use fp32"
            )
        return finite

    @staticmethod
    def forward(model: nn.Module, batch: Batch, raw_size: int | None, batch_rows: BatchRows | None = None) -> Any:
        """Run the model on a batch."""
        return model(
            batch.source, batch.source_beta, batch.source_camera, batch.source_points,
            batch.target_beta, batch.target_camera, batch.source_person_mask, raw_size=raw_size, batch_rows=batch_rows,
        )  # fmt: skip

    def decay_fraction(self) -> float:
        """Return the progress of the learning-rate decay, 0..1."""
        if self.stage == "adversarial":
            return 1.0
        if self.config.decay_by_time:
            return self.run.time_fraction(self.start_minute)
        return self.step / max(self.config.steps, 1)

    @torch.no_grad()
    def update_plane_ema(self, *, drop: bool = False) -> None:
        """Update eq. 12 by the mean over all parts and processes, unless the forward pass has done it."""
        generator = self.model.generator
        if generator.plane_means:
            mean = self.run.world.all_reduce_mean_(torch.stack(generator.plane_means).mean(0))
            if not drop:
                generator.update_plane_ema(mean)
            generator.plane_means.clear()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the exponential moving average of the weights, with a faster decay at first; integers are copied."""
        decay = min(self.config.ema, (1 + self.global_step) / (10 + self.global_step))
        state = self.model.state_dict()
        names = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.ema_weights[k] for k in names], [state[k] for k in names], 1 - decay)
        for name in state.keys() - set(names):
            self.ema_weights[name].copy_(state[name])

    def save(self) -> None:
        """Write the training state and the inference weights."""
        self.run.last_saved = (self.stage, self.step)
        decayed = self.decay_fraction() if self.config.decay_by_time else 0.0  # collective: before the return
        if not self.run.world.is_main:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.ema_weights.items()}
        if self.discriminator is not None:
            tensors |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
            tensors |= {f"against.{k}": v for k, v in pack_optimizer(self.discriminator_optimizer).items()}
        self.run.save(self.stage, self.step, tensors | pack_optimizer(self.optimizer), decayed)
        record = {**self.record, "steps": min(self.global_step, self.config.steps)}
        if self.stage == "adversarial":
            record["adversarial_steps"] = self.step
        save_weights(self.weights_path, self.ema_weights, self.config.model, record, licence=self.config.license)

    @property
    def weights_path(self) -> Path:
        """File of the inference weights."""
        return self.run.folder / "weights.safetensors"

    @torch.no_grad()
    def write_samples(self, rows: int = 4) -> None:
        """Write a grid of source | driver | raw render | output | depth, of pairs that are the same over the run."""
        if not self.run.world.is_main:
            return
        batch = self.sampler.draw_pairs(self.config.seed + 1, 2**31, rows).to(self.run.device)
        training_weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema_weights)
        self.model.eval()
        try:
            with self.run.autocast():
                output = self.forward(self.model, batch, scheduled_raw_size(self.config, max(self.global_step - 1, 0)))
        finally:
            self.model.load_state_dict(training_weights)
            self.model.train()
        side = batch.target.shape[-1]
        depth = output.depth.float()
        low, high = depth.amin((2, 3), keepdim=True), depth.amax((2, 3), keepdim=True)
        depth = (1 - 2 * (depth - low) / (high - low).clamp_min(1e-6)).expand(-1, 3, -1, -1)  # near is white
        columns = [batch.source, batch.target, output.raw[:, :3], output.image, depth]
        resized = [nn.functional.interpolate(c.float().cpu(), size=(side, side)) for c in columns]
        grid = torch.cat([torch.cat(list(c), dim=1) for c in resized], dim=2)  # (3, rows * H, 5 * W)
        folder = self.run.folder / "samples"
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{self.global_step:07d}.png", to_uint8(grid))


def is_expression_frozen(config: TrainConfig) -> bool:
    """Whether f_e is frozen: after its pre-training. Without it, or as an ablation, f_e is trained end to end."""
    is_pretrained = "clebs" in config.stages or config.init or config.expression_from
    return config.model.expression == "clebs" and bool(is_pretrained)


def tensors_with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, with it removed from the names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
