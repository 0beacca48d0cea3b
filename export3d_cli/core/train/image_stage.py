"""The image stages (sec. 6.3): reconstruction, and the adversarial one after it. S and D are two frames of one clip."""

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
from export3d_cli.core.train.augmentation import Adaptive, augment
from export3d_cli.core.train.cuda_graph import StepGraph
from export3d_cli.core.train.distributed import no_sync
from export3d_cli.core.train.identity_loss import load_identity_loss
from export3d_cli.core.train.landmark_loss import LandmarkLoss, LandmarkNetwork
from export3d_cli.core.train.losses import PerceptualDistance
from export3d_cli.core.train.lpips import load_perceptual_term
from export3d_cli.core.train.objective import learning_rate, reconstruction_loss, scheduled_raw_size
from export3d_cli.core.train.pair_sampler import Batch, PairSampler, Prefetcher, num_loader_threads
from export3d_cli.core.train.training_run import TrainingRun

MAX_SKIPPED_STEPS = 20  # updates with gradients that are no numbers, before giving up
STAGE_SEEDS = {"reconstruction": 1, "adversarial": 2}  # the number of a stage in `Run.seed`


class ImageStages:
    """Model, moving average and optimisers of the stages that are trained on images."""

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
        self.adaptive = Adaptive(config.adversarial)
        self.skipped_discriminator_steps = 0  # steps in a row of the discriminator whose loss was no number
        self.discriminator: adversary.Discriminator | None = None
        self.stage, self.step, self.skipped, self.start_minute = "reconstruction", 0, 0, 0.0
        if run.resumed_state is not None:
            self._resume(*run.resumed_state)
        compiled = torch.compile(model, backend=config.compile) if config.compile else model
        self.wrapped: nn.Module = run.world.wrap_ddp(compiled)  # type: ignore[arg-type]
        self.term_names: tuple[str, ...] = ()  # of a step's terms
        self.cuda_graph = self._make_cuda_graph()

    def _load_perceptual(self) -> PerceptualDistance | None:
        found = load_perceptual_term(self.config.loss)
        if found is None:
            self.run.report_progress("reconstruction", 0, 0, message="no perceptual term: loss.backbone is empty")
            return None
        self.run.report_progress("reconstruction", 0, 0, message=f"perceptual term: {found.title}")
        return found.to(self.run.device)

    def _make_cuda_graph(self) -> StepGraph | None:
        """Where a step is one CUDA graph: one device takes the whole batch at once."""
        config, run = self.config, self.run
        alone = run.world.size == 1 and config.accumulate == 1 and not config.compile
        if not (config.cuda_graph and alone and run.device.type == "cuda"):
            return None
        flow, generator = self.model.flow, self.model.generator
        windows = None if flow is None else flow.windows
        return StepGraph(self.accumulate_gradients, self.parameters, [generator.plane_ema], windows)

    def _assign_rows(self) -> range:
        """Which rows of every batch this process takes."""
        world, config = self.run.world, self.config
        if config.batch % (world.size * config.accumulate):
            raise ConfigError(
                f"batch ({config.batch}) must be a multiple of processes times accumulate "
                f"({world.size} x {config.accumulate})"
            )
        rows = config.batch // world.size
        if rows < config.batch or config.accumulate > 1:  # what depends on the whole batch must know where it is
            self.model.generator.plane_means = []
        return range(world.rank * rows, (world.rank + 1) * rows)

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
                if "augment.state" in tensors:
                    self.adaptive.state = tensors["augment.state"]
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            where = f"the training state in {self.run.folder} does not fit its configuration"
            raise TrainingError(f"{where}: {error}") from error

    def _make_discriminator(self) -> None:
        torch.manual_seed(self.config.seed + 29)
        adversarial = self.config.adversarial
        self.discriminator = adversary.Discriminator(self.config.model.image_size, adversarial).to(self.run.device)
        self.discriminator_optimizer = adversary.make_discriminator_optimizer(self.discriminator, adversarial)

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return self.config.stage_steps(self.stage)

    @property
    def global_step(self) -> int:
        """Steps done of both stages: data, moving average and raw render go on where reconstruction ended."""
        return self.step + (self.config.steps if self.stage == "adversarial" else 0)

    def train(self, stage: str) -> dict[str, float]:
        """Take the steps of `stage` that are left; the last log line."""
        config, run = self.config, self.run
        if stage != self.stage:
            self.stage, self.step = stage, 0
        if stage == "adversarial":
            if (
                self.cuda_graph is not None
            ):  # such steps are not recorded: the rasteriser need not keep to what was seen
                self.cuda_graph.release()
            if self.discriminator is None:
                self._make_discriminator()
        values: dict[str, float] = {}
        sums: dict[str, list[float]] = {}
        self.start_minute = clock = run.elapsed_minutes()
        ahead = self.global_step - self.step

        def make(step: int) -> list[Batch]:
            batch = self.sampler.draw_pairs(config.seed, ahead + step, config.batch, self.local_rows)
            return batch.split(len(self.local_rows) // config.accumulate)

        with Prefetcher(make, self.step, self.steps, num_loader_threads(config.data, run.device)) as batches:
            while self.step < self.steps and not run.out_of_time():
                parts = [batch.to(run.device) for batch in batches.next()]
                lr = learning_rate(config, self.step, self.decay_fraction())
                if stage == "adversarial":
                    lr = learning_rate(config, config.steps, 1.0)  # that at which reconstruction ended
                for group in self.optimizer.param_groups:
                    group["lr"] = lr

                # update, unless the loss or a gradient is no number
                planes = self.model.generator.plane_ema.clone()
                fakes, terms = self.backward(parts)
                terms["grad"] = float(nn.utils.clip_grad_norm_(self.parameters, config.clip_grad or math.inf))
                if self.is_finite(terms):
                    self.optimizer.step()
                    self.update_plane_ema()
                    if self.discriminator is not None:
                        terms |= self.train_discriminator(parts, fakes)
                else:
                    self.model.generator.plane_ema.copy_(planes)  # it has seen the batch
                    self.update_plane_ema(drop=True)
                self.step += 1
                self.update_ema()

                # bookkeeping
                if self.skipped == 0:
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
        """Gradients of eq. 13, or 14, by the whole batch, part by part; the results and the terms."""
        config, fakes = self.config, []
        sums: dict[str, float] = {}
        first = self.local_rows.start
        self.model.train()
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)

        def seed() -> None:
            self.run.seed_step(STAGE_SEEDS[self.stage], self.step)  # every part draws what the whole batch would

        if self.cuda_graph is not None and self.discriminator is None:
            try:
                image, values = self.cuda_graph(parts[0], scheduled_raw_size(config, self.global_step), seed)
                return [image], dict(zip(self.term_names, values.tolist(), strict=True))
            except RuntimeError as error:
                self.cuda_graph.release()
                self.cuda_graph = None
                why = str(error).partition("\n")[0]
                told = f"the step cannot be one CUDA graph ({why}): on, slower, with its operations one by one"
                self.run.report_progress(self.stage, self.step, self.steps, message=told)
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(parts, 1):
            seed()
            rows = range(first, first := first + len(batch.source))
            with no_sync(self.wrapped, is_last=number == len(parts)):
                image, values = self.accumulate_gradients(
                    batch, scheduled_raw_size(config, self.global_step), rows, len(parts)
                )
            for key, term in zip(self.term_names, values.tolist(), strict=True):
                sums[key] = sums.get(key, 0.0) + term / len(parts)
            fakes.append(image)
        return fakes, dict(zip(sums, self.run.world.all_reduce_mean(list(sums.values())), strict=True))

    def accumulate_gradients(
        self, batch: Batch, raw: int, rows: range | None = None, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Add a part's gradients, without asking the device for anything; the result, and the terms of `names`."""
        config = self.config
        with self.run.autocast():
            batch_rows = None if rows is None else (rows.start, rows.stop, config.batch)
            output = self.forward(self.wrapped, batch, raw, batch_rows)
            loss, terms = reconstruction_loss(
                output, batch, config, self.perceptual, self.identity, self.landmarks, self.head_masks(batch)
            )
        if self.discriminator is not None and rows is not None:  # eq. 14
            shown = self.shown(output.image, 0, rows)
            fooled = adversary.generator_loss(self.discriminator(shown, batch.target_camera))
            loss, terms["g_adv"] = loss + config.adversarial.weight * fooled, fooled.detach()
        (loss / parts if parts > 1 else loss).backward()
        self.term_names = ("loss", *terms)
        return output.image.detach(), torch.stack([loss.detach(), *terms.values()])

    @torch.no_grad()
    def head_masks(self, batch: Batch) -> Tensor | None:
        """Where the targets show the head, (B, 1, m, m), if that is asked for."""
        if self.config.loss.silhouette <= 0 or self.model.flow is None:
            return None
        return self.model.flow.head_mask(batch.target_points, batch.target_camera, batch.target_person_mask)

    def train_discriminator(self, parts: list[Batch], fakes: list[Tensor]) -> dict[str, float]:
        """One step of the discriminator, with R1 every now and then."""
        assert self.discriminator is not None
        adversarial, d = self.config.adversarial, self.discriminator
        d.requires_grad_(True)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        sums = {"d_loss": 0.0, "d_real": 0.0, "d_fake": 0.0, "d_sign": 0.0}
        first = self.local_rows.start
        for batch, fake in zip(parts, fakes, strict=True):
            rows = range(first, first := first + len(fake))
            real, fake = self.shown(batch.target, 1, rows), self.shown(fake, 2, rows)
            real_logits, fake_logits = d(real, batch.target_camera), d(fake, batch.target_camera)
            loss = adversary.discriminator_loss(real_logits, fake_logits)
            terms = {"d_loss": loss, "d_real": real_logits.mean(), "d_fake": fake_logits.mean()}
            terms["d_sign"] = real_logits.sign().mean()
            if adversarial.r1_gamma > 0 and self.step % adversarial.r1_interval == 0:
                terms["r1"] = adversary.r1_penalty(d, real, batch.target_camera)  # of the image as it is shown
                loss = loss + adversarial.r1_gamma / 2 * adversarial.r1_interval * terms["r1"]
            (loss / len(parts)).backward()
            for key, term in terms.items():
                sums[key] = sums.get(key, 0.0) + float(term.detach()) / len(parts)
        self.run.world.average_gradients(d.parameters())
        values = dict(zip(sums, self.run.world.all_reduce_mean(list(sums.values())), strict=True))
        if not math.isfinite(values["d_loss"]):
            self.skipped_discriminator_steps += 1
            if self.skipped_discriminator_steps > self.config.skip_nonfinite:
                self.run.check_finite(values["d_loss"], self.stage, self.step, values)
            return {}
        self.skipped_discriminator_steps = 0
        self.discriminator_optimizer.step()
        self.adaptive.update(values["d_sign"], self.config.batch)
        return values | {"augment": self.adaptive.p}

    def shown(self, image: Tensor, which: int, rows: range) -> Tensor:
        """Images (rows of the batch) as the discriminator sees them; `which` tells apart what is drawn in a step."""
        seed = ((self.config.seed * 1_000_003 + self.step) * 4 + which) % 2**63
        return augment(image, self.adaptive.p, seed, rows, self.config.batch)

    def is_finite(self, terms: dict[str, float]) -> bool:
        """Whether the step can be taken; raises after too many in a row that cannot."""
        good = math.isfinite(terms["loss"]) and math.isfinite(terms["grad"])
        self.skipped = 0 if good else self.skipped + 1
        if self.skipped > self.config.skip_nonfinite:
            self.run.check_finite(terms["loss"], self.stage, self.step, terms)
        if self.skipped > max(MAX_SKIPPED_STEPS, self.config.skip_nonfinite):
            raise TrainingError(
                f"gradients were not finite for {self.skipped} steps up to step {self.step}: lower lr or use fp32"
            )
        return good

    @staticmethod
    def forward(model: nn.Module, batch: Batch, raw: int | None, batch_rows: BatchRows | None = None) -> Any:
        """The model on a batch."""
        return model(
            batch.source, batch.source_beta, batch.source_camera, batch.source_points,
            batch.target_beta, batch.target_camera, batch.source_person_mask, raw_size=raw, batch_rows=batch_rows,
        )  # fmt: skip

    def decay_fraction(self) -> float:
        """How far the decay of the learning rate is."""
        if self.stage == "adversarial":
            return 1.0
        if self.config.decay_by_time:
            return self.run.time_fraction(self.start_minute)
        return self.step / max(self.config.steps, 1)

    @torch.no_grad()
    def update_plane_ema(self, *, drop: bool = False) -> None:
        """Eq. 12 by the mean over all parts and processes, where the generator has not done it itself."""
        generator = self.model.generator
        if generator.plane_means:
            mean = self.run.world.all_reduce_mean_(torch.stack(generator.plane_means).mean(0))
            if not drop:
                generator.update_plane_ema(mean)
            generator.plane_means.clear()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Exponential moving average of the weights, quick at first; integers are copied."""
        keep = min(self.config.ema, (1 + self.global_step) / (10 + self.global_step))
        own = self.model.state_dict()
        names = [k for k, v in own.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.ema_weights[k] for k in names], [own[k] for k in names], 1 - keep)
        for name in own.keys() - set(names):
            self.ema_weights[name].copy_(own[name])

    def save(self) -> None:
        """Write training state and inference weights."""
        self.run.last_saved = (self.stage, self.step)
        decayed = (
            self.decay_fraction() if self.config.decay_by_time else 0.0
        )  # asked by all: the first one's clock is shared
        if not self.run.world.is_main:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.ema_weights.items()}
        if self.discriminator is not None:
            tensors |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
            tensors |= {f"against.{k}": v for k, v in pack_optimizer(self.discriminator_optimizer).items()}
            tensors["augment.state"] = self.adaptive.state
        self.run.save(self.stage, self.step, tensors | pack_optimizer(self.optimizer), decayed)
        record = {**self.record, "steps": min(self.global_step, self.config.steps)}
        if self.stage == "adversarial":
            record["adversarial_steps"] = self.step
        save_weights(self.weights_path, self.ema_weights, self.config.model, record)

    @property
    def weights_path(self) -> Path:
        """The inference weights."""
        return self.run.folder / "weights.safetensors"

    @torch.no_grad()
    def write_samples(self, rows: int = 4) -> None:
        """Write a grid of source | driver | raw | result | depth, of pairs that stay the same over the run."""
        if not self.run.world.is_main:
            return
        batch = self.sampler.draw_pairs(self.config.seed + 1, 2**31, rows).to(self.run.device)
        own = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema_weights)
        self.model.eval()
        try:
            with self.run.autocast():
                output = self.forward(self.model, batch, scheduled_raw_size(self.config, max(self.global_step - 1, 0)))
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
        write_image(folder / f"{self.global_step:07d}.png", to_uint8(grid))


def is_expression_frozen(config: TrainConfig) -> bool:
    """f_e is frozen after its own stage; without one, or as an ablation, it is trained end to end."""
    known = "clebs" in config.stages or config.init or config.expression_from
    return config.model.expression == "clebs" and bool(known)


def tensors_with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
