"""Training: the CLeBS stage, then the image stages (sec. 6.3). To resume, run the same command again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export3d_cli.core.config.loading import save_yaml
from export3d_cli.core.config.schema import INPAINTERS, STAGES, TrainConfig
from export3d_cli.core.face.canonical_face import load_canonical_face, make_flow_triangles
from export3d_cli.core.model.checkpoint import load_into, load_weights, read_licence, save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime import weights
from export3d_cli.core.runtime.device import pick_device, precision_notes
from export3d_cli.core.runtime.errors import ConfigError, TrainingError
from export3d_cli.core.runtime.files import folder_lock
from export3d_cli.core.train import pose_debias_stage as steady
from export3d_cli.core.train.clebs_stage import clebs_steps, train_clebs
from export3d_cli.core.train.distributed import init_distributed
from export3d_cli.core.train.frame_cache import load_datasets
from export3d_cli.core.train.image_stage import ImageStages
from export3d_cli.core.train.inpaint_stage import InpaintStage
from export3d_cli.core.train.objective import learning_rate, reconstruction_loss, scheduled_raw_size
from export3d_cli.core.train.pair_sampler import PairSampler
from export3d_cli.core.train.training_run import TrainEvent, TrainingRun

__all__ = ["TrainSummary", "learning_rate", "reconstruction_loss", "scheduled_raw_size", "train"]


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
    """Run the stages of `config` in its run folder, or go on with them where an earlier call stopped.

    Under torchrun the processes share each batch; the first one writes the files.
    """
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(init_distributed(pick_device(config.device)))
        if world.is_main:
            stack.enter_context(folder_lock(Path(config.run)))
        run = TrainingRun.open(config, progress, world)
        try:
            return _train(run)
        finally:
            run.close()


def _train(run: TrainingRun) -> TrainSummary:
    config, world = run.config, run.world
    if world.is_main:
        save_yaml(config, run.folder / "config.yaml")
    else:
        world.barrier()  # the first process makes the caches
    for message in precision_notes("bf16" if run.bf16 else "fp32", run.device):
        run.report_progress("data", 0, 0, message=message)
    sets = load_datasets(
        config.data, config.model.image_size, progress=lambda m: run.report_progress("data", 0, 0, message=m)
    )
    if world.is_main:
        world.barrier()
    face = load_canonical_face(weights.weights_dir() / "face_landmarker.task")
    sampler = PairSampler(sets, config.data, face.mirror)
    torch.manual_seed(config.seed)
    model = Export3D(config.model).to(run.device)
    if model.flow is not None:
        model.flow.triangles.copy_(torch.from_numpy(make_flow_triangles(face)))
    _load_initial_weights(model, config)
    basis = model.flow.basis if model.flow is not None else None

    resumed_stage = run.resumed_state[1]["stage"] if run.resumed_state is not None else "clebs"
    if run.resumed_state is not None and resumed_stage not in config.stages:
        raise TrainingError(
            f"{run.folder} stopped in the stage {resumed_stage}, which is not one of this run's "
            f"({', '.join(config.stages)}): name another folder in `run`, or add the stage"
        )
    if "clebs" in config.stages and resumed_stage == "clebs":
        own = replace(config.data, weight=config.clebs.weight or config.data.weight)
        done = train_clebs(run, model.expression, basis, PairSampler(sets, own, face.mirror))
        if done < clebs_steps(config):
            return _make_summary(run, "clebs", done, finished=False, values={})
        world.broadcast_module(model)
        run.resumed_state = None  # the state of the next stage starts empty
    for name in INPAINTERS:
        if name in config.stages and STAGES.index(resumed_stage) <= STAGES.index(name):
            done = InpaintStage(run, model, sampler, name).train()
            if done < config.stage_steps(name):
                return _make_summary(run, name, done, finished=False, values={})
            run.resumed_state = None
    model.inpainters.requires_grad_(False)  # they are not asked in the stages that follow
    if resumed_stage != steady.STAGE:
        summary = _train_image_stages(run, model, sampler, resumed_stage)
        if not summary.finished or steady.STAGE not in config.stages:
            return summary
        run.resumed_state = None
    return _train_pose_debias(run, model, PairSampler(sets, steady.sampling_config(config), face.mirror))


def _train_image_stages(run: TrainingRun, model: Export3D, sampler: PairSampler, resumed_stage: str) -> TrainSummary:
    """The stages that are trained on whole images, if any; in the end there is a weights file."""
    config = run.config
    stages = [stage for stage in config.stages if stage not in ("clebs", *INPAINTERS, steady.STAGE)]
    if not stages:
        if run.world.is_main:
            save_weights(
                run.folder / "weights.safetensors", model.state_dict(), config.model, _training_record(config, 0)
            )
        last = next((stage for stage in reversed(config.stages) if stage != steady.STAGE), steady.STAGE)
        return _make_summary(run, last, config.stage_steps(last), finished=True, values={})
    images = ImageStages(run, model, sampler, _training_record(config, 0))
    if resumed_stage in stages:
        stages = stages[stages.index(resumed_stage) :]
    values: dict[str, float] = {}
    for stage in stages:
        values = images.train(stage)
        if images.step < images.steps:
            break
    finished = images.stage == stages[-1] and images.step >= images.steps
    return _make_summary(run, images.stage, images.step, finished=finished, values=values)


def _train_pose_debias(run: TrainingRun, model: Export3D, sampler: PairSampler) -> TrainSummary:
    """The stage `steady`, of the weights that the stages before it left."""
    run.world.barrier()  # the first process has written them
    path = run.folder / "weights.safetensors"
    state, _, record = load_weights(path)
    load_into(model, state, f"the weights {path}")
    stage = steady.PoseDebiasStage(run, model, sampler)
    done = stage.train()
    finished = done >= run.config.stage_steps(steady.STAGE)
    if finished and run.world.is_main:
        save_weights(path, model.state_dict(), run.config.model, {**record, "steady_steps": done})
    return _make_summary(run, steady.STAGE, done, finished=finished, values=stage.values)


def _load_initial_weights(model: Export3D, config: TrainConfig) -> None:
    """Fill a new model from `init`, or its expression code and basis flow from `expression`."""
    if config.init:
        state, found, _ = load_weights(weights.resolve_weights(config.init))
        same = replace(found, raw_size=config.model.raw_size)
        new: dict[str, Tensor] = {}
        for name in INPAINTERS:
            if not getattr(same, name) and name in config.stages:  # it is this run that gives the model one
                same = replace(same, **{name: getattr(config.model, name)})  # type: ignore[arg-type]
                new |= {k: v for k, v in model.state_dict().items() if k.startswith(f"inpainters.{name}.")}
        if same != config.model:
            raise ConfigError(f"init {config.init} holds a model of another size: use its configuration")
        load_into(model, {**new, **state}, f"the weights {config.init}")
    if config.expression_from:
        state, _, _ = load_weights(weights.resolve_weights(config.expression_from))
        part = {k: v for k, v in state.items() if k.startswith("expression.") or k == "flow.basis"}
        load_into(model, {**model.state_dict(), **part}, f"the expression code of {config.expression_from}")


def _training_record(config: TrainConfig, step: int) -> dict[str, Any]:
    """The training record in the weights' header: enough to know what the weights saw, no paths."""
    own = "clebs" in config.stages
    record: dict[str, Any] = {
        "stages": list(config.stages),
        "steps": step,
        "clebs_steps": config.clebs.steps if own and config.model.expression == "clebs" else 0,
        **{f"{name}_steps": config.stage_steps(name) for name in INPAINTERS if name in config.stages},
        "denominator": config.clebs.denominator if own else "",
        "batch": config.batch,
        "seed": config.seed,
        "data": [Path(p).name for p in config.data.path],
        "backbone": Path(config.loss.backbone).name,
    }
    for key, origin in (("init", config.init), ("expression", config.expression_from)):  # loaded parts keep their record
        if origin:
            path = weights.resolve_weights(origin)
            record[key] = load_weights(path)[2]
            record["licence"] = read_licence(path)  # what they allow holds for what is made of them
    return record


def _make_summary(run: TrainingRun, stage: str, step: int, *, finished: bool, values: dict[str, float]) -> TrainSummary:
    return TrainSummary(
        run.folder, run.folder / "weights.safetensors", stage, step, finished, run.elapsed_minutes(), values
    )
