"""Retargeting: which of the driver's motion the source takes, and how strongly.

Regions of the face are entries of beta: those of a region that is not driven keep the base's values before f_e, so that
one smooth displacement field moves the whole face and no seam can appear.

Expression (in lambda) and pose (on the rotation group) follow one rule: the source's value plus `scale` times the
driver's change from a base. The base is the source's value (absolute) or the driver's reference frame (relative). Scale
0 keeps the source's value, absolute at scale 1 is the driver's (the paper's reenactment), and above 1 exaggerates.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from export3d_cli.core.face.expression_coefficients import REGIONS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.smoothing import BETA_CHANGE
from export3d_cli.core.runtime.camera import head_pose, rotation_exp, rotation_log, with_head_pose, yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError

# Pose of the head. absolute: the driver's; relative: the source's own, moved as the driver's moves from its reference
# frame; auto: relative to the frame whose head rotation is nearest to the source's.
Pose = Literal["auto", "relative", "absolute"]
# What the expression is read from: landmarks; pixels; or both, landmarks that pixels correct. See `PlaneDict`.
MotionSource = Literal["landmarks", "pixels", "both"]
DRIVABLE = (*REGIONS, "head")  # parts of a driver's motion
_GROUPS = {"all": DRIVABLE, "expression": tuple(REGIONS), "pose": ("head",)}
MAX_GROWTH = 0.12  # largest change of the logarithm of the head's or torso's size, and of the torso's roll, if limited
# How far the head may turn from its pose in the photo, degrees of yaw, if limited: the photo does not show the rest.
MAX_TURN, MAX_PROFILE = 50.0, 65.0  # to either side, and the largest yaw that results
HIDDEN_SIDE = 1.1  # degrees less of turn towards the side that a turned photo hides, per degree of its yaw
MIN_TURN = 5.0
LINEAR_RANGE = 2 / 3  # fraction of a limit up to which values stay as they are
ROTATION_UNIT = np.radians(0.5)  # head rotation that makes frames as unlike as `BETA_CHANGE` of the expression
SAME_FRAME = 4.0  # largest squared distance, in these units, of two pictures of one moment; of two people 50 and more
ROTATION_TIE = np.radians(1)  # rotations that differ by less are equally near
REST_FRAMES = 50  # number of frames that are averaged to measure the driver's face at rest


class TravelLimits(NamedTuple):
    """How far the head's centre may leave the source's own place, in crop sides towards each side of the image."""

    left: float
    right: float
    up: float
    down: float


@dataclass(frozen=True)
class Control:
    """Which parts of the motion are used, how strongly, and relative to which base."""

    drive: tuple[str, ...] = DRIVABLE  # or all, expression (all but head), pose (head)
    expression_scale: float = 1.0  # 0: the source's expression, 1: the driver's, above 1: exaggerated
    pose_scale: float = 1.0  # of the head pose, likewise
    scales: tuple[tuple[str, float], ...] = ()  # of regions, on top of the two scales
    pose: Pose = "absolute"
    relative_expression: bool = False  # the source's expression plus the driver's change
    # fraction of the neck's motion that the torso follows, None: as torsos usually do; or `driver`: the driver's motion
    torso: float | Literal["driver"] | None = None
    motion: MotionSource = "landmarks"  # what the expression is read from
    eyes_to_camera: bool = False  # the gaze is at the camera, whatever source and driver look at

    def __post_init__(self) -> None:
        scales = [self.expression_scale, self.pose_scale, *(scale for _, scale in self.scales)]
        if not np.isfinite(scales).all():
            raise InputError(f"scales must be finite numbers, got {', '.join(map(str, scales))}")
        object.__setattr__(self, "drive", _expand_regions(self.drive))
        _expand_regions([name for name, _ in self.scales] or DRIVABLE)
        if self.motion != "landmarks" and not self.drives_whole_face:
            raise InputError(f"--motion {self.motion} drives the whole face: leave out --drive and --scale")
        if self.motion == "pixels" and (self.expression_scale != 1 or self.relative_expression or self.eyes_to_camera):
            raise InputError("--motion pixels shows expressions as they are: leave out --expression-scale, "
                             "--relative-expression and --eyes-to-camera")  # fmt: skip
        if self.torso == "driver" and self.pose == "absolute":
            raise InputError("the driver's torso moves from its reference frame: use --pose auto or relative with it")
        is_fraction = isinstance(self.torso, int | float) and 0 <= self.torso <= 1
        if self.torso not in (None, "driver") and not is_fraction:
            raise InputError(f"torso must be driver, None or 0 to 1 of the neck's motion, got {self.torso}")

    @property
    def needs_reference(self) -> bool:
        """Whether a part is relative to the driver's reference frame."""
        return self.relative_expression or self.pose != "absolute"

    @property
    def drives_whole_face(self) -> bool:
        """Whether all regions of the face take the driver's expression, none of them scaled."""
        return all(self._scale(region) == 1 for region in REGIONS)

    def _scale(self, region: str) -> float:
        """Return the scale of a region without `expression_scale` and `pose_scale`; 0 if it is not driven."""
        scales = [scale for name, scale in self.scales if region in _GROUPS.get(name, (name,))]
        return float(np.prod(scales)) if region in self.drive else 0.0

    def select_regions(self, base: np.ndarray, driver: np.ndarray) -> np.ndarray:
        """Return the driver's beta (T, 64) with the base's, (64,) or (T, 64), in undriven regions; others scaled."""
        if self.drives_whole_face:
            return driver
        weights = np.ones(base.shape[-1], base.dtype)
        for region, entries in REGIONS.items():
            weights[list(entries)] = self._scale(region)
        return base + weights * (driver - base)

    def target_expression(self, source: Tensor, driver: Tensor, reference: Tensor | None) -> Tensor:
        """Return lambda (B, n) from the source's (1, n), that of `select_regions` (B, n), the reference's (1, n)."""
        scale = self.expression_scale if set(self.drive) & set(REGIONS) else 0.0
        if not self.relative_expression and scale == 1:
            return driver
        base = reference if self.relative_expression else source
        assert base is not None  # `Animator.animate` checks it
        return source + scale * (driver - base)

    def target_cameras(self, source: np.ndarray, driver: np.ndarray, reference: np.ndarray | None,
                       limits: TravelLimits | None = None) -> np.ndarray:  # fmt: skip
        """Return cameras (T, 25) float32 from those of the source (25,), the driver (T, 25) and its reference (25,).

        Rotations are about the head's own axes, so that a nod stays a nod wherever the source looks. Shifts in the
        image are counted in heads and sizes are ratios, so that a driver in close-up moves the source no farther.
        `limits` are soft; with them the size changes by at most exp(MAX_GROWTH), and a relative pose turns no farther
        than the photo can be turned, see `_turn_limits`.
        """
        scale = self.pose_scale * self._scale("head")
        if self.pose == "absolute" and scale == 1 and limits is None:
            return driver
        source_rotation, source_centre = head_pose(source)
        base = source if self.pose == "absolute" else reference
        assert base is not None
        base_rotation, base_centre = head_pose(base)
        driver_rotation, driver_centre = head_pose(driver)
        turn = scale * rotation_log(base_rotation.T @ driver_rotation)  # (T, 3)
        if limits is not None and self.pose != "absolute":
            turn[:, 1] = _limit_softly(turn[:, 1], *_turn_limits(yaw_pitch_roll(source)[0]))
        growth = scale * np.log(base_centre[2] / driver_centre[:, 2])  # of the logarithm of the head's size
        shift = driver_centre[:, :2] / driver_centre[:, 2:] - base_centre[:2] / base_centre[2]  # at focal length 1
        shift *= scale * base_centre[2] / source_centre[2]
        if limits is not None:
            growth, focal = _limit_softly(growth, MAX_GROWTH, MAX_GROWTH), float(np.asarray(source)[16])
            shift[:, 0] = _limit_softly(shift[:, 0], limits.left / focal, limits.right / focal)
            shift[:, 1] = _limit_softly(shift[:, 1], limits.up / focal, limits.down / focal)
        depth = source_centre[2] * np.exp(-growth)
        place = source_centre[:2] / source_centre[2] + shift
        cameras = np.repeat(np.asarray(source, dtype=np.float32)[None], len(driver), axis=0)
        centre = np.concatenate([place * depth[:, None], depth[:, None]], axis=1)
        return with_head_pose(cameras, source_rotation @ rotation_exp(turn), centre)

    def target_torso(
        self, source: np.ndarray, driver: np.ndarray, reference: Motion | None, limits: TravelLimits
    ) -> np.ndarray | None:
        """Return the torso's shift in crop sides, roll and growth (T, 4) float32 from the driver's torso (T, 4).

        It is as far from its place in row 0 of the reference as the driver's, and limited as `target_cameras` limits
        the head. NaN: not seen. Without `torso="driver"` it is None.
        """
        if self.torso != "driver" or reference is None:
            return None
        change = self.pose_scale * self._scale("head") * (driver - reference.torso[:1])
        change[:, :2] *= head_pose(reference.camera[0])[1][2] / head_pose(source)[1][2]
        change[:, 0] = _limit_softly(change[:, 0], limits.left, limits.right)
        change[:, 1] = _limit_softly(change[:, 1], limits.up, limits.down)
        change[:, 2:] = _limit_softly(change[:, 2:], MAX_GROWTH, MAX_GROWTH)
        return change


