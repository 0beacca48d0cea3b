"""The image stages (sec. 6.3): reconstruction, then adversarial. Source and driver are two frames of one clip."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import TrainConfig
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.volume_renderer import BatchRows
from export3d_cli.core.model.warp.mesh_flow import NECK_FADE_HEIGHT
from export3d_cli.core.model.warp.rasterizer import RasterWindows
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.runtime.weights import resolve_weights
from export3d_cli.core.train import discriminator as adversary
from export3d_cli.core.train.losses import LandmarkLoss, LandmarkNetwork, draw_rays, ray_loss, reconstruction_loss
from export3d_cli.core.train.perceptual import load_perceptual
from export3d_cli.core.train.planedict_stage import disentanglement_loss
from export3d_cli.core.train.stage import Stage, TrainingRun, is_finite, update_ema
from export3d_cli.core.train.training_data import Batch, PairSampler

VOLUME_PARTS = ("expression.", "generator.", "decoder.", "source_view.eighth.", "source_view.quarter.")
CROSS_INTERVAL = 3  # of the disentanglement loss: two steps within people, one with another driver
EAGER_STEPS = 24  # steps without a graph first: they measure the widths of the rasteriser's windows
WARMUP_RUNS = 3  # runs on the capture stream before the capture


class StepGraph:
    """Runs `compute`, which leaves gradients in the parameters, eagerly for `EAGER_STEPS` steps, then replays it.

    A step is about seven thousand small kernels. Launched one by one they leave a fast GPU idle for two thirds of the
    time; as one CUDA graph they are launched together.
    """

    def __init__(self, compute: Callable[[Batch, Any], tuple[Tensor, ...]], parameters: Sequence[Tensor],
                 buffers: Sequence[Tensor], windows: RasterWindows | None) -> None:  # fmt: skip
        """All shapes must stay fixed; warm-up and capture restore the `buffers`, which `compute` changes."""
        self.compute, self.parameters, self.buffers, self.windows = compute, parameters, buffers, windows
        self.graph_key: Any = None
        self.eager_steps_done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_batch: Batch | None = None
        self.static_result: tuple[Tensor, ...] = ()

    def __call__(self, batch: Batch, graph_key: Any, seed: Callable[[], None]) -> tuple[Tensor, ...]:
        """Run `compute` after `seed`; another `graph_key` records a new graph. The next call overwrites the result."""
        if graph_key != self.graph_key:
            self.release()
            self.graph_key, self.eager_steps_done = graph_key, 0
        if self.eager_steps_done < EAGER_STEPS:
            self.eager_steps_done += 1
            seed()
            self._clear_gradients()
            return self.compute(batch, graph_key)
        if self.graph is None:
            self._record(batch, graph_key)
        assert self.static_batch is not None and self.graph is not None
        for static, new in zip(self.static_batch, batch, strict=True):
            static.copy_(new)
        seed()
        self.graph.replay()
        return self.static_result

    def release(self) -> None:
        """Drop the graph and let the rasteriser's windows grow again."""
        self.graph, self.static_result = None, ()
        if self.windows is not None:
            self.windows.fixed = False

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self, batch: Batch, graph_key: Any) -> None:
        self.static_batch = Batch(*(x.clone() for x in batch))
        if self.windows is not None:
            self.windows.fixed = True
        saved = [buffer.clone() for buffer in self.buffers]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_RUNS):
                    self._clear_gradients()
                    self.compute(self.static_batch, graph_key)
            torch.cuda.current_stream().wait_stream(stream)
            self._clear_gradients()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.static_result = self.compute(self.static_batch, graph_key)
        finally:
            for buffer, value in zip(self.buffers, saved, strict=True):
                buffer.copy_(value)


