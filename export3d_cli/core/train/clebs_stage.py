"""The stage `clebs` (sec. 3.1, 6.2): contrastive pre-training of f_e, then a closed-form fit of the basis flow."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export3d_cli.core.config.schema import ClebsConfig
from export3d_cli.core.face.landmarks import LEFT_EYE, LEFT_IRIS, LIPS, NUM_LANDMARKS, RIGHT_EYE, RIGHT_IRIS
from export3d_cli.core.face.motion import mirror_beta
from export3d_cli.core.model.checkpoint import pack_optimizer, unpack_optimizer, write_text
from export3d_cli.core.model.expression import DirectCode, ImageEncoder, LeBS, contrastive_loss
from export3d_cli.core.train.basis_rotation import fit_lambda_axes
from export3d_cli.core.train.linear_probe import probe_expression_code
from export3d_cli.core.train.pair_sampler import PairSampler, Prefetcher, num_loader_threads
from export3d_cli.core.train.training_plots import has_plot_libraries
from export3d_cli.core.train.training_run import TrainingRun

MIN_CLIP_FRAMES = 8  # smallest group of frames of a clip for eq. 1
LAMBDA_STD = 3.0  # standard deviation of lambda over the training data
PEOPLE_PER_STEP, FRAMES_PER_PERSON = 96, 16  # for `identity_leakage_loss`
REPORT_GROUPS = 16  # groups for the contrastive accuracy of the report
REPORT_FRAMES = 4000  # approximate number of frames of a dataset for the probes
_FIT_CHUNK_PAIRS = 500  # pairs drawn at a time for the closed-form fit


@dataclass(frozen=True)
class FlowReport:
    """Mean landmark error of the basis flow, and that of a rigid face, in pixels at 256."""

    all: float
    all_rigid: float
    lips: float
    lips_rigid: float
    eyes: float
    eyes_rigid: float


def set_beta_statistics(lebs: LeBS | DirectCode, sampler: PairSampler, seed: int) -> None:
    """Set the mean and standard deviation by which f_e normalises beta."""
    beta = torch.cat([x for s in range(4) for x in sampler.draw_landmark_pairs(seed, -1 - s + 2**31, 500)[:2]])
    lebs.beta_mean.copy_(beta.mean(0))
    # the minimum keeps coefficients that hardly ever move from being amplified into noise
    lebs.beta_std.copy_(beta.std(0).clamp_min(0.02))


def train_clebs(run: TrainingRun, lebs: LeBS | DirectCode, flow_basis: Tensor | None, sampler: PairSampler) -> int:
    """Train `lebs`, then fill `flow_basis` (n, 478, 3), both in place; returns the steps done. Resumes with `run`.

    The processes share the clips of a step if their number divides `clebs.clips_per_step`; else each takes all.
    """
    config, clebs = run.config, run.config.clebs
    if config.model.expression != "clebs" or isinstance(lebs, DirectCode):
        set_beta_statistics(lebs, sampler, config.seed)
        if isinstance(lebs, DirectCode):  # lambda is fixed; with LeBS it still changes, and the basis flow stays 0
            finalize_expression(run, lebs, flow_basis, sampler)
        return 0
    torch.manual_seed(config.seed + 17)
    encoder = ImageEncoder(lebs.weight.shape[0], clebs.encoder_width).to(run.device)
    readout = nn.Linear(lebs.weight.shape[1], NUM_LANDMARKS * 3, bias=False).to(run.device)
    with torch.no_grad():
        readout.weight.mul_(0.1)
    modules = nn.ModuleDict({"lebs": lebs, "encoder": encoder, "readout": readout})
    optimizer = torch.optim.Adam([p for p in modules.parameters() if p.requires_grad], lr=clebs.lr)
    start = 0
    if run.resumed_state is not None:
        tensors, info = run.resumed_state
        modules.load_state_dict({k.removeprefix("clebs."): v for k, v in tensors.items() if k.startswith("clebs.")})
        unpack_optimizer(optimizer, tensors)
        start = info["step"]
    else:
        set_beta_statistics(lebs, sampler, config.seed)
    scale = _motion_scale(sampler, config.seed).to(run.device)
    pool = _PairPool(sampler, config.seed, clebs.geometry_pairs)

    def save(step: int) -> None:
        run.save("clebs", step, {f"clebs.{k}": v for k, v in modules.state_dict().items()} | pack_optimizer(optimizer))

    def draw_groups(step: int) -> list[tuple[Tensor, Tensor]]:
        if step < clebs.geometry_warmup_steps:
            return []
        return [
            sampler.draw_clip_group(
                config.seed, step, clebs.negatives + 1, clebs.image_size, MIN_CLIP_FRAMES, group_index
            )
            for group_index in group_indices
        ]

    modules.train()
    group_indices, total, skipped = _local_groups(run), config.stage_steps("clebs"), 0
    num_images, clock, logged_step = 0, run.elapsed_minutes(), start
    with Prefetcher(draw_groups, start, total, num_loader_threads(config.data, run.device)) as prefetcher:
        for step in range(start, total):
            if run.out_of_time():
                save(step)
                return step
            run.seed_step(0, step)
            groups = prefetcher.next()
            loss, terms = _clebs_loss(run, modules, groups, sampler, pool, step, scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if len(group_indices) < clebs.clips_per_step:
                run.world.average_gradients(modules.parameters())
            values = dict(zip(terms, run.world.all_reduce_mean(list(terms.values())), strict=True))
            norm = float(nn.utils.clip_grad_norm_(modules.parameters(), clebs.clip_grad or math.inf))
            optimizer.param_groups[0]["lr"] = clebs.lr * (1 - 0.9 * step / total if clebs.lr_decay else 1.0)
            skipped = 0 if math.isfinite(values["loss"] + norm) else skipped + 1
            if skipped == 0:
                optimizer.step()
            elif skipped > config.skip_nonfinite:
                run.check_finite(values["loss"] + norm, "clebs", step, values | {"grad": norm})
            num_images += sum(len(beta) for _, beta in groups) * (clebs.clips_per_step // len(group_indices))
            if (step + 1) % config.log_every == 0 or step + 1 == total:
                seconds = (run.elapsed_minutes() - clock) * 60
                speed = {"seconds_a_step": seconds / (step + 1 - logged_step)}
                if num_images:  # the first steps may use landmarks alone
                    speed["images_a_second"] = num_images / max(seconds, 1e-9)
                run.log("clebs", step + 1, total, values | speed)
                num_images, clock, logged_step = 0, run.elapsed_minutes(), step + 1
            if (step + 1) % config.checkpoint_every == 0:
                save(step + 1)
    finalize_expression(run, lebs, flow_basis, sampler)
    write_expression_report(run, lebs, encoder, sampler)
    return total


def _local_groups(run: TrainingRun) -> range:
    """Return the groups of every step that this process takes."""
    world, groups = run.world, run.config.clebs.clips_per_step
    if world.size == 1:
        return range(groups)
    if groups % world.size:
        message = (
            f"clebs.clips_per_step ({groups}) is not a multiple of the {world.size} processes: "
            "the stage clebs is not shared, every process takes all of it"
        )
        run.report_progress("clebs", 0, 0, message=message)
        return range(groups)
    count = groups // world.size
    return range(world.rank * count, (world.rank + 1) * count)


class _PairPool:
    """Landmark pairs; each is used REUSE times within STEPS steps, since drawing is slower than a step."""

    STEPS, REUSE = 50, 4

    def __init__(self, sampler: PairSampler, seed: int, pairs: int) -> None:
        self.sampler, self.seed, self.pairs = sampler, seed, pairs
        self.period = -1
        self.drawn: tuple[Tensor, ...] = ()

    def draw(self, step: int) -> tuple[Tensor, ...]:
        """Return beta_k, beta_j, points_k, points_j of a step, a function of (seed, step)."""
        if self.period != step // self.STEPS:
            self.period = step // self.STEPS
            count = max(self.pairs * self.STEPS // self.REUSE, self.pairs)
            self.drawn = self.sampler.draw_landmark_pairs(self.seed, self.period, count)[:4]
        order = np.random.default_rng([self.seed, step, 4]).permutation(len(self.drawn[0]))
        rows = torch.from_numpy(order[: self.pairs])
        return tuple(x[rows] for x in self.drawn)


def _clebs_loss(
    run: TrainingRun, modules: nn.ModuleDict, groups: list[tuple[Tensor, Tensor]], sampler: PairSampler,
    pool: _PairPool, step: int, scale: Tensor,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Return the loss of a step, eq. 1 on groups of frames of one clip plus terms beyond the paper, and its terms."""
    clebs: ClebsConfig = run.config.clebs
    lebs, encoder, readout = modules["lebs"], modules["encoder"], modules["readout"]
    assert isinstance(lebs, LeBS)
    loss = torch.zeros((), device=run.device)
    values: dict[str, float] = {}
    for images, beta in groups:
        with run.autocast():
            codes = encoder(images.to(run.device))
        contrast, accuracy = contrastive_loss(codes, lebs(beta.to(run.device)), clebs.temperature, clebs.denominator)
        loss = loss + contrast / len(groups)
        for key, value in (("contrast", contrast.item()), ("accuracy", accuracy.item()), ("chance", 1 / len(beta))):
            values[key] = values.get(key, 0.0) + value / len(groups)
    pairs = pool.draw(step) if clebs.geometry > 0 or clebs.mirror > 0 else ()
    if clebs.geometry > 0:
        beta_k, beta_j, points_k, points_j = (x.to(run.device) for x in pairs)
        change = lebs.coefficients(beta_j) - lebs.coefficients(beta_k)  # (N, n)
        motion = (points_j - points_k).flatten(1) / scale
        geometry = F.smooth_l1_loss(readout(change), motion)
        loss = loss + clebs.geometry * geometry
        with torch.no_grad():
            values |= {"geometry": geometry.item(), "rigid": F.smooth_l1_loss(torch.zeros_like(motion), motion).item()}
    if clebs.identity_leakage > 0:
        person = identity_leakage_loss(_lambda_by_person(run, lebs, sampler, step))
        loss = loss + clebs.identity_leakage * person
        values["identity_leakage"] = person.item()
    if clebs.mirror > 0:
        beta = pairs[1]
        mirrored = torch.from_numpy(mirror_beta(beta.numpy()))
        sides = [lebs.coefficients(x.to(run.device)) for x in (beta, mirrored)]
        mirror = mirror_loss(sides[0], sides[1], clebs.antisymmetric_dims)
        loss = loss + clebs.mirror * mirror
        values["mirror"] = mirror.item()
    values["loss"] = loss.item()
    return loss, values


