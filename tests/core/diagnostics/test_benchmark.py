"""The benchmark on a tiny model: that results are complete and add up, never how fast."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.person import Person
from export3d_cli.core.diagnostics import benchmark
from export3d_cli.core.diagnostics.benchmark import compare_speed, run_benchmark
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli

COPY = (
    f'{sys.executable} -c "import shutil, sys; assert sys.argv[1]; shutil.copy(*sys.argv[2:])" {{src}} {{drv}} {{out}}'
)


def test_run_benchmark_reports_every_stage(animator: Animator) -> None:
    result = run_benchmark(animator, frames=2)
    assert list(result.stages) == ["decode", "track", "encode source", "render", "compose", "encode video"]
    assert all(milliseconds > 0 for milliseconds in result.stages.values())
    assert (result.frames, result.fps) == (2, pytest.approx(2 / result.seconds))
    assert result.peak_memory is None or result.peak_memory > 40 * 2**20
    assert result.peak_gpu is None


def test_person_file_is_taken_for_the_photo(animator: Animator, tmp_path: Path) -> None:
    path = tmp_path / "me.person.safetensors"
    Person((read_image(example_path("source.jpg")),), None, animator.fingerprint, {}).save(path)
    assert run_benchmark(animator, path, frames=2).frames == 2


def test_bench_command_prints_stages_and_speed(tiny_weights: Path) -> None:
    done = CliRunner().invoke(cli, ["bench", "--weights", str(tiny_weights), "--device", "cpu", "--frames", "2"])
    assert done.exit_code == 0, done.output
    assert "render" in done.stdout
    assert "frames/s from file to file" in done.stdout


def test_another_tool_is_timed_in_turn_on_the_same_files(tiny_weights: Path) -> None:
    options = [f"--weights={tiny_weights}", "--device=cpu", "--max-frames=2"]
    result = compare_speed(COPY, rounds=1, arguments=options)
    assert len(result.seconds) == len(result.other_seconds) == 1
    assert result.ratio == pytest.approx(result.other_seconds[0] / result.seconds[0])
    assert 0 < result.ratio < 1  # copying a file is faster


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("tool {src} {out}", "lacks {drv}"),
        ("tool '{src} {drv} {out}", "quote it"),
        ("no-such-tool {src} {drv} {out}", "cannot be run"),
        (f"{sys.executable} -c 1 {{src}} {{drv}} {{out}}", "did not write {out}"),
        (f"{sys.executable} -c 'exit(\"no model\")' {{src}} {{drv}} {{out}}", "exit code 1.*no model"),
    ],
)
def test_a_command_that_cannot_be_compared_is_explained(command: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        compare_speed(command)


def test_bench_against_prints_medians_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([4.0, 1.0, 5.0, 2.0, 9.0, 3.0, 5.0, 1.0, 6.0, 2.0])
    monkeypatch.setattr(benchmark, "_time_tool", lambda command, out: next(times))
    done = CliRunner().invoke(cli, ["bench", "--against", "tool {src} {drv} {out}"])
    assert done.exit_code == 0, done.output
    assert "2.00 s, 1.00 to 3.00 s in 5 runs" in done.stdout and "5.00 s, 4.00 to 9.00 s" in done.stdout
    assert "ratio 2.50" in done.stdout
    refused = CliRunner().invoke(cli, ["bench", "--against", "tool {src} {drv} {out}", "--frames", "3"])
    assert refused.exit_code == 2 and "--frames has no effect" in refused.stderr
