"""The training loop: runs the stages of a configuration in order. To resume, run the same command again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export3d_cli.core.config.loading import save_yaml
from export3d_cli.core.config.schema import CALIBRATION, INPAINTERS, ModelConfig, TrainConfig
from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.model.checkpoint import load_into, load_weights, read_licence
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.device import pick_device, precision_notes, torch_state
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.runtime.files import folder_lock
from export3d_cli.core.runtime.weights import resolve_weights
from export3d_cli.core.train.clebs_stage import ClebsStage, prepare_ablation
from export3d_cli.core.train.distributed import init_distributed
from export3d_cli.core.train.frame_cache import load_datasets
from export3d_cli.core.train.image_stage import ImageStages
from export3d_cli.core.train.inpaint_stage import InpaintStage
from export3d_cli.core.train.pair_sampler import PairSampler
from export3d_cli.core.train.pose_debias_stage import PoseDebiasStage, sampling_config
from export3d_cli.core.train.stage import Stage
from export3d_cli.core.train.training_run import TrainEvent, TrainingRun

IMAGE_STAGES = ("reconstruction", "adversarial")


@dataclass(frozen=True)
class TrainSummary:
    """Result of a call of `train`."""

    run: Path
    weights: Path  # inference weights (moving average); missing while the first stage is unfinished
    stage: str  # the stage reached
    step: int  # its steps done
    finished: bool  # False: `max_minutes` ran out
    minutes: float
    values: dict[str, float]  # the last log line


def train(config: TrainConfig, *, progress: Callable[[TrainEvent], None] | None = None) -> TrainSummary:
    """Run the stages of `config` in its run folder, or continue where an earlier call stopped.

    Under torchrun the processes share each batch; the first one writes the files.
    """
    if not config.license:
        raise ConfigError(
            "license is not set: name the licence of the trained weights, for example --license CC-BY-4.0 "
            "(what your training data and initial weights allow)"
        )
    if config.init:
        init_model = load_weights(resolve_weights(config.init))[1]
        config = replace(config, model=_inherit_calibration(config.model, init_model))
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(init_distributed(pick_device(config.device)))
        stack.enter_context(torch_state(threads=config.threads, seed=config.seed, device=world.device))
        if world.is_main:
            stack.enter_context(folder_lock(Path(config.run)))
        run = TrainingRun.open(config, progress, world)
        try:
            return _train(run)
        finally:
            run.close()


def _train(run: TrainingRun) -> TrainSummary:
    config, world = run.config, run.world

    # data
    if world.is_main:
        save_yaml(config, run.folder / "config.yaml")
    else:
        world.barrier()  # the first process builds the caches
    for message in precision_notes("bf16" if run.bf16 else "fp32", run.device):
        run.report_progress("data", 0, 0, message=message)
    datasets = load_datasets(
        config.data, config.model.image_size, progress=lambda m: run.report_progress("data", 0, 0, message=m)
    )
    if world.is_main:
        world.barrier()
    face = load_canonical_face()
    sampler = PairSampler(datasets, config.data, face.mirror)

    # model
    torch.manual_seed(config.seed)
    model = Export3D(config.model).to(run.device)
    if model.flow is not None:
        model.flow.triangles.copy_(torch.from_numpy(face.flow_triangles))
    _load_initial_weights(model, run)

    # stages
    model.inpainters.requires_grad_(False)  # only their own stages train them
    run.record = _training_record(config)
    resumed_stage = config.stages[0] if run.resumed_state is None else run.resumed_state[1]["stage"]
    images: ImageStages | None = None
    stage: Stage | None = None
    finished = True
    for name in config.stages[config.stages.index(resumed_stage) :]:
        if name == "clebs":
            data = replace(config.data, weight=config.clebs.weight or config.data.weight)
            clebs_sampler = PairSampler(datasets, data, face.mirror)
            if config.model.expression != "clebs":
                prepare_ablation(run, model, clebs_sampler)
                continue
            stage = ClebsStage(run, model, clebs_sampler)
        elif name in INPAINTERS:
            stage = InpaintStage(run, model, sampler, name)
        elif name == "pose_debias":
            if run.resumed_state is None and images is None:
                run.save_weights(model.state_dict())
            world.barrier()  # the first process has written the weights
            state, _, run.record = load_weights(run.weights)
            load_into(model, state, f"the weights {run.weights}")
            stage = PoseDebiasStage(run, model, PairSampler(datasets, sampling_config(config), face.mirror))
        else:
            stage = images = images or ImageStages(run, model, sampler)
            images.begin(name)
        finished = stage.train()
        if not finished:
            break
        run.resumed_state = None  # the next stage starts without a state
        if name not in IMAGE_STAGES:
            world.broadcast_module(model)
            run.save_weights(model.state_dict())
    step, values = (stage.step, stage.values) if stage is not None else (0, {})
    return TrainSummary(run.folder, run.weights, name, step, finished, run.elapsed_minutes(), values)


def _inherit_calibration(model: ModelConfig, init_model: ModelConfig) -> ModelConfig:
    """Return `model` with the calibration of the initial weights, except for fields that the configuration sets."""
    unset = [name for name in CALIBRATION if getattr(model, name) == getattr(ModelConfig, name)]
    return replace(model, **{name: getattr(init_model, name) for name in unset})


def _load_initial_weights(model: Export3D, run: TrainingRun) -> None:
    """Fill a new model from `init`, or its expression code and basis flow from `expression_from`."""
    config = run.config
    for name in (config.init, config.expression_from):
        licence = read_licence(resolve_weights(name)) if name else config.license
        if licence != config.license:
            message = f"{name} has the licence {licence or 'unknown'}: make sure that it allows {config.license}"
            run.report_progress("data", 0, 0, message=message)
    if config.init:
        state, init_config, _ = load_weights(resolve_weights(config.init))
        kept = {name: getattr(config.model, name) for name in ("raw_size", *CALIBRATION)}
        init_config = replace(init_config, **kept)
        new_state: dict[str, Tensor] = {}
        for stage in INPAINTERS:
            if not getattr(init_config, stage) and stage in config.stages:  # this run adds the inpainter
                init_config = replace(init_config, **{stage: getattr(config.model, stage)})  # type: ignore[arg-type]
                prefix = f"inpainters.{stage}."
                new_state |= {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
        model_fields = vars(config.model)
        differing = [f"{name}={value}" for name, value in vars(init_config).items() if value != model_fields[name]]
        if differing:
            raise ConfigError(f"init {config.init} holds another model: set model.{', model.'.join(differing)}")
        load_into(model, {**new_state, **state}, f"the weights {config.init}")
    if config.expression_from:
        state, _, _ = load_weights(resolve_weights(config.expression_from))
        expression = {k: v for k, v in state.items() if k.startswith("expression.") or k == "flow.basis"}
        load_into(model, {**model.state_dict(), **expression}, f"the expression code of {config.expression_from}")


def _training_record(config: TrainConfig) -> dict[str, Any]:
    """Return the training record for the weights' header: enough to know what the weights have seen, no paths."""
    has_clebs = "clebs" in config.stages
    record: dict[str, Any] = {
        "stages": list(config.stages),
        "steps": 0,  # of reconstruction; set when weights are saved
        "clebs_steps": config.clebs.steps if has_clebs and config.model.expression == "clebs" else 0,
        **{f"{stage}_steps": config.stage_steps(stage) for stage in INPAINTERS if stage in config.stages},
        "denominator": config.clebs.denominator if has_clebs else "",
        "batch": config.batch,
        "seed": config.seed,
        "data": [Path(p).name for p in config.data.path],
        "backbone": Path(config.loss.backbone).name,
    }
    for key, name in (("init", config.init), ("expression", config.expression_from)):
        if name:  # weights from elsewhere keep their own record
            record[key] = load_weights(resolve_weights(name))[2]
    return record
