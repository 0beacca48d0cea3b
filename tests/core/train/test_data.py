"""What is drawn: the same for the same (seed, step), of one clip, mirrored as one, and lost tracks left out."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.config import DataConfig
from export3d_cli.core.errors import InputError, TrainingError
from export3d_cli.core.face.mesh import canonical_face
from export3d_cli.core.train.cache import load_set, load_sets
from export3d_cli.core.train.data import Prefetcher, Sampler

from .conftest import BUNDLE, FRAMES, SIZE


@pytest.fixture
def sampler(data_set: Path) -> Sampler:
    config = DataConfig(path=(str(data_set),), jitter=0.0, flip=False, stills=0.0)
    return Sampler(load_sets(config, SIZE), config, canonical_face(BUNDLE).mirror)


def test_cache_holds_the_frames_with_a_face_and_is_made_once(data_set: Path) -> None:
    faces = load_set(data_set, SIZE)
    assert len(faces.frames) == 4 * (FRAMES - 1) + 1
    assert 3 not in faces.number[faces.clips[0].start : faces.clips[0].start + faces.clips[0].count]
    levels = faces.frames[:11, 32, 32, 0].astype(int)  # frame t of the first clip is a field of 20 t
    assert np.abs(levels - 20 * faces.number[:11]).max() <= 4
    assert faces.clips[4].still
    assert faces.clips[0].track == "t00"
    assert faces.clips[4].track == ""
    before = (data_set / f"cache-{SIZE}" / "frames.npy").stat().st_mtime_ns
    load_set(data_set, SIZE)
    assert (data_set / f"cache-{SIZE}" / "frames.npy").stat().st_mtime_ns == before
    assert not list(data_set.glob("*.tmp"))


def test_cache_is_made_again_when_the_data_set_changed(data_set: Path, tmp_path: Path) -> None:
    assert len(load_set(data_set, SIZE, 2, str(tmp_path)).frames) == 4 * 6 + 1
    place = next(tmp_path.iterdir())
    (place / "index.json").write_text("{}")
    assert len(load_set(data_set, SIZE, 2, str(tmp_path)).frames) == 4 * 6 + 1


def test_unreadable_list_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.jsonl"):
        load_set(tmp_path, SIZE)


def test_batches_repeat_and_differ_by_step(sampler: Sampler) -> None:
    a, b, c = sampler.batch(0, 5, 4), sampler.batch(0, 5, 4), sampler.batch(0, 6, 4)
    assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    assert not torch.equal(a.target_beta, c.target_beta)
    assert a.source.shape == (4, 3, SIZE, SIZE)
    assert a.source_points.shape == (4, 478, 3)


def test_mirrored_points_are_the_mirrored_head(sampler: Sampler) -> None:
    always = Sampler(sampler.sets, replace(sampler.config, flip=True), sampler.mirror)
    straight = sampler.geometry(0, 1, 40)
    flipped = always.geometry(0, 1, 40)
    for beta, points in ((straight[0], straight[2]), (flipped[0], flipped[2])):
        assert torch.isfinite(points).all()
        assert torch.isfinite(beta).all()
        # the person's left eye stays at the image's right, in the mirror too
        assert (points[:, 263, 0] > points[:, 33, 0]).all()


def test_different_drivers_are_preferred(sampler: Sampler) -> None:
    data, config = sampler.sets[0], sampler.config

    def mean_difference(spread: float) -> float:
        s = Sampler(sampler.sets, replace(config, spread=spread), sampler.mirror)
        rng = np.random.default_rng(0)
        drawn = [(5, s._driver(rng, data, data.clips[0], 5)) for _ in range(100)]
        assert all(k != j for k, j in drawn)
        return float(np.mean([s.difference(data, k, np.array([j]))[0] for k, j in drawn]))

    assert mean_difference(1.0) > 1.2 * mean_difference(0.0)


def test_crossed_pairs_take_the_expression_of_the_other_head(sampler: Sampler) -> None:
    data = sampler.sets[0]
    for i in range(20):
        crossed = sampler._crossed(np.random.default_rng(i))
        assert crossed is not None
        _, source, target, beta = crossed
        clip = {row: c for c in data.clips for row in range(c.start, c.start + c.count)}
        driver = int(np.flatnonzero((data.beta == beta).all(1))[0])
        assert clip[source].person == clip[target].person != clip[driver].person
        assert clip[driver].track == clip[target].track
        assert data.number[driver] == data.number[target]


def test_groups_need_long_clips(sampler: Sampler) -> None:
    images, beta = sampler.group(0, 0, 33, 32)
    assert images.shape == (FRAMES - 1, 3, 32, 32)
    assert beta.shape == (FRAMES - 1, 64)
    with pytest.raises(TrainingError, match="longer clips"):
        sampler.group(0, 0, 33, 32, least=50)


def test_prefetcher_keeps_order_and_passes_errors_on() -> None:
    def make(step: int) -> int:
        if step == 3:
            raise ValueError("broken")
        return step

    with Prefetcher(make, 0, 10) as ahead:
        assert [ahead.next() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="broken"):
            ahead.next()
