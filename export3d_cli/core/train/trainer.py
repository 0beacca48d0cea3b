"""The training loop: runs the stages of a configuration in order. To resume, run the same command again."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from export3d_cli.core.config.loading import save_yaml
from export3d_cli.core.config.schema import CALIBRATION, INPAINTERS, ModelConfig, TrainConfig
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.model.checkpoint import load_into, load_weights, read_licence
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.device import pick_device, precision_notes, torch_state
from export3d_cli.core.runtime.errors import ConfigError
from export3d_cli.core.runtime.files import folder_lock
from export3d_cli.core.runtime.weights import resolve_weights
from export3d_cli.core.train.clebs_stage import ClebsStage, prepare_ablation
from export3d_cli.core.train.distributed import init_distributed
from export3d_cli.core.train.image_stage import ImageStages
from export3d_cli.core.train.inpaint_stage import InpaintStage
from export3d_cli.core.train.planedict_stage import PlaneDictStage
from export3d_cli.core.train.pose_debias_stage import PoseDebiasStage, sampling_config
from export3d_cli.core.train.sampler_stage import SamplerStage
from export3d_cli.core.train.stage import Stage, TrainEvent, TrainingRun
from export3d_cli.core.train.training_data import PairSampler, load_datasets


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
    """Run or continue the stages of `config` in its run folder; under torchrun the processes share each batch."""
    if not config.license:
        raise ConfigError("license is not set: name the licence of the trained weights, for example "
                          "--license CC-BY-4.0 (what your training data and initial weights allow)")  # fmt: skip
    names = {"init": config.init, "expression": config.expression_from}
    initial = {key: load_weights(resolve_weights(name)) for key, name in names.items() if name}
    if "init" in initial:
        # of the initial weights, except for fields that the configuration sets
        unset = [name for name in CALIBRATION if getattr(config.model, name) == getattr(ModelConfig, name)]
        calibration = {name: getattr(initial["init"][1], name) for name in unset}
        config = replace(config, model=replace(config.model, **calibration))
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(init_distributed(pick_device(config.device)))
        stack.enter_context(torch_state(threads=config.threads, seed=config.seed, device=world.device))
        if world.is_main:
            stack.enter_context(folder_lock(Path(config.run)))
        run = TrainingRun(config, progress, world)

        # data
        if world.is_main:
            save_yaml(config, run.folder / "config.yaml")
        else:
            world.barrier()  # the first process builds the caches
        for message in [*_licence_notes(config), *precision_notes("bf16" if run.bf16 else "fp32", run.device)]:
            run.report_message(message)
        datasets = load_datasets(config.data, config.model.image_size, progress=run.report_message)
        if world.is_main:
            world.barrier()
        if config.stages == ("sampler",):  # no network
            run.record = {"stages": list(config.stages), "data": [Path(p).name for p in config.data.path]}
            fit = SamplerStage(run, datasets)
            fit.train()
            return TrainSummary(run.folder, run.weights, "sampler", 1, True, run.elapsed_minutes(), fit.values)

        # model
        torch.manual_seed(config.seed)
        model = Export3D(config.model).to(run.device)
        if model.flow is not None:
            model.flow.triangles.copy_(torch.from_numpy(load_canonical_face().flow_triangles))
        _load_initial_weights(model, config, initial)
        run.record = _training_record(config) | {key: record for key, (_, _, record) in initial.items()}
        planedict_is_new = "init" not in initial or initial["init"][1].motion != "planedict"
        del initial

        # stages
        model.inpainters.requires_grad_(False)  # only their own stages train them
        make_sampler = partial(PairSampler, datasets)
        resumed_stage = config.stages[0] if run.resumed_state is None else run.resumed_state[1]["stage"]
        images: ImageStages | None = None
        stage: Stage | None = None
        finished = True
        for name in config.stages[config.stages.index(resumed_stage) :]:
            if name == "clebs":
                sampler = make_sampler(replace(config.data, weight=config.clebs.weight or config.data.weight))
                if config.model.expression != "clebs":
                    prepare_ablation(run, model, sampler)
                    continue
                stage = ClebsStage(run, model, sampler)
            elif name in INPAINTERS:
                stage = InpaintStage(run, model, make_sampler(config.data), name)
            elif name == "planedict":
                data = replace(config.data, weight=config.planedict.weight or config.data.weight)
                stage = PlaneDictStage(run, model, make_sampler(data), is_new=planedict_is_new)
            elif name == "pose_debias":
                if run.resumed_state is None and images is None:
                    run.save_weights(model.state_dict())
                world.barrier()  # the first process has written the weights
                state, _, run.record = load_weights(run.weights)
                load_into(model, state, f"the weights {run.weights}")
                stage = PoseDebiasStage(run, model, make_sampler(sampling_config(config)))
            else:
                stage = images = images or ImageStages(run, model, make_sampler(config.data))
                images.begin(name)
            finished = stage.train()
            if not finished:
                break
            run.resumed_state = None  # the next stage starts without a state
            if stage is not images:
                world.broadcast_module(model)
                run.save_weights(model.state_dict())
        step, values = (stage.step, stage.values) if stage is not None else (0, {})
        return TrainSummary(run.folder, run.weights, name, step, finished, run.elapsed_minutes(), values)


def _licence_notes(config: TrainConfig) -> list[str]:
    """Return a note if the initial weights have another licence than the trained ones."""
    licences = {name: read_licence(resolve_weights(name)) for name in (config.init, config.expression_from) if name}
    remedy = f"make sure that it allows {config.license}"
    differing = {name: licence or "unknown" for name, licence in licences.items() if licence != config.license}
    return [f"{name} has the licence {licence}: {remedy}" for name, licence in differing.items()]


def _load_initial_weights(model: Export3D, config: TrainConfig, initial: dict[str, Any]) -> None:
    """Fill a new model from the weights `init`, or its expression code and basis flow from `expression`."""
    if "init" in initial:
        state, init_config, _ = initial["init"]
        kept = {name: getattr(config.model, name) for name in ("raw_size", *CALIBRATION)}
        added = [s for s in INPAINTERS if not getattr(init_config, s) and s in config.stages]  # inpainters of this run
        lacks_planedict = "planedict" in config.stages and init_config.motion == "landmarks"
        added_fields = [*added, *(["motion"] if lacks_planedict else [])]
        init_config = replace(init_config, **kept, **{name: getattr(config.model, name) for name in added_fields})
        prefixes = (*(f"inpainters.{stage}." for stage in added), *(["planedict."] if "motion" in added_fields else []))
        new_state = {k: v for k, v in model.state_dict().items() if prefixes and k.startswith(prefixes)}
        model_fields = vars(config.model)
        differing = [f"{name}={value}" for name, value in vars(init_config).items() if value != model_fields[name]]
        if differing:
            raise ConfigError(f"init {config.init} holds another model: set model.{', model.'.join(differing)}")
        load_into(model, {**new_state, **state}, f"the weights {config.init}")
    if "expression" in initial:
        state = initial["expression"][0]
        expression = {k: v for k, v in state.items() if k.startswith("expression.") or k == "flow.basis"}
        load_into(model, {**model.state_dict(), **expression}, f"the expression code of {config.expression_from}")


def _training_record(config: TrainConfig) -> dict[str, Any]:
    """Return the training record for the weights' header: enough to know what the weights have seen, no paths."""
    has_clebs = "clebs" in config.stages
    return {
        "stages": list(config.stages),
        "steps": 0,  # of reconstruction; set when weights are saved
        "clebs_steps": config.clebs.steps if has_clebs and config.model.expression == "clebs" else 0,
        **{f"{s}_steps": config.stage_steps(s) for s in (*INPAINTERS, "planedict") if s in config.stages},
        "denominator": config.clebs.denominator if has_clebs else "",
        "batch": config.batch,
        "seed": config.seed,
        "data": [Path(p).name for p in config.data.path],
        "backbone": Path(config.loss.backbone).name,
    }
