"""Named expression controls: ARKit values that a portrait shall show, turned into beta for the network.

A control such as `smile` sets a few coefficients; the rest of their regions moves as it does on filmed people
(`BetaStatistics`), the same coefficients of the other side and other regions keep their values. How strongly an
expression shows depends on the face and on the weights, so the portrait is rendered at several strengths and tracked,
and the curves from strength to the tracked value are inverted.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from export3d_cli.core.config.loading import read_yaml
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, BETA_NAMES, REGIONS, BetaStatistics, region_of
from export3d_cli.core.face.motion import MIRROR_ORDER
from export3d_cli.core.face.tracker import LandmarkerTracker
from export3d_cli.core.runtime.errors import InputError

if TYPE_CHECKING:
    from export3d_cli.core.animation.animator import Animator, Portrait

Range = tuple[float, float]
MIN_BETA_STD = 0.0201  # entries of beta with the floor of 0.02 hardly varied in training: weights cannot move them
ROUNDS = 2  # of trial frames
STRENGTHS = 5  # at which the portrait is rendered for each end of a range
MAX_STRENGTH = 3.0  # of the asked change
MAX_COEFFICIENT = 1.3  # that the network is given
MAX_CHANGE = 28.0  # length of the change of lambda; 99.5 % of filmed frames are this near to the median of their clip
MIN_SHORTFALL = 0.1  # between asked and shown value, from which it is noted
_NEAR = 0.1  # a range that reaches beyond the base's value by less counts as one-sided
_RIDGE = 1e-3  # of the regression on few coefficients
_PRESETS = Path(__file__).with_name("presets.yaml")


def _sides(*names: str) -> tuple[str, ...]:
    return tuple(name + side for name in names for side in ("Left", "Right"))


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

    def coefficients(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return coefficients that show values (T,)."""
        if not self.lowered:
            return dict.fromkeys(self.raised, values)
        return dict.fromkeys(self.raised, values.clip(0)) | dict.fromkeys(self.lowered, (-values).clip(0))


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


@dataclass(frozen=True)
class ExpressionEdit:
    """Controls and the values that the tracker shall read: first and last of a sweep, or twice the same."""

    controls: Mapping[str, float | Range] = field(default_factory=dict)  # by names of `CONTROLS`
    from_neutral: bool = False  # take the photo's own expression of mouth and brows out first

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
    """Expressions that show an edit."""

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
    """Return the expressions that show an edit at positions (T,) between the ends 0 and 1 of its ranges."""
    statistics, own = BetaStatistics.load(), portrait.motion.beta[0].astype(np.float64)
    base = _neutral(statistics, own) if edit.from_neutral else own
    if not edit.controls:
        return EditedExpression(base, base[None].repeat(len(positions), axis=0), ())
    _check_movable(animator, edit)
    controls = [CONTROLS[name] for name in edit.controls]

    def with_values(values: np.ndarray) -> np.ndarray:  # (T, controls) -> beta (T, 64)
        coefficients: dict[str, np.ndarray] = {}
        for control, column in zip(controls, values.T, strict=True):
            coefficients |= control.coefficients(column)
        known = [BETA_NAMES.index(name) for name in coefficients]
        held = [int(MIRROR_ORDER[k]) for k in known if MIRROR_ORDER[k] not in known]  # the other side of the face
        slope = statistics.regression(known + held, _RIDGE)[:, : len(known)]
        regions = {region_of(name) for name in coefficients}
        slope[[k for region in set(REGIONS) - regions for k in REGIONS[region]]] = 0
        slope[known], slope[held] = np.eye(len(known)), 0
        return np.asarray(base + (np.stack(list(coefficients.values()), axis=1) - base[known]) @ slope.T)

    # strengths from the base's values to a multiple of the asked change, for all controls at once; ranges on one side
    # of the base's values need their farther ends only
    start = np.array([control.measure(base) for control in controls])
    lowest = np.array([-MAX_COEFFICIENT if control.lowered else -0.5 for control in controls])
    first, last = np.array(list(edit.ranges.values())).T
    farther = np.where(abs(first - start) > abs(last - start), first, last)
    on_both_sides = (np.minimum(first, last) < start - _NEAR) & (np.maximum(first, last) > start + _NEAR)
    ends = [first, last] if on_both_sides.any() else [farther]
    limits = np.stack([(start + MAX_STRENGTH * (end - start)).clip(lowest, MAX_COEFFICIENT) for end in ends])
    lam = animator.expression_change(portrait, with_values(np.stack([start, *limits])))  # (1 + ends, n)
    change = np.linalg.norm(lam[1:] - lam[0], axis=1)[:, None]
    limits = start + (limits - start) * np.minimum(1, MAX_CHANGE / change.clip(1e-6))
    trial = np.concatenate([np.linspace(start, limit, STRENGTHS + 1) for limit in limits])  # (K, controls)
    asked = first + np.asarray(positions)[:, None] * (last - first)  # (T, controls)
    values, reached = asked.copy(), asked
    given, shown = np.empty((0, len(controls))), np.empty((0, len(own)))
    for _ in range(ROUNDS):
        given, tracked = np.concatenate([given, trial]), _track(animator, portrait, with_values(trial))
        if tracked is None:
            note = "no face was found in trial frames: the controls' strength is not adapted to this portrait"
            return EditedExpression(base, with_values(values), (note,))
        shown = np.concatenate([shown, tracked])
        values, reached = _invert(controls, given, shown, asked)
        trial = values[np.linspace(0, len(values) - 1, min(len(values), STRENGTHS)).astype(int)]
    short = []
    for k, name in enumerate(edit.controls):
        worst = int(np.abs(asked - reached)[:, k].argmax())
        if abs(asked[worst, k] - reached[worst, k]) > MIN_SHORTFALL:
            short.append(f"{name} reaches {reached[worst, k]:.2f} of {asked[worst, k]:.2f}")
    notes = (f"on this face and with these weights {', '.join(short)}",) if short else ()
    return EditedExpression(base, with_values(values), notes)


