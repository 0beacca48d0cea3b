"""The benchmark on a tiny model: that results are complete and add up, never how fast."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.diagnostics.benchmark import run_benchmark
from export3d_cli.main import cli


def test_run_benchmark_reports_every_stage(animator: Animator) -> None:
    result = run_benchmark(animator, frames=2)
    network = ["expression", "tri-plane", "render", "flow", "super-resolution"]
    assert list(result.stages) == ["decode", "track", "encode source", *network, "compose", "encode video"]
    assert all(milliseconds > 0 for milliseconds in result.stages.values())
    assert (result.frames, result.fps) == (2, pytest.approx(2 / result.seconds))
    assert result.peak_memory is None or result.peak_memory > 40 * 2**20
    assert result.peak_gpu is None
    assert "forward" not in vars(animator.model.superres)  # the clocks are removed


def test_bench_command_prints_stages_and_speed(tiny_weights: Path) -> None:
    done = CliRunner().invoke(cli, ["bench", "--weights", str(tiny_weights), "--device", "cpu", "--frames", "2"])
    assert done.exit_code == 0, done.output
    assert "super-resolution" in done.stdout
    assert "frames/s from file to file" in done.stdout
