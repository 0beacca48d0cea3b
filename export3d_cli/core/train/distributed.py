"""Training on several devices under torchrun: rank, world size and the collective operations that training needs."""

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from export3d_cli.core.runtime.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among the processes of one run; the only one unless started by torchrun."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            distributed.barrier()

    def all_reduce_mean(self, values: dict[str, float]) -> dict[str, float]:
        """Return the mean of each number over the processes."""
        if self.size == 1:
            return values
        tensor = self.all_reduce_mean_(torch.tensor(list(values.values()), dtype=torch.float64, device=self.device))
        return dict(zip(values, tensor.tolist(), strict=True))

    def broadcast(self, value: float) -> float:
        """Return the value of the first process, so that decisions that depend on clocks agree."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.broadcast(tensor, 0)
        return float(tensor)

    def all_reduce_mean_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its mean over the processes."""
        if self.size > 1:
            distributed.all_reduce(tensor)
            tensor.div_(self.size)
        return tensor

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over the processes, in one message."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not grads:
            return
        flat = self.all_reduce_mean_(torch.cat([g.flatten() for g in grads]))
        for grad, average in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(average.view_as(grad))

    def broadcast_module(self, module: nn.Module) -> None:
        """Copy parameters and buffers of the first process to all."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                contiguous = tensor.contiguous()
                distributed.broadcast(contiguous, 0)
                tensor.copy_(contiguous)


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[World]:
    """Join torchrun's process group (gloo on CPUs, NCCL on CUDA) and leave it at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"process {local_rank} has no CUDA device of its own: start one process per device")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # The functions of this module keep the process group that exists when they are defined. If an optimiser's first
    # step imported it later, the group's threads would outlive the group and sometimes abort the process at exit.
    importlib.import_module("torch.distributed.nn.functional")
    # the other processes wait while the first one decodes a dataset, which may take long
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield World(rank, size, device)
    finally:
        distributed.destroy_process_group()
