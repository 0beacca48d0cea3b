"""Rendered heads with exact views: which are held out, their labels, their depth in the crop, a data set of them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.config.schema import DataConfig
from export3d_cli.core.dataset.exact_views import CLOTHES, SKIN, HeadLabels, crop_depth, read_labels, split_heads
from export3d_cli.core.dataset.preprocess import preprocess
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.camera import FOCAL, head_pose, orbit_camera, project_points
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.core.train.training_data import PairSampler, load_dataset

COUNT = 12  # heads in `folder`


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Heads of three pictures; only the first head's are there: frames of the example driver, with a flat face."""
    for name in ("clips", "labels", "depth"):
        (tmp_path / "views" / name).mkdir(parents=True)
    with VideoReader(example_path("drive.mp4"), size=(256, 256)) as reader:
        frames = [frame for _, frame in zip(range(3), reader, strict=False)]
    with VideoWriter(tmp_path / "views/clips/h00.mp4", size=(256, 256), fps=reader.info.fps) as writer:
        for frame in frames:
            writer.write(frame)
    labels = {
        "expression": np.zeros(3, int),
        "head_rot_deg": np.zeros((3, 3)),
        "intrinsics": np.diag([FOCAL, FOCAL, 1]),
    }
    classes = np.zeros((3, 64, 64), np.uint8)
    classes[:, 16:44, 20:44], classes[:, 44:] = SKIN, CLOTHES
    for number in range(COUNT):
        np.savez(tmp_path / f"views/labels/h{number:02d}.npz", **labels)
        depth = np.full((3, 64, 64), 1.5, np.float16)
        np.savez(tmp_path / f"views/depth/h{number:02d}.npz", depth=depth, classes=classes)
    return tmp_path / "views"


def test_the_last_eleventh_of_the_heads_is_held_out(folder: Path, tmp_path: Path) -> None:
    names = [f"h{number:02d}" for number in range(COUNT)]
    assert split_heads(folder) == (names[:10], names[10:])
    (tmp_path / "depth").mkdir()
    with pytest.raises(InputError, match=r"no \.npz file"):
        split_heads(tmp_path)


@pytest.mark.parametrize("name", ["labels", "depth"])
def test_damaged_labels_are_refused(folder: Path, name: str) -> None:
    np.savez(folder / name / "h00.npz", expression=np.zeros(2), depth=np.zeros((2, 4, 4)), classes=np.zeros((3, 4, 4)))
    with pytest.raises(InputError, match="no exact views of h00"):
        read_labels(folder, "h00")


def test_crop_depth_lies_on_the_landmarks_in_head_frame_units() -> None:
    """The truth sees the landmarks' plane at another scale; a crop of half the picture shows its middle."""
    camera, face = orbit_camera(5, 3), load_canonical_face().points
    rotation, centre = head_pose(camera)
    distance = (face @ rotation.T + centre)[:, 2]
    marks = np.column_stack([project_points(camera, face), (distance - 2.7) * FOCAL / 2.7]).astype(np.float32)
    arrays = (np.zeros((2, 64), np.float32), np.stack([camera] * 2), np.stack([marks] * 2), np.ones(2, bool))
    motion = Motion(*arrays, Fraction(25), (16.0, 16.0, 32.0), (64, 64))
    y, x = np.mgrid[:64, :64] / 64
    slope = 0.2 * (x + y - 1)  # metres of depth across the picture
    classes = np.where(y < 0.7, SKIN, CLOTHES)[None].repeat(2, 0)
    classes[..., :20] = 0
    depth = (1.5 + slope)[None].repeat(2, 0).astype(np.float32)
    labels = HeadLabels(np.zeros(2), np.zeros((2, 3)), 5.0, depth, classes)
    depth, person = crop_depth(labels, motion)
    assert depth.dtype == np.float16 and depth.shape == person.shape == (2, 64, 64)
    assert not depth[..., :8].any() and not person[..., :8].any()  # background, left of cell 20 of the picture
    assert not depth[:, 58:, 8:].any() and person[:, 58:, 8:].all()  # clothes
    # 1 metre is as many units as make a pixel of the picture as wide at both distances
    own = float(np.median(depth[0, 20:40, 20:44].astype(np.float32)))
    units = (own / FOCAL) * 2 / (1.5 / 5.0)  # the crop's focal length counts half the picture
    rise = np.diff(depth[0, 30, [16, 56]].astype(np.float32))[0]
    assert rise == pytest.approx(0.2 * 40 / 128 * units, rel=0.05)
    middle = float(np.linalg.norm(motion.camera[0, [3, 7, 11]]))
    assert own == pytest.approx(middle - 0.1, abs=0.1)  # the face, before the head's centre


def test_preprocess_makes_a_data_set_with_depth_for_training(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    summary = preprocess([folder], out, size=64, shard=(1, 10))
    assert (summary.clips, summary.frames) == (1, 3)
    (row,) = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    assert row["depth"] == "clips/clips-h00.depth.npz" and row["frames"] == 3
    data = load_dataset(out, 64)
    head = data.depth > 0
    assert head[:, 32, 32].all() and np.ptp(data.depth[0][head[0]].astype(np.float32)) < 0.01  # a flat face
    assert (data.person_mask[:, -1, 32] == 255).all() and not head[:, -1].any()  # clothes
    config = DataConfig(path=(str(out),), jitter=0.0)
    sampler = PairSampler([data], config)
    for step in range(8):  # mirrored with the picture or not
        batch = sampler.draw_pairs(0, step, 1)
        truth = [data.depth[row][:, ::-1] if flip else data.depth[row] for row in range(3) for flip in (0, 1)]
        errors = [np.abs(batch.target_depth[0, 0].numpy() - depth).max() for depth in truth]
        assert min(errors) == 0
        person = data.person_mask[int(np.argmin(errors)) // 2] / np.float32(255)
        flipped = person[:, ::-1] if int(np.argmin(errors)) % 2 else person
        assert np.array_equal(batch.target_person_mask[0, 0].numpy(), flipped)
    (out / row["depth"]).write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"depth\.npz is damaged"):
        load_dataset(out, 64, cache=str(tmp_path / "cache"))


def test_pictures_that_do_not_fit_their_depth_are_refused(folder: Path, tmp_path: Path) -> None:
    labels = np.load(folder / "labels/h00.npz")
    np.savez(folder / "labels/h00.npz", **{**labels, "expression": np.zeros(2), "head_rot_deg": np.zeros((2, 3))})
    np.savez(folder / "depth/h00.npz", depth=np.ones((2, 8, 8)), classes=np.ones((2, 8, 8), np.uint8))
    summary = preprocess([folder], tmp_path / "data", size=64, shard=(1, 10))
    assert summary.clips == 0 and "must have 2 square pictures like its depth, got 3" in summary.rejected[0]
