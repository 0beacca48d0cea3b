"""Landmarks from a file: formats, bad files, and completion to 478 points against those that the landmarker finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.face.given_landmarks import complete_landmarks, read_landmarks
from export3d_cli.core.face.landmarks import IBUG68
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.camera import yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.weights import example_path

POINTS = np.random.default_rng(0).uniform(10, 90, (68, 2)).round(2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(POINTS.tolist())),
        ("a.json", json.dumps({"landmarks": [POINTS.tolist()]})),
        ("a.json", json.dumps([{"x": x, "y": y, "visible": 1} for x, y in POINTS.tolist()])),
        ("a.csv", "\n".join(f"{x},{y}" for x, y in POINTS)),
        ("a.csv", "id,x,y\n" + "\n".join(f"{k},{x},{y}" for k, (x, y) in enumerate(POINTS))),
        ("a.csv", "\n".join(f"{x / 200},{y / 100}" for x, y in POINTS)),
    ],
)
def test_formats_give_the_same_points(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    np.testing.assert_allclose(read_landmarks(tmp_path / name, (200, 100)), POINTS, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no landmarks"), ("[[1, 2], [3]]", "no landmarks"), ("{}", "no landmarks"), ("[[1, 2], [3, 4]]", "shape"),
        ("[" * 5000, "no landmarks"), (json.dumps((POINTS + 500).tolist()), "200x100 pixels"),
        (json.dumps([[1, float("nan")]] * 68), "not finite"), (json.dumps([["1", "b"]] * 68), "no landmarks"),
        (json.dumps([[1, 10**400]] * 68), "no landmarks"),
        (json.dumps([[x, y, 1e30] for x, y in POINTS.tolist()]), "200x100 pixels"),
        (json.dumps([[k, k] for k in range(68)]), "lie on a line"),
        ("csv: 1," + "9" * 200_000, "no landmarks"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    name = "a.csv" if text.startswith("csv: ") else "a.json"
    (tmp_path / name).write_text(text.removeprefix("csv: "))
    with pytest.raises(InputError, match=words):
        read_landmarks(tmp_path / name, (200, 100))


def test_completed_landmarks_are_near_those_that_are_found(animator: Animator) -> None:
    photo = read_image(example_path("source.jpg"))
    face = animator.tracker().find(photo)
    assert face is not None
    found = face.landmarks
    np.testing.assert_array_equal(complete_landmarks(found), found)
    height = float(np.ptp(found[:, 1]))
    flat = complete_landmarks(found[:, :2])
    np.testing.assert_array_equal(flat[:, :2], found[:, :2])
    z, own = flat[:, 2] - flat[:, 2].mean(), found[:, 2] - found[:, 2].mean()
    assert np.corrcoef(z, own)[0, 1] > 0.95 and 0.8 < np.polyfit(own, z, 1)[0] < 1.2
    few = complete_landmarks(found[list(IBUG68), :2])
    np.testing.assert_allclose(few[list(IBUG68), :2], found[list(IBUG68), :2], atol=0.02 * height)
    error = np.linalg.norm(few[:, :2] - found[:, :2], axis=1) / height
    assert np.median(error) < 0.015 and np.quantile(error, 0.95) < 0.05
    irises = slice(468, 478)
    assert error[irises].max() < 0.03


def test_a_face_that_is_not_found_becomes_a_portrait_by_its_landmarks(animator: Animator) -> None:
    photo = read_image(example_path("source.jpg"))
    face = animator.tracker().find(photo)
    assert face is not None
    drawing = np.full_like(photo, 200)
    with pytest.raises(NoFaceError, match="--landmarks"):
        animator.portrait(drawing)
    portrait = animator.portrait(drawing, landmarks=face.landmarks[list(IBUG68), :2])
    assert next(animator.animate(portrait, [portrait.motion])).shape == photo.shape
    assert abs(yaw_pitch_roll(portrait.camera)[0]) < 15
