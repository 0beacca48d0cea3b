"""The stages `mouth`, `eyes` and `lids` (beyond the paper): holes cut into pictures are filled, under a critic's eyes.

Every frame and still with parted lips, open or shut eyes, teaches it by itself; no pairs, no other network takes part.
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
from export3d_cli.core.model.inpaint.inpainter import CONDITION_CHANNELS, CROP_SIZE_PX, Hole, Inpainter, dilate_and_blur
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.train.image_stage import tensors_with_prefix
from export3d_cli.core.train.inpaint_data import INPAINT_SAMPLERS, InpaintBatch
from export3d_cli.core.train.losses import PerceptualDistance
from export3d_cli.core.train.lpips import load_perceptual_term
from export3d_cli.core.train.pair_sampler import PairSampler, Prefetcher, num_loader_threads
from export3d_cli.core.train.training_run import TrainingRun

STAGE_SEEDS = {"mouth": 3, "eyes": 4, "lids": 6}  # the number of a stage in `Run.seed`
R1_INTERVAL = 8


class InpaintCritic(nn.Module):
    """How real the insides of mouths or eyes, or lids, look, patch by patch; what is around them it does not see."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3 + CONDITION_CHANNELS, width, 3, padding=1)]
        for a, b in ((1, 2), (2, 4), (4, 8)):
            layers += [nn.LeakyReLU(0.2), nn.Conv2d(a * width, b * width, 4, stride=2, padding=1)]
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(8 * width, 8 * width, 3, padding=1)]
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(8 * width, 1, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, crops: Tensor, hole: Hole) -> tuple[Tensor, Tensor]:
        """Close-ups (B, 3, s, s) -> logits (B, 1, s/8, s/8), and how much each counts, 1 in all."""
        inside = dilate_and_blur(hole.condition[:, :1])
        seen = torch.cat([crops * inside, hole.condition], dim=1)
        logits = self.layers(seen.contiguous(memory_format=torch.channels_last)).float()
        weight = F.adaptive_avg_pool2d(inside, logits.shape[-2:])  # elsewhere there is nothing to tell
        return logits, weight / weight.sum().clamp_min(1e-6)


