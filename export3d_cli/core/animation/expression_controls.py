"""Named expression controls: ARKit values that a portrait shall show, turned into beta for the network.

A control such as `smile` sets a few coefficients; the rest of their regions moves as it does on filmed people
(`BetaStatistics`), the same coefficients of the other side and other regions keep their values. How strongly an
expression shows depends on the face and on the weights, so the portrait is rendered at several strengths and tracked,
and the curves from strength to the tracked value are inverted.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from export3d_cli.core.config.loading import read_yaml
from export3d_cli.core.face.crop import crop_image
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, BETA_NAMES, REGIONS, BetaStatistics, region_of
from export3d_cli.core.face.landmarks import BROWS, MEASURE_POINTS
from export3d_cli.core.face.motion import MIRROR_ORDER
from export3d_cli.core.face.tracker import LandmarkerTracker
from export3d_cli.core.model.masks import smooth_step
from export3d_cli.core.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from export3d_cli.core.animation.animator import Animator, Portrait

Range = tuple[float, float]
MIN_BETA_STD = 0.0201  # entries of beta with the floor of 0.02 hardly varied in training: weights cannot move them
ROUNDS = 2  # of trial frames
STRENGTHS = 5, 3  # at which the portrait is rendered for each end of a range, and for a constant edit
MAX_STRENGTH = 3.0  # of the asked change
MAX_COEFFICIENT = 2.0  # that the network is given
# Likewise, of lowered brows, which would cover the eyes: by their gap to the upper lids, over the eyes' distance.
BROW_GAPS, MAX_BROW_DOWN = (0.17, 0.23), (1.2, 1.6)
MIN_GAIN = 0.03  # of a control's value, for which more strength is given
MIN_SHORTFALL = 0.1  # between asked and shown value, from which it is noted
MIN_MEASURED_CHANGE = 0.25  # of a control's value, from which its gain is measured
GAIN_RANGE = (0.5, 2.5)  # of controls that are held in a video
# Of people who look at the camera while they turn: gaze-x and gaze-y over the sines of the camera's direction to the
# right and up in the head frame (median slopes and offsets of 19 and 24 filmed clips, correlations .9 and .75 or more).
# Horizontally, the irises move by .97 of the shift of a 12 mm eyeball; in frames, trackers measure half of it.
GAZE_SLOPE, GAZE_AT_REST = (1.9, 1.45), (0.1, -0.22)
# How far lids follow gaze-y up and down, over what the covariance of beta says: in eleven filmed clips, without blinks,
# the eyes' openings change by .05 per unit instead of .13.
LIDS_FOLLOW = 0.35
BLINK_FADE = (0.3, 0.6)  # value of `blink` up to which eyes count as open, and from which on as closed
_NEAR = 0.1  # a range that reaches beyond the base's value by less counts as one-sided
_RIDGE = 1e-3  # of the regression on few coefficients
_KEPT_TRIALS = 32  # of each control
_IDENTITY = np.array([[-1.0, 1.0]] * 2)
_PRESETS = Path(__file__).with_name("presets.yaml")


def _sides(*names: str) -> tuple[str, ...]:
    return tuple(name + side for name in names for side in ("Left", "Right"))


LIP_OPENERS = ("jawOpen", "mouthFunnel", *_sides("mouthLowerDown", "mouthUpperUp"))  # 0 in a shut mouth
LIP_GAPS = ("lipGapLeft", "lipGapCentre", "lipGapRight")


class _Control(NamedTuple):
    """Coefficients that a positive and a negative value sets."""

    raised: tuple[str, ...]
    lowered: tuple[str, ...] = ()

    def measure(self, beta: np.ndarray) -> np.ndarray:
        """Return the control's value in expressions beta (..., 64)."""
        raised, lowered = (
            beta[..., [BETA_NAMES.index(n) for n in names]].mean(-1) if names else np.zeros(beta.shape[:-1])
            for names in self
        )
        return np.asarray(raised - lowered)

    def coefficients(self, values: np.ndarray) -> list[np.ndarray]:
        """Return the coefficients, raised and then lowered, that show values (T,)."""
        raised = values.clip(0) if self.lowered else values
        return [raised] * len(self.raised) + [(-values).clip(0)] * len(self.lowered)


