"""The stages `mouth`, `eyes` and `lids` (beyond the paper): inpaint holes cut into images, with a discriminator.

Every frame or still image with parted lips, open or shut eyes is a training example by itself; no pairs and no other
network take part.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.model.encoded_source import map_tensors
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.inpaint.inpainter import CONDITION_CHANNELS, Hole, Inpainter, dilate_and_blur
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.train.inpaint_data import INPAINT_SAMPLERS, InpaintBatch
from export3d_cli.core.train.pair_sampler import PairSampler
from export3d_cli.core.train.perceptual import load_perceptual
from export3d_cli.core.train.stage import Stage, is_finite, update_ema
from export3d_cli.core.train.training_run import STAGE_SEEDS, TrainingRun

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


class InpaintStage(Stage):
    """Trains the inpainter of the stage `mouth`, `eyes` or `lids`."""

    def __init__(self, run: TrainingRun, model: Export3D, sampler: PairSampler, stage: str) -> None:
        super().__init__(run, stage)
        inpainter = model.inpainters[stage]
        assert isinstance(inpainter, Inpainter)
        self.config = getattr(run.config, stage)
        if self.config.batch % run.world.size:
            raise ConfigError(f"{stage}.batch ({self.config.batch}) must be a multiple of {run.world.size} processes")
        self.images_per_step = self.config.batch
        self.sampler = INPAINT_SAMPLERS[stage](sampler, self.config)
        self.inpainter = inpainter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.inpainter.requires_grad_(True)
        torch.manual_seed(run.config.seed + 28 + STAGE_SEEDS[stage])
        self.discriminator = InpaintDiscriminator(self.config.discriminator_width).to(run.device)
        self.optimizer = torch.optim.Adam(self.inpainter.parameters(), lr=self.config.lr, betas=(0.5, 0.99))
        against = self.discriminator.parameters()
        self.discriminator_optimizer = torch.optim.Adam(against, lr=self.config.discriminator_lr, betas=(0.0, 0.99))
        self.ema = copy.deepcopy(inpainter).to(run.device)
        distance = load_perceptual(run.config.loss)
        self.perceptual = distance.to(run.device) if distance is not None else None
        self.saved_parts = {
            "model.": model, "discriminator.": self.discriminator, "ema.": self.ema,
            "inpainter_optimizer.": self.optimizer, "discriminator_optimizer.": self.discriminator_optimizer,
        }  # fmt: skip

    def draw(self, step: int) -> InpaintBatch:
        """Draw this process's crops."""
        world = self.run.world
        return self.sampler.draw_batch(self.run.config.seed, step, world.rank, self.config.batch // world.size)

    def take_step(self, batch: InpaintBatch) -> dict[str, float]:
        """Update the inpainter and the discriminator."""
        config, batch = self.config, map_tensors(batch, lambda x: x.to(self.run.device))
        for optimizer, lr in ((self.optimizer, config.lr), (self.discriminator_optimizer, config.discriminator_lr)):
            optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * self.step / self.steps)
        inpainted, terms = self.train_inpainter(batch)
        if is_finite(terms):
            self.optimizer.step()
            terms |= self.train_discriminator(batch, inpainted)
        update_ema(self.ema.state_dict(), self.inpainter.state_dict(), config.ema, self.step + 1)
        return terms

    def finish(self) -> None:
        """Replace the inpainter by its moving average, and freeze it."""
        self.inpainter.load_state_dict(self.ema.state_dict())
        self.inpainter.requires_grad_(False)

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
        values = {key: float(term.detach()) for key, term in {"loss": loss, **terms}.items()}
        return inpainted.detach(), self.run.world.all_reduce_mean(values)

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
            (real_logits, weight), (fake_logits, _) = (self.discriminator(x, hole) for x in (real, inpainted))
        loss = ((F.softplus(-real_logits) + F.softplus(fake_logits)) * weight).sum()
        terms = {"d_loss": float(loss.detach()), "d_real": float((real_logits.detach() * weight).sum())}
        if with_r1:  # gradient of each crop's own mean logit
            (gradient,) = torch.autograd.grad((real_logits * weight).sum() * len(real), real, create_graph=True)
            loss = loss + config.r1_gamma / 2 * R1_INTERVAL * gradient.float().square().sum((1, 2, 3)).mean()
        loss.backward()
        self.run.world.average_gradients(self.discriminator.parameters())
        terms = self.run.world.all_reduce_mean(terms)
        if is_finite(terms):
            self.discriminator_optimizer.step()
        return terms

    @torch.no_grad()
    def write_samples(self, rows: int = 8, columns: int = 4) -> None:
        """Write a grid of crops, each with its hole and inpainted; the same crops throughout the run."""
        if not self.run.world.is_main:
            return
        batch = self.sampler.draw_batch(self.run.config.seed + 1, 2**31, 0, rows * columns)
        crops, hole = map_tensors(batch, lambda x: x.to(self.run.device))
        with self.run.autocast():
            cells = torch.cat([crops, crops * (1 - hole.mask), fill_holes(self.ema, crops, hole)], dim=-1)
        self.run.write_sample(f"{self.name}-{self.step:07d}.png", list(cells.split(rows)))


def fill_holes(inpainter: Inpainter, crops: Tensor, hole: Hole, context: Tensor | None = None) -> Tensor:
    """Inpaint the holes of crops (B, 3, s, s); `context` replaces the crops as the network's input."""
    context = crops if context is None else context
    return torch.lerp(crops, inpainter(context * (1 - hole.mask), hole), hole.mask)
