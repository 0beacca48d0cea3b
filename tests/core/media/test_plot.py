"""Panels of curves: where things are drawn, not how they look."""

import numpy as np
import pytest

from export3d_cli.core.media import plot


def where(picture, colour):
    """Rows and columns of the pixels of a colour."""
    return np.argwhere((picture == colour).all(-1))


def test_a_line_runs_from_corner_to_corner():
    picture = plot.plot_curves("t", {"a": [(0, 0.0), (10, 5.0)]}, x_label="x", markers=True)
    assert picture.shape == (plot.HEIGHT, plot.WIDTH, 3)
    drawn = where(picture, plot.hue_palette(1)[0])
    (low_row, left), (top, right) = drawn[drawn[:, 1].argmin()], drawn[drawn[:, 1].argmax()]
    assert abs(left - plot.MARGIN) < 5 and abs(low_row - (plot.HEIGHT - plot.MARGIN)) < 5
    assert abs(right - (plot.WIDTH - plot.MARGIN // 2)) < 5 and abs(top - plot.MARGIN) < 5


@pytest.mark.parametrize(("values", "ticks"), [([5.0], 6), ([0.03, 0.02], 4), ([97.0, 3.0], 6), ([0.0], 6)])
def test_marks_of_the_axis_begin_at_zero_and_reach_the_largest(values, ticks):
    found, names = plot._ticks(np.array(values), log=False)
    assert (found[0] == 0 and found[-1] >= max(values) > found[-2] - 1e-9) or max(values) == 0
    assert len(found) == len(names) <= ticks + 1 and len(set(names)) == len(names)


def test_marks_of_a_logarithmic_axis_are_powers_of_ten():
    found, names = plot._ticks(np.array([0.02, 30.0]), log=True)
    assert found.tolist() == [-2, -1, 0, 1, 2] and names[0] == "1e-2"
    assert plot._ticks(np.array([1.0]), log=True)[0].tolist() == [0, 1]


def test_several_lines_are_named_and_one_point_is_a_dot():
    lines = {"loss": [(3, 0.5)], "l2": [(3, 0.05)]}
    picture = plot.plot_curves("stage", lines, x_label="step", log_y=True)
    assert all(len(where(picture, colour)) > 10 for colour in plot.hue_palette(2))
    assert (picture[:, plot.WIDTH - 3 * plot.MARGIN + 8 :] < 200).any()
    alone = plot.plot_curves("stage", {"loss": lines["loss"]}, x_label="step", log_y=True)
    assert (alone[plot.HEIGHT // 2, -plot.MARGIN // 2 + 2 :] == 255).all()