CONTROLS = {
    "smile": _Control(_sides("mouthSmile")),
    "jaw": _Control(("jawOpen",)),
    "pucker": _Control(("mouthPucker",)),
    "blink": _Control(_sides("eyeBlink")),
    "eyes-open": _Control(_sides("eyeWide"), _sides("eyeBlink")),
    "brows": _Control(("browInnerUp", *_sides("browOuterUp")), _sides("browDown")),
    "gaze-x": _Control(("eyeLookOutLeft", "eyeLookInRight"), ("eyeLookInLeft", "eyeLookOutRight")),  # image's right
    "gaze-y": _Control(_sides("eyeLookUp"), _sides("eyeLookDown")),
    **{name: _Control((name,)) for name in ARKIT_NAMES},
}

_HEIGHT = CONTROLS["gaze-y"].measure(np.eye(len(BETA_NAMES)))  # (64,) weights of beta in the gaze's height


@dataclass(frozen=True)
class ExpressionEdit:
    """Controls and the values that the tracker shall read: first and last of a sweep, or twice the same."""

    controls: Mapping[str, float | Range] = field(default_factory=dict)  # by names of `CONTROLS`
    from_neutral: bool = False  # take the photo's own expression of mouth and brows out first
    adapted: bool = True  # adapt the strength to the portrait by trial frames; else by those of its earlier edits alone

    def __post_init__(self) -> None:
        names = set()
        for name, ends in self.ranges.items():
            if name not in CONTROLS:
                near = difflib.get_close_matches(name, CONTROLS, 1, 0)
                raise InputError(f"there is no control {name[:40]!r}: did you mean {near[0]}?")
            low = -1.0 if CONTROLS[name].lowered else 0.0
            if not all(low <= end <= 1 for end in ends):
                raise InputError(f"{name} must be {low:g} to 1, got {':'.join(f'{e:g}' for e in dict.fromkeys(ends))}")
            for coefficient in sum(CONTROLS[name], ()):
                if coefficient in names:
                    raise InputError(f"two controls set {coefficient}: leave out {name} or the other one")
                names.add(coefficient)

    def __bool__(self) -> bool:
        return bool(self.controls) or self.from_neutral

    @property
    def ranges(self) -> dict[str, Range]:
        """First and last value of each control."""
        return {name: ends if isinstance(ends, tuple) else (ends, ends) for name, ends in self.controls.items()}

    @property
    def is_constant(self) -> bool:
        """Whether no control sweeps a range."""
        return all(first == last for first, last in self.ranges.values())


class EditedExpression(NamedTuple):
    """Expressions that show an edit; those of `edit_expression` are read-only."""

    base: np.ndarray  # (64,) the photo's beta, or its neutral expression
    beta: np.ndarray  # (T, 64)
    notes: tuple[str, ...]  # for the user


def read_preset(name: str) -> dict[str, float]:
    """Return the controls of a preset of this package, or of `FILE#NAME` in a YAML file like presets.yaml."""
    file, _, key = name.rpartition("#")
    path = Path(file) if file else _PRESETS
    presets = read_yaml(path)
    if key not in presets:
        near = [*difflib.get_close_matches(key, map(str, presets), 1, 0), "FILE#NAME"][0][:40]
        raise InputError(f"there is no preset {key[:40]!r} in {path.name}: did you mean {near}?")
    values = presets[key]
    if not isinstance(values, dict) or not all(
        isinstance(value, int | float) and abs(value) <= 1 for value in values.values()
    ):
        raise InputError(f"preset {key} in {path} must map controls to numbers from -1 to 1, such as {{smile: 0.8}}")
    return {str(control): float(value) for control, value in values.items()}


def edit_expression(
    animator: Animator, portrait: Portrait, edit: ExpressionEdit, positions: Sequence[float] | np.ndarray = (0.0,)
) -> EditedExpression:
    """Return the expressions that show an edit at positions (T,) between the ends 0 and 1 of its ranges.

    A portrait's last adapted edit is kept, so that other changes next to it need no trial frames.
    """
    key = edit.from_neutral, *edit.ranges.items(), *np.ravel(positions).tolist()
    edited = portrait.edits.get(key)
    if edited is None:
        edited = _fit_edit(animator, portrait, edit, positions)
        for array in (edited.base, edited.beta):
            array.flags.writeable = False
        if edit.adapted:
            portrait.edits.clear()
            portrait.edits[key] = edited
    return edited


