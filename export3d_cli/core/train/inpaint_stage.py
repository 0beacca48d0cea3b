"""The stages `mouth`, `eyes` and `lids` (beyond the paper): inpaint holes cut into images, with a discriminator.

Every frame or still image with parted lips, open or shut eyes is a training example by itself; no pairs and no other
network take part.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.media.image import to_uint8, write_image
from export3d_cli.core.model.checkpoint import load_into, pack_optimizer, unpack_optimizer
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.inpaint.inpainter import (
    CONDITION_CHANNELS,
    INPAINT_SIZE_PX,
    Hole,
    Inpainter,
    dilate_and_blur,
)
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.train.image_stage import tensors_with_prefix
from export3d_cli.core.train.inpaint_data import INPAINT_SAMPLERS, InpaintBatch
from export3d_cli.core.train.losses import PerceptualDistance
from export3d_cli.core.train.lpips import load_perceptual_term
from export3d_cli.core.train.pair_sampler import PairSampler, Prefetcher, num_loader_threads
from export3d_cli.core.train.training_run import TrainingRun

STAGE_SEEDS = {"mouth": 3, "eyes": 4, "lids": 6}  # arguments of `TrainingRun.seed_step`
R1_INTERVAL = 8  # steps between two R1 penalties


class InpaintDiscriminator(nn.Module):
    """A patch discriminator of the inside of mouths, eyes or lids; it does not see the surroundings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3 + CONDITION_CHANNELS, width, 3, padding=1)]
        for a, b in ((1, 2), (2, 4), (4, 8)):
            layers += [nn.LeakyReLU(0.2), nn.Conv2d(a * width, b * width, 4, stride=2, padding=1)]
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(8 * width, 8 * width, 3, padding=1)]
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(8 * width, 1, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, crops: Tensor, hole: Hole) -> tuple[Tensor, Tensor]:
        """Judge crops (B, 3, s, s) -> logits (B, 1, s/8, s/8) and their weights, which sum to 1."""
        inside = dilate_and_blur(hole.condition[:, :1])
        x = torch.cat([crops * inside, hole.condition], dim=1)
        logits = self.layers(x.contiguous(memory_format=torch.channels_last)).float()
        weight = F.adaptive_avg_pool2d(inside, logits.shape[-2:])
        return logits, weight / weight.sum().clamp_min(1e-6)


