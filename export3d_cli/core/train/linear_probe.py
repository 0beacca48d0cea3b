"""What an expression code knows: linear probes for the person and for the expression, and a picture of both.

A good code tells expressions apart and not people: from beta' the person should be read worse than from beta.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export3d_cli.core.media.image import write_image
from export3d_cli.core.train.training_plots import scatter

FIGURE_PEOPLE, FIGURE_FRAMES = 10, 10  # in the picture, as in the paper's figure 8


@dataclass(frozen=True)
class ProbeReport:
    """Shares of frames classified rightly, 0..1, by a ridge classifier on frames it was not fitted to."""

    person_beta: float  # the person from beta
    person_code: float  # the person from beta'
    person_chance: float  # by always naming the most frequent
    expression_beta: float  # the cluster of expression from beta
    expression_code: float  # the cluster of expression from beta'
    expression_chance: float
    frames: int
    people: int


def linear_probe(features: np.ndarray, labels: np.ndarray, fit: np.ndarray, *, ridge: float = 1.0) -> float:
    """Accuracy of a linear classifier in closed form: one ridge regression a class onto +1 and -1, the largest wins.

    Args:
        features: (N, D).
        labels: (N,) of any kind.
        fit: (N,) bool, rows to fit to; the others are classified. Labels never fitted count as wrong.
        ridge: strength of the penalty, in rows, on standardised features.
    """
    if features.ndim != 2 or len(labels) != len(features) or fit.shape != (len(features),):
        raise ValueError(f"got features {features.shape}, labels {np.shape(labels)}, fit {fit.shape}")
    if not fit.any() or fit.all():
        raise ValueError("a probe needs rows to fit to and rows to classify")
    x = features.astype(np.float64)
    x = (x - x[fit].mean(0)) / np.maximum(x[fit].std(0), 1e-6)
    x = np.column_stack([x, np.ones(len(x))])
    names, index = np.unique(labels, return_inverse=True)
    target = 2.0 * np.eye(len(names))[index] - 1
    penalty = ridge * np.eye(x.shape[1])
    penalty[-1, -1] = 0  # the offset is free
    solution = np.linalg.lstsq(x[fit].T @ x[fit] + penalty, x[fit].T @ target[fit], rcond=None)[0]
    return float(((x[~fit] @ solution).argmax(1) == index[~fit]).mean())


def majority_accuracy(labels: np.ndarray, fit: np.ndarray) -> float:
    """Accuracy of always naming the label most frequent among the rows to fit to."""
    names, counts = np.unique(labels[fit], return_counts=True)
    return float((labels[~fit] == names[counts.argmax()]).mean())


def clusters(features: np.ndarray, count: int, *, seed: int = 0, rounds: int = 30) -> np.ndarray:
    """k-means, started far apart (k-means++): (N, D) -> (N,) in 0..count-1."""
    rng = np.random.default_rng(seed)
    x = features.astype(np.float64)
    centres = x[rng.integers(len(x))][None]
    while len(centres) < count:
        away = _distance(x, centres).min(1)
        share = away / away.sum() if away.sum() > 0 else None
        centres = np.concatenate([centres, x[rng.choice(len(x), p=share)][None]])
    index = np.zeros(len(x), int)
    for _ in range(rounds):
        index = _distance(x, centres).argmin(1)
        for c in np.unique(index):
            centres[c] = x[index == c].mean(0)
    return index


def _distance(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    squared = (x**2).sum(1)[:, None] - 2 * x @ centres.T + (centres**2).sum(1)
    return np.maximum(squared, 0)


def principal(features: np.ndarray, axes: int = 2) -> np.ndarray:
    """The first principal components: (N, D) -> (N, axes)."""
    x = features.astype(np.float64) - features.mean(0)
    return x @ np.linalg.svd(x, full_matrices=False)[2][:axes].T


def project_to_plane(features: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """(N, D) laid out in the plane, (N, 2), and how: by t-SNE where scikit-learn is installed, else by PCA."""
    if importlib.util.find_spec("sklearn") is None or len(features) < 5:
        return principal(features), "PCA"
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=min(30.0, (len(features) - 1) / 3), init="pca", random_state=seed)
    return tsne.fit_transform(features.astype(np.float64)), "t-SNE"


def select_figure_rows(person: np.ndarray) -> np.ndarray:
    """Rows of the picture: at most 10 people, spread over all who have 10 frames, and 10 frames spread over each."""
    names, counts = np.unique(person, return_counts=True)
    names = names[counts >= min(FIGURE_FRAMES, counts.max())]
    names = names[np.unique(np.linspace(0, len(names) - 1, min(FIGURE_PEOPLE, len(names))).round().astype(int))]
    rows = [np.flatnonzero(person == name) for name in names]
    return np.concatenate([r[np.linspace(0, len(r) - 1, min(FIGURE_FRAMES, len(r))).round().astype(int)] for r in rows])


def draw_figure(
    beta: np.ndarray, code: np.ndarray, person: np.ndarray, expression: np.ndarray, told: ProbeReport
) -> np.ndarray:
    """The paper's figure 8 of `chosen` frames, beta above beta', with the probes' figures; uint8 (H, W, 3)."""
    rows = select_figure_rows(person)
    beta = beta / np.maximum(beta.std(0), 0.02)
    lines = []
    for name, values, who, what in (
        ("beta", beta, told.person_beta, told.expression_beta),
        ("beta'", code, told.person_code, told.expression_code),
    ):
        points, how = project_to_plane(values[rows])
        panels = [
            scatter(
                points,
                labels[rows],
                f"{name} by {by} ({how}); linear probe {100 * right:.0f} %, chance {100 * luck:.0f} %",
            )
            for by, labels, right, luck in (
                ("person", person, who, told.person_chance),
                ("expression", expression, what, told.expression_chance),
            )
        ]
        lines.append(np.concatenate(panels, axis=1))
    return np.concatenate(lines)


def expression_labels(beta: np.ndarray, person: np.ndarray, count: int = 8) -> np.ndarray:
    """Clusters of what a person's beta (N, 64) differs by from that person's mean."""
    away = beta.astype(np.float64)
    for name in np.unique(person):
        rows = person == name
        away[rows] -= away[rows].mean(0)
    return clusters(away / np.maximum(away.std(0), 0.02), min(count, len(beta)))


def probe_expression_code(
    beta: np.ndarray, code: np.ndarray, person: np.ndarray, fit: np.ndarray, *, figure_path: Path | None = None
) -> ProbeReport:
    """Compare beta (N, 64) with beta' (N, d) of frames of known people; with `picture` also draw some of them.

    Args:
        beta: (N, 64).
        code: (N, d).
        person: (N,) names.
        fit: (N,) bool, the frames the classifiers are fitted to.
        picture: PNG of `figure`.
    """
    expression = expression_labels(beta, person)
    report = ProbeReport(
        person_beta=linear_probe(beta, person, fit),
        person_code=linear_probe(code, person, fit),
        person_chance=majority_accuracy(person, fit),
        expression_beta=linear_probe(beta, expression, fit),
        expression_code=linear_probe(code, expression, fit),
        expression_chance=majority_accuracy(expression, fit),
        frames=len(beta),
        people=len(np.unique(person)),
    )
    if figure_path is not None:
        write_image(figure_path, draw_figure(beta, code, person, expression, report))
    return report
