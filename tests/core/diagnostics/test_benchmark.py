"""The benchmark on a tiny model: that results are complete and add up, never how fast."""

import importlib.util
import json

import pytest
from click.testing import CliRunner

from export3d_cli.core.diagnostics import benchmark
from export3d_cli.core.diagnostics import cost_curves as curves
from export3d_cli.core.diagnostics.benchmark import run_benchmark
from export3d_cli.core.diagnostics.cost_curves import Point, cost_curves, fit_line
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.main import cli


def test_run_benchmark_reports_every_stage(animator, monkeypatch):
    monkeypatch.setattr(benchmark, "ENCODE_REPEATS", 1)
    steps = []
    result = run_benchmark(animator, frames=2, progress=lambda stage, done, total: steps.append((done, total)))
    network = ["expression", "tri-plane", "render", "flow", "super-resolution"]
    assert list(result.stages) == ["decode", "track", "encode source", *network, "convert", "compose", "encode video"]
    assert all(stage.low <= stage.median <= stage.high for stage in result.stages.values())
    assert result.fps == pytest.approx(2 / result.seconds) and result.peak_gpu is None
    assert steps == [(i, benchmark.STEPS) for i in range(1, benchmark.STEPS + 1)]
    assert "forward" not in vars(animator.model.superres)  # the clocks are removed


def test_fit_line_through_points():
    curve = fit_line("batch", tuple(Point(x, 0.5 + 0.25 * x, None) for x in (1, 2, 4)))
    assert (curve.fixed, curve.each, curve.r2) == pytest.approx((0.5, 0.25, 1.0))
    assert fit_line("batch", tuple(Point(x, x**3, None) for x in range(1, 9))).r2 < 0.9


def test_cost_curves_are_measured_and_plotted(animator, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(curves, "SOURCES_FRAMES", 2)
    monkeypatch.setattr(curves, "BATCH_FRAMES", 2)
    sizes, steps, batch = {"frames": (2, 4), "sources": (1, 2), "batch": (1, 2)}, [], animator.batch
    result = cost_curves(animator, tmp_path / "c.png", sizes=sizes, progress=lambda *step: steps.append(step[1:]))
    assert [[point.x for point in curve.points] for curve in result.curves] == [[2, 4], [1, 2], [1, 2]]
    assert [curve.name for curve in result.curves] == list(sizes) and steps[-1] == (6, 6)
    assert all(point.seconds > 0 for curve in result.curves for point in curve.points)
    assert read_image(result.out).std() > 5 and animator.batch == batch


def test_cost_curves_without_matplotlib_names_the_extra(animator, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(InputError, match=r"pip install 'export3d-cli\[plots\]'"):
        cost_curves(animator, tmp_path / "c.png")


def test_bench_command(tiny_weights, tmp_path, monkeypatch):
    args = ["bench", "--weights", str(tiny_weights), "--device", "cpu"]
    assert CliRunner().invoke(cli, [*args, "--curves", str(tmp_path / "c.txt")]).exit_code == 2
    done = CliRunner().invoke(cli, [*args, "--curves", str(tmp_path / "c.png"), "--frames", "30", "--batch", "2"])
    assert done.exit_code == 2 and "--frames, --batch has no effect with --curves" in done.stderr
    done = CliRunner().invoke(cli, [*args, "--frames", "2"])
    assert done.exit_code == 0 and "super-resolution" in done.stdout and "frames/s" in done.stdout, done.output
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(curves, "SIZES", {"batch": (1,)})
    done = CliRunner().invoke(cli, [*args, "--curves", str(tmp_path / "c.png"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["curves"][0]["points"][0]["x"] == 1
