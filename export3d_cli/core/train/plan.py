"""What a training would cost, before it starts: parameters of every box, FLOPs of a frame, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from export3d_cli.core.camera import Camera
from export3d_cli.core.config import BETA_DIM, POINTS, TrainConfig
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.train.discriminator import Discriminator

COPIES = 5  # of the weights in training: themselves, gradients, two moments of Adam, moving average


@dataclass(frozen=True)
class TrainPlan:
    """The cost of one configuration. FLOPs count matrix products, convolutions and attention, two a multiply-add."""

    parameters: dict[str, int]  # of each box
    total_parameters: int  # of the model, without the discriminator
    gflops_source: float  # work that depends on the photo alone, once a source
    gflops_frame: float  # every driven frame
    activations_mib_a_pair: float  # what backward keeps for one pair, at fp32
    weights_mib: float  # weights, gradients, Adam's moments and the moving average
    memory_mib: float  # estimate for one process: weights and the activations of one part of its batch, the
    # discriminator's activations left out


@torch.no_grad()
def _frame_flops(model: Export3D, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    model.eval()
    with FlopCounterMode(display=False) as once:
        source = model.encode_source(*inputs[:4])
    with FlopCounterMode(display=False) as often:
        model.drive(source, *inputs[4:])
    return once.get_total_flops() / 1e9, often.get_total_flops() / 1e9


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


def plan(config: TrainConfig, *, processes: int = 1) -> TrainPlan:
    """Build the model of `config` on the CPU, run it once on zeros and measure."""
    size = config.model.image_size
    with torch.random.fork_rng(devices=[]):
        model = Export3D(config.model)
        boxes = {name: sum(p.numel() for p in box.parameters()) for name, box in model.named_children()}
        total = sum(boxes.values())
        discriminator = 0
        if "adversarial" in config.stages:
            against = Discriminator(size, config.adversarial)
            discriminator = sum(p.numel() for p in against.parameters())
            boxes["discriminator"] = discriminator
        camera = torch.from_numpy(Camera.orbit(0, 0).vector()).float()[None]
        beta, points = torch.zeros(1, BETA_DIM), torch.zeros(1, POINTS, 3)
        inputs = (torch.zeros(1, 3, size, size), beta, camera, points, beta, camera)
        source, frame = _frame_flops(model, inputs)
        activations = _activation_bytes(model, inputs) / 2**20
    weights = (COPIES * total + (COPIES - 1) * discriminator) * 4 / 2**20
    pairs = max(config.batch // (config.accumulate * processes), 1)
    return TrainPlan(boxes, total, source, frame, activations, weights, weights + pairs * activations)
