"""The image stages: equal gradients by parts and processes; ablations; crashes; non-finite losses; cost estimate."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export3d_cli.core.config.loading import make_train_config, save_yaml
from export3d_cli.core.config.schema import PRESETS, AdversarialConfig, PlaneDictConfig, TrainConfig
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.media.image import read_image
from export3d_cli.core.model.checkpoint import load_state, load_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.errors import ConfigError, TrainingError
from export3d_cli.core.train import clebs_stage as pretrain
from export3d_cli.core.train import discriminator as adversary
from export3d_cli.core.train import image_stage as stages
from export3d_cli.core.train.trainer import train
from export3d_cli.core.train.training_data import Batch
from export3d_cli.core.train.training_plan import plan_training

ADVERSARIAL = AdversarialConfig(
    steps=1, channel_max=8, channel_base=256, mapping_layers=1, mbstd_group_size=2, r1_gamma=1.0, r1_interval=1
)
WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from export3d_cli.core.config.loading import load_train_config
from export3d_cli.core.train.trainer import train
train(load_train_config(Path(sys.argv[1])))
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in names if "gloo" in name], names  # they would outlive Python
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from export3d_cli.core.model import checkpoint
from export3d_cli.core.config.loading import load_train_config
from export3d_cli.core.train.trainer import train
original, calls = checkpoint.save_file, []
def save_file(tensors, path, metadata=None):
    if "state" in metadata["format"]:
        calls.append(path)
    if len(calls) == 3:
        original(tensors, path, metadata=metadata)
        with open(path, "r+b") as file:
            file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
    original(tensors, path, metadata=metadata)
checkpoint.save_file = save_file
train(load_train_config(Path(sys.argv[1])))
"""


def load_tensors(config: TrainConfig) -> dict[str, torch.Tensor]:
    state = load_state(Path(config.run))
    assert state is not None
    return state[0]