def _invert(
    controls: Sequence[_Control], given: np.ndarray, shown: np.ndarray, asked: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values to give (T, controls) for those asked, and those that will show.

    `given` (K, controls) are values that were tried, `shown` (K, 64) the expressions that the tracker read.
    """
    values, reached = np.empty_like(asked), np.empty_like(asked)
    for k, control in enumerate(controls):
        order = np.argsort(given[:, k], kind="stable")
        curve = np.maximum.accumulate(control.measure(shown)[order])
        rising = curve + 1e-6 * np.arange(len(curve))  # strictly
        values[:, k] = np.interp(asked[:, k], rising, given[order, k])
        reached[:, k] = np.interp(values[:, k], given[order, k], curve)
    return values, reached


def _neutral(statistics: BetaStatistics, beta: np.ndarray) -> np.ndarray:
    """Return beta (64,) with mouth and brows at rest: coefficients 0, and the measures that go with them."""
    known = [k for k in (*REGIONS["mouth"], *REGIONS["brows"]) if k < len(ARKIT_NAMES)]
    change = statistics.regression(known, _RIDGE) @ -beta[known]
    change[[*REGIONS["eyes"], *REGIONS["gaze"]]] = 0
    return np.asarray(beta + change)


def _check_movable(animator: Animator, edit: ExpressionEdit) -> None:
    """Raise `InputError` for a control whose coefficients did not vary in the training of the weights."""
    movable = animator.model.expression.beta_std.cpu().numpy() > MIN_BETA_STD
    for name in edit.controls:
        if not any(movable[BETA_NAMES.index(coefficient)] for coefficient in sum(CONTROLS[name], ())):
            raise InputError(f"these weights cannot move {name}, which did not vary in their training: use another one")


def _track(animator: Animator, portrait: Portrait, beta: np.ndarray) -> np.ndarray | None:
    """Render the portrait with expressions beta (T, 64) and return those that the tracker reads; None: no face."""
    frames = list(animator.edit(replace(portrait, canvas=None), animator.expression_change(portrait, beta)))
    tracker = animator.tracker()
    assert isinstance(tracker, LandmarkerTracker)
    motion = tracker.track_crops(frames)
    return None if motion is None else motion.beta
