"""Training on several devices under torchrun: who I am, and the few numbers and tensors that are shared."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from export3d_cli.core.runtime.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among those of one run; alone unless torchrun started it."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def all_reduce_mean(self, values: list[float]) -> list[float]:
        """The mean over the processes of each number."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(shared)
        return (shared / self.size).tolist()

    def broadcast(self, value: float) -> float:
        """What the first process says, so that clocks cannot disagree."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.broadcast(shared, 0)
        return float(shared)

    def all_reduce_mean_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its mean over the processes."""
        if self.size > 1:
            distributed.all_reduce(tensor)
            tensor.div_(self.size)
        return tensor

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The same for gradients, in one message; what DistributedDataParallel does, for modules it cannot wrap."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not grads:
            return
        flat = self.all_reduce_mean_(torch.cat([g.flatten() for g in grads]))
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def broadcast_module(self, module: nn.Module) -> None:
        """Parameters and buffers of the first process to all."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                contiguous = tensor.contiguous()
                distributed.broadcast(contiguous, 0)
                tensor.copy_(contiguous)

    def wrap_ddp(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the processes in every backward pass."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # buffers are the same everywhere anyhow; newer releases of torch have another name for leaving them alone
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        options: dict[str, Any] = {"device_ids": ids}
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        return nn.parallel.DistributedDataParallel(module, **options)


def no_sync(module: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager[object]:
    """Keeps a wrapped module from averaging before the last part of a batch."""
    if is_last or not isinstance(module, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[World]:
    """Meet the other processes of torchrun (gloo on CPUs, NCCL on CUDA), and part from them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} has no CUDA device of its own: start at most one a device")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # Its functions keep the group they find while they are defined. An optimiser's first step would load them, and the
    # threads of the group they keep would outlive it and, now and then, abort the process while Python ends.
    importlib.import_module("torch.distributed.nn.functional")
    # the others wait while the first one decodes a data set, which may take long
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield World(rank, size, device)
    finally:
        distributed.destroy_process_group()