def _fit_edit(
    animator: Animator, portrait: Portrait, edit: ExpressionEdit, positions: Sequence[float] | np.ndarray
) -> EditedExpression:
    statistics, own = BetaStatistics.load(), portrait.motion.beta[0].astype(np.float64)
    base = _neutral(statistics, own) if edit.from_neutral else own
    if not edit.controls:
        return EditedExpression(base, base[None].repeat(len(positions), axis=0), ())
    movable = movable_coefficients(animator).cpu().numpy()
    for name in edit.controls:
        if not movable[[BETA_NAMES.index(coefficient) for coefficient in sum(CONTROLS[name], ())]].any():
            raise InputError(f"these weights cannot move {name}, which did not vary in their training: use another one")
    setter = _ControlSetter(edit.controls, statistics)
    controls, with_values = setter.controls, partial(setter, base)

    first, last = np.array(list(edit.ranges.values())).T
    asked = first + np.asarray(positions)[:, None] * (last - first)  # (T, controls)
    keys = [(name, edit.from_neutral) for name in edit.controls]
    if not edit.adapted:
        columns = [_invert(portrait.trials.get(key, _IDENTITY), asked[:, k])[0] for k, key in enumerate(keys)]
        return EditedExpression(base, with_values(np.stack(columns, axis=1)), ())

    # strengths from the base's values to a multiple of the asked change, for all controls at once; ranges on one side
    # of the base's values need their farther ends only
    start = setter.measure(base)
    lowest = np.array([-MAX_COEFFICIENT if control.lowered else -0.5 for control in controls])
    max_down = np.interp(_brow_gap(portrait.motion.head_landmarks[0]), BROW_GAPS, MAX_BROW_DOWN)
    lowest[[name == "brows" for name in edit.controls]] = -max_down
    highest = np.array([max_down if name.startswith("browDown") else MAX_COEFFICIENT for name in edit.controls])
    farther = np.where(abs(first - start) > abs(last - start), first, last)
    on_both_sides = (np.minimum(first, last) < start - _NEAR) & (np.maximum(first, last) > start + _NEAR)
    ends = [first, last] if on_both_sides.any() else [farther]
    limits = np.stack([(start + MAX_STRENGTH * (end - start)).clip(lowest, highest) for end in ends])
    count = STRENGTHS[edit.is_constant]
    trial = np.concatenate([np.linspace(start, limit, count + 1)[1:] for limit in limits])  # (K, controls)
    values = asked
    given, shown = start[None], setter.measure(own)[None]  # the photo itself
    if edit.from_neutral:
        given, shown, trial = given[:0], shown[:0], np.concatenate([given, trial])
    for _ in range(ROUNDS):
        given, tracked = np.concatenate([given, trial]), _track(animator, portrait, with_values(trial))
        if tracked is None:
            note = "no face was found in trial frames: the controls' strength is not adapted to this portrait"
            return EditedExpression(base, with_values(values), (note,))
        shown = np.concatenate([shown, setter.measure(tracked)])
        pairs = np.stack([given, shown]).transpose(2, 0, 1)  # (controls, 2, K)
        values, reached = np.stack([_invert(*p) for p in zip(pairs, asked.T, strict=True)]).transpose(1, 2, 0)
        trial = values[np.linspace(0, len(values) - 1, min(len(values), count)).astype(int)]
    for key, pair in zip(keys, pairs, strict=True):
        portrait.trials[key] = np.hstack([pair, portrait.trials.get(key, pair[:, :0])])[:, :_KEPT_TRIALS]
    short = []
    for k, name in enumerate(edit.controls):
        worst = int(np.abs(asked - reached)[:, k].argmax())
        if abs(asked[worst, k] - reached[worst, k]) > MIN_SHORTFALL:
            short.append(f"{name} reaches {reached[worst, k]:.2f} of {asked[worst, k]:.2f}")
    notes = (f"on this face and with these weights {', '.join(short)}",) if short else ()
    return EditedExpression(base, with_values(values), notes)