def reference_rows(driver: Motion, source: Motion) -> np.ndarray:
    """Return rows of `driver`, first the one whose head rotation matches that of `source`, which has one row.

    A driver that contains the photo itself, found by rotation and expression, is followed exactly, from this row alone.
    Other people's expressions say little: then it is the earliest of the frames that are nearest in rotation, and more
    rows, spread over the driver, tell its face at rest.
    """
    rotations, own = head_pose(driver.camera)[0], head_pose(source.camera[0])[0]
    angles = np.linalg.norm(rotation_log(own.T @ rotations), axis=-1)
    changes = (driver.beta - source.beta) / BETA_CHANGE
    distances = (angles / ROTATION_UNIT) ** 2 + (changes**2).mean(1)
    nearest = int(np.argmin(distances))
    if distances[nearest] < SAME_FRAME:
        return np.array([nearest])
    first = np.argmax(angles < angles.min() + ROTATION_TIE)
    return np.append(first, np.unique(np.linspace(0, len(driver) - 1, REST_FRAMES).round().astype(int)))


def _turn_limits(yaw: float) -> tuple[float, float]:
    """Return how far a head of this yaw in degrees may turn to the image's right and to its left, radians."""
    limits = [min(MAX_TURN, MAX_PROFILE - side) if side > 0 else MAX_TURN + HIDDEN_SIDE * side for side in (yaw, -yaw)]
    right, left = np.radians(np.maximum(limits, MIN_TURN))
    return right, left


def _limit_softly(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Bring values (T, ...) into (-low, high): up to `LINEAR_RANGE` of it they stay, the slope then falls to 0."""
    limits = np.maximum(np.where(values < 0, low, high), 1e-9)
    linear, rest = LINEAR_RANGE * limits, (1 - LINEAR_RANGE) * limits
    beyond = np.maximum(np.abs(values) - linear, 0)
    return np.sign(values) * (np.minimum(np.abs(values), linear) + rest * np.tanh(beyond / rest))


def _expand_regions(names: Iterable[str]) -> tuple[str, ...]:
    """Return the regions that names of regions and groups stand for."""
    names = tuple(names)
    if "torso" in names:
        raise InputError("torso is not a region: use head, with --torso driver for a torso that moves as the driver's")
    known = (*DRIVABLE, *_GROUPS)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        near = f": did you mean {difflib.get_close_matches(unknown[0], known, 1, 0)[0]}?" if unknown else ""
        raise InputError(f"regions are {', '.join(known)}, got {unknown[0] if unknown else 'none'!r}{near}")
    return tuple(dict.fromkeys(region for name in names for region in _GROUPS.get(name, (name,))))
