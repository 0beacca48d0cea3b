"""Cost of a training run before it starts: parameters per module, FLOPs per frame, memory."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from export3d_cli.core.config.schema import BETA_DIM, TrainConfig
from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.train.discriminator import Discriminator

WEIGHT_COPIES = 5  # weights, gradients, two moments of Adam, moving average


@dataclass(frozen=True)
class TrainPlan:
    """Cost of a configuration. FLOPs count matrix products, convolutions and attention, two per multiply-add."""

    parameters: dict[str, int]  # per module of the model, and of the discriminator
    total_parameters: int  # of the model, without the discriminator
    gflops_source: float  # work that depends on the source alone, once per source
    gflops_frame: float  # per driven frame
    activations_mib_a_pair: float  # activations that backward keeps for one pair, at fp32
    weights_mib: float  # weights, gradients, Adam's moments and the moving average
    memory_mib: float  # per process: weights and the activations of one part of its batch, without the discriminator's


def _activation_bytes(model: Export3D, inputs: tuple[Tensor, ...]) -> int:
    """Return the bytes, without weights, that a forward pass in training keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(*inputs)
    del output  # kept until here, so that no freed storage is reused and counted twice
    return sum(kept.values())


def plan_training(config: TrainConfig) -> TrainPlan:
    """Measure the model of `config` in one pass over zeros on the CPU; the stage `sampler` has no network."""
    if config.stages == ("sampler",):
        return TrainPlan({}, 0, 0, 0, 0, 0, 0)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.random.fork_rng(devices=[]):
        model = Export3D(config.model).eval()
        parameters = {name: count(child) for name, child in model.named_children()}
        total = sum(parameters.values())
        discriminator = 0
        if "adversarial" in config.stages:
            discriminator = count(Discriminator(config.model.image_size, config.adversarial))
        photo = torch.zeros(1, 3, config.model.image_size, config.model.image_size)
        camera = torch.from_numpy(orbit_camera(0)).float()[None]
        beta, points = torch.zeros(1, BETA_DIM), torch.zeros(1, NUM_LANDMARKS, 3)
        with FlopCounterMode(display=False) as counter:  # with gradients: a CPU skips work without them
            source = model.encode_source(photo, beta, camera, points)
            source_flops = counter.get_total_flops()
            model.drive(source, model.coefficients(beta), camera)
        activations = _activation_bytes(model, (photo, beta, camera, points, beta, camera)) / 2**20
    weights = (WEIGHT_COPIES * total + (WEIGHT_COPIES - 1) * discriminator) * 4 / 2**20
    parameters |= {"discriminator": discriminator} if discriminator else {}
    frame_flops, memory = counter.get_total_flops() - source_flops, config.batch // config.accumulate * activations
    return TrainPlan(parameters, total, source_flops / 1e9, frame_flops / 1e9, activations, weights, weights + memory)
