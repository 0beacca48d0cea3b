"""Cost of a training run before it starts: parameters per module, FLOPs per frame, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from export3d_cli.core.config.schema import BETA_DIM, CAMERA_DIM, TrainConfig
from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.train.discriminator import Discriminator

WEIGHT_COPIES = 5  # weights, gradients, two moments of Adam, moving average


@dataclass(frozen=True)
class TrainPlan:
    """Cost of a configuration. FLOPs count matrix products, convolutions and attention, two per multiply-add."""

    parameters: dict[str, int]  # per module of the model
    total_parameters: int  # of the model, without the discriminator
    gflops: dict[str, float]  # per module, for a source and one frame of it; the discriminator's for one image
    gflops_source: float  # work that depends on the source alone, once per source
    gflops_frame: float  # per driven frame
    activations_mib_a_pair: float  # activations that backward keeps for one pair, at fp32
    weights_mib: float  # weights, gradients, Adam's moments and the moving average
    memory_mib: float  # per process: weights and the activations of one part of its batch, without the discriminator's


class _MethodModule(nn.Module):
    """A method of a module as a module, since the FLOP counter groups its counts by module."""

    def __init__(self, model: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: Any) -> Any:
        return self.method(*inputs)


def _frame_flops(model: Export3D, inputs: tuple[Tensor, ...]) -> tuple[dict[str, float], float, float]:
    """Return GFLOPs per module, per source and per frame, with gradients (a CPU skips work without them)."""
    model.eval()
    gflops = dict.fromkeys((name for name, _ in model.named_children()), 0.0)
    totals: list[float] = []
    source: Any = None
    for method in (model.encode_source, model.drive):
        with FlopCounterMode(display=False) as counter:
            source = _MethodModule(model, method)(*(inputs[:4] if source is None else (source, *inputs[4:])))
        for name, flops in _group_by_child(counter.get_flop_counts()).items():
            gflops[name] = gflops.get(name, 0.0) + flops / 1e9
        totals.append(counter.get_total_flops() / 1e9)
    gflops["between the boxes"] = sum(totals) - sum(gflops.values())
    return gflops, totals[0], totals[1]


def _group_by_child(counts: dict[str, dict[Any, int]]) -> dict[str, float]:
    """Sum counts per module into counts per child of the model; of nested modules only the outermost one counts."""
    start = f"{_MethodModule.__name__}.model."
    entered = {name for name in counts if name.startswith(start)}
    flops: dict[str, float] = {}
    for name in entered:
        parts = name.split(".")
        if not any(".".join(parts[:k]) in entered for k in range(3, len(parts))):
            flops[parts[2]] = flops.get(parts[2], 0.0) + sum(counts[name].values())
    return flops


def _activation_bytes(model: Export3D, inputs: tuple[Tensor, ...]) -> int:
    """Return the bytes, without weights, that a forward pass in training keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    del output  # kept until here, so that no freed storage is reused and counted twice
    return sum(kept.values())


def plan_training(config: TrainConfig, *, processes: int = 1) -> TrainPlan:
    """Measure the model of `config` in one pass over zeros on the CPU."""
    size = config.model.image_size
    with torch.random.fork_rng(devices=[]):
        model = Export3D(config.model)
        parameters = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
        total = sum(parameters.values())
        discriminator, discriminator_gflops = 0, {}
        if "adversarial" in config.stages:
            network = Discriminator(size, config.adversarial)
            discriminator = sum(p.numel() for p in network.parameters())
            parameters["discriminator"] = discriminator
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network(torch.zeros(1, 3, size, size), torch.zeros(1, CAMERA_DIM))
            discriminator_gflops = {"discriminator": counter.get_total_flops() / 1e9}
        camera = torch.from_numpy(Camera.orbit(0, 0).to_vector()).float()[None]
        beta, points = torch.zeros(1, BETA_DIM), torch.zeros(1, NUM_LANDMARKS, 3)
        inputs = (torch.zeros(1, 3, size, size), beta, camera, points, beta, camera)
        gflops, source, frame = _frame_flops(model, inputs)
        activations = _activation_bytes(model, inputs) / 2**20
    weights = (WEIGHT_COPIES * total + (WEIGHT_COPIES - 1) * discriminator) * 4 / 2**20
    pairs = max(config.batch // (config.accumulate * processes), 1)
    memory = weights + pairs * activations
    return TrainPlan(parameters, total, gflops | discriminator_gflops, source, frame, activations, weights, memory)
