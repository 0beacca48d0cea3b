"""The stage `sampler`: an exemplar's own code gives its picture; ages; unusable data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.config.schema import SamplerConfig, TrainConfig
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.model.checkpoint import load_weights
from export3d_cli.core.model.head_sampler import HeadSampler, SampledFace, warp_grid
from export3d_cli.core.runtime.camera import orbit_camera, project_points
from export3d_cli.core.runtime.errors import ConfigError, InputError, TrainingError, WeightsError
from export3d_cli.core.train import trainer
from export3d_cli.core.train.training_data import Clip, FaceDataset
from export3d_cli.core.train.training_plan import plan_training

SIDE, HEADS = 64, 24
CONFIG = SamplerConfig(shapes=3, textures=3, held_out=0)


def make_heads(turn: float = 0.0) -> FaceDataset:
    """Heads that differ in width and in the brightness of the cheeks, one frame each."""
    rng = np.random.default_rng(0)
    frames, landmarks, camera = [], [], np.stack([orbit_camera(turn)] * HEADS)
    gradient = np.linspace(40, 200, SIDE)[None, :, None] * np.array([1.0, 0.8, 0.6])
    for _ in range(HEADS):
        points = load_canonical_face().points * [rng.uniform(0.9, 1.1), 1, 1]
        points[14] = points[13]  # shut lips
        uv = project_points(camera[0], points)
        landmarks.append(np.column_stack([uv, np.zeros(len(uv))]))
        cheek = cv2.GaussianBlur(rng.uniform(-60, 60, (8, 8)), (0, 0), 1.5)
        frames.append((gradient + cv2.resize(cheek, (SIDE, SIDE))[..., None]).clip(0, 255).astype(np.uint8))
    empty = np.zeros((HEADS, SIDE, SIDE))
    return FaceDataset(
        np.broadcast_to(np.stack(frames), (HEADS, SIDE, SIDE, 3)), np.zeros((HEADS, 64), np.float32),
        camera.astype(np.float32), np.stack(landmarks).astype(np.float32), empty.astype(np.uint8),
        empty.astype(np.float16), np.arange(HEADS, dtype=np.int32),
        tuple(Clip(f"p{k}", f"p{k}", k, 1, True) for k in range(HEADS)),
    )  # fmt: skip


def fit(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, data: FaceDataset, config: SamplerConfig = CONFIG) -> Path:
    monkeypatch.setattr(trainer, "load_datasets", lambda *arguments, **options: [data])
    return trainer.train(replace(tiny, stages=("sampler",), sampler=config)).weights


def test_the_code_of_an_exemplar_gives_its_picture(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_heads()
    path = fit(tiny, monkeypatch, data)
    sampler = HeadSampler.load(path)
    arrays = sampler.arrays
    assert sampler.size == (SIDE, SIDE)
    for e in (0, HEADS - 1):
        face = SampledFace(e, arrays["shape"][e], arrays["texture"][e], False, 0.0)
        error = np.abs(sampler.render(face).astype(float) - data.frames[e])[4:-4, 4:-4]
        assert error.mean() < 3  # JPEG
        mirrored = sampler.render(replace(face, mirrored=True))
        np.testing.assert_array_equal(mirrored[:, ::-1], sampler.render(face))
    with pytest.raises(WeightsError, match="holds no export3d weights: format is 'export3d-sampler-1'"):
        load_weights(path)
    with pytest.raises(InputError, match="give no --age, these weights know no ages"):
        sampler.draw(0, age=(20, 30))


def test_another_code_of_texture_changes_the_face_towards_it(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_heads()
    sampler = HeadSampler.load(fit(tiny, monkeypatch, data, replace(CONFIG, textures=HEADS - 1)))
    arrays = sampler.arrays
    face = SampledFace(0, arrays["shape"][1], arrays["texture"][1], False, 0.0)
    inside = np.s_[30:44, 26:38]  # between brows and chin
    error = np.abs(sampler.render(face).astype(float) - data.frames[1])[inside].mean()
    before = np.abs(data.frames[0].astype(float) - data.frames[1])[inside].mean()
    assert error < before / 2


def test_sampled_ages_lie_in_the_range(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_heads()
    width = np.ptp(data.landmarks[..., 0], axis=1)
    years = 50 + 200 * (width - width.mean()) / width.mean()
    table = tmp_path / "ages.csv"
    rows = [f"p{k},{age:.2f},{int(k < 20)}" for k, age in enumerate(years)]
    table.write_text("\n".join(["person,age,shown", *rows]))
    sampler = HeadSampler.load(fit(tiny, monkeypatch, data, replace(CONFIG, attributes=str(table))))
    assert len(sampler.arrays["years"]) == 20  # others may not be shown
    low, high = sampler.ages
    face = sampler.draw(3, age=(high - 5, high))
    predicted = sampler.arrays["age"][1] + np.concatenate([face.shape, face.texture]) @ sampler.arrays["age"][3:]
    assert high - 5.1 <= predicted <= high + 0.1
    with pytest.raises(InputError, match=f"age 0:20 cannot be sampled: give {low:.0f}:{high:.0f} or a part of it"):
        sampler.draw(3, age=(0, 20))


def test_data_without_frontal_heads_and_bad_tables_are_refused(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="2 heads must be seen from the front"):
        fit(tiny, monkeypatch, make_heads(turn=40))
    (tmp_path / "x.csv").write_text("person\np0\n")
    with pytest.raises(InputError, match="must be a CSV with person, age and shown"):
        fit(tiny, monkeypatch, make_heads(), replace(CONFIG, attributes=str(tmp_path / "x.csv")))


def test_warp_grid_moves_landmarks_onto_each_other() -> None:
    points = project_points(orbit_camera(0), load_canonical_face().points) * 256
    moved = points * [1.1, 0.95] + 3 * np.sin(points[:, ::-1] / 40)
    grid = warp_grid(moved, points, 256)
    at = grid[moved[:, 1].round().astype(int), moved[:, 0].round().astype(int)]
    assert np.median(np.linalg.norm(at - points, axis=1)) < 1.0


def test_the_stage_is_alone_in_its_run() -> None:
    assert plan_training(make_train_config({"stages": ["sampler"]})).total_parameters == 0
    with pytest.raises(ConfigError, match="the stage sampler must be the only one of its run"):
        make_train_config({"stages": ["reconstruction", "sampler"]})
