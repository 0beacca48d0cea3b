"""The stages `mouth`, `eyes` and `lids` (beyond the paper): inpaint holes cut into images, with a discriminator.

Every frame or still image with parted lips, open or shut eyes is a training example by itself; no pairs and no other
network take part.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export3d_cli.core.config.schema import LidsConfig
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.motion import mirror_camera, mirror_landmarks
from export3d_cli.core.model.encoded_source import map_tensors
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.inpaint.eyelids import eyelid_hole
from export3d_cli.core.model.inpaint.eyes import CroppedHole, eye_hole, eye_opening, iris_colour
from export3d_cli.core.model.inpaint.inpainter import CONDITION_CHANNELS, Hole, Inpainter, dilate_and_blur
from export3d_cli.core.model.inpaint.mouth import mouth_hole, mouth_opening
from export3d_cli.core.model.warp.mouth_eye_interior import MAX_OPENING_RATIO
from export3d_cli.core.runtime.errors import ConfigError, TrainingError
from export3d_cli.core.train.perceptual import load_perceptual
from export3d_cli.core.train.stage import STAGE_SEEDS, Stage, TrainingRun, is_finite, update_ema
from export3d_cli.core.train.training_data import PairSampler, apply_color_lut, make_color_lut

PARTIAL_OPENING_RATIO = (1.3, 4.0)  # range of opening ratios that stand for a photo with slightly parted lips
MIN_OPEN_EYE = 0.25  # opening, in eye widths, from which an eye counts as open
VISIBLE_IRIS_HEIGHT = (0.3, 1.0)  # range of the iris's visible height that the colour is measured on
R1_INTERVAL = 8  # steps between two R1 penalties
InpaintBatch = tuple[Tensor, Hole]  # crops (B, 3, INPAINT_SIZE_PX, INPAINT_SIZE_PX) in [-1, 1], and their holes


class InpaintSampler:
    """Draws crops: a data set by its weight, then a person uniformly, then a frame whose opening is accepted."""

    def __init__(self, sampler: PairSampler, config: Any) -> None:
        self.sampler, self.config = sampler, config
        is_lids = isinstance(config, LidsConfig)
        self.openings = [self.opening(torch.from_numpy(data.landmarks)).numpy() for data in sampler.datasets]
        self.frames: list[list[np.ndarray]] = []  # per data set and person: indices of the accepted frames
        for opening, people in zip(self.openings, sampler.clips_by_person, strict=True):
            accepted = opening < config.max_opening if is_lids else opening > config.min_opening
            spans = [
                np.concatenate([np.arange(c.start, c.start + c.count) for c in clips]) for clips in people.values()
            ]
            self.frames.append([rows[accepted[rows]] for rows in spans if accepted[rows].any()])
        weights = np.array(config.weight) if config.weight else sampler.dataset_weights
        weights = weights * [bool(rows) for rows in self.frames]
        if weights.sum() <= 0:
            stage = next(name for name, kind in INPAINT_SAMPLERS.items() if type(self) is kind)
            change = "shut enough: raise" if is_lids else "open enough: lower"
            raise TrainingError(f"no frame of the data sets is {change} {stage}.{'max' if is_lids else 'min'}_opening")
        self.dataset_weights = weights / weights.sum()

    def opening(self, points: Tensor) -> Tensor:
        """Return the opening of frames with landmarks (N, 478, 3), (N,), that `min_opening` or `max_opening` limits."""
        return eye_opening(points, 0)

    def reference_frames(self, rng: np.random.Generator, dataset: int, row: int) -> list[int]:
        """Return other frames of the data set that serve as the photo for frame `row`."""
        return []

    def make_hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> CroppedHole:
        """Return the holes in the first of each K images (B, K, 3, H, W); the others are its reference frames.

        `points` (B, K, 478, 3) are their landmarks in the head frame, `uv` (B, K, 478, 2) in the images.
        """
        raise NotImplementedError

    def draw_batch(self, seed: int, step: int, rank: int, size: int) -> InpaintBatch:
        """Draw the crops of one step: a pure function of (seed, step, rank)."""
        rng = np.random.default_rng([seed, step, 6, rank])
        samples = [self._draw(rng) for _ in range(size)]
        arrays = (np.stack(x).astype(np.float32) for x in zip(*samples, strict=True))
        images, landmarks, points = (torch.from_numpy(array) for array in arrays)
        crop, hole = self.make_hole(rng, images, points, landmarks[..., :2])
        return crop.sample(images[:, 0]), hole

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw images (K, 3, H, W), their landmarks (K, 478, 3), and the same in the head frame."""
        dataset = int(rng.choice(len(self.sampler.datasets), p=self.dataset_weights))
        data, people = self.sampler.datasets[dataset], self.frames[dataset]
        row = int(rng.choice(people[int(rng.integers(len(people)))]))
        flip = self.sampler.config.flip and rng.random() < 0.5
        lut = make_color_lut(rng, self.config.jitter)
        rows = [row, *self.reference_frames(rng, dataset, row)]
        images, landmarks, cameras = np.stack([data.frames[r] for r in rows]), data.landmarks[rows], data.camera[rows]
        if flip:
            images, cameras, landmarks = images[:, :, ::-1], mirror_camera(cameras), mirror_landmarks(landmarks)
        return apply_color_lut(images, lut), landmarks, landmarks_to_head_frame(landmarks, cameras)


