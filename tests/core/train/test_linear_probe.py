"""Probes on synthetic codes of which it is known what they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.media.image import read_image
from export3d_cli.core.train import linear_probe as probes
from export3d_cli.core.train.linear_probe import (
    clusters,
    expression_labels,
    linear_probe,
    majority_accuracy,
    principal,
    probe_expression_code,
)


@pytest.fixture
def frames() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """beta of 4 people and 3 expressions in 64 numbers: (beta, person, expression, fit)."""
    rng = np.random.default_rng(0)
    person, expression = rng.integers(4, size=600), rng.integers(3, size=600)
    who, what = rng.normal(size=(4, 64)), 3 * rng.normal(size=(3, 64))
    beta = who[person] + what[expression] + 0.1 * rng.normal(size=(600, 64))
    return beta.astype(np.float32), person, expression, np.arange(600) < 300


def test_probe_reads_what_is_there_and_nothing_else(frames: tuple[np.ndarray, ...]) -> None:
    beta, person, expression, fit = frames
    assert linear_probe(beta, person, fit) > 0.99
    assert linear_probe(beta, expression, fit) > 0.99
    noise = np.random.default_rng(1).normal(size=(600, 8))
    assert linear_probe(noise, person, fit) < 0.4
    assert 0.2 < majority_accuracy(person, fit) < 0.35
    with pytest.raises(ValueError, match="rows to classify"):
        linear_probe(beta, person, np.ones(600, bool))


def test_clusters_find_expressions_whoever_wears_them(frames: tuple[np.ndarray, ...]) -> None:
    beta, person, expression, _ = frames
    found = expression_labels(beta, person, 3)
    assert len({(a, b) for a, b in zip(found.tolist(), expression.tolist(), strict=True)}) == 3
    assert clusters(np.zeros((5, 2)), 2).shape == (5,)


def test_first_axis_is_that_of_most_variance() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3)) * (0.1, 5.0, 1.0)
    assert abs(np.corrcoef(principal(x)[:, 0], x[:, 1])[0, 1]) > 0.99


def test_code_without_people_is_told_from_beta(frames: tuple[np.ndarray, ...], tmp_path: Path) -> None:
    beta, person, expression, fit = frames
    code = np.eye(3)[expression] @ np.random.default_rng(2).normal(size=(3, 16))
    report = probe_expression_code(beta, code, person, fit, figure_path=tmp_path / "axes.png")
    assert report.person_beta > 0.99 > 0.4 > report.person_code
    assert min(report.expression_beta, report.expression_code) > report.expression_chance + 0.1
    assert (report.frames, report.people) == (600, 4)
    assert read_image(tmp_path / "axes.png").shape == (960, 960, 3)


def test_picture_shows_ten_people_ten_times(frames: tuple[np.ndarray, ...]) -> None:
    person = np.repeat([f"p{i:02d}" for i in range(30)], 20)
    rows = probes.select_figure_rows(np.concatenate([person, ["seldom"] * 3]))
    assert len(rows) == len(set(rows.tolist())) == 100
    names, counts = np.unique(person[rows], return_counts=True)
    assert (len(names), set(counts)) == (10, {10})
    assert {"p00", "p29"} <= set(names)
    assert len(probes.select_figure_rows(frames[1])) == 40  # all four people there are
    assert len(probes.select_figure_rows(np.array(["a", "a", "b"]))) == 2  # b has too few


def test_places_keep_clusters_apart(frames: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    beta, person, expression, _ = frames
    group = 4 * expression[:120] + person[:120]

    def apart() -> tuple[float, str]:
        points, how = probes.project_to_plane(beta[:120])
        assert points.shape == (120, 2)
        assert np.array_equal(points, probes.project_to_plane(beta[:120])[0])
        centres = np.stack([points[group == g].mean(0) for g in np.unique(group)])
        away = np.linalg.norm(points[:, None] - centres, axis=-1)
        return float((np.unique(group)[away.argmin(1)] == group).mean()), how

    monkeypatch.setattr(probes.importlib.util, "find_spec", lambda name: None)
    right, how = apart()
    assert right > 0.5 and how == "PCA"  # two axes cannot hold all
    monkeypatch.undo()
    pytest.importorskip("sklearn")
    right, how = apart()
    assert right > 0.95 and how == "t-SNE"
