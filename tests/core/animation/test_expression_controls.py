"""Named controls: what the tracker reads on the portrait, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.animation import expression_controls
from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.expression_controls import (
    CONTROLS,
    GAZE_SLOPE,
    ExpressionEdit,
    edit_expression,
    hold_expression,
    look_at_camera,
    read_preset,
    shut_lips,
)
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, BETA_NAMES, REGIONS
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path


def test_shipped_weights_show_what_is_asked() -> None:
    animator = Animator.from_weights(device="cpu", quality="fast")
    portrait = animator.portrait(read_image(example_path("source.jpg")), framing="face", size=256)
    own = portrait.motion.beta
    edit = ExpressionEdit({"smile": (0.3, 0.7)})
    base, beta, notes = edit_expression(animator, portrait, edit, [0, 1])
    np.testing.assert_allclose(base, own[0])
    others = [k for region in ("eyes", "gaze", "brows") for k in REGIONS[region]]
    np.testing.assert_allclose(beta[:, others], own[:, others].repeat(2, axis=0), atol=1e-6)
    frames = list(animator.edit(portrait, animator.expression_change(portrait, beta)))
    shown = animator.tracker().track_crops(frames, independent=True).beta
    np.testing.assert_allclose(CONTROLS["smile"].measure(shown), [0.3, 0.7], atol=0.12)
    change = np.abs(shown - own)[:, [k for k in others if k < len(ARKIT_NAMES)]]
    assert change.mean() < 0.05
    assert notes == ()
    aside = edit_expression(animator, portrait, ExpressionEdit({"mouthLeft": 0.4, "brows": -0.6})).beta
    frames = list(animator.edit(portrait, animator.expression_change(portrait, aside)))
    shown = animator.tracker().track_crops(frames, independent=True).beta
    assert float(CONTROLS["mouthLeft"].measure(shown)[0]) == pytest.approx(0.4, abs=0.15)
    assert float(CONTROLS["brows"].measure(shown)[0]) == pytest.approx(-0.6, abs=0.15)
    wink = edit_expression(animator, portrait, ExpressionEdit({"eyeBlinkLeft": 0.6})).beta
    assert wink[0, BETA_NAMES.index("eyeBlinkRight")] == pytest.approx(own[0, BETA_NAMES.index("eyeBlinkRight")])
    frames = list(animator.edit(portrait, animator.expression_change(portrait, wink)))
    left, right = (
        float(animator.tracker().track_crops(frames, independent=True).beta[0, k] / own[0, k])
        for k in (BETA_NAMES.index("eyeOpeningLeft"), BETA_NAMES.index("eyeOpeningRight"))
    )
    assert left < 0.6 * right and right > 0.5  # trackers read the open eye of a wink as narrowed
    with pytest.raises(InputError, match="cannot move cheekPuff"):
        edit_expression(animator, portrait, ExpressionEdit({"cheekPuff": 1}))


def test_a_constant_edit_takes_four_trial_frames_once(animator: Animator, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, track = [], expression_controls._track

    def count(animator: Animator, portrait: Portrait, beta: np.ndarray) -> np.ndarray | None:
        counts.append(len(beta))
        return track(animator, portrait, beta)

    monkeypatch.setattr(expression_controls, "_track", count)
    portrait = animator.portrait(read_image(example_path("source.jpg")), framing="face", size=256)
    edited = edit_expression(animator, portrait, ExpressionEdit({"smile": 0.5, "jaw": 0.2}))
    assert counts == [3, 1]
    assert edit_expression(animator, portrait, ExpressionEdit({"smile": 0.5, "jaw": 0.2})) is edited
    for array in (edited.base, edited.beta):  # which later results hold, too
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert counts == [3, 1]
    other = edit_expression(animator, portrait, ExpressionEdit({"smile": 0.6, "jaw": 0.2}))
    assert counts == [3, 1, 3, 1] and not np.array_equal(other.beta, edited.beta)


def test_an_edit_that_is_not_adapted_takes_the_trials_of_earlier_ones(
    animator: Animator, monkeypatch: pytest.MonkeyPatch
) -> None:
    portrait = animator.portrait(read_image(example_path("source.jpg")), framing="face", size=256)
    jaw = {"jaw": 0.4}
    direct = edit_expression(animator, portrait, ExpressionEdit(jaw, adapted=False))
    assert CONTROLS["jaw"].measure(direct.beta) == pytest.approx(0.4, abs=1e-5)
    adapted = edit_expression(animator, portrait, ExpressionEdit({**jaw, "smile": 0.8}))
    monkeypatch.setattr(expression_controls, "_track", None)
    again = edit_expression(animator, portrait, ExpressionEdit(jaw, adapted=False))
    assert CONTROLS["jaw"].measure(again.beta) == CONTROLS["jaw"].measure(adapted.beta) != pytest.approx(0.4, abs=1e-5)
    assert edit_expression(animator, portrait, ExpressionEdit({**jaw, "smile": 0.8}, adapted=False)) is adapted


def test_untrained_weights_note_what_they_cannot_show(animator: Animator) -> None:
    portrait = animator.portrait(read_image(example_path("source.jpg")), framing="face", size=256)
    *_, notes = edit_expression(animator, portrait, ExpressionEdit({"jaw": 0.9}))
    assert [note.partition("jaw reaches")[2] != "" for note in notes] == [True]
    neutral = edit_expression(animator, portrait, ExpressionEdit(from_neutral=True), [0, 0.5, 1])
    assert neutral.beta.shape == (3, 64)
    brows = [BETA_NAMES.index(name) for name in ("browDownLeft", "browInnerUp", "jawOpen")]
    np.testing.assert_allclose(neutral.base[brows], 0, atol=0.02)
    eyes = list(REGIONS["eyes"])
    np.testing.assert_allclose(neutral.base[eyes], portrait.motion.beta[0, eyes])


@pytest.mark.parametrize(
    ("controls", "words"),
    [
        ({"smyle": 1}, "did you mean smile"),
        ({"jawopen": (0, 1)}, "did you mean jawOpen"),
        ({"smile": (0, 1.5)}, "smile must be 0 to 1, got 0:1.5"),
        ({"brows": -2}, "brows must be -1 to 1, got -2"),
        ({"blink": 1, "eyes-open": 1}, "two controls set eyeBlinkLeft"),
    ],
)
def test_bad_controls_are_refused(controls: dict[str, float | tuple[float, float]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ExpressionEdit(controls)


def test_more_strength_is_given_only_where_it_shows() -> None:
    """A plateau is not climbed further, and what the tracker does not read is given as asked."""
    given = [0.1, 0.5, 1.0, 2.0]
    values, reached = expression_controls._invert(np.array([given, [0, 0, 0, 0]]), np.array([0.8]))
    assert values.item() == 0.8 and reached.item() == 0
    trials, asked = np.array([given, [0.1, 0.3, 0.6, 0.61]]), np.array([0.1, 0.45, 0.9])
    values, reached = expression_controls._invert(trials, asked)
    np.testing.assert_allclose(values, [0.1, 0.75, 1.0], atol=1e-4)
    np.testing.assert_allclose(reached, [0.1, 0.45, 0.6], atol=1e-4)


def test_presets_are_controls_of_the_package_or_of_a_file(tmp_path: Path) -> None:
    for name in ("joy", "surprise", "anger", "sad", "kiss", "sleep"):
        ExpressionEdit(read_preset(name))
    mine = tmp_path / "mine.yaml"
    mine.write_text("grin: {smile: 1, jaw: 0.2}\nodd: {smile: wide}\n")
    assert read_preset(f"{mine}#grin") == {"smile": 1.0, "jaw": 0.2}
    for name, words in (("jo", "did you mean joy"), (f"{mine}#odd", "must map"), (f"{tmp_path / 'no.yaml'}#a", "read")):
        with pytest.raises(InputError, match=words):
            read_preset(name)


def test_lids_follow_the_gaze_up_and_down_and_closed_eyes_stay_closed(animator: Animator) -> None:
    setter = expression_controls._setter("gaze-y")
    down, up = setter(np.zeros(64), np.array([[-0.5], [0.5]]))
    opening = [BETA_NAMES.index(f"eyeOpening{side}") for side in ("Left", "Right")]
    assert (down[opening] < -0.015).all() and (up[opening] > 0.015).all()
    both = expression_controls._setter("gaze-y", "blink")(np.zeros(64), np.array([[-0.5, 0]]))
    assert CONTROLS["blink"].measure(both) == 0
    portrait = animator.portrait(read_image(example_path("source.jpg")), framing="face", size=256)
    hold, _ = hold_expression(animator, portrait, ExpressionEdit({"gaze-y": 0.3}))
    own = portrait.motion.beta.copy()
    assert np.abs(hold(own) - own)[0, opening].max() > 0.005
    own[:, [BETA_NAMES.index("eyeBlinkLeft"), BETA_NAMES.index("eyeBlinkRight")]] = 0.9
    eyes = list(REGIONS["eyes"])
    np.testing.assert_allclose(hold(own)[:, eyes], own[:, eyes], atol=1e-6)


def test_look_at_camera_turns_the_eyes_against_the_head() -> None:
    beta = np.zeros((4, 64))
    beta[3, [BETA_NAMES.index("eyeBlinkLeft"), BETA_NAMES.index("eyeBlinkRight")]] = 0.9
    cameras = np.stack([orbit_camera(*angles) for angles in ((8, 0), (-8, 0), (0, 8), (8, 0))])
    looking = look_at_camera(beta, cameras)
    x, y = CONTROLS["gaze-x"].measure(looking), CONTROLS["gaze-y"].measure(looking)
    np.testing.assert_allclose(x[1] - x[0], 2 * GAZE_SLOPE[0] * np.sin(np.radians(8)), rtol=1e-3)
    np.testing.assert_allclose(y[0] - y[2], GAZE_SLOPE[1] * np.sin(np.radians(8)), rtol=1e-3)
    assert x[0] < 0 < x[1]  # a head that is turned to the image's right looks back to the left
    np.testing.assert_array_equal(looking[3], beta[3])  # a blink
    others = [k for region in ("eyes", "brows", "mouth") for k in REGIONS[region]]
    np.testing.assert_array_equal(looking[:, others], beta[:, others])


def test_shut_lips_follows_the_weights_of_silence() -> None:
    beta = np.zeros((4, 64))
    beta[:, BETA_NAMES.index("jawOpen")] = 0.5
    shut = shut_lips(beta, np.array([1, 0, 0.5, 1]), first=1)  # the frame beyond the sound is silent
    np.testing.assert_allclose(CONTROLS["jawOpen"].measure(shut), [0.5, 0.25, 0, 0])
    gap = BETA_NAMES.index("lipGapCentre")
    assert (np.diff(shut[:3, gap]) < -0.01).all()
