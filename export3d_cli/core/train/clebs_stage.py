"""The stage `clebs` (sec. 3.1, 6.2): contrastive pre-training of f_e, then a closed-form fit of the basis flow."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export3d_cli.core.face.landmarks import LEFT_EYE, LEFT_IRIS, LIPS, NUM_LANDMARKS, RIGHT_EYE, RIGHT_IRIS
from export3d_cli.core.face.motion import mirror_beta
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.expression import DirectCode, ImageEncoder, LeBS, contrastive_loss
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.train.stage import Stage, TrainingRun, is_finite
from export3d_cli.core.train.training_data import PairSampler

MIN_CLIP_FRAMES = 8  # smallest group of frames of a clip for eq. 1
LAMBDA_STD = 3.0  # standard deviation of lambda over the training data
PEOPLE_PER_STEP, FRAMES_PER_PERSON = 96, 16  # for `identity_leakage_loss`
POOL_STEPS, POOL_REUSE = 50, 4  # steps for which landmark pairs are drawn at once; uses of each
_FIT_CHUNK_PAIRS = 500  # pairs drawn at a time for the closed-form fit


def set_beta_statistics(lebs: LeBS | DirectCode, sampler: PairSampler, seed: int) -> None:
    """Set the mean and standard deviation by which f_e normalises beta."""
    beta = torch.cat([x for s in range(4) for x in sampler.draw_landmark_pairs(seed, -1 - s + 2**31, 500)[:2]])
    lebs.beta_mean.copy_(beta.mean(0))
    # the minimum keeps coefficients that hardly ever move from being amplified into noise
    lebs.beta_std.copy_(beta.std(0).clamp_min(0.02))


class ClebsStage(Stage):
    """Trains f_e, then fits the basis flow.

    The processes share the clips of a step if their number divides `clebs.clips_per_step`; else each takes all.
    """

    def __init__(self, run: TrainingRun, model: Export3D, sampler: PairSampler) -> None:
        super().__init__(run, "clebs")
        lebs = model.expression
        assert isinstance(lebs, LeBS)
        self.model, self.lebs, self.sampler, self.config = model, lebs, sampler, run.config.clebs
        self.seed = run.config.seed
        set_beta_statistics(lebs, sampler, self.seed)
        torch.manual_seed(self.seed + 17)
        self.encoder = ImageEncoder(lebs.weight.shape[0], self.config.encoder_width).to(run.device)
        self.readout = nn.Linear(lebs.weight.shape[1], NUM_LANDMARKS * 3, bias=False).to(run.device)
        with torch.no_grad():
            self.readout.weight.mul_(0.1)
        self.modules = nn.ModuleDict({"lebs": lebs, "encoder": self.encoder, "readout": self.readout})
        self.modules.train()
        parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=self.config.lr)
        self.saved_parts = {"clebs.": self.modules, "": self.optimizer}
        self.motion_scale = _motion_scale(sampler, self.seed).to(run.device)
        self.pair_pool = functools.lru_cache(maxsize=1)(self._draw_pair_pool)

    def draw(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Draw this process's groups of frames of one clip, images and beta; none in the warm-up."""
        if step < self.config.geometry_warmup_steps:
            return []
        size, clips, world = self.config.negatives + 1, self.config.clips_per_step, self.run.world
        indices = range(world.rank, clips, world.size) if clips % world.size == 0 else range(clips)
        draw = functools.partial(self.sampler.draw_clip_group, self.seed, step, size, self.config.image_size)
        return [draw(MIN_CLIP_FRAMES, index) for index in indices]

    def take_step(self, batch: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Update f_e, f_I and the readout."""
        world, config = self.run.world, self.config
        loss, terms = self.compute_loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        world.average_gradients(self.modules.parameters())
        terms = world.all_reduce_mean(terms)
        terms["grad"] = float(nn.utils.clip_grad_norm_(self.modules.parameters(), config.clip_grad or math.inf))
        self.optimizer.param_groups[0]["lr"] = config.lr * (1 - 0.9 * self.step / self.steps if config.lr_decay else 1)
        if is_finite(terms):
            self.optimizer.step()
        self.images_per_step = sum(len(beta) for _, beta in batch) * max(config.clips_per_step // max(len(batch), 1), 1)
        return terms

    def finish(self) -> None:
        """Fit the basis flow and choose the axes of lambda."""
        finalize_expression(self.run, self.model, self.sampler)

    def _draw_pair_pool(self, period: int) -> tuple[Tensor, ...]:
        """Return the landmark pairs of a period: each is used POOL_REUSE times, since drawing is slower than a step."""
        pairs = self.config.geometry_pairs
        return self.sampler.draw_landmark_pairs(self.seed, period, max(pairs * POOL_STEPS // POOL_REUSE, pairs))[:4]

    def draw_pairs(self) -> tuple[Tensor, ...]:
        """Return beta_k, beta_j, points_k, points_j of this step."""
        pool = self.pair_pool(self.step // POOL_STEPS)
        order = np.random.default_rng([self.seed, self.step, 4]).permutation(len(pool[0]))
        rows = torch.from_numpy(order[: self.config.geometry_pairs])
        return tuple(x[rows] for x in pool)

    def compute_loss(self, groups: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss, eq. 1 on groups of frames of one clip plus terms beyond the paper, and its terms."""
        clebs, run, lebs = self.config, self.run, self.lebs
        loss = torch.zeros((), device=run.device)
        values: dict[str, float] = {}
        for images, beta in groups:
            with run.autocast():
                codes = self.encoder(images.to(run.device))
            beta = beta.to(run.device)
            contrast, accuracy = contrastive_loss(codes, lebs(beta), clebs.temperature, clebs.denominator)
            loss = loss + contrast / len(groups)
            terms = {"contrast": contrast.item(), "accuracy": accuracy.item(), "chance": 1 / len(beta)}
            values = {key: values.get(key, 0.0) + term / len(groups) for key, term in terms.items()}
        pairs = self.draw_pairs() if clebs.geometry > 0 or clebs.mirror > 0 else ()
        if clebs.geometry > 0:
            beta_k, beta_j, points_k, points_j = (x.to(run.device) for x in pairs)
            change = lebs.coefficients(beta_j) - lebs.coefficients(beta_k)  # (N, n)
            motion = (points_j - points_k).flatten(1) / self.motion_scale
            geometry = F.smooth_l1_loss(self.readout(change), motion)
            loss = loss + clebs.geometry * geometry
            with torch.no_grad():
                values |= {"geometry": geometry.item(), "rigid": F.smooth_l1_loss(0 * motion, motion).item()}
        if clebs.identity_leakage > 0:
            person = identity_leakage_loss(_lambda_by_person(run, lebs, self.sampler, self.step))
            loss = loss + clebs.identity_leakage * person
            values["identity_leakage"] = person.item()
        if clebs.mirror > 0:
            beta = pairs[1]
            mirrored = torch.from_numpy(mirror_beta(beta.numpy()))
            sides = [lebs.coefficients(x.to(run.device)) for x in (beta, mirrored)]
            mirror = mirror_loss(sides[0], sides[1], clebs.antisymmetric_dims)
            loss = loss + clebs.mirror * mirror
            values["mirror"] = mirror.item()
        return loss, {"loss": loss.item(), **values}


def _lambda_by_person(run: TrainingRun, lebs: LeBS, sampler: PairSampler, step: int) -> Tensor:
    """Return lambda of random frames of random people, (PEOPLE_PER_STEP, FRAMES_PER_PERSON, n)."""
    beta = sampler.draw_person_betas(run.config.seed, step, PEOPLE_PER_STEP, FRAMES_PER_PERSON).to(run.device)
    return lebs.coefficients(beta.flatten(0, 1)).unflatten(0, beta.shape[:2])


def identity_leakage_loss(lam: Tensor) -> Tensor:
    """Return how well lambda (people, frames, n) separates people (beyond the paper); 0 if their means agree.

    Fisher's criterion trace(S_w^-1 S_b) / n, which does not change with the scale or a rotation of lambda.
    """
    mean = lam.mean(1, keepdim=True)
    deviations, means = (lam - mean).flatten(0, 1), (mean - mean.mean(0)).squeeze(1)
    within = deviations.T @ deviations / (lam.shape[0] * (lam.shape[1] - 1))  # (n, n)
    within = within + 1e-3 * within.diagonal().mean() * torch.eye(len(within), device=lam.device)
    return torch.linalg.solve(within, means.T @ means / len(means)).diagonal().mean()


def mirror_loss(lam: Tensor, mirrored: Tensor, antisymmetric_dims: int) -> Tensor:
    """Return the change of lambda (N, n) when faces are mirrored; the last `antisymmetric_dims` flip their sign."""
    sign = torch.ones(lam.shape[1], device=lam.device)
    sign[lam.shape[1] - antisymmetric_dims :] = -1
    return (mirrored - sign * lam).square().mean() / lam.detach().var(0).mean().clamp_min(1e-6)


def _motion_scale(sampler: PairSampler, seed: int) -> Tensor:
    """Return the scale of each landmark coordinate's motion, (1434,): equal for x and y, three times that for depth.

    Lips, eyelids and irises, which carry the expression, get 1 / 1.5 of it.
    """
    _, _, points_k, points_j, _ = sampler.draw_landmark_pairs(seed, 2**31 + 7, 500)
    size = (points_j - points_k).square().mean().sqrt().clamp_min(1e-6)
    scale = size * torch.tensor([1.0, 1.0, 3.0]).repeat(NUM_LANDMARKS, 1)
    scale[list(LIPS + LEFT_EYE + RIGHT_EYE + LEFT_IRIS + RIGHT_IRIS)] /= 1.5
    return scale.flatten()


def prepare_ablation(run: TrainingRun, model: Export3D, sampler: PairSampler) -> None:
    """Prepare an expression code without pre-training."""
    set_beta_statistics(model.expression, sampler, run.config.seed)
    if isinstance(model.expression, DirectCode):  # lambda is fixed; with LeBS it still changes, and the flow stays 0
        finalize_expression(run, model, sampler)


@torch.no_grad()
def finalize_expression(run: TrainingRun, model: Export3D, sampler: PairSampler) -> None:
    """Scale lambda to the standard deviation LAMBDA_STD, fit the basis flow, and rotate lambda to interpretable axes.

    Eq. 1 is invariant to the scale of lambda. For the axes see `basis_rotation`.
    """
    lebs = model.expression.eval()
    if isinstance(lebs, LeBS):
        beta = sampler.draw_landmark_pairs(run.config.seed, 2**31 + 8, 1000)[1].to(run.device)
        size = lebs.coefficients(beta).std(0).square().mean().sqrt().clamp_min(1e-6) / LAMBDA_STD
        lebs.fc2.weight.div_(size)
        lebs.fc2.bias.div_(size)
    if model.flow is None:
        return
    clebs = run.config.clebs
    fitted, report = fit_flow_basis(lebs, sampler, run.config.seed, clebs.ridge_pairs, clebs.ridge, run.device)
    if isinstance(lebs, LeBS):
        lam = _lambda_by_person(run, lebs, sampler, 2**31 + 9)
        motion = fitted.flatten(1) / _motion_scale(sampler, run.config.seed)
        deviations = (lam - lam.mean(1, keepdim=True)).flatten(0, 1)
        mixture = fit_lambda_axes(deviations, motion, clebs.antisymmetric_dims, LAMBDA_STD).to(run.device)
        lebs.fc2.weight.copy_(mixture @ lebs.fc2.weight)
        lebs.fc2.bias.copy_(mixture @ lebs.fc2.bias)
        fitted = torch.linalg.solve(mixture.T.cpu(), fitted.flatten(1)).view_as(fitted)
    model.flow.basis.copy_(fitted.to(model.flow.basis))
    total = run.config.stage_steps("clebs")
    run.log("clebs", total, total, {f"flow_{k}": v for k, v in report.items()})


@torch.no_grad()
def fit_flow_basis(lebs: LeBS | DirectCode, sampler: PairSampler, seed: int, pairs: int, ridge: float,
                   device: torch.device | str = "cpu") -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Return the displacement b_i of every basis vector, (n, 478, 3) in the head frame, by ridge regression.

    Fits `points_j - points_k = sum_i (lambda_i(j) - lambda_i(k)) b_i` over pairs of frames of one clip, with people
    drawn equally often, then again without the 1 % of pairs with the largest residual (lost tracks). Also returns the
    mean landmark error of the flow and of a rigid face, in pixels at 256, of all landmarks, lips and eyes.
    """
    chunks = []
    for start in range(0, max(pairs, 2), _FIT_CHUNK_PAIRS):
        drawn = sampler.draw_landmark_pairs(seed, 2**31 + 100 + start, min(_FIT_CHUNK_PAIRS, max(pairs, 2) - start))
        change = lebs.coefficients(drawn[1].to(device)) - lebs.coefficients(drawn[0].to(device))
        chunks.append((change.cpu(), *drawn[2:]))
    change, before, after, camera = (torch.cat(x) for x in zip(*chunks, strict=True))
    motion = (after - before).flatten(1)

    def solve(rows: Tensor) -> Tensor:
        x, y = change[rows].double(), motion[rows].double()
        return torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y).float()

    basis = solve(torch.ones(len(motion), dtype=torch.bool))
    residual = (motion - change @ basis).square().sum(1)
    basis = solve(residual <= residual.quantile(0.99))
    moved = before + (change @ basis).view_as(before)
    target, rigid, moved = (project(points, camera)[0] for points in (after, before, moved))
    distance = {"": (moved - target).norm(dim=-1) * 256, "_rigid": (rigid - target).norm(dim=-1) * 256}
    regions = {"all": list(range(NUM_LANDMARKS)), "lips": list(LIPS), "eyes": list(LEFT_EYE + RIGHT_EYE)}
    report = {f"{r}{kind}": float(d[:, idx].mean()) for r, idx in regions.items() for kind, d in distance.items()}
    return basis.view(-1, NUM_LANDMARKS, 3), report


@torch.no_grad()
def fit_lambda_axes(lam_deviations: Tensor, basis: Tensor, antisymmetric_dims: int, max_std: float) -> Tensor:
    """Return the mixture A (n, n) that maps lambda to independent axes, lambda' = A lambda, strongest first.

    Within the symmetric and within the antisymmetric coefficients: whitened over the frames of a person, then rotated
    by varimax so that every axis moves few landmarks. Weak axes get a smaller deviation, by the square root of their
    strength, so that a unit step is visible on every axis. The positive direction is the rarer and farther one: for
    eyes, which rest open, closing.

    `lam_deviations` (N, n) is lambda minus its mean over the frames of the same person, `basis` (n, K) the weighted
    displacements of each coefficient, `max_std` the standard deviation of the strongest coefficient of either kind.
    """
    n = lam_deviations.shape[1]
    mixture = torch.zeros(n, n, dtype=torch.float64)
    lam_deviations, basis = lam_deviations.double().cpu(), basis.double().cpu()
    for block in (slice(0, n - antisymmetric_dims), slice(n - antisymmetric_dims, n)):
        x = lam_deviations[:, block]
        if not x.shape[1]:
            continue
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        root = values.clamp_min(values.max() * 1e-6).sqrt()
        whiten, restore = vectors / root @ vectors.T, vectors * root @ vectors.T
        rotation = varimax((restore @ basis[block]).T)  # (k, k)
        strength, order = (rotation.T @ restore @ basis[block]).norm(dim=1).sort(descending=True)
        axes = max_std * (strength / strength[0]).sqrt()[:, None] * (rotation.T @ whiten)[order]
        skewness = (x @ axes.T).pow(3).mean(0)
        mixture[block, block] = axes * torch.where(skewness < 0, -1.0, 1.0)[:, None]
    return mixture.float()


def varimax(loadings: Tensor) -> Tensor:
    """Return Kaiser's rotation (k, k), which maximises the variance of the squared columns of loadings (K, k)."""
    k = loadings.shape[1]
    rotation, last_sum = torch.eye(k, dtype=loadings.dtype), 0.0
    for _ in range(200):
        rotated = loadings @ rotation
        u, s, vt = torch.linalg.svd(loadings.T @ (rotated**3 - rotated * rotated.square().mean(0)))
        rotation, singular_sum = u @ vt, float(s.sum())
        if singular_sum <= last_sum * (1 + 1e-9):
            break
        last_sum = singular_sum
    return rotation
