"""What of a driver reaches the source, and how much of it: expression in lambda, pose on the rotation group.

Both follow one rule: the source's own, plus `scale` times the driver's change from a base. The base is the source's own
(absolute) or the driver's reference frame (relative). So a scale of 0 leaves the source as it is, absolute at 1 is the
driver itself (the paper's reenactment), and more than 1 exaggerates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.runtime.camera import head_pose, rotation_exp, rotation_log, with_head_pose
from export3d_cli.core.runtime.errors import InputError

T = TypeVar("T")
DRIVABLE = ("expression", "pose")  # of a driver


@dataclass(frozen=True)
class Control:
    """Which parts are driven, how much, and counted from where."""

    drive: tuple[str, ...] = DRIVABLE
    expression_scale: float = 1.0
    pose_scale: float = 1.0
    pose: Literal["absolute", "relative"] = "absolute"
    relative_expression: bool = False
    max_travel: float | None = None  # the head's centre stays within this part of the crop's side from the source's own

    def __post_init__(self) -> None:
        if not np.isfinite([self.expression_scale, self.pose_scale]).all():
            raise InputError(f"scales {self.expression_scale} and {self.pose_scale} must be finite numbers")
        if not self.drive or not set(self.drive) <= set(DRIVABLE):
            raise InputError(f"cannot drive {','.join(self.drive) or 'nothing'}: name expression, pose or both")

    @property
    def needs_reference(self) -> bool:
        """Whether it takes the driver's reference frame."""
        return self.relative_expression or self.pose == "relative"

    def target_expression(self, own: Tensor, driver: Tensor, reference: Tensor | None) -> Tensor:
        """Coefficients lambda of the source (1, n), the driver (B, n) and its reference (1, n) -> (B, n)."""
        scale = self.expression_scale if "expression" in self.drive else 0.0
        if not self.relative_expression and scale == 1:
            return driver
        return own + scale * (driver - (_require_reference(reference) if self.relative_expression else own))

    def target_cameras(self, own: np.ndarray, driver: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
        """Cameras of the source (25,), the driver (T, 25) and its reference (25,) -> (T, 25) float32.

        Turns are counted about the head's own axes, so that a nod stays a nod whichever way the source looks; shifts
        along the camera's, so that to the right stays to the right.
        """
        scale = self.pose_scale if "pose" in self.drive else 0.0
        if self.pose == "absolute" and scale == 1 and self.max_travel is None:
            return driver
        rotation, centre = head_pose(own)
        turned, shifted = head_pose(driver)
        first, begin = head_pose(_require_reference(reference)) if self.pose == "relative" else (rotation, centre)
        turn = rotation_exp(scale * rotation_log(first.T @ turned))
        cameras = np.repeat(np.asarray(own, dtype=np.float32)[None], len(driver), axis=0)
        return with_head_pose(
            cameras, rotation @ turn, self._limit_travel(centre, centre + scale * (shifted - begin), own)
        )

    def _limit_travel(self, own: np.ndarray, centre: np.ndarray, camera: np.ndarray) -> np.ndarray:
        """Head centres (T, 3) of the camera frame, softly kept near the source's own (3,), in place and in size."""
        if self.max_travel is None:
            return centre
        growth = self.max_travel * np.tanh(np.log(own[2] / centre[:, 2]) / self.max_travel)
        depth = own[2] * np.exp(-growth)
        unit = self.max_travel / float(camera[16])  # of the crop's side, at depth 1
        shift = unit * np.tanh((centre[:, :2] / centre[:, 2:] - own[:2] / own[2]) / unit)
        return np.concatenate([(own[:2] / own[2] + shift) * depth[:, None], depth[:, None]], axis=1)


def amplify_expression(source: Tensor, target: Tensor, gain: float) -> Tensor:
    """Return lambda (B, n) to give to the network, so that its frames show `target` (B, n).

    The difference from the source's lambda (1, n) is multiplied by `ModelConfig.expression_gain`.
    """
    return torch.lerp(source.expand_as(target), target, gain)


def _require_reference(reference: T | None) -> T:
    if reference is None:
        raise InputError("relative control needs the driver's reference frame")
    return reference
