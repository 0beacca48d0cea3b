"""A run's numbers for TensorBoard, where it is installed; stats.jsonl holds the same everywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


class TensorBoardLogger:
    """Writes scalars as `stage/term` over the steps of all stages together; does nothing without TensorBoard."""

    def __init__(self, folder: Path, *, enabled: bool, first_step: int = 0) -> None:
        """Write to `folder`; what an earlier call wrote of steps from `first` on is forgotten."""
        self.writer: Any = None
        if enabled and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=first_step or None, max_queue=100)

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One line of the log."""
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(f"{stage}/{key}", value, step)

    def close(self) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.close()
