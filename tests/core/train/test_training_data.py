"""Draws of pairs and groups: reproducible by (seed, step), from one clip, mirrored consistently; the frame cache."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.config.schema import DataConfig
from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.runtime.camera import yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError, TrainingError
from export3d_cli.core.runtime.files import driver_track_id
from export3d_cli.core.train.training_data import PairSampler, apply_color_lut, load_dataset, load_datasets, prefetch

from .conftest import FRAMES, SIZE


@pytest.fixture
def sampler(data_set: Path) -> PairSampler:
    config = DataConfig(path=(str(data_set),), jitter=0.0, flip=False, still_image_ratio=0.0)
    return PairSampler(load_datasets(config, SIZE), config)


def test_cache_holds_the_frames_with_a_face_and_is_built_once(data_set: Path) -> None:
    faces = load_dataset(data_set, SIZE)
    assert len(faces.frames) == 4 * (FRAMES - 1) + 1
    assert 3 not in faces.frame_index[faces.clips[0].start : faces.clips[0].start + faces.clips[0].count]
    levels = faces.frames[:11, 32, 32, 0].astype(int)  # frame t of the first clip is uniform, 20 t
    assert np.abs(levels - 20 * faces.frame_index[:11]).max() <= 4
    assert faces.clips[4].still
    assert faces.person_mask.shape == (len(faces.frames), 64, 64)
    assert faces.person_mask.max() < 25  # uniform images show no person
    built = (data_set / f"cache-{SIZE}" / "frames.npy").stat().st_mtime_ns
    load_dataset(data_set, SIZE)
    assert (data_set / f"cache-{SIZE}" / "frames.npy").stat().st_mtime_ns == built
    assert not list(data_set.glob("*.tmp"))


def test_stale_or_old_cache_is_built_again(data_set: Path, tmp_path: Path) -> None:
    assert len(load_dataset(data_set, SIZE, 2, str(tmp_path)).frames) == 4 * 6 + 1
    cache = next(tmp_path.iterdir())
    (cache / "index.json").write_text("{}")
    assert len(load_dataset(data_set, SIZE, 2, str(tmp_path)).frames) == 4 * 6 + 1


def test_damaged_cache_is_refused(data_set: Path, tmp_path: Path) -> None:
    load_dataset(data_set, SIZE, 1, str(tmp_path))
    (cache,) = tmp_path.iterdir()
    count = 4 * (FRAMES - 1) + 1
    for name, array in {
        "beta": np.zeros((3, 64), np.float32), "camera": np.full((count, 25), np.nan, np.float32),
        "landmarks": np.zeros((count, 478, 3), np.uint8), "frames": np.zeros((2, SIZE, SIZE, 3), np.uint8),
        "person": np.zeros((count, 64, 64), np.float32),
    }.items():  # fmt: skip
        before = (cache / f"{name}.npy").read_bytes()
        np.save(cache / f"{name}.npy", array)
        with pytest.raises(InputError, match=rf"damaged .*{name}.*remove it"):
            load_dataset(data_set, SIZE, 1, str(tmp_path))
        (cache / f"{name}.npy").write_bytes(before)
    index = cache / "index.json"
    index.write_text(index.read_text().replace('"start": 0', '"start": 4000'))
    with pytest.raises(InputError, match="outside the frames"):
        load_dataset(data_set, SIZE, 1, str(tmp_path))


def test_missing_manifest_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.jsonl"):
        load_dataset(tmp_path, SIZE)


def test_draw_pairs_repeats_and_differs_by_step(sampler: PairSampler) -> None:
    a, b, c = sampler.draw_pairs(0, 5, 4), sampler.draw_pairs(0, 5, 4), sampler.draw_pairs(0, 6, 4)
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a.target_beta, c.target_beta)
    assert a.source.shape == (4, 3, SIZE, SIZE)
    assert a.source_points.shape == (4, 478, 3)


def test_draw_person_betas_uses_all_clips_of_a_person(sampler: PairSampler) -> None:
    beta = sampler.draw_person_betas(0, 1, 6, 40)
    assert beta.shape == (6, 40, 64)
    assert torch.equal(beta, sampler.draw_person_betas(0, 1, 6, 40))
    data = sampler.datasets[0]
    person_frames = [
        {data.beta[r].tobytes() for c in clips for r in range(c.start, c.start + c.count)}
        for clips in sampler.video_clips_by_person[0].values()
    ]
    assert all(any({row.tobytes() for row in rows.numpy()} <= frames for frames in person_frames) for rows in beta)


def test_draw_landmark_pairs_mirrors_the_head(sampler: PairSampler) -> None:
    flipping = PairSampler(sampler.datasets, replace(sampler.config, flip=True))
    straight = sampler.draw_landmark_pairs(0, 1, 40)
    flipped = flipping.draw_landmark_pairs(0, 1, 40)
    for beta, points in ((straight[0], straight[2]), (flipped[0], flipped[2])):
        assert torch.isfinite(points).all()
        assert torch.isfinite(beta).all()
        # the person's left eye stays at the image's right, in the mirror too
        assert (points[:, 263, 0] > points[:, 33, 0]).all()


def test_draw_pairs_mirrors_the_whole_scene(sampler: PairSampler) -> None:
    ramp = np.tile(np.arange(SIZE, dtype=np.uint8)[:, None], (SIZE, 1, 3))
    mask = np.broadcast_to(np.arange(64, dtype=np.uint8), sampler.datasets[0].person_mask.shape)
    frames = np.broadcast_to(ramp, sampler.datasets[0].frames.shape)
    dataset = replace(sampler.datasets[0], frames=frames, person_mask=mask)
    straight = PairSampler([dataset], sampler.config)
    flipping = PairSampler([dataset], replace(sampler.config, flip=True))
    step = next(
        s
        for s in range(50)
        if flipping.draw_pairs(0, s, 1).source[0, 0, 0, 0] > straight.draw_pairs(0, s, 1).source[0, 0, 0, 0]
    )
    a, b = straight.draw_pairs(0, step, 1), flipping.draw_pairs(0, step, 1)
    assert torch.equal(b.source, a.source.flip(3)) and torch.equal(b.target, a.target.flip(3))
    assert torch.equal(b.source_person_mask, a.source_person_mask.flip(3)) and a.source_person_mask[0, 0, 0, 51] == 0.2
    assert torch.equal(b.target_person_mask, a.target_person_mask.flip(3))
    for batch in (a, b):
        marks, _ = project(batch.target_points, batch.target_camera)
        torch.testing.assert_close(marks, batch.target_landmarks, atol=1e-4, rtol=0)
    left, right = BETA_NAMES.index("mouthSmileLeft"), BETA_NAMES.index("mouthSmileRight")
    for before, after in ((a.source_beta, b.source_beta), (a.target_beta, b.target_beta)):
        assert after[0, left] == before[0, right] != before[0, left] == after[0, right]
        assert after[0, BETA_NAMES.index("jawOpen")] == before[0, BETA_NAMES.index("jawOpen")]
    # the mirrored camera sees the mirrored head at the mirrored landmarks
    mirrored, _ = project(b.source_points, b.source_camera)
    original, _ = project(a.source_points, a.source_camera)
    torch.testing.assert_close(mirrored[0, load_canonical_face().mirror, 0], 1 - original[0, :, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(mirrored[0, load_canonical_face().mirror, 1], original[0, :, 1], atol=1e-4, rtol=0)
    target = yaw_pitch_roll(b.target_camera[0].numpy())
    assert target[0] == pytest.approx(-yaw_pitch_roll(a.target_camera[0].numpy())[0], abs=1e-3)
    assert target[1] == pytest.approx(yaw_pitch_roll(a.target_camera[0].numpy())[1], abs=1e-3)


def test_draw_clip_draws_people_then_clips_equally_often(sampler: PairSampler) -> None:
    data = sampler.datasets[0]
    # one clip of person a becomes a third person's
    clips = tuple(replace(c, person="third") if c.id == "a_t01" else c for c in data.clips)
    three = PairSampler([replace(data, clips=clips)], sampler.config)
    rng = np.random.default_rng(0)
    clips_drawn = [three._draw_clip(rng, three.video_clips_by_person)[1] for _ in range(3000)]
    people = [sum(c.person == p for c in clips_drawn) / 3000 for p in ("a", "b", "third")]
    assert people == pytest.approx([1 / 3] * 3, abs=0.03)
    assert sum(c.id == "b_t00" for c in clips_drawn) / 3000 == pytest.approx(1 / 6, abs=0.03)
    stills = PairSampler([data], replace(sampler.config, still_image_ratio=0.5))
    is_still = [stills._draw_clip(rng, stills.clips_by_person)[1].person == "c" for _ in range(3000)]
    assert np.mean(is_still) == pytest.approx(0.5 / 2.5, abs=0.03)


def test_draw_clip_draws_datasets_by_weight(sampler: PairSampler) -> None:
    other = replace(sampler.datasets[0])
    weighted = PairSampler([sampler.datasets[0], other], replace(sampler.config, weight=(3.0, 1.0)))
    rng = np.random.default_rng(0)
    fraction = np.mean([weighted._draw_clip(rng, weighted.video_clips_by_person)[0] is other for _ in range(2000)])
    assert fraction == pytest.approx(0.25, abs=0.03)


def test_cached_frames_are_memory_mapped_and_recoloured_by_the_table(sampler: PairSampler) -> None:
    frames = sampler.datasets[0].frames
    base = frames
    while not isinstance(base, np.memmap) and base is not None:
        base = base.base
    assert isinstance(base, np.memmap)  # no copy in memory
    rng = np.random.default_rng(0)
    lut, images = rng.normal(size=(256, 3)).astype(np.float32), rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    recoloured = apply_color_lut(images[:, :, ::-1], lut)
    assert np.array_equal(recoloured, np.stack([lut[images[:, :, ::-1, c], c] for c in range(3)], axis=1))


def test_hard_pair_ratio_prefers_different_drivers(sampler: PairSampler) -> None:
    data, config = sampler.datasets[0], sampler.config

    def mean_difference(ratio: float) -> float:
        s = PairSampler(sampler.datasets, replace(config, hard_pair_ratio=ratio))
        rng = np.random.default_rng(0)
        pairs = [(5, s._draw_driver(rng, data, data.clips[0], 5)) for _ in range(100)]
        assert all(k != j for k, j in pairs)
        return float(np.mean([s.pose_expression_distance(data, k, np.array([j]))[0] for k, j in pairs]))

    assert mean_difference(1.0) > 1.2 * mean_difference(0.0)


def test_wide_view_pairs_have_different_views(sampler: PairSampler) -> None:
    axes = sampler.datasets[0].camera[:, 2:11:4]

    def mean_angle(pairs: list[tuple[int, int]]) -> float:
        return float(np.degrees(np.mean([np.arccos(min(axes[k] @ axes[j], 1.0)) for k, j in pairs])))

    rng, wide_pairs = np.random.default_rng(0), []
    for _ in range(50):
        data, source, target = sampler._draw_wide_view_pair(rng)
        assert any(c.start <= min(source, target) < max(source, target) < c.start + c.count for c in data.clips)
        wide_pairs.append((source, target))
    clip = sampler.datasets[0].clips[0]
    random_pairs = [(clip.start, clip.start + int(rng.integers(1, clip.count))) for _ in range(50)]
    assert mean_angle(wide_pairs) > 1.2 * mean_angle(random_pairs)
    wide_only = PairSampler(
        sampler.datasets, replace(sampler.config, wide_view_ratio=1.0, cross_identity_ratio=0.0, flip=False)
    )
    batch = wide_only.draw_pairs(0, 0, 20)
    directions = batch.source_camera[:, 2:11:4], batch.target_camera[:, 2:11:4]
    assert float(torch.rad2deg(torch.arccos((directions[0] * directions[1]).sum(-1))).mean()) > 1.2 * mean_angle(
        random_pairs
    )


def test_cross_identity_pairs_take_the_expression_of_another_head(sampler: PairSampler) -> None:
    data = sampler.datasets[0]
    for i in range(20):
        pair = sampler._draw_cross_identity_pair(np.random.default_rng(i))
        assert pair is not None
        _, source, target, driver = pair
        clip = {row: c for c in data.clips for row in range(c.start, c.start + c.count)}
        assert clip[source].person == clip[target].person != clip[driver].person
        assert driver_track_id(clip[driver].id) == driver_track_id(clip[target].id) != ""
        assert data.frame_index[driver] == data.frame_index[target]


def test_draw_clip_group_needs_long_clips(sampler: PairSampler) -> None:
    images, beta = sampler.draw_clip_group(0, 0, 33, 32)
    assert images.shape == (FRAMES - 1, 3, 32, 32)
    assert beta.shape == (FRAMES - 1, 64)
    with pytest.raises(TrainingError, match="longer clips"):
        sampler.draw_clip_group(0, 0, 33, 32, min_frames=50)


def test_prefetch_keeps_order_and_raises_errors() -> None:
    def make(step: int) -> int:
        if step == 3:
            raise ValueError("broken")
        return step

    for workers in (1, 4):
        batches = prefetch(make, range(10), workers)
        assert [next(batches) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="broken"):
            next(batches)
    slow = threading.Event()
    batches = prefetch(lambda step: slow.wait(5) if step == 0 else step, range(4), 2)
    slow.set()
    assert list(batches) == [True, 1, 2, 3]
