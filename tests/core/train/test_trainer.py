"""Whole runs of the tiny preset: exact resume, time limit, and errors that name the way out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export3d_cli.core.config.schema import LossConfig, TrainConfig
from export3d_cli.core.face.beta import ARKIT_NAMES
from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.face.landmarks import LIPS
from export3d_cli.core.model.checkpoint import load_state, load_weights
from export3d_cli.core.model.expression import LeBS
from export3d_cli.core.runtime.errors import ConfigError, TrainingError
from export3d_cli.core.train import trainer
from export3d_cli.core.train.clebs_stage import fit_flow_basis
from export3d_cli.core.train.frame_cache import load_datasets
from export3d_cli.core.train.pair_sampler import PairSampler
from export3d_cli.core.train.trainer import learning_rate, scheduled_raw_size, train
from export3d_cli.core.train.training_run import WARM_RESTART_PROGRESS, TrainingRun

from .conftest import BUNDLE, SIZE


def test_the_first_stage_draws_by_its_own_shares(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[list[float]]] = {"geometry": [], "batch": []}
    for name, shares in seen.items():
        plain = getattr(PairSampler, name)

        def told(self: PairSampler, *args: object, plain=plain, shares=shares) -> object:  # type: ignore[no-untyped-def]
            shares.append(self.dataset_weights.tolist())
            return plain(self, *args)

        monkeypatch.setattr(PairSampler, name, told)
    data, clebs = replace(tiny.data, path=tiny.data.path * 2), replace(tiny.clebs, weight=(3.0, 1.0))
    train(replace(tiny, data=data, clebs=clebs, steps=1))
    assert seen["geometry"] and all(shares == [0.75, 0.25] for shares in seen["geometry"])
    assert seen["batch"] and all(shares == [0.5, 0.5] for shares in seen["batch"])


def test_resume_is_exact(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, decay=False, loss=LossConfig(l1=0.5, mask=10.0))
    whole = train(config)
    assert whole.finished
    assert whole.step == 4
    halves = replace(config, run=str(tmp_path / "halves"))
    first = train(replace(halves, steps=2))
    assert first.step == 2
    second = train(halves)
    assert second.finished
    assert second.step == 4
    a, b = load_state(Path(config.run)), load_state(Path(halves.run))
    assert a is not None
    assert b is not None
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    c, d = load_weights(whole.weights)[0], load_weights(second.weights)[0]
    assert all(torch.equal(c[k], d[k]) for k in c)
    steps = [json.loads(s)["step"] for s in (Path(halves.run) / "stats.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 1, 2, 3, 4]  # three of the CLeBS stage and its report, four of reconstruction
    assert sorted(p.name for p in (Path(config.run) / "samples").iterdir()) == ["0000004.png"]


def test_weights_carry_a_trained_expression_and_flow(tiny: TrainConfig) -> None:
    summary = train(replace(tiny, steps=1))
    state, config, record = load_weights(summary.weights)
    assert config == tiny.model
    assert record["steps"] == 1
    assert record["clebs_steps"] == 2
    assert state["flow.basis"].abs().max() > 0
    assert not torch.equal(state["expression.beta_mean"], torch.zeros(64))


def test_clebs_stage_resumes_exactly(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny, stages=("clebs",), checkpoint_every=1)
    whole = train(config)
    broken = replace(config, run=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainingRun, "out_of_time", lambda self: (self.folder / "state.json").exists())
        stopped = train(broken)
    assert not stopped.finished
    assert stopped.stage == "clebs"
    assert stopped.step == 1
    assert train(broken).finished
    a, b = load_weights(whole.weights)[0], load_weights(Path(broken.run) / "weights.safetensors")[0]
    assert all(torch.equal(a[k], b[k]) for k in a)


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
    assert TrainingRun.open(config, None).decay_progress == WARM_RESTART_PROGRESS  # given more time


def test_loss_that_is_no_number_stops(tiny: TrainConfig) -> None:
    config = replace(tiny, stages=("reconstruction",), loss=LossConfig(l2=float("nan")))
    with pytest.raises(TrainingError, match="nan at step 0"):
        train(config)


def test_init_of_another_size_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    summary = train(replace(tiny, stages=("reconstruction",), steps=1))
    other = replace(tiny, run=str(tmp_path / "other"), init=str(summary.weights))
    with pytest.raises(ConfigError, match="another size"):
        train(replace(other, model=replace(other.model, width=64)))
    assert train(replace(other, stages=("reconstruction",), steps=1)).step == 1


def test_expression_is_taken_from_other_weights(tiny: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(tiny, stages=("clebs",)))
    other = replace(tiny, run=str(tmp_path / "other"), stages=("reconstruction",), seed=5, steps=2)
    second = train(replace(other, expression=str(first.weights)))
    a, b = load_weights(first.weights), load_weights(second.weights)
    kept = [k for k in a[0] if k.startswith(("expression.", "flow.basis"))]
    assert all(torch.equal(a[0][k], b[0][k]) for k in kept)  # frozen
    assert b[2]["expression"]["clebs_steps"] == 2


def test_schedules(tiny: TrainConfig) -> None:
    config = replace(tiny, lr=1.0, warmup=4, decay=True, raw_size_start=8, raw_size_grow_step=10)
    assert learning_rate(config, 0, 0.0) == 0.25
    assert learning_rate(config, 100, 0.5) == pytest.approx(0.55)
    assert learning_rate(config, 100, 1.0) == pytest.approx(0.1)
    assert (scheduled_raw_size(config, 9), scheduled_raw_size(config, 10)) == (8, 16)


def test_flow_basis_recovers_a_linear_motion(tiny: TrainConfig) -> None:
    sampler = PairSampler(load_datasets(tiny.data, SIZE), tiny.data, load_canonical_face(BUNDLE).mirror)
    torch.manual_seed(0)
    lebs = LeBS(tiny.model)
    basis, report = fit_flow_basis(lebs, sampler, 0, 400, 1e-4)
    assert basis.shape == (10, 478, 3)
    assert report.lips < 0.35 * report.lips_rigid  # the data set's mouth moves with one number
    beta = torch.zeros(2, 64)
    beta[1, ARKIT_NAMES.index("jawOpen")] = 1
    lam = lebs.coefficients(beta)
    moved = torch.einsum("n,npc->pc", lam[1] - lam[0], basis)
    assert moved[list(LIPS), 1].mean().item() == pytest.approx(0.05, rel=0.2)  # as the clips were made
    assert moved[10].norm() < 0.01