class InpaintStage:
    """Painter, critic, and what trains them: the stage `mouth`, `eyes` or `lids`."""

    def __init__(self, run: TrainingRun, model: Export3D, sampler: PairSampler, name: str) -> None:
        painter = model.inpainters[name]
        assert isinstance(painter, Inpainter)
        self.run, self.model, self.stage, self.config = run, model, name, getattr(run.config, name)
        if self.config.batch % run.world.size:
            raise ConfigError(
                f"{name}.batch ({self.config.batch}) must be a multiple of the {run.world.size} processes"
            )
        self.sampler = INPAINT_SAMPLERS[name](sampler, self.config)
        self.workers = num_loader_threads(sampler.config, run.device)
        self.inpainter = painter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.manual_seed(run.config.seed + 28 + STAGE_SEEDS[name])
        self.critic = InpaintCritic(self.config.discriminator_width).to(run.device)
        self.optimizer = torch.optim.Adam(self.inpainter.parameters(), lr=self.config.lr, betas=(0.5, 0.99))
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=self.config.discriminator_lr, betas=(0.0, 0.99)
        )
        self.ema = type(painter)(getattr(run.config.model, name)).to(run.device)
        self.ema.load_state_dict(painter.state_dict())
        distance = load_perceptual_term(run.config.loss)
        self.perceptual: PerceptualDistance | None = distance.to(run.device) if distance is not None else None
        self.step = 0
        if run.resumed_state is not None and run.resumed_state[1]["stage"] == name:
            self._resume(*run.resumed_state)

    def _state_modules(self) -> dict[str, nn.Module]:
        return {"model.": self.model, "critic.": self.critic, "average.": self.ema}

    def _resume(self, tensors: dict[str, Tensor], info: dict[str, object]) -> None:
        for prefix, module in self._state_modules().items():
            load_into(module, tensors_with_prefix(tensors, prefix), "the training state")
        unpack_optimizer(self.optimizer, tensors_with_prefix(tensors, "painter."))
        unpack_optimizer(self.critic_optimizer, tensors_with_prefix(tensors, "against."))
        self.step = int(str(info["step"]))

    def save(self) -> None:
        """Write the training state."""
        tensors = {
            f"{prefix}{k}": v for prefix, own in self._state_modules().items() for k, v in own.state_dict().items()
        }
        for prefix, optimizer in (("painter.", self.optimizer), ("against.", self.critic_optimizer)):
            tensors |= {f"{prefix}{k}": v for k, v in pack_optimizer(optimizer).items()}
        self.run.save(self.stage, self.step, tensors)

    def train(self) -> int:
        """Take the steps that are left; then the painter is its moving average, and frozen. The steps done."""
        run, config, skipped = self.run, self.config, 0
        size, clock = config.batch // run.world.size, run.elapsed_minutes()
        sums: dict[str, list[float]] = {}

        def draw(step: int) -> InpaintBatch:
            return self.sampler.draw_batch(run.config.seed, step, run.world.rank, size)

        with Prefetcher(draw, self.step, config.steps, self.workers) as batches:
            while self.step < config.steps and not run.out_of_time():
                run.seed_step(STAGE_SEEDS[self.stage], self.step)
                picture, hole = batches.next()
                drawn = InpaintBatch(picture.to(run.device), Hole(*(x.to(run.device) for x in hole)))
                for optimizer, lr in ((self.optimizer, config.lr), (self.critic_optimizer, config.discriminator_lr)):
                    optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * self.step / config.steps)
                filled, terms = self.train_inpainter(drawn)
                good = math.isfinite(terms["loss"])
                skipped = 0 if good else skipped + 1
                if good:
                    self.optimizer.step()
                    terms |= self.train_critic(drawn, filled)
                    for key, term in terms.items():
                        sums.setdefault(key, []).append(term)
                elif skipped > run.config.skip_nonfinite:
                    run.check_finite(terms["loss"], self.stage, self.step, terms)
                self.step += 1
                self.update_ema()
                if (self.step % run.config.log_every == 0 or self.step == config.steps) and sums:
                    values = {k: float(np.mean(v)) for k, v in sums.items()}
                    values["seconds_a_step"] = (run.elapsed_minutes() - clock) * 60 / len(sums["loss"])
                    values["images_a_second"] = config.batch / max(values["seconds_a_step"], 1e-9)
                    run.log(self.stage, self.step, config.steps, values)
                    sums, clock = {}, run.elapsed_minutes()
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

    def train_inpainter(self, batch: InpaintBatch) -> tuple[Tensor, dict[str, float]]:
        """Gradients of the painter; the filled close-ups, and the terms."""
        config, (picture, hole) = self.config, batch
        # results are a little softer than pictures, so what surrounds the hole is, too
        soft = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        around = torch.lerp(picture, soft, torch.rand(len(picture), 1, 1, 1, device=picture.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.critic.requires_grad_(False)
        with self.run.autocast():
            filled = fill_holes(self.inpainter, picture, hole, around)
            away = ((filled - picture).abs() * hole.mask).sum() / (3 * hole.mask.sum().clamp_min(1))
            terms = {"l1": config.l1 * away}
            if self.perceptual is not None and config.perceptual > 0:
                terms[self.perceptual.name] = config.perceptual * self.perceptual(filled, picture, scales=1)
            if config.adversarial > 0 and self.step >= config.adversarial_start:
                verdict, weight = self.critic(filled, hole)
                terms["g_adv"] = config.adversarial * (F.softplus(-verdict) * weight).sum()
            loss = torch.stack([term.float() for term in terms.values()]).sum()
        loss.backward()
        self.run.world.average_gradients(self.inpainter.parameters())
        names = {"loss": loss, **terms}
        means = self.run.world.all_reduce_mean([float(term.detach()) for term in names.values()])
        return filled.detach(), dict(zip(names, means, strict=True))

    def train_critic(self, batch: InpaintBatch, filled: Tensor) -> dict[str, float]:
        """One step of the critic, with R1 every now and then."""
        config, (picture, hole) = self.config, batch
        if (
            config.adversarial <= 0 or self.step < config.adversarial_start // 2
        ):  # it gets a start on what it is to judge
            return {}
        self.critic.requires_grad_(True)
        self.critic_optimizer.zero_grad(set_to_none=True)
        regular = config.r1_gamma > 0 and self.step % R1_INTERVAL == 0
        real = picture.detach().requires_grad_(regular)
        with self.run.autocast():
            (on_real, weight), (on_filled, _) = self.critic(real, hole), self.critic(filled, hole)
        loss = ((F.softplus(-on_real) + F.softplus(on_filled)) * weight).sum()
        terms = {"d_loss": float(loss.detach()), "d_real": float((on_real.detach() * weight).sum())}
        if regular:  # the slope of each close-up's own mean verdict
            (slope,) = torch.autograd.grad((on_real * weight).sum() * len(real), real, create_graph=True)
            loss = loss + config.r1_gamma / 2 * R1_INTERVAL * slope.float().square().sum((1, 2, 3)).mean()
        loss.backward()
        self.run.world.average_gradients(self.critic.parameters())
        if math.isfinite(float(loss.detach())):
            self.critic_optimizer.step()
        return dict(zip(terms, self.run.world.all_reduce_mean(list(terms.values())), strict=True))

    @torch.no_grad()
    def update_ema(self) -> None:
        """Exponential moving average of the painter, quick at first."""
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        own = [p.detach() for p in self.inpainter.parameters()]
        torch._foreach_lerp_([p.detach() for p in self.ema.parameters()], own, 1 - keep)

    @torch.no_grad()
    def write_samples(self, rows: int = 8, columns: int = 4) -> None:
        """Write a grid of pictures, their holes, and these filled, the same over the run."""
        if not self.run.world.is_main:
            return
        picture, hole = self.sampler.draw_batch(self.run.config.seed + 1, 2**31, 0, rows * columns)
        picture, hole = picture.to(self.run.device), Hole(*(x.to(self.run.device) for x in hole))
        with self.run.autocast():
            shown = torch.cat([picture, picture * (1 - hole.mask), fill_holes(self.ema, picture, hole)], dim=-1)
        grid = (
            shown.view(rows, columns, 3, CROP_SIZE_PX, 3 * CROP_SIZE_PX).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        )
        folder = Path(self.run.folder) / "samples"
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{self.stage}-{self.step:07d}.png", to_uint8(grid.cpu()))


def fill_holes(inpainter: Inpainter, crops: Tensor, hole: Hole, context: Tensor | None = None) -> Tensor:
    """Close-ups (B, 3, s, s) with their holes painted; `around`: what is seen of them instead of the pictures."""
    context = crops if context is None else context
    return torch.lerp(crops, inpainter(context * (1 - hole.mask), hole), hole.mask)
