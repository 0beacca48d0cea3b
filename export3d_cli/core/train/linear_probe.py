"""Linear probes of an expression code: how well a linear classifier reads the person and the expression from it.

A good code separates expressions, not people: the person should be read less well from beta' than from beta. Needs
scikit-learn and matplotlib (`export3d-cli[train]`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export3d_cli.core.train.training_plots import plot_scatter

FIGURE_PEOPLE, FIGURE_FRAMES = 10, 10  # of each person, as in the paper's figure 8


@dataclass(frozen=True)
class ProbeReport:
    """Accuracies, 0..1, of ridge classifiers on frames that they were not fitted to."""

    person_beta: float  # the person from beta
    person_code: float  # the person from beta'
    person_chance: float  # accuracy of the most frequent person
    expression_beta: float  # the expression cluster from beta
    expression_code: float  # the expression cluster from beta'
    expression_chance: float
    frames: int
    people: int


def linear_probe(features: np.ndarray, labels: np.ndarray, fit: np.ndarray) -> float:
    """Return the accuracy of a ridge classifier on standardised features.

    Args:
        features: (N, D).
        labels: (N,) of any kind.
        fit: (N,) bool, rows to fit to; the others are classified. Labels without a fitted row count as wrong.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if features.ndim != 2 or len(labels) != len(features) or fit.shape != (len(features),):
        raise ValueError(f"got features {features.shape}, labels {np.shape(labels)}, fit {fit.shape}")
    if not fit.any() or fit.all():
        raise ValueError("a probe needs rows to fit to and rows to classify")
    classifier = make_pipeline(StandardScaler(), RidgeClassifier(solver="svd")).fit(features[fit], labels[fit])
    return float(classifier.score(features[~fit], labels[~fit]))


def majority_accuracy(labels: np.ndarray, fit: np.ndarray) -> float:
    """Return the accuracy of always predicting the most frequent label of the rows to fit to."""
    names, counts = np.unique(labels[fit], return_counts=True)
    return float((labels[~fit] == names[counts.argmax()]).mean())


def expression_labels(beta: np.ndarray, person: np.ndarray, count: int = 8) -> np.ndarray:
    """Cluster the deviation of beta (N, 64) from each person's mean by k-means: labels (N,)."""
    from sklearn.cluster import KMeans

    deviation = beta.astype(np.float64)
    for name in np.unique(person):
        rows = person == name
        deviation[rows] -= deviation[rows].mean(0)
    deviation /= np.maximum(deviation.std(0), 0.02)
    count = min(count, len(np.unique(deviation, axis=0)))
    return KMeans(count, n_init=1, random_state=0).fit_predict(deviation)


def project_to_plane(features: np.ndarray) -> np.ndarray:
    """Project (N, D) to the plane, (N, 2), by t-SNE."""
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=min(30.0, (len(features) - 1) / 3), init="pca", random_state=0)
    return tsne.fit_transform(features.astype(np.float64))


def select_figure_rows(person: np.ndarray) -> np.ndarray:
    """Return the rows of the figure: up to 10 people with at least 10 frames, and 10 evenly spaced frames of each."""
    names, counts = np.unique(person, return_counts=True)
    names = names[counts >= min(FIGURE_FRAMES, counts.max())]
    names = names[np.unique(np.linspace(0, len(names) - 1, min(FIGURE_PEOPLE, len(names))).round().astype(int))]
    rows = [np.flatnonzero(person == name) for name in names]
    return np.concatenate([r[np.linspace(0, len(r) - 1, min(FIGURE_FRAMES, len(r))).round().astype(int)] for r in rows])


def draw_figure(
    path: Path, beta: np.ndarray, code: np.ndarray, person: np.ndarray, expression: np.ndarray, report: ProbeReport
) -> None:
    """Draw the paper's figure 8 to a PNG: t-SNE of some rows, beta above beta', coloured by person and expression."""
    from matplotlib.figure import Figure

    rows = select_figure_rows(person)
    if len(rows) < 5:  # too few points for t-SNE
        return
    figure = Figure(figsize=(9.6, 9.6), layout="constrained")
    panels = figure.subplots(2, 2)
    beta = beta / np.maximum(beta.std(0), 0.02)
    for (left, right), name, features, person_accuracy, expression_accuracy in (
        (panels[0], "beta", beta, report.person_beta, report.expression_beta),
        (panels[1], "beta'", code, report.person_code, report.expression_code),
    ):
        points = project_to_plane(features[rows])
        for panel, label, labels, accuracy, chance in (
            (left, "person", person, person_accuracy, report.person_chance),
            (right, "expression", expression, expression_accuracy, report.expression_chance),
        ):
            title = f"{name} by {label} (t-SNE); linear probe {100 * accuracy:.0f} %, chance {100 * chance:.0f} %"
            plot_scatter(panel, points, labels[rows], title)
    figure.savefig(path)


def probe_expression_code(
    beta: np.ndarray, code: np.ndarray, person: np.ndarray, fit: np.ndarray, *, figure_path: Path | None = None
) -> ProbeReport:
    """Compare beta with beta' of frames of known people, and draw some of them.

    Args:
        beta: (N, 64).
        code: (N, d), beta'.
        person: (N,) names.
        fit: (N,) bool, the frames that the classifiers are fitted to.
        figure_path: PNG of `draw_figure`.
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
        draw_figure(figure_path, beta, code, person, expression, report)
    return report