def assert_equal_moments(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal up to the order of sums. Compares moments, since Adam's first step has one size for any gradient."""
    assert a.keys() == b.keys()
    for start in ("optimizer.", "against.", "model.generator.plane_ema"):
        keys = [k for k in a if k.startswith(start) and (k.endswith(("exp_avg", "plane_ema")))]
        difference = sum(float((a[k] - b[k]).square().sum()) for k in keys)
        size = sum(float(a[k].square().sum()) for k in keys)
        assert difference <= 1e-8 * size, f"{start} differs by {difference} of {size}"  # other jitter makes it 1e-5


@pytest.fixture
def joined(tiny: TrainConfig) -> TrainConfig:
    """One step of both stages on a batch of four pairs."""
    return replace(
        tiny,
        stages=("reconstruction", "adversarial"),
        steps=1,
        batch=4,
        lr=1e-6,
        clip_grad=0.0,
        adversarial=ADVERSARIAL,
    )


def test_accumulated_parts_give_the_gradients_of_the_whole_batch(joined: TrainConfig, tmp_path: Path) -> None:
    train(joined)
    parts = replace(joined, run=str(tmp_path / "parts"), accumulate=2)
    train(parts)
    assert_equal_moments(load_tensors(joined), load_tensors(parts))


def test_raw_rays_train_the_volume_alone(tiny: TrainConfig) -> None:
    config = replace(
        tiny, stages=("reconstruction",), steps=1, checkpoint_every=1, raw_rays=64, loss=replace(tiny.loss, l1=1.0)
    )
    train(config)
    trained = load_tensors(config)
    torch.manual_seed(config.seed)
    initial = Export3D(config.model).state_dict()
    changed = {k for k, v in initial.items() if not torch.equal(v, trained[f"model.{k}"])}
    assert {"decoder.density.weight", "source_view.quarter.weight", "generator.to_planes.weight"} <= changed
    assert not [k for k in changed if k.startswith(("superres.", "flow_blend.", "source_view.background."))]


def test_trainable_parts_change_alone(tiny: TrainConfig) -> None:
    """The frozen generator keeps its mean tri-plane, too."""
    config = replace(tiny, stages=("reconstruction",), steps=1, checkpoint_every=1, trainable=("superres.", "flow_b"))
    train(config)
    trained = load_tensors(config)
    torch.manual_seed(config.seed)
    initial = Export3D(config.model).state_dict()
    changed = {k for k, v in initial.items() if not torch.equal(v, trained[f"model.{k}"])} - {"flow.triangles"}
    assert changed and all(k.startswith(config.trainable) for k in changed)
    with pytest.raises(ConfigError, match="trainable must name parts of the model"):
        train(replace(config, run=config.run + "-2", trainable=("superresolution",)))


def test_two_processes_give_the_gradients_of_one(joined: TrainConfig, tmp_path: Path) -> None:
    """All stages; `decay_by_time` and saving need the processes' agreement."""
    clebs = replace(joined.clebs, geometry_warmup_steps=0, steps=1, clips_per_step=2, ridge_pairs=8, lr=1e-9)
    stages = ("clebs", "reconstruction", "adversarial")
    one = replace(joined, stages=stages, clebs=clebs, checkpoint_every=1, decay_by_time=True, max_minutes=60.0)
    train(one)
    two = replace(one, run=str(tmp_path / "two"))
    train_in_two_processes(two, tmp_path)
    assert_equal_moments(load_tensors(one), load_tensors(two))
    logs = [[json.loads(s) for s in (Path(c.run) / "stats.jsonl").read_text().splitlines()] for c in (one, two)]
    assert [x["stage"] for x in logs[1]] == ["clebs", "clebs", "reconstruction", "adversarial"]  # by one process
    assert logs[0][0]["contrast"] == pytest.approx(logs[1][0]["contrast"], rel=1e-4)


def train_in_two_processes(config: TrainConfig, tmp_path: Path) -> None:
    save_yaml(config, tmp_path / "two.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "two.yaml")],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors


def test_batch_that_accumulate_does_not_divide_is_refused(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="multiple of accumulate"):
        make_train_config({"batch": 4, "accumulate": 3})


@pytest.mark.parametrize(
    "options",
    [
        {"expression": "lebs", "conditioning": "cross_attention"},
        {"expression": "direct", "source_skip": False, "plane_ema": 0.0, "lowpass": False},
    ],
    ids=["lebs", "direct"],
)
def test_ablations_train_and_sample(tiny: TrainConfig, options: dict[str, object]) -> None:
    config = replace(tiny, model=replace(tiny.model, **options), steps=1, sample_every=1)
    summary = train(config)
    assert summary.finished
    state, found, _ = load_weights(summary.weights)
    assert found == config.model
    Export3D(found).load_state_dict(state)
    assert read_image(Path(config.run) / "samples" / "0000001.png").shape == (4 * 64, 5 * 64, 3)
    moments = [k for k in load_tensors(config) if k.endswith("exp_avg")]
    assert len(moments) == len(list(Export3D(found).parameters()))  # ablations are trained end to end
    assert ("generator.blocks.0.cross.attention.out_proj.weight" in state) == (found.conditioning == "cross_attention")


def test_ablation_options_do_not_change_the_presets() -> None:
    names = set(Export3D(PRESETS["tiny"]).state_dict())
    assert not any("cross" in name or "linear" in name for name in names)
    with pytest.raises(ConfigError, match="clebs, lebs, direct"):
        make_train_config({"model": {"expression": "learned"}})


def test_silhouette_term_gets_the_head_mask_of_the_target(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny, stages=("reconstruction",), steps=1, loss=replace(tiny.loss, silhouette=1.0))
    loss, seen = stages.reconstruction_loss, []

    def noted(*args: Any) -> object:
        seen.append((args[1], args[-1]))
        return loss(*args)

    monkeypatch.setattr(stages, "reconstruction_loss", noted)
    train(config)
    (batch, head), flow = seen[0], Export3D(config.model).flow
    assert flow is not None
    flow.triangles.copy_(torch.from_numpy(load_canonical_face().flow_triangles))
    torch.testing.assert_close(head, flow.head_mask(batch.target_points, batch.target_camera, batch.target_person_mask))
    assert not torch.equal(head, flow.head_mask(batch.source_points, batch.source_camera, batch.source_person_mask))


def test_non_finite_steps_change_nothing(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A skipped step of each stage leaves weights and planes finite."""
    config = replace(
        tiny, stages=("clebs", "reconstruction", "adversarial"), skip_nonfinite=1, steps=2, adversarial=ADVERSARIAL,
        clebs=replace(tiny.clebs, geometry_warmup_steps=0, steps=2, ridge_pairs=8),
    )  # fmt: skip
    for module, name in ((pretrain, "contrastive_loss"), (stages, "reconstruction_loss")):
        original, calls = getattr(module, name), iter(range(100))

        def first_is_nan(*args: Any, original: Any = original, calls: Any = calls) -> object:
            value, terms = original(*args)
            return (value * float("nan") if next(calls) == 0 else value), terms

        monkeypatch.setattr(module, name, first_is_nan)
    fair = adversary.discriminator_loss
    monkeypatch.setattr(adversary, "discriminator_loss", lambda real, fake: fair(real, fake) * float("nan"))
    assert train(config).finished
    assert all(torch.isfinite(v).all() for v in load_tensors(config).values() if v.is_floating_point())
    with pytest.raises(TrainingError, match=r"loss of stage reconstruction is nan at step 0 \(loss nan, l2 "):
        train(
            replace(
                config,
                run=config.run + "-strict",
                stages=("reconstruction",),
                skip_nonfinite=0,
                loss=replace(config.loss, l2=float("nan")),
            )
        )


def test_kill_during_a_save_leaves_a_usable_run(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, stages=("reconstruction",), checkpoint_every=1, keep_checkpoints=3, threads=1)
    save_yaml(config, tmp_path / "config.yaml")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "config.yaml")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = Path(config.run)
    assert list(run.glob(".*.part.safetensors"))  # the unfinished file
    found = load_state(run)
    assert found is not None
    assert found[1]["step"] == 2
    assert train(config).finished
    assert not list(run.glob(".*.part.*"))
    assert sorted(p.name for p in run.glob("state*.safetensors")) == [
        "state.1.safetensors", "state.2.safetensors", "state.safetensors",
    ]  # fmt: skip
    whole = replace(config, run=str(tmp_path / "whole"))
    train(whole)
    a, b = load_tensors(config), load_tensors(whole)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_plan_training_counts_parameters_and_flops() -> None:
    found = plan_training(
        make_train_config({"preset": "tiny", "batch": 4, "stages": ["reconstruction", "adversarial"]})
    )
    model = Export3D(PRESETS["tiny"])
    assert found.total_parameters == sum(p.numel() for p in model.parameters())
    assert found.parameters["generator"] == sum(p.numel() for p in model.generator.parameters())
    assert found.parameters["discriminator"] > 0
    assert found.gflops_frame > 0 and found.gflops_source > 0
    assert 0 < found.activations_mib_a_pair < 200
    assert found.memory_mib == pytest.approx(found.weights_mib + 4 * found.activations_mib_a_pair)


def test_rays_densities_and_losses_stay_fp32_under_bf16(tiny: TrainConfig) -> None:
    model = Export3D(PRESETS["tiny"])
    kinds: dict[str, set[torch.dtype]] = {"ray": set(), "layer": set()}
    whole = model.query_field

    def decode(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        colours, densities = whole(*args)  # type: ignore[arg-type]
        kinds["ray"] |= {x.dtype for x in (*args[2:], colours, densities) if isinstance(x, torch.Tensor)}
        return colours, densities

    model.query_field = decode  # type: ignore[method-assign]
    model.decoder.hidden.register_forward_hook(lambda module, args, out: kinds["layer"].add(out.dtype))
    camera = torch.from_numpy(orbit_camera(0, 0)).float()[None].expand(2, -1)
    beta, image = torch.rand(2, 64), torch.rand(2, 3, 64, 64)
    marks = torch.rand(2, 478, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image, beta, camera, torch.zeros(2, 478, 3), beta, camera)
        batch = Batch(image, beta, camera, beta, image, image, beta, camera, marks, marks, image, image, image, beta)
        loss, _ = stages.reconstruction_loss(output, batch, tiny, None)
    assert kinds["ray"] == {torch.float32}
    assert kinds["layer"] == {torch.bfloat16}  # what is between them is not
    assert {output.depth.dtype, output.opacity.dtype, output.raw.dtype, loss.dtype} == {torch.float32}


def test_planedict_is_trained_alone_on_given_weights(tiny: TrainConfig, tiny_weights: Path, tmp_path: Path) -> None:
    """Its stage trains the codes, the next one the planes; every third step has the disentanglement loss alone."""
    config = replace(
        tiny, init=str(tiny_weights), stages=("planedict", "reconstruction"), trainable=("planedict.",), steps=3,
        model=replace(tiny.model, motion="planedict"), planedict=PlaneDictConfig(steps=2, batch=2),
        loss=replace(tiny.loss, l1=1.0, mask=10.0, perceptual=0.0, disentangle=0.1),
    )  # fmt: skip
    summary = train(config)
    before, after = load_weights(tiny_weights)[0], load_weights(summary.weights)[0]
    own = {name for name in after if not name.startswith("planedict.")}
    assert own == before.keys() and all(torch.allclose(after[k], before[k], atol=1e-3) for k in own)
    lines = [json.loads(line) for line in (Path(config.run) / "stats.jsonl").read_text().splitlines()]
    rendered = [line for line in lines if line["stage"] == "reconstruction"]
    total = sum(rendered[0][key] for key in ("l2", "l2_raw", "l1", "l1_raw", "mask", "disentangle"))
    assert rendered[0]["loss"] == pytest.approx(total, rel=1e-3) != pytest.approx(rendered[0]["disentangle"])
    assert rendered[2]["loss"] == pytest.approx(rendered[2]["disentangle"], rel=1e-3) and "l2" not in rendered[2]
    again = train(replace(config, run=f"{config.run}-again", init=str(summary.weights), stages=("planedict",),
                          loss=replace(config.loss, disentangle=0.0),
                          planedict=PlaneDictConfig(steps=1, batch=2, lr=0.0)))  # fmt: skip
    state, _, record = load_weights(again.weights)
    assert record["planedict_steps"] == 1
    assert all(torch.allclose(state[k], after[k], atol=1e-3) for k in after)
    with pytest.raises(ConfigError, match=r"need model\.motion planedict"):
        make_train_config({"preset": "tiny", "stages": ["planedict"]})
