"""What a training would cost, before it starts: parameters of every box, FLOPs of a frame, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from export3d_cli.core.config.schema import BETA_DIM, CAMERA_DIM, NUM_LANDMARKS, TrainConfig
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.train.discriminator import Discriminator

WEIGHT_COPIES = 5  # of the weights in training: themselves, gradients, two moments of Adam, moving average


@dataclass(frozen=True)
class TrainPlan:
    """The cost of one configuration. FLOPs count matrix products, convolutions and attention, two a multiply-add."""

    parameters: dict[str, int]  # of each box
    total_parameters: int  # of the model, without the discriminator
    gflops: dict[str, float]  # of each box, for a source and a frame of it together; the discriminator's for one image
    gflops_source: float  # work that depends on the photo alone, once a source
    gflops_frame: float  # every driven frame
    activations_mib_a_pair: float  # what backward keeps for one pair, at fp32
    weights_mib: float  # weights, gradients, Adam's moments and the moving average
    memory_mib: float  # estimate for one process: weights and the activations of one part of its batch, the
    # discriminator's activations left out


class _MethodModule(nn.Module):
    """A method of a module as a module: the counter names what it counts by the modules it enters."""

    def __init__(self, model: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: Any) -> Any:
        return self.method(*inputs)


def _frame_flops(model: Export3D, inputs: tuple[Tensor, ...]) -> tuple[dict[str, float], float, float]:
    """GFLOPs of every box, of a source, and of a frame; with gradients, without which a CPU leaves work out."""
    model.eval()
    boxes = dict.fromkeys((name for name, _ in model.named_children()), 0.0)
    totals: list[float] = []
    source: Any = None
    for method in (model.encode_source, model.drive):
        with FlopCounterMode(display=False) as counter:
            source = _MethodModule(model, method)(*(inputs[:4] if source is None else (source, *inputs[4:])))
        for box, flops in _group_by_child(counter.get_flop_counts()).items():
            boxes[box] = boxes.get(box, 0.0) + flops / 1e9
        totals.append(counter.get_total_flops() / 1e9)
    boxes["between the boxes"] = sum(totals) - sum(boxes.values())
    return boxes, totals[0], totals[1]


def _group_by_child(counts: dict[str, dict[Any, int]]) -> dict[str, float]:
    """Counts by module -> by child of the model: of nested modules only the outermost one that was entered."""
    start = f"{_MethodModule.__name__}.model."
    entered = {name for name in counts if name.startswith(start)}
    found: dict[str, float] = {}
    for name in entered:
        parts = name.split(".")
        if not any(".".join(parts[:k]) in entered for k in range(3, len(parts))):
            found[parts[2]] = found.get(parts[2], 0.0) + sum(counts[name].values())
    return found


def _activation_bytes(model: Export3D, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that one forward pass in training keeps for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    del output  # until here nothing that was counted could be freed and its place counted twice
    return sum(kept.values())


def plan_training(config: TrainConfig, *, processes: int = 1) -> TrainPlan:
    """Build the model of `config` on the CPU, run it once on zeros and measure."""
    size = config.model.image_size
    with torch.random.fork_rng(devices=[]):
        model = Export3D(config.model)
        boxes = {name: sum(p.numel() for p in box.parameters()) for name, box in model.named_children()}
        total = sum(boxes.values())
        discriminator, critic = 0, {}
        if "adversarial" in config.stages:
            against = Discriminator(size, config.adversarial)
            discriminator = sum(p.numel() for p in against.parameters())
            boxes["discriminator"] = discriminator
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                against(torch.zeros(1, 3, size, size), torch.zeros(1, CAMERA_DIM))
            critic = {"discriminator": counter.get_total_flops() / 1e9}
        camera = torch.from_numpy(Camera.orbit(0, 0).to_vector()).float()[None]
        beta, points = torch.zeros(1, BETA_DIM), torch.zeros(1, NUM_LANDMARKS, 3)
        inputs = (torch.zeros(1, 3, size, size), beta, camera, points, beta, camera)
        gflops, source, frame = _frame_flops(model, inputs)
        activations = _activation_bytes(model, inputs) / 2**20
    weights = (WEIGHT_COPIES * total + (WEIGHT_COPIES - 1) * discriminator) * 4 / 2**20
    pairs = max(config.batch // (config.accumulate * processes), 1)
    memory = weights + pairs * activations
    return TrainPlan(boxes, total, gflops | critic, source, frame, activations, weights, memory)