def _lambda_by_person(run: TrainingRun, lebs: LeBS, sampler: PairSampler, step: int) -> Tensor:
    """Return lambda of random frames of random people, (PEOPLE_PER_STEP, FRAMES_PER_PERSON, n)."""
    beta = sampler.draw_person_betas(run.config.seed, step, PEOPLE_PER_STEP, FRAMES_PER_PERSON).to(run.device)
    return lebs.coefficients(beta.flatten(0, 1)).unflatten(0, beta.shape[:2])


def identity_leakage_loss(lam: Tensor) -> Tensor:
    """Return how well lambda (people, frames, n) separates people (beyond the paper); 0 if their means agree.

    Fisher's criterion trace(S_w^-1 S_b) / n: the variance between people in units of the variance within each, which
    does not change with the scale or a rotation of lambda.
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


@torch.no_grad()
def finalize_expression(
    run: TrainingRun, lebs: LeBS | DirectCode, flow_basis: Tensor | None, sampler: PairSampler
) -> FlowReport | None:
    """Scale lambda to the standard deviation LAMBDA_STD, fit the basis flow, and rotate lambda to interpretable axes.

    Eq. 1 is invariant to the scale of lambda. For the axes see `basis_rotation`.
    """
    lebs.eval()
    if isinstance(lebs, LeBS):
        beta = sampler.draw_landmark_pairs(run.config.seed, 2**31 + 8, 1000)[1].to(run.device)
        size = lebs.coefficients(beta).std(0).square().mean().sqrt().clamp_min(1e-6) / LAMBDA_STD
        lebs.fc2.weight.div_(size)
        lebs.fc2.bias.div_(size)
    if flow_basis is None:
        return None
    fitted, report = fit_flow_basis(
        lebs, sampler, run.config.seed, run.config.clebs.ridge_pairs, run.config.clebs.ridge, run.device
    )
    if isinstance(lebs, LeBS):
        lam = _lambda_by_person(run, lebs, sampler, 2**31 + 9)
        motion = fitted.flatten(1) / _motion_scale(sampler, run.config.seed)
        deviations = (lam - lam.mean(1, keepdim=True)).flatten(0, 1)
        mixture = fit_lambda_axes(deviations, motion, run.config.clebs.antisymmetric_dims, LAMBDA_STD).to(run.device)
        lebs.fc2.weight.copy_(mixture @ lebs.fc2.weight)
        lebs.fc2.bias.copy_(mixture @ lebs.fc2.bias)
        fitted = torch.linalg.solve(mixture.T.cpu(), fitted.flatten(1)).view_as(fitted)
    flow_basis.copy_(fitted.to(flow_basis))
    total = run.config.stage_steps("clebs")
    run.log("clebs", total, total, {f"flow_{k}": v for k, v in asdict(report).items()})
    return report


@torch.no_grad()
def fit_flow_basis(
    lebs: LeBS | DirectCode,
    sampler: PairSampler,
    seed: int,
    pairs: int,
    ridge: float,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, FlowReport]:
    """Return the displacement b_i of every basis vector, (n, 478, 3) in the head frame, by ridge regression.

    Fits `points_j - points_k = sum_i (lambda_i(j) - lambda_i(k)) b_i` over pairs of frames of one clip, with people
    drawn equally often, then again without the 1 % of pairs with the largest residual (lost tracks).
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

    all_rows = torch.ones(len(motion), dtype=torch.bool)
    basis = solve(all_rows)
    residual = (motion - change @ basis).square().sum(1)
    basis = solve(residual <= residual.quantile(0.99))
    target, rigid = project_points(after, camera), project_points(before, camera)
    moved = project_points(before + (change @ basis).view_as(before), camera)
    distance = {"": (moved - target).norm(dim=-1) * 256, "_rigid": (rigid - target).norm(dim=-1) * 256}
    regions = {"all": list(range(NUM_LANDMARKS)), "lips": list(LIPS), "eyes": list(LEFT_EYE + RIGHT_EYE)}
    report = FlowReport(
        **{f"{r}{kind}": float(d[:, idx].mean()) for r, idx in regions.items() for kind, d in distance.items()}
    )
    return basis.view(-1, NUM_LANDMARKS, 3), report


