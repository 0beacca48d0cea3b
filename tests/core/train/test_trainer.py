"""Whole runs of the tiny preset: exact resume, time limit, licence, and errors that say what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export3d_cli.core.config.schema import LossConfig, TrainConfig
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.landmarks import LIPS
from export3d_cli.core.model.checkpoint import load_state, load_weights, read_licence
from export3d_cli.core.model.expression import LeBS
from export3d_cli.core.runtime.errors import ConfigError, TrainingError
from export3d_cli.core.train import trainer
from export3d_cli.core.train.clebs_stage import fit_flow_basis
from export3d_cli.core.train.image_stage import learning_rate, scheduled_raw_size
from export3d_cli.core.train.stage import WARM_RESTART_PROGRESS, TrainingRun
from export3d_cli.core.train.trainer import train
from export3d_cli.core.train.training_data import PairSampler, load_datasets

from .conftest import SIZE


def test_clebs_stage_uses_its_own_dataset_weights(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[list[float]] = []

    def make_stage(run: object, model: object, sampler: PairSampler) -> None:
        weights.append(sampler.dataset_weights.tolist())
        raise TrainingError("stop")

    monkeypatch.setattr(trainer, "ClebsStage", make_stage)
    monkeypatch.setattr(trainer, "ImageStages", make_stage)
    data, clebs = replace(tiny.data, path=tiny.data.path * 2), replace(tiny.clebs, weight=(3.0, 1.0))
    for stages in (("clebs",), ("reconstruction",)):
        with pytest.raises(TrainingError, match="stop"):
            train(replace(tiny, data=data, clebs=clebs, stages=stages))
    assert weights == [[0.75, 0.25], [0.5, 0.5]]


def test_train_resumes_exactly(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny, decay=False, loss=LossConfig(l1=0.5, mask=10.0), checkpoint_every=1)
    whole = train(config)
    assert (whole.finished, whole.step) == (True, 4)
    halves = replace(config, run=str(tmp_path / "halves"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainingRun, "out_of_time", lambda self: (self.folder / "state.json").exists())
        stopped = train(halves)
    assert (stopped.finished, stopped.stage, stopped.step) == (False, "clebs", 1)
    assert train(replace(halves, steps=2)).step == 2
    second = train(halves)
    assert (second.finished, second.step) == (True, 4)
    a, b = load_state(Path(config.run)), load_state(Path(halves.run))
    assert a is not None
    assert b is not None
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    (c, model, record), d = load_weights(whole.weights), load_weights(second.weights)[0]
    assert all(torch.equal(c[k], d[k]) for k in c)
    assert (model, record["steps"], record["clebs_steps"]) == (tiny.model, 4, 2)
    assert c["flow.basis"].abs().max() > 0
    assert not torch.equal(c["expression.beta_mean"], torch.zeros(64))
    steps = [json.loads(s)["step"] for s in (Path(halves.run) / "stats.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 1, 2, 3, 4]  # three of the CLeBS stage and its report, four of reconstruction
    assert sorted(p.name for p in (Path(config.run) / "samples").iterdir()) == ["0000004.png"]


def test_max_minutes_stops_and_saves(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny, stages=("reconstruction",), steps=1000, max_minutes=1.0, decay_by_time=True)
    clock = iter(x / 10 for x in range(10_000))
    monkeypatch.setattr(trainer.TrainingRun, "elapsed_minutes", lambda self: next(clock))
    summary = train(config)
    assert not summary.finished
    assert 0 < summary.step < 20
    saved = load_state(Path(config.run))
    assert saved is not None
    assert saved[1]["step"] == summary.step
    assert saved[1]["decayed"] == 1.0
    assert TrainingRun(config).decay_progress == WARM_RESTART_PROGRESS  # continued with more time


def test_train_leaves_threads_and_random_state_unchanged(tiny: TrainConfig) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(replace(tiny, stages=("reconstruction",), steps=1, threads=threads + 1))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_init_with_another_size_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    summary = train(replace(tiny, stages=("reconstruction",), steps=1))
    other = replace(tiny, run=str(tmp_path / "other"), init=str(summary.weights))
    with pytest.raises(ConfigError, match=r"holds another model: set model\.width="):
        train(replace(other, model=replace(other.model, width=64)))
    assert train(replace(other, stages=("reconstruction",), steps=1)).step == 1


def test_init_passes_its_calibration_on(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, stages=("reconstruction",), steps=1)
    first = train(replace(config, model=replace(tiny.model, expression_gain=1.1, surface_density=5.0)))
    model = replace(tiny.model, surface_density=6.0)  # set by the configuration
    second = train(replace(config, run=str(tmp_path / "second"), init=str(first.weights), model=model))
    saved = load_weights(second.weights)[1]
    assert (saved.expression_gain, saved.surface_density) == (1.1, 6.0)


def test_expression_from_takes_code_and_flow_of_other_weights(tiny: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(tiny, stages=("clebs",)))
    other = replace(tiny, run=str(tmp_path / "other"), stages=("reconstruction",), seed=5, steps=2)
    second = train(replace(other, expression_from=str(first.weights)))
    a, b = load_weights(first.weights), load_weights(second.weights)
    kept = [k for k in a[0] if k.startswith(("expression.", "flow.basis"))]
    assert all(torch.equal(a[0][k], b[0][k]) for k in kept)  # frozen
    assert b[2]["expression"]["clebs_steps"] == 2


def test_train_without_a_licence_is_refused_before_any_work(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"^license is not set: .* --license CC-BY-4\.0 "):
        train(replace(tiny, license=""))
    assert not Path(tiny.run).exists()


def test_licence_is_written_into_every_weights_file(tiny: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(tiny, stages=("reconstruction",), steps=1, license="CC-BY-4.0"))
    assert read_licence(first.weights) == "CC-BY-4.0"
    messages: list[str] = []
    config = replace(tiny, run=str(tmp_path / "second"), stages=("reconstruction",), steps=1, init=str(first.weights))
    second = train(config, progress=lambda event: messages.append(event.message))
    assert read_licence(second.weights) == "CC0-1.0"
    assert f"{first.weights} has the licence CC-BY-4.0: make sure that it allows CC0-1.0" in messages


def test_learning_rate_and_raw_size_schedules(tiny: TrainConfig) -> None:
    config = replace(tiny, lr=1.0, warmup=4, decay=True, raw_size_start=8, raw_size_grow_step=10)
    assert learning_rate(config, 0, 0.0) == 0.25
    assert learning_rate(config, 100, 0.5) == pytest.approx(0.55)
    assert learning_rate(config, 100, 1.0) == pytest.approx(0.1)
    assert (scheduled_raw_size(config, 9), scheduled_raw_size(config, 10)) == (8, 16)


def test_fit_flow_basis_recovers_a_linear_motion(tiny: TrainConfig) -> None:
    sampler = PairSampler(load_datasets(tiny.data, SIZE), tiny.data)
    torch.manual_seed(0)
    lebs = LeBS(tiny.model)
    basis, report = fit_flow_basis(lebs, sampler, 0, 400, 1e-4)
    assert basis.shape == (10, 478, 3)
    assert report["lips"] < 0.35 * report["lips_rigid"]  # the mouths of the dataset move with one number
    beta = torch.zeros(2, 64)
    beta[1, ARKIT_NAMES.index("jawOpen")] = 1
    lam = lebs.coefficients(beta)
    moved = torch.einsum("n,npc->pc", lam[1] - lam[0], basis)
    assert moved[list(LIPS), 1].mean().item() == pytest.approx(0.05, rel=0.2)  # as in the clips
    assert moved[10].norm() < 0.01