class ImageStages(Stage):
    """Model, moving average, discriminator and optimisers of the stages that train on whole images."""

    def __init__(self, run: TrainingRun, model: Export3D, sampler: PairSampler) -> None:
        super().__init__(run, "reconstruction")
        config = run.config
        self.config, self.model, self.sampler = config, model, sampler
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on CPUs
        # f_e is frozen after its pre-training; without it, or as an ablation, f_e is trained end to end
        is_pretrained = bool("clebs" in config.stages or config.init or config.expression_from)
        model.expression.requires_grad_(not (is_pretrained and config.model.expression == "clebs"))
        if model.planedict is not None:
            for part in model.planedict.code_parts():
                part.requires_grad_(False)
        trainable = config.trainable or (VOLUME_PARTS if config.raw_rays else ("",))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(trainable))
        self.local_rows = self._assign_rows()
        self.images_per_step = config.batch
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError(f"trainable must name parts of the model, for example superres., got {trainable[0]!r}")
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, fused=True)
        self.ema_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.saved_parts = {"model.": model, "average.": self.ema_weights, "": self.optimizer}
        self.perceptual = load_perceptual(config.loss, run.device)
        self.landmarks = None
        if config.loss.landmarks > 0:
            self.landmarks = LandmarkLoss(LandmarkNetwork(resolve_weights("face_landmarker"))).to(run.device)
        run.record["perceptual"] = self.perceptual.name if self.perceptual is not None else "none"
        self.discriminator: adversary.Discriminator | None = None
        self.term_names: tuple[str, ...] = ()  # of the loss terms of a step
        self.cuda_graph = self._make_cuda_graph()

    def begin(self, stage: str) -> None:
        """Continue with another stage; optimiser and moving average go on."""
        self.name, self.step = stage, 0
        if stage == "adversarial":
            if self.cuda_graph is not None:  # not used here, so the raster windows may vary again
                self.cuda_graph.release()
            torch.manual_seed(self.config.seed + 29)
            adversarial = self.config.adversarial
            self.discriminator = adversary.Discriminator(self.config.model.image_size, adversarial).to(self.run.device)
            self.discriminator_optimizer = adversary.make_discriminator_optimizer(self.discriminator, adversarial)
            self.saved_parts |= {"discriminator.": self.discriminator, "against.": self.discriminator_optimizer}

    def _make_cuda_graph(self) -> StepGraph | None:
        """Return the CUDA graph of a step, if one device processes the whole batch at once."""
        config, run = self.config, self.run
        is_whole_batch = run.world.size == 1 and config.accumulate == 1
        if not (config.cuda_graph and is_whole_batch and not config.loss.disentangle and run.device.type == "cuda"):
            return None
        flow, generator = self.model.flow, self.model.generator
        windows = None if flow is None else flow.windows
        return StepGraph(self.accumulate_gradients, self.parameters, [generator.plane_ema], windows)

    def _assign_rows(self) -> range:
        """Return the rows of every batch that this process takes."""
        world, config = self.run.world, self.config
        if config.batch % (world.size * config.accumulate):
            raise ConfigError(f"batch ({config.batch}) must be a multiple of processes times accumulate "
                              f"({world.size} x {config.accumulate})")  # fmt: skip
        count = config.batch // world.size
        if count < config.batch or config.accumulate > 1:  # eq. 12 needs the mean over the whole batch
            self.model.generator.plane_means = []
        return range(world.rank * count, (world.rank + 1) * count)

    @property
    def first_step(self) -> int:
        """Number of steps before this stage: the data, the moving average and the raw size continue across stages."""
        return self.config.steps if self.name == "adversarial" else 0

    @property
    def global_step(self) -> int:
        """Steps done in both stages."""
        return self.first_step + self.step

    def draw(self, step: int) -> list[Batch]:
        """Draw this process's rows of the batch, in `accumulate` parts."""
        batch = self.sampler.draw_pairs(self.config.seed, self.first_step + step, self.config.batch, self.local_rows)
        return batch.split(len(self.local_rows) // self.config.accumulate)

    def take_step(self, batch: list[Batch]) -> dict[str, float]:
        """Update the model by eq. 13 or 14, and the discriminator."""
        config, generator = self.config, self.model.generator
        parts = [part.to(self.run.device) for part in batch]
        if self.discriminator is None:
            fraction = self.decay_progress() if config.decay_by_time else self.step / max(config.steps, 1)
            lr = learning_rate(config, self.step, fraction)
        else:
            lr = learning_rate(config, config.steps, 1.0)  # the final rate of reconstruction
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        plane_ema = generator.plane_ema.clone()
        fakes, terms = self.backward(parts)
        terms["grad"] = float(nn.utils.clip_grad_norm_(self.parameters, config.clip_grad or math.inf))
        if is_finite(terms):
            self.optimizer.step()
            if generator.plane_means:  # of all parts and processes; else the forward pass has updated eq. 12
                generator.update_plane_ema(self.run.world.all_reduce_mean_(torch.stack(generator.plane_means).mean(0)))
            if self.discriminator is not None:
                terms |= self.train_discriminator(parts, fakes)
        else:
            generator.plane_ema.copy_(plane_ema)  # undo the forward pass
        if generator.plane_means is not None:
            generator.plane_means.clear()
        update_ema(self.ema_weights, self.model.state_dict(), config.ema, self.global_step + 1)
        return terms | {"lr": lr}

    def backward(self, parts: list[Batch]) -> tuple[list[Tensor], dict[str, float]]:
        """Compute the gradients of eq. 13 or 14 for the batch, part by part; return the outputs and the terms."""
        config, fakes = self.config, []
        sums: dict[str, float] = {}
        first_row = self.local_rows.start
        raw_size = scheduled_raw_size(config, self.global_step)
        self.model.train()
        generator = self.model.generator  # a frozen one keeps its mean tri-plane, too
        generator.train(any(parameter.requires_grad for parameter in generator.parameters()))
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)

        def seed() -> None:
            self.run.seed_step(self.name, self.step)  # every part draws what the whole batch would

        if self.cuda_graph is not None and self.discriminator is None:
            try:
                image, values = self.cuda_graph(parts[0], raw_size, seed)
                return [image], dict(zip(self.term_names, values.tolist(), strict=True))
            except RuntimeError as error:
                self.cuda_graph.release()
                self.cuda_graph = None
                reason = str(error).partition("\n")[0]
                message = f"the step cannot be one CUDA graph ({reason}): training continues without, more slowly"
                self.run.report_progress(self.name, self.step, self.steps, message=message)
        self.optimizer.zero_grad(set_to_none=True)
        for batch in parts:
            seed()
            batch_rows = (first_row, first_row := first_row + len(batch.source), config.batch)
            image, values = self.accumulate_gradients(batch, raw_size, len(parts), batch_rows)
            for key, term in zip(self.term_names, values.tolist(), strict=True):
                sums[key] = sums.get(key, 0.0) + term / len(parts)
            fakes.append(image)
        self.run.world.average_gradients(self.parameters)
        return fakes, self.run.world.all_reduce_mean(sums)

    def accumulate_gradients(self, batch: Batch, raw_size: int, parts: int = 1,
                             batch_rows: BatchRows | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Add the gradients of one of `parts` parts; return images (B, 3, H, W) and terms, without synchronising."""
        config = self.config
        is_crossed = config.loss.disentangle > 0 and self.step % CROSS_INTERVAL == CROSS_INTERVAL - 1
        loss: Any = 0
        terms: dict[str, Tensor] = {}
        with self.run.autocast():
            head_mask = None if is_crossed else self.head_masks(batch)
            if is_crossed:  # other people drive, and the result is not known
                batch = batch._replace(driver=batch.driver.roll(1, 0))
                output = self.forward(batch, raw_size, batch_rows)
            elif config.raw_rays:
                rays = draw_rays(config, batch, raw_size)
                output = self.forward(batch, raw_size, batch_rows, rays)
                loss, terms = ray_loss(output, rays, raw_size, batch, config, head_mask)
            else:
                output = self.forward(batch, raw_size, batch_rows)
                loss, terms = reconstruction_loss(output, batch, config, self.perceptual, self.landmarks, head_mask)
        if config.loss.disentangle and self.model.planedict is not None:
            disentangle = config.loss.disentangle * disentanglement_loss(self.model.planedict, batch, output.image)
            loss, terms["disentangle"] = loss + disentangle, disentangle.detach()
        if self.discriminator is not None:  # eq. 14
            adversarial_loss = F.softplus(-self.discriminator(output.image, batch.target_camera)).mean()
            loss, terms["g_adv"] = loss + config.adversarial.weight * adversarial_loss, adversarial_loss.detach()
        (loss / parts if parts > 1 else loss).backward()
        self.term_names = ("loss", *terms)
        return output.image.detach(), torch.stack([loss.detach(), *terms.values()])

    @torch.no_grad()
    def head_masks(self, batch: Batch) -> Tensor | None:
        """Return where the targets show the head, (B, 1, m, m) in 0..1, if the loss needs it."""
        loss = self.config.loss
        if self.model.flow is None or not (self.config.raw_rays or loss.silhouette or loss.depth):
            return None
        flow, points, camera = self.model.flow, batch.target_points, batch.target_camera
        mask = flow.head_mask(points, camera, batch.target_person_mask)
        surface = F.interpolate((batch.target_depth > 0).float(), mask.shape[2:])
        exact = surface * (flow.face_axes(points, camera)[0] / NECK_FADE_HEIGHT + 1).clamp(0, 1)
        return torch.where(surface.amax((1, 2, 3), keepdim=True) > 0, exact, mask)

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
        values = self.run.world.all_reduce_mean(sums)
        if math.isfinite(values["d_loss"]):
            self.discriminator_optimizer.step()
        return values

    def forward(self, batch: Batch, raw_size: int, batch_rows: BatchRows | None = None,
                rays: Tensor | None = None) -> Any:  # fmt: skip
        """Run the model on a batch; with the disentanglement loss, motion is read from the drivers' faces."""
        face = batch.driver if self.config.loss.disentangle else None
        return self.model(batch.source, batch.source_beta, batch.source_camera, batch.source_points, batch.target_beta,
                          batch.target_camera, batch.source_person_mask, raw_size=raw_size, batch_rows=batch_rows,
                          rays=rays, driver_face=face)  # fmt: skip

    def decay_progress(self) -> float:
        """Return the progress of a decay by time."""
        return self.run.time_fraction(self.start_minute) if self.config.decay_by_time else 0.0

    def save(self) -> None:
        """Write the training state and the inference weights."""
        super().save()
        if self.name == "adversarial":
            self.run.record["adversarial_steps"] = self.step
        self.run.save_weights(self.ema_weights, steps=min(self.global_step, self.config.steps))

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
                output = self.forward(batch, scheduled_raw_size(self.config, max(self.global_step - 1, 0)))
        finally:
            self.model.load_state_dict(training_weights)
            self.model.train()
        side = batch.target.shape[-1]
        depth = output.depth.float()
        low, high = depth.amin((2, 3), keepdim=True), depth.amax((2, 3), keepdim=True)
        depth = (1 - 2 * (depth - low) / (high - low).clamp_min(1e-6)).expand(-1, 3, -1, -1)  # near is white
        columns = [batch.source, batch.target, output.raw[:, :3], output.image, depth]
        columns = [F.interpolate(column.float(), size=(side, side)) for column in columns]
        self.run.write_sample(f"{self.global_step:07d}.png", columns)


def learning_rate(config: TrainConfig, step: int, fraction: float) -> float:
    """Return linear warm-up, then (with `decay`) a cosine to a tenth; `fraction` is the decay's progress, 0..1."""
    lr = config.lr * min(1.0, (step + 1) / config.warmup) if config.warmup else config.lr
    if config.decay or config.decay_by_time:
        lr *= 0.1 + 0.45 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
    return lr


def scheduled_raw_size(config: TrainConfig, step: int) -> int:
    """Return the side of the raw render at a step in pixels: `raw_size_start` first, if set."""
    is_small = config.raw_size_start > 0 and step < config.raw_size_grow_step
    return config.raw_size_start if is_small else config.model.raw_size
