"""Retargeting: which of the driver's motion the source takes, and how strongly.

Expression (in lambda) and pose (on the rotation group) follow one rule: the source's value plus `scale` times the
driver's change from a base. The base is the source's value (absolute) or the driver's reference frame (relative). Scale
0 keeps the source's value, absolute at scale 1 is the driver's (the paper's reenactment), and above 1 exaggerates.
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
DRIVABLE = ("expression", "pose")  # parts of a driver's motion


@dataclass(frozen=True)
class Control:
    """Which parts of the motion are used, how strongly, and relative to which base."""

    drive: tuple[str, ...] = DRIVABLE
    expression_scale: float = 1.0
    pose_scale: float = 1.0
    pose: Literal["absolute", "relative"] = "absolute"
    relative_expression: bool = False
    max_travel: float | None = None  # limit of the head centre's motion, in crop sides; None: no limit

    def __post_init__(self) -> None:
        if not np.isfinite([self.expression_scale, self.pose_scale]).all():
            raise InputError(f"scales must be finite numbers, got {self.expression_scale} and {self.pose_scale}")
        if not self.drive or not set(self.drive) <= set(DRIVABLE):
            raise InputError(f"drive must be expression, pose or both, got {','.join(self.drive) or 'nothing'}")

    @property
    def needs_reference(self) -> bool:
        """Whether a part is relative to the driver's reference frame."""
        return self.relative_expression or self.pose == "relative"

    def target_expression(self, source: Tensor, driver: Tensor, reference: Tensor | None) -> Tensor:
        """Return the target lambda (B, n) from those of source (1, n), driver (B, n) and reference frame (1, n)."""
        scale = self.expression_scale if "expression" in self.drive else 0.0
        if not self.relative_expression and scale == 1:
            return driver
        return source + scale * (driver - (_require_reference(reference) if self.relative_expression else source))

    def target_cameras(self, source: np.ndarray, driver: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
        """Return cameras (T, 25) float32 from those of source (25,), driver (T, 25) and reference frame (25,).

        Rotations are about the head's axes, so that a nod stays a nod at any angle of the source's head. Translations
        are along the camera's axes, so that a move to the image's right stays one.
        """
        scale = self.pose_scale if "pose" in self.drive else 0.0
        if self.pose == "absolute" and scale == 1 and self.max_travel is None:
            return driver
        source_rotation, source_centre = head_pose(source)
        base_rotation, base_centre = source_rotation, source_centre
        if self.pose == "relative":
            base_rotation, base_centre = head_pose(_require_reference(reference))
        rotation, centre = head_pose(driver)
        turn = rotation_exp(scale * rotation_log(base_rotation.T @ rotation))
        centre = self._limit_travel(source_centre, source_centre + scale * (centre - base_centre), source)
        cameras = np.repeat(np.asarray(source, dtype=np.float32)[None], len(driver), axis=0)
        return with_head_pose(cameras, source_rotation @ turn, centre)

    def _limit_travel(self, source_centre: np.ndarray, centre: np.ndarray, camera: np.ndarray) -> np.ndarray:
        """Return head centres (T, 3) in the camera frame, softly limited around the source's (3,) in place and size."""
        if self.max_travel is None:
            return centre
        growth = self.max_travel * np.tanh(np.log(source_centre[2] / centre[:, 2]) / self.max_travel)
        depth = source_centre[2] * np.exp(-growth)
        limit = self.max_travel / float(camera[16])  # at depth 1
        source_direction = source_centre[:2] / source_centre[2]
        shift = limit * np.tanh((centre[:, :2] / centre[:, 2:] - source_direction) / limit)
        return np.concatenate([(source_direction + shift) * depth[:, None], depth[:, None]], axis=1)


def amplify_expression(source: Tensor, target: Tensor, gain: float) -> Tensor:
    """Return lambda (B, n) to give to the network, so that its frames show `target` (B, n).

    The difference from the source's lambda (1, n) is multiplied by `ModelConfig.expression_gain`.
    """
    return torch.lerp(source.expand_as(target), target, gain)


def _require_reference(reference: T | None) -> T:
    if reference is None:
        raise InputError("relative control needs the driver's reference frame: pass reference")
    return reference
