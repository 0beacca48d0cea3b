"""Linear probes on synthetic codes with known content, and the figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.media.image import read_image
from export3d_cli.core.train.linear_probe import (
    expression_labels,
    linear_probe,
    majority_accuracy,
    probe_expression_code,
    project_to_plane,
    select_figure_rows,
)

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture
def frames() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """beta of 4 people and 3 expressions in 64 numbers: (beta, person, expression, fit)."""
    rng = np.random.default_rng(0)
    person, expression = rng.integers(4, size=600), rng.integers(3, size=600)
    person_part, expression_part = rng.normal(size=(4, 64)), 3 * rng.normal(size=(3, 64))
    beta = person_part[person] + expression_part[expression] + 0.1 * rng.normal(size=(600, 64))
    return beta.astype(np.float32), person, expression, np.arange(600) < 300


def test_linear_probe_reads_only_what_the_features_hold(frames: tuple[np.ndarray, ...]) -> None:
    beta, person, expression, fit = frames
    assert linear_probe(beta, person, fit) > 0.99
    assert linear_probe(beta, expression, fit) > 0.99
    noise = np.random.default_rng(1).normal(size=(600, 8))
    assert linear_probe(noise, person, fit) < 0.4
    assert linear_probe(beta, np.zeros(600), fit) == 1.0  # a single label
    assert 0.2 < majority_accuracy(person, fit) < 0.35
    with pytest.raises(ValueError, match="rows to classify"):
        linear_probe(beta, person, np.ones(600, bool))


def test_expression_labels_are_independent_of_the_person(frames: tuple[np.ndarray, ...]) -> None:
    beta, person, expression, _ = frames
    labels = expression_labels(beta, person, 3)
    assert len(set(zip(labels.tolist(), expression.tolist(), strict=True))) == 3
    assert expression_labels(np.zeros((5, 2)), np.zeros(5), 2).shape == (5,)


def test_probe_separates_a_code_without_people_from_beta(frames: tuple[np.ndarray, ...], tmp_path: Path) -> None:
    beta, person, expression, fit = frames
    code = np.eye(3)[expression] @ np.random.default_rng(2).normal(size=(3, 16))
    report = probe_expression_code(beta, code, person, fit, figure_path=tmp_path / "clebs.png")
    assert report.person_beta > 0.99 > 0.4 > report.person_code
    assert min(report.expression_beta, report.expression_code) > report.expression_chance + 0.1
    assert (report.frames, report.people) == (600, 4)
    assert read_image(tmp_path / "clebs.png").shape == (960, 960, 3)


def test_select_figure_rows_takes_ten_frames_of_ten_people(frames: tuple[np.ndarray, ...]) -> None:
    person = np.repeat([f"p{i:02d}" for i in range(30)], 20)
    rows = select_figure_rows(np.concatenate([person, ["rare"] * 3]))
    assert len(rows) == len(set(rows.tolist())) == 100
    names, counts = np.unique(person[rows], return_counts=True)
    assert (len(names), set(counts)) == (10, {10})
    assert {"p00", "p29"} <= set(names)
    assert len(select_figure_rows(frames[1])) == 40  # all four people
    assert len(select_figure_rows(np.array(["a", "a", "b"]))) == 2  # b has too few


def test_project_to_plane_keeps_clusters_apart(frames: tuple[np.ndarray, ...]) -> None:
    beta, person, expression, _ = frames
    group = 4 * expression[:120] + person[:120]
    points = project_to_plane(beta[:120])
    assert points.shape == (120, 2)
    assert np.array_equal(points, project_to_plane(beta[:120]))
    centres = np.stack([points[group == g].mean(0) for g in np.unique(group)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=-1).argmin(1)
    assert (np.unique(group)[nearest] == group).mean() > 0.95
