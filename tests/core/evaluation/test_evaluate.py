"""A tiny, untrained model on a small data set: the baselines' scores are known, the model's only have to be there."""

import csv
import json
import math
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.dataset.preprocess import preprocess
from export3d_cli.core.evaluation.evaluate import EvaluateOptions, evaluate, write_inputs
from export3d_cli.core.evaluation.metrics import METRICS
from export3d_cli.core.evaluation.protocol import (
    Case,
    consecutive_frames,
    cross_cases,
    decode_frames,
    most_frontal_frame,
    read_clips,
    select_frames,
)
from export3d_cli.core.face.canonical_face import load_canonical_face, make_flow_triangles
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image, to_tensor
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.model.checkpoint import save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path, weights_dir
from export3d_cli.core.train.losses import load_perceptual
from export3d_cli.main import cli

FRAMES = 10


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """The example driver as a clip, and the same moving picture as two heads that share their tracks."""
    folder = tmp_path_factory.mktemp("faces")
    preprocess([example_path("drive.mp4")], folder, size=64, max_frames=FRAMES)
    return folder


@pytest.fixture(scope="module")
def heads(data_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    shutil.copytree(data_set / "clips", folder / "clips")
    line = json.loads((data_set / "manifest.jsonl").read_text())
    lines = [
        {**line, "id": f"{head}_t{t:02d}", "person": head}
        for head in ("a", "b") for t in range(2)
    ]  # fmt: skip
    (folder / "manifest.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    model = Export3D(PRESETS["tiny"])
    triangles = make_flow_triangles(load_canonical_face(weights_dir() / "face_landmarker.task"))
    model.flow.triangles.copy_(torch.from_numpy(triangles))
    save_weights(path, model.state_dict(), PRESETS["tiny"], {}, half=False)
    return path


@pytest.fixture(scope="module")
def animator(weights):
    return Animator.from_weights(weights, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def result(animator, data_set, tmp_path_factory):
    return evaluate(animator, data_set, EvaluateOptions(max_frames=6), out=tmp_path_factory.mktemp("out"))


def test_methods_stand_side_by_side(result):
    assert list(result.mean) == ["model", "flow", "repeat"]
    assert result.cases == 1 and result.frames == 6 and len(result.clips) == 3
    assert all(set(METRICS) <= set(row) for row in result.clips)
    repeat, flow, model = (result.mean[name] for name in ("repeat", "flow", "model"))
    assert repeat["lost"] == 0.0 and flow["lost"] == 0.0
    assert 20 < repeat["psnr"] < 100 and 0 < repeat["ssim"] < 1
    assert abs(model["psnr"] - flow["psnr"]) < 3  # an untrained network starts as the flow
    assert repeat["akd478"] > 0 and repeat["aed"] < 0.3
    assert repeat["identity"] is None


def test_rigid_flow_follows_the_head(result):
    """With b_i = 0 the mesh still moves rigidly: closer to the truth than standing still, if the head turns at all."""
    assert result.mean["flow"]["akd478"] <= result.mean["repeat"]["akd478"] + 0.2


def test_tables_and_pictures_are_written(result):
    table, whole, report = result.files[:3]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["model", "flow", "repeat"] and rows[0]["identity"] == ""
    assert json.loads(whole.read_text())["mean"]["flow"]["psnr"] == result.mean["flow"]["psnr"]
    sheets = [read_image(path) for path in result.files[3:]]
    assert [sheet.shape for sheet in sheets] == [(3 * 64, 7 * 64, 3)] * 3 + [(64, 7 * 64, 3)]
    page = report.read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 4 and "http" not in page and "<script" not in page


def test_source_is_the_most_frontal_frame(data_set):
    motion = Motion.load(next(data_set.glob("clips/*.npz")))
    camera = motion.camera.copy()
    camera[:] = Camera.orbit(20.0).to_vector()
    camera[3], camera[5] = Camera.orbit(1.0).to_vector(), Camera.orbit(0.0).to_vector()
    found = np.ones(len(motion), bool)
    found[5] = False
    assert most_frontal_frame(Motion(**{**vars(motion), "camera": camera, "found": found})) == 3


def test_heads_that_share_tracks_have_a_truth(animator, heads):
    """Both heads are one here, so that the flow of another head's track is that of one's own."""
    own = evaluate(animator, heads, EvaluateOptions(max_frames=4))
    crossed = evaluate(animator, heads, EvaluateOptions(max_frames=4, cross=True, pairs=2))
    assert crossed.cases == 2
    assert crossed.mean["flow"]["akd478"] == pytest.approx(own.mean["flow"]["akd478"], rel=0.3)
    assert all(len({part[:1] for part in row["case"].split("-by-")}) == 2 for row in crossed.clips)


def test_two_people_without_a_truth(animator, heads, tmp_path):
    shutil.copytree(heads / "clips", tmp_path / "clips")
    lines = (heads / "manifest.jsonl").read_text().replace("_t0", "_0").splitlines()
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    result = evaluate(animator, tmp_path, EvaluateOptions(max_frames=3, cross=True, pairs=2), out=tmp_path / "out")
    assert result.mean["flow"]["psnr"] is None and result.mean["flow"]["akd478"] is None
    assert result.mean["flow"]["aed"] is not None


def test_intervals_need_more_than_one_clip(animator, data_set, heads, result):
    assert result.interval["flow"]["psnr"] is None
    more = evaluate(animator, heads, EvaluateOptions(max_frames=3, views=False))
    low, high = more.interval["flow"]["psnr"]
    assert low == pytest.approx(high) and low == pytest.approx(more.mean["flow"]["psnr"])  # the clips are copies
    assert more.views == [] and more.mean["model"]["view_lost"] is None


def test_novel_views_are_told_by_angle(result):
    assert [view["yaw"] for view in result.views] == [-30, -20, -10, 0, 10, 20, 30]
    seen = [view for view in result.views if view["view_pose"] is not None]
    assert all(0 <= view["view_pose"] <= 180 for view in seen) and len(seen) == sum(
        view["view_lost"] == 0 for view in result.views
    )
    lost = np.mean([view["view_lost"] for view in result.views])
    assert result.mean["model"]["view_lost"] == pytest.approx(lost) and result.mean["flow"]["view_pose"] is None


def test_finished_videos_are_scored_by_the_same_ruler(animator, data_set, tmp_path):
    """The driver itself as a result is perfect; the rows that count are the right ones."""
    options = EvaluateOptions(max_frames=4, results=(tmp_path / "tool",), model=False)
    clip = read_clips(data_set)[0]
    files = write_inputs(data_set, options, tmp_path / "in", 64)
    assert [file.name for file in files] == [f"{clip.id}-source.png", f"{clip.id}-driver.mp4"]
    assert read_image(files[0]).shape == (64, 64, 3)
    with pytest.raises(InputError, match=f"no result for {clip.id}"):
        evaluate(animator, data_set, options)
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / f"{clip.id}.mp4").write_bytes(files[1].read_bytes())
    result = evaluate(animator, data_set, options, out=tmp_path / "out")
    assert list(result.mean) == ["tool", "repeat"] and result.frames == 4 and result.views == []
    score = result.mean["tool"]
    assert (score["psnr"], score["akd478"], score["apd"], score["gaze_error"]) == pytest.approx(
        (100, 0, 0, 0), abs=1e-6
    )
    assert score["flicker"] == 0 and score["jitter"] == 0 and score["lost"] == 0
    assert result.mean["repeat"]["psnr"] < 60


@pytest.mark.parametrize(
    ("size", "frames", "message"), [((64, 64), 3, "too short"), ((96, 64), 10, "must be square")]
)
def test_results_that_do_not_fit_are_refused(animator, data_set, tmp_path, size, frames, message):
    name = read_clips(data_set)[0].id
    with VideoWriter(tmp_path / f"{name}.mp4", size=size, fps=Fraction(25)) as writer:
        for _ in range(frames):
            writer.write(np.zeros((size[1], size[0], 3), np.uint8))
    with pytest.raises(InputError, match=message):
        evaluate(animator, data_set, EvaluateOptions(results=(tmp_path,), model=False))


def test_rows_are_spread_or_first_and_steadiness_has_neighbours(data_set):
    clip = read_clips(data_set)[0]
    found = np.ones(40, bool)
    found[[4, 20]] = False
    motion = Motion(**{**vars(clip.motion), **{
        key: np.repeat(getattr(clip.motion, key)[:1], 40, axis=0) for key in ("beta", "camera", "landmarks")
    }, "found": found})  # fmt: skip
    clip = replace(clip, motion=motion)
    case = Case(clip, clip, clip)
    assert select_frames(case, 5, "first").tolist() == [1, 2, 3, 5, 6]  # 0 is the source
    assert select_frames(case, 3).tolist() == [1, 21, 39] and len(select_frames(case, None)) == 37
    assert consecutive_frames(case, 4).tolist() == [17, 18, 19]
    assert len(consecutive_frames(case, 50)) == 12 and 20 not in consecutive_frames(case, 50)
    found[:] = np.arange(40) % 3 != 0
    assert len(consecutive_frames(case, 50)) == 0


def test_pairs_are_fixed_by_the_seed(heads):
    clips = read_clips(heads)
    names = [[case.name for case in cross_cases(clips, 4, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


@pytest.fixture
def backbone(tmp_path):
    """A random VGG16 under torchvision's names, narrow: enough for the arithmetic."""
    torch.manual_seed(0)
    state, inside = {}, 3
    for number, out in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64, 64, *[8] * 11), strict=True):
        state[f"features.{number}.weight"] = torch.randn(out, inside, 3, 3) / (9 * inside) ** 0.5
        state[f"features.{number}.bias"], inside = torch.zeros(out), out
    save_file(state, tmp_path / "vgg.safetensors")
    return tmp_path / "vgg.safetensors"


def test_perceptual_distance_is_named_after_its_backbone(animator, data_set, backbone):
    result = evaluate(animator, data_set, EvaluateOptions(max_frames=3, perceptual=backbone, views=False))
    told = result.mean["repeat"]
    assert told["lpips"] is None and told["mobilenetv2"] is None
    clip = read_clips(data_set)[0]
    truth = decode_frames(clip, select_frames(Case(clip, clip, clip), 3), 64)
    photo = to_tensor(decode_frames(clip, np.array([most_frontal_frame(clip.motion)]), 64)[0])
    expected = [float(load_perceptual(backbone)(photo[None], to_tensor(frame)[None], scales=1)) for frame in truth]
    assert told["vgg16"] == pytest.approx(np.mean(expected), rel=1e-4) and min(expected) >= 0
    with pytest.raises(InputError, match="give its VGG16"):
        evaluate(animator, data_set, EvaluateOptions(lpips=backbone))


class _Colours(torch.nn.Module):
    """An `identity` that is the mean colour."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + 1.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_identity_of_the_repeated_source_is_one(animator, data_set, tmp_path):
    torch.jit.script(_Colours()).save(str(tmp_path / "id.pt"))
    result = evaluate(animator, data_set, EvaluateOptions(max_frames=3, identity=str(tmp_path / "id.pt")))
    assert result.mean["repeat"]["identity"] == pytest.approx(1.0, abs=1e-4)


def test_what_cannot_be_used_is_an_input_error(animator, data_set, tmp_path):
    with pytest.raises(InputError, match="is not a data set"):
        evaluate(animator, tmp_path)
    line = json.loads((data_set / "manifest.jsonl").read_text())
    for key, value in (("id", "../x"), ("id", "a/b"), ("file", "/etc/passwd"), ("motion", "../m.npz"), ("file", 3)):
        (tmp_path / "manifest.jsonl").write_text(json.dumps({**line, key: value}))
        with pytest.raises(InputError, match="is not a data set"):
            evaluate(animator, tmp_path)
    with pytest.raises(InputError, match="no pair of two people"):
        evaluate(animator, data_set, EvaluateOptions(cross=True))
    (tmp_path / "id.pt").write_bytes(b"no network")
    with pytest.raises(InputError, match="not a TorchScript face embedder"):
        evaluate(animator, data_set, EvaluateOptions(identity=str(tmp_path / "id.pt")))


def test_command(weights, data_set, tmp_path):
    args = ["evaluate", str(data_set), "--weights", str(weights), "--max-frames", "3", "--device", "cpu"]
    done = CliRunner().invoke(cli, [*args, "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["mean"]["repeat"]["lost"] == 0.0 and not math.isnan(told["mean"]["flow"]["psnr"])
    assert Path(told["files"][0]).is_file()
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0 and "repeat" in done.stderr and "akd478" in done.stderr
    assert CliRunner().invoke(cli, ["evaluate", str(tmp_path), "--weights", str(weights)]).exit_code == 2
    assert CliRunner().invoke(cli, [*args, "--pairs", "0"]).exit_code == 2
    assert CliRunner().invoke(cli, [*args, "--no-model"]).exit_code == 2
    assert CliRunner().invoke(cli, [*args, "--identity", "nobody"]).exit_code == 2
    done = CliRunner().invoke(cli, [*args, "--write-inputs", str(tmp_path / "in")])
    assert done.exit_code == 0 and len(list((tmp_path / "in").iterdir())) == 2