def hold_expression(
    animator: Animator, portrait: Portrait, edit: ExpressionEdit
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...]]:
    """Measure on a portrait, a frame of a video, how strongly the controls of a constant edit show there.

    Return a function from the expressions beta (T, 64) that frames show to those to give to them, so that the controls'
    values show in every frame; and notes for the user.
    """
    statistics, own = BetaStatistics.load(), portrait.motion.beta[0].astype(np.float64)
    opens_lips = any(name in LIP_OPENERS for control in edit.controls for name in sum(CONTROLS[control], ()))
    kept = () if opens_lips else (*LIP_OPENERS, *LIP_GAPS)  # speech stays: lips close where the video's do
    setter = _ControlSetter(edit.controls, statistics, kept)
    asked = np.array([first for first, _ in edit.ranges.values()])

    def base(beta: np.ndarray) -> np.ndarray:
        return _neutral(statistics, beta) if edit.from_neutral else beta

    start = setter.measure(base(own))
    # a change too small to measure is measured at a larger one, towards the farther end of the range
    lowest = np.array([-1.0 if control.lowered else 0.0 for control in setter.controls])
    towards = np.where(start - lowest > 1 - start, -1.0, 1.0)
    small = np.abs(asked - start) < MIN_MEASURED_CHANGE
    trial = np.where(small, (start + towards * MIN_MEASURED_CHANGE).clip(lowest, 1), asked)
    tried = replace(edit, controls=dict(zip(edit.controls, trial.tolist(), strict=True)))
    edited = edit_expression(animator, portrait, tried)
    change = trial - start
    gains = np.divide(setter.measure(edited.beta[0]) - start, change, out=np.ones_like(change), where=change != 0)
    gains = gains.clip(*GAIN_RANGE)  # change to give over the change that shows
    looks = [region_of(c.raised[0]) == "gaze" for c in setter.controls]  # closed eyes keep their gaze, and stay closed

    def hold(beta: np.ndarray) -> np.ndarray:
        shown = setter.measure(base(beta))
        given = shown + gains * np.where(looks, _openness(beta)[:, None], 1) * (asked - shown)
        return setter(base(beta), given.clip(-MAX_COEFFICIENT, MAX_COEFFICIENT))

    return hold, () if small.any() else edited.notes


def look_at_camera(beta: np.ndarray, cameras: np.ndarray) -> np.ndarray:
    """Return expressions beta (T, 64) with the gaze at their cameras (T, 25), wherever the head is turned.

    Lids stay as they are, and closed eyes keep their gaze, which moves the lids too.
    """
    setter = _setter("gaze-x", "gaze-y", kept=tuple(BETA_NAMES[k] for k in REGIONS["eyes"]))
    to_camera = cameras[:, [3, 7]] / np.linalg.norm(cameras[:, [3, 7, 11]], axis=1, keepdims=True)  # right, down
    gaze = (to_camera * (1, -1) * GAZE_SLOPE + GAZE_AT_REST).clip(-1, 1)
    shown = setter.measure(beta)
    given = shown + _openness(beta)[:, None] * (gaze - shown)
    return setter(beta, given.clip(-MAX_COEFFICIENT, MAX_COEFFICIENT))


def _openness(beta: np.ndarray) -> np.ndarray:
    """Return how far the eyes of expressions beta (T, 64) count as open, (T,) in [0, 1]."""
    return np.asarray(1 - smooth_step(CONTROLS["blink"].measure(beta), *BLINK_FADE))


def shut_lips(beta: np.ndarray, silent: np.ndarray, first: int = 0) -> np.ndarray:
    """Return expressions beta (T, 64) of the frames from number `first` on with the lips shut where they are silent.

    `silent` (N,) are weights in [0, 1]; frames beyond are silent.
    """
    setter, sound = _setter(*LIP_OPENERS), 1 - silent[first : first + len(beta)]
    sound = np.pad(sound, (0, len(beta) - len(sound)))
    return setter(beta, sound[:, None] * setter.measure(beta))