def project_points(points: Tensor, camera: Tensor) -> Tensor:
    """Project head-frame points (N, P, 3) by cameras (N, 25) to (N, P, 2) in crop units."""
    pose = camera[:, :16].view(-1, 4, 4)
    local = (points - pose[:, None, :3, 3]) @ pose[:, :3, :3]
    return local[..., :2] / local[..., 2:] * camera[:, 16].view(-1, 1, 1) + 0.5


@torch.no_grad()
def write_expression_report(
    run: TrainingRun, lebs: LeBS, encoder: ImageEncoder, sampler: PairSampler
) -> dict[str, float]:
    """Write clebs.json and clebs.png: contrastive accuracy on groups not used in training, and linear probes."""
    clebs, seed = run.config.clebs, run.config.seed
    accuracies, chances = [], []
    for k in range(REPORT_GROUPS if clebs.steps > 0 else 0):
        images, beta = sampler.draw_clip_group(
            seed, 2**31 + 50 + k, clebs.negatives + 1, clebs.image_size, MIN_CLIP_FRAMES
        )
        codes = encoder(images.to(run.device))
        accuracies.append(contrastive_loss(codes, lebs(beta.to(run.device)), clebs.temperature)[1].item())
        chances.append(1 / len(beta))
    values: dict[str, float] = {}
    if accuracies:
        values = {"accuracy": float(np.mean(accuracies)), "chance": float(np.mean(chances))}
    if not run.world.is_main:
        return values
    betas, person, fit = _labelled_frames(sampler)
    if len(np.unique(person)) > 1 and has_plot_libraries():
        code = lebs(torch.from_numpy(betas).to(run.device)).cpu().numpy()
        values |= asdict(probe_expression_code(betas, code, person, fit, figure_path=run.folder / "clebs.png"))
    write_text(run.folder / "clebs.json", json.dumps(values, indent=1) + "\n")
    return values


def _labelled_frames(sampler: PairSampler) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return beta (N, 64) and person (N,) of frames of every clip, and which to fit to: the first half of each clip."""
    rows: list[np.ndarray] = []
    person: list[str] = []
    fit: list[np.ndarray] = []
    for number, (data, people) in enumerate(zip(sampler.datasets, sampler.video_clips_by_person, strict=True)):
        num_clips = sum(len(clips) for clips in people.values())
        frames_per_clip = max(REPORT_FRAMES // max(num_clips, 1), 4)
        for name, clips in people.items():
            for clip in clips:
                frames = np.unique(np.linspace(0, clip.count - 1, min(frames_per_clip, clip.count)).round().astype(int))
                rows.append(data.beta[clip.start + frames])
                person += [f"{number}/{name}"] * len(frames)
                fit.append(frames < clip.count / 2)
    return np.concatenate(rows).astype(np.float32), np.array(person), np.concatenate(fit)