class InpaintStage:
    """Trains the inpainter of the stage `mouth`, `eyes` or `lids`."""

    def __init__(self, run: TrainingRun, model: Export3D, sampler: PairSampler, stage: str) -> None:
        inpainter = model.inpainters[stage]
        assert isinstance(inpainter, Inpainter)
        self.run, self.model, self.stage, self.config = run, model, stage, getattr(run.config, stage)
        if self.config.batch % run.world.size:
            raise ConfigError(
                f"{stage}.batch must be a multiple of the {run.world.size} processes, got {self.config.batch}"
            )
        self.sampler = INPAINT_SAMPLERS[stage](sampler, self.config)
        self.workers = num_loader_threads(sampler.config, run.device)
        self.inpainter = inpainter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.manual_seed(run.config.seed + 28 + STAGE_SEEDS[stage])
        self.discriminator = InpaintDiscriminator(self.config.discriminator_width).to(run.device)
        self.optimizer = torch.optim.Adam(self.inpainter.parameters(), lr=self.config.lr, betas=(0.5, 0.99))
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=self.config.discriminator_lr, betas=(0.0, 0.99)
        )
        self.ema = type(inpainter)(getattr(run.config.model, stage)).to(run.device)
        self.ema.load_state_dict(inpainter.state_dict())
        distance = load_perceptual_term(run.config.loss)
        self.perceptual: PerceptualDistance | None = distance.to(run.device) if distance is not None else None
        self.step = 0
        if run.resumed_state is not None and run.resumed_state[1]["stage"] == stage:
            self._resume(*run.resumed_state)

    def _modules_to_save(self) -> dict[str, nn.Module]:
        return {"model.": self.model, "discriminator.": self.discriminator, "ema.": self.ema}

    def _optimizers_to_save(self) -> dict[str, torch.optim.Optimizer]:
        return {"inpainter_optimizer.": self.optimizer, "discriminator_optimizer.": self.discriminator_optimizer}

    def _resume(self, tensors: dict[str, Tensor], info: dict[str, object]) -> None:
        for prefix, module in self._modules_to_save().items():
            load_into(module, tensors_with_prefix(tensors, prefix), "the training state")
        for prefix, optimizer in self._optimizers_to_save().items():
            unpack_optimizer(optimizer, tensors_with_prefix(tensors, prefix))
        self.step = int(str(info["step"]))

    def save(self) -> None:
        """Write the training state."""
        parts = {prefix: module.state_dict() for prefix, module in self._modules_to_save().items()}
        parts |= {prefix: pack_optimizer(optimizer) for prefix, optimizer in self._optimizers_to_save().items()}
        tensors = {f"{prefix}{k}": v for prefix, part in parts.items() for k, v in part.items()}
        self.run.save(self.stage, self.step, tensors)

    def train(self) -> int:
        """Take the remaining steps; return the steps done. After the last, the inpainter is its EMA, and frozen."""
        run, config, skipped = self.run, self.config, 0
        size, start = config.batch // run.world.size, run.elapsed_minutes()
        sums: dict[str, list[float]] = {}

        def draw(step: int) -> InpaintBatch:
            return self.sampler.draw_batch(run.config.seed, step, run.world.rank, size)

        with Prefetcher(draw, self.step, config.steps, self.workers) as batches:
            while self.step < config.steps and not run.out_of_time():
                run.seed_step(STAGE_SEEDS[self.stage], self.step)
                batch = self._to_device(batches.next())
                rates = ((self.optimizer, config.lr), (self.discriminator_optimizer, config.discriminator_lr))
                for optimizer, lr in rates:
                    optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * self.step / config.steps)
                inpainted, terms = self.train_inpainter(batch)
                is_finite = math.isfinite(terms["loss"])
                skipped = 0 if is_finite else skipped + 1
                if is_finite:
                    self.optimizer.step()
                    terms |= self.train_discriminator(batch, inpainted)
                    for key, term in terms.items():
                        sums.setdefault(key, []).append(term)
                elif skipped > run.config.skip_nonfinite:
                    run.check_finite(terms["loss"], self.stage, self.step, terms)
                self.step += 1
                self.update_ema()
                if (self.step % run.config.log_every == 0 or self.step == config.steps) and sums:
                    values = {k: float(np.mean(v)) for k, v in sums.items()}
                    values["seconds_a_step"] = (run.elapsed_minutes() - start) * 60 / len(sums["loss"])
                    values["images_a_second"] = config.batch / max(values["seconds_a_step"], 1e-9)
                    run.log(self.stage, self.step, config.steps, values)
                    sums, start = {}, run.elapsed_minutes()
                if run.config.sample_every and self.step % run.config.sample_every == 0:
                    self.write_samples()
                if self.step % run.config.checkpoint_every == 0:
                    self.save()
        self.save()
        self.write_samples()
        if self.step >= config.steps:
            self.inpainter.load_state_dict(self.ema.state_dict())
            self.inpainter.requires_grad_(False)
        return self.step

    def _to_device(self, batch: InpaintBatch) -> InpaintBatch:
        crops, hole = batch
        return InpaintBatch(crops.to(self.run.device), Hole(*(x.to(self.run.device) for x in hole)))

    def train_inpainter(self, batch: InpaintBatch) -> tuple[Tensor, dict[str, float]]:
        """Compute the inpainter's gradients; return the inpainted crops and the loss terms."""
        config, (crops, hole) = self.config, batch
        # results are slightly softer than photos, so blur the context by a random amount
        soft = F.avg_pool2d(F.pad(crops, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        context = torch.lerp(crops, soft, torch.rand(len(crops), 1, 1, 1, device=crops.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.discriminator.requires_grad_(False)
        with self.run.autocast():
            inpainted = fill_holes(self.inpainter, crops, hole, context)
            l1 = ((inpainted - crops).abs() * hole.mask).sum() / (3 * hole.mask.sum().clamp_min(1))
            terms = {"l1": config.l1 * l1}
            if self.perceptual is not None and config.perceptual > 0:
                terms[self.perceptual.name] = config.perceptual * self.perceptual(inpainted, crops, scales=1)
            if config.adversarial > 0 and self.step >= config.adversarial_start:
                logits, weight = self.discriminator(inpainted, hole)
                terms["g_adv"] = config.adversarial * (F.softplus(-logits) * weight).sum()
            loss = torch.stack([term.float() for term in terms.values()]).sum()
        loss.backward()
        self.run.world.average_gradients(self.inpainter.parameters())
        terms = {"loss": loss, **terms}
        means = self.run.world.all_reduce_mean([float(term.detach()) for term in terms.values()])
        return inpainted.detach(), dict(zip(terms, means, strict=True))

    def train_discriminator(self, batch: InpaintBatch, inpainted: Tensor) -> dict[str, float]:
        """Take a step of the discriminator, with R1 every `R1_INTERVAL` steps; return its loss terms."""
        config, (crops, hole) = self.config, batch
        if config.adversarial <= 0 or self.step < config.adversarial_start // 2:  # it starts before it is used
            return {}
        self.discriminator.requires_grad_(True)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        with_r1 = config.r1_gamma > 0 and self.step % R1_INTERVAL == 0
        real = crops.detach().requires_grad_(with_r1)
        with self.run.autocast():
            (real_logits, weight), (fake_logits, _) = (
                self.discriminator(real, hole),
                self.discriminator(inpainted, hole),
            )
        loss = ((F.softplus(-real_logits) + F.softplus(fake_logits)) * weight).sum()
        terms = {"d_loss": float(loss.detach()), "d_real": float((real_logits.detach() * weight).sum())}
        if with_r1:  # gradient of each crop's own mean logit
            (gradient,) = torch.autograd.grad((real_logits * weight).sum() * len(real), real, create_graph=True)
            loss = loss + config.r1_gamma / 2 * R1_INTERVAL * gradient.float().square().sum((1, 2, 3)).mean()
        loss.backward()
        self.run.world.average_gradients(self.discriminator.parameters())
        if math.isfinite(float(loss.detach())):
            self.discriminator_optimizer.step()
        return dict(zip(terms, self.run.world.all_reduce_mean(list(terms.values())), strict=True))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the inpainter's exponential moving average, faster in the first steps."""
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        parameters = [p.detach() for p in self.inpainter.parameters()]
        torch._foreach_lerp_([p.detach() for p in self.ema.parameters()], parameters, 1 - decay)

    @torch.no_grad()
    def write_samples(self, rows: int = 8, columns: int = 4) -> None:
        """Write a grid of crops, each with its hole and inpainted; the same crops throughout the run."""
        if not self.run.world.is_main:
            return
        crops, hole = self._to_device(self.sampler.draw_batch(self.run.config.seed + 1, 2**31, 0, rows * columns))
        with self.run.autocast():
            cells = torch.cat([crops, crops * (1 - hole.mask), fill_holes(self.ema, crops, hole)], dim=-1)
        cells = cells.view(rows, columns, 3, INPAINT_SIZE_PX, 3 * INPAINT_SIZE_PX)
        grid = cells.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        folder = Path(self.run.folder) / "samples"
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{self.stage}-{self.step:07d}.png", to_uint8(grid.cpu()))


def fill_holes(inpainter: Inpainter, crops: Tensor, hole: Hole, context: Tensor | None = None) -> Tensor:
    """Inpaint the holes of crops (B, 3, s, s); `context` replaces the crops as the network's input."""
    context = crops if context is None else context
    return torch.lerp(crops, inpainter(context * (1 - hole.mask), hole), hole.mask)