class _ControlSetter:
    """Called with expressions and values of controls; returns expressions with these values.

    The rest of their regions follows, but for entries that are `kept`.
    """

    def __init__(self, names: Iterable[str], statistics: BetaStatistics, kept: Sequence[str] = ()) -> None:
        self.controls, self.statistics = [CONTROLS[name] for name in names], statistics
        coefficients = [name for control in self.controls for name in sum(control, ())]
        self._known = known = [BETA_NAMES.index(name) for name in coefficients]
        held = [int(MIRROR_ORDER[k]) for k in known if MIRROR_ORDER[k] not in known]  # the other side of the face
        self._slope = statistics.regression(known + held, _RIDGE)[:, : len(known)]
        regions = {region_of(name) for name in coefficients}
        self._slope[[k for region in set(REGIONS) - regions for k in REGIONS[region]]] = 0
        self._slope[np.ix_(REGIONS["eyes"], _HEIGHT[known] != 0)] = 0
        lids = statistics.covariance[list(REGIONS["eyes"])] @ _HEIGHT / (_HEIGHT @ statistics.covariance @ _HEIGHT)
        self._slope[list(REGIONS["eyes"])] += LIDS_FOLLOW * np.outer(lids, _HEIGHT[known])
        self._slope[[BETA_NAMES.index(name) for name in kept]] = 0
        self._slope[known], self._slope[held] = np.eye(len(known)), 0

    def measure(self, beta: np.ndarray) -> np.ndarray:
        """Return the controls' values (..., controls) in expressions beta (..., 64)."""
        return np.array([control.measure(beta) for control in self.controls]).T

    def __call__(self, base: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return beta (T, 64): `base` (64,) or (T, 64) with values (T, controls)."""
        columns = [c for k, control in enumerate(self.controls) for c in control.coefficients(values[:, k])]
        return base + (np.stack(columns, axis=1) - base[..., self._known]) @ self._slope.T if columns else base


@cache
def _setter(*names: str, kept: tuple[str, ...] = ()) -> _ControlSetter:
    return _ControlSetter(names, BetaStatistics.load(), kept)


def _invert(trials: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a control to give (T,) for those asked, and those that will show.

    `trials` (2, K) are values that were given, the photo's first, and those that the tracker read.
    """
    order = np.argsort(trials[0], kind="stable")
    (strengths, curve), start = trials[:, order], int(order.argmin())
    curve[start:] = np.maximum.accumulate(curve[start:])
    curve[: start + 1] = np.minimum.accumulate(curve[start::-1])[::-1]
    low = min(start, int(np.flatnonzero(curve <= curve[0] + MIN_GAIN)[-1]))
    high = max(start, int(np.argmax(curve >= curve[-1] - MIN_GAIN)))
    rising = curve + 1e-6 * np.arange(len(curve))  # strictly
    values = np.array(asked, float)  # unless the tracker reads it; beyond low and high, more strength shows no more
    for part, side in ((slice(low, start + 1), asked < curve[start]), (slice(start, high + 1), asked >= curve[start])):
        if part.stop - part.start > 1:
            values[side] = np.interp(asked[side], rising[part], strengths[part])
    return values, np.interp(values, strengths, curve)


def _neutral(statistics: BetaStatistics, beta: np.ndarray) -> np.ndarray:
    """Return beta (..., 64) with mouth and brows at rest: coefficients 0, and the measures that go with them."""
    known = [k for k in (*REGIONS["mouth"], *REGIONS["brows"]) if k < len(ARKIT_NAMES)]
    change = -beta[..., known] @ statistics.regression(known, _RIDGE).T
    change[..., [*REGIONS["eyes"], *REGIONS["gaze"]]] = 0
    return np.asarray(beta + change)


def movable_coefficients(animator: Animator) -> Tensor:
    """Return which entries of beta varied in the training of the weights, (64,) bool."""
    return animator.model.expression.beta_std > MIN_BETA_STD


def _track(animator: Animator, portrait: Portrait, beta: np.ndarray) -> np.ndarray | None:
    """Render the portrait with expressions beta (T, 64) and return those that the tracker reads; None: no face."""
    frames = animator.edit(portrait, animator.expression_change(portrait, beta))
    tracker = animator.tracker()
    assert isinstance(tracker, LandmarkerTracker)
    motion = tracker.track_crops([crop_image(frame, portrait.square, len(portrait.crop)) for frame in frames])
    return None if motion is None else motion.beta


def _brow_gap(points: np.ndarray) -> float:
    """Return the gap from brows to upper lids of landmarks (478, 3), in distances of the eyes."""
    left, right = (points[list(corners)].mean(0) for corners in MEASURE_POINTS.eye_corners)
    lids = [upper[1] for upper, _ in MEASURE_POINTS.eyelids]
    return float(abs((points[lids, 1] - points[list(BROWS), 1]).mean()) / np.linalg.norm(left - right))