class MouthSampler(InpaintSampler):
    """Open mouths."""

    def opening(self, points: Tensor) -> Tensor:
        """See `InpaintSampler.opening`."""
        return mouth_opening(points)

    def make_hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> CroppedHole:
        """Return the whole inside, or the part that a photo with slightly parted lips would not show."""
        points, uv = points[:, 0], uv[:, 0]
        is_partial = rng.random(len(uv)) < self.config.partial_hole_ratio
        ratio = np.where(is_partial, rng.uniform(*PARTIAL_OPENING_RATIO, len(uv)), MAX_OPENING_RATIO)
        ratios = torch.from_numpy(ratio.astype(np.float32))[:, None, None].expand(*uv.shape[:2], 1)
        return mouth_hole(points, uv, ratios)


class EyeSampler(InpaintSampler):
    """Open right eyes of the person, or left ones of mirrored images."""

    def make_hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> CroppedHole:
        """Return the whole inside, with the iris colour measured as in a narrow eye, or none for some of them."""
        images, points, uv = images[:, 0], points[:, 0], uv[:, 0]
        visible_height = rng.uniform(*VISIBLE_IRIS_HEIGHT, len(uv)).astype(np.float32)
        is_visible = rng.random(len(uv)) >= self.config.hidden_iris_ratio
        colour, confidence = iris_colour(images, uv, 0, torch.from_numpy(visible_height))
        return eye_hole(points, uv, 0, colour, confidence * torch.from_numpy(is_visible))


class EyelidSampler(InpaintSampler):
    """Shut right eyes of the person, or left ones of mirrored images."""

    def reference_frames(self, rng: np.random.Generator, dataset: int, row: int) -> list[int]:
        """Return a frame of the same clip with the eye open, as the photo; `row` itself if there is none."""
        clip = next(c for c in self.sampler.datasets[dataset].clips if c.start <= row < c.start + c.count)
        is_open = self.openings[dataset][clip.start : clip.start + clip.count] > MIN_OPEN_EYE
        rows = clip.start + is_open.nonzero()[0]
        return [int(rng.choice(rows)) if len(rows) else row]

    def make_hole(self, rng: np.random.Generator, images: Tensor, points: Tensor, uv: Tensor) -> CroppedHole:
        """Return the whole eyelid."""
        visibility = (eye_opening(points[:, 1], 0) > MIN_OPEN_EYE).float()
        return eyelid_hole(uv[:, 0], 0, images[:, 1], uv[:, 1], visibility)


INPAINT_SAMPLERS = {"mouth": MouthSampler, "eyes": EyeSampler, "lids": EyelidSampler}


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
        self.perceptual = load_perceptual(run.config.loss, run.device)
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
