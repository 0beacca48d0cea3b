"""The bench on a tiny model: what is told, and that it adds up; never how fast."""

import json

import pytest
import torch
from click.testing import CliRunner

from export3d_cli.core.diagnostics import benchmark as module
from export3d_cli.core.diagnostics import cost_curves as curves
from export3d_cli.core.diagnostics import machine
from export3d_cli.core.diagnostics.benchmark import StageTiming, add_roofline, run_benchmark
from export3d_cli.core.diagnostics.cost_curves import Point, cost_curves, fit_line, variant
from export3d_cli.core.diagnostics.machine import Machine, OpCounts
from export3d_cli.core.media.image import read_image
from export3d_cli.main import cli


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(machine, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 2**20})


def test_limit_is_the_slower_of_products_and_memory():
    rates = Machine({"fp32": 100.0, "bf16": 200.0}, 10.0)  # GFLOP/s, GB/s
    stage = StageTiming(50.0, 49.0, 51.0, 3)
    found = add_roofline(stage, OpCounts({"fp32": 1e9, "bf16": 2e9}, 5e7), rates)
    assert found.limit == pytest.approx(10 + 10) and found.gflops == pytest.approx(3) and found.megabytes == 50
    assert found.matrix_share == pytest.approx(0.4) and found.bandwidth_share == pytest.approx(0.1)
    assert found.share == found.matrix_share
    assert add_roofline(stage, OpCounts({}, 4e8), rates).limit == pytest.approx(40)
    assert add_roofline(stage, None, rates) is stage


def test_every_stage_is_told(animator, monkeypatch):
    monkeypatch.setattr(module, "ENCODE_REPEATS", 1)
    steps = []
    result = run_benchmark(animator, frames=2, progress=lambda stage, done, total: steps.append((done, total)))
    network = ["expression", "tri-plane", "render", "flow", "super-resolution"]
    assert list(result.stages) == ["decode", "track", "encode source", *network, "convert", "encode video"]
    for name in ("encode source", *network, "convert"):
        stage = result.stages[name]
        assert stage.low <= stage.median <= stage.high and stage.limit > 0 and stage.megabytes > 0, name
    assert result.stages["track"].gflops is None and result.stages["convert"].gflops == 0
    assert result.fps == pytest.approx(2 / result.seconds) and result.peak_gpu is None
    assert steps[-1] == (7, 7) and len(steps) == 7
    assert "forward" not in vars(animator.model.superres)  # the clocks are gone


def test_counted_flops_of_a_frame_are_those_of_one_pass(animator):
    from torch.utils.flop_counter import FlopCounterMode

    photo = read_image(module.example_path("source.jpg"))
    seen = animator.set_source(photo)
    crop = module.crop_image(photo, seen.crop, 64)
    work = module._count_work(animator, seen, crop, seen)
    animator.set_source_motion(crop, seen)  # a tri-plane that is known is not made again
    with FlopCounterMode(display=False) as counter:
        list(animator.drive([seen]))
    frame = sum(sum(work[name].flops.values()) for name, _, _ in module.STAGES if name in work)
    assert frame == pytest.approx(counter.get_total_flops(), rel=0.02)  # which leaves the CPU's attention out


def test_line_through_points():
    points = tuple(Point(x, 0.5 + 0.25 * x, None) for x in (1, 2, 4))
    found = fit_line("batch", points)
    assert (found.fixed, found.each, found.r2) == pytest.approx((0.5, 0.25, 1.0))
    squares = fit_line("resolution", tuple(Point(x, 2e-6 * x * x, 1) for x in (128, 256, 512)))
    assert curves.formula(found) == "0.5 + 0.25 x, R2 1.000" and curves.formula(squares).endswith("2e-06 x^2, R2 1.000")
    assert squares.each == pytest.approx(2e-6) and squares.r2 == pytest.approx(1.0)
    assert fit_line("batch", tuple(Point(x, x**3, None) for x in range(1, 9))).r2 < 0.9


def test_variant_keeps_the_weights_that_fit(animator):
    found = variant(animator, 3, {"coarse_samples": 6, "plane_size": 32})
    assert found.batch == 3 and found.model.config.coarse_samples == 6 and animator.model.config.coarse_samples == 4
    for name in ("decoder", "superres"):
        for a, b in zip(
            getattr(found.model, name).parameters(), getattr(animator.model, name).parameters(), strict=True
        ):
            assert torch.equal(a, b)
    assert found.model.generator.plane_ema.shape[-1] == 32


def test_curves_are_measured_and_drawn(animator, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "CLIP_FRAMES", 2)
    monkeypatch.setattr(curves, "REPEATS", 1)
    sizes = {"frames": (2, 4), "sources": (1, 2), "resolution": (50, 100), "samples": (4, 8), "batch": (1, 2)}
    steps = []
    found = cost_curves(animator, tmp_path / "c.png", sizes=sizes, progress=lambda *step: steps.append(step[1:]))
    assert [curve.name for curve in found.curves] == list(sizes) and steps[-1] == (10, 10)
    assert [[p.x for p in curve.points] for curve in found.curves] == [[2, 4], [1, 2], [32, 64], [4, 8], [1, 2]]
    assert all(point.seconds > 0 for curve in found.curves for point in curve.points)
    assert read_image(found.out).shape == (5 * curves.ROW, 900, 3)


def test_command(tiny_weights, tmp_path, monkeypatch):
    args = ["bench", "--weights", str(tiny_weights), "--device", "cpu"]
    assert CliRunner().invoke(cli, [*args, "--curves", str(tmp_path / "c.txt")]).exit_code == 2
    monkeypatch.setattr(curves, "SIZE_GROUPS", {"batch": (1,)})
    done = CliRunner().invoke(cli, [*args, "--curves", str(tmp_path / "c.png"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["curves"][0]["points"][0]["x"] == 1
    done = CliRunner().invoke(cli, [*args, "--frames", "2"])
    assert done.exit_code == 0 and "super-resolution" in done.stdout and "GFLOP/s" in done.stdout, done.output
