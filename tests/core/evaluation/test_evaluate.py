"""Evaluation of a tiny, untrained model: the baselines' scores are checked, the model's only need to exist."""

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
from export3d_cli.core.evaluation.evaluate import EvaluateOptions, evaluate, render_methods, write_inputs
from export3d_cli.core.evaluation.metrics import METRICS
from export3d_cli.core.evaluation.protocol import (
    Case,
    consecutive_frames,
    cross_cases,
    decode_frames,
    load_source_image,
    most_frontal_frame,
    read_clips,
    select_frames,
)
from export3d_cli.core.face.canonical_face import load_canonical_face, make_flow_triangles
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.smoothing import smooth_motion
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
    """Return a data set with the example driver as its one clip."""
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


def test_evaluate_scores_model_and_baselines(result):
    assert list(result.mean) == ["model", "flow", "repeat"]
    assert result.cases == 1 and result.frames == 6 and len(result.clips) == 3
    assert all(set(METRICS) <= set(row) for row in result.clips)
    repeat, flow, model = (result.mean[name] for name in ("repeat", "flow", "model"))
    assert repeat["lost"] == 0.0 and flow["lost"] == 0.0
    assert 20 < repeat["psnr"] < 100 and 0 < repeat["ssim"] < 1
    assert abs(model["psnr"] - flow["psnr"]) < 3  # an untrained network starts as the flow
    assert repeat["akd478"] > 0 and repeat["aed"] < 0.3
    assert repeat["identity"] is None


def test_flow_baseline_without_expression_follows_the_head(result):
    """With b_i = 0 the mesh still moves rigidly, so it is closer to the truth than the unchanged source."""
    assert result.mean["flow"]["akd478"] <= result.mean["repeat"]["akd478"] + 0.2


def test_write_report_writes_tables_and_pictures(result):
    table, whole, report = result.files[:3]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["model", "flow", "repeat"] and rows[0]["identity"] == ""
    assert json.loads(whole.read_text())["mean"]["flow"]["psnr"] == result.mean["flow"]["psnr"]
    sheets = [read_image(path) for path in result.files[3:]]
    assert [sheet.shape for sheet in sheets] == [(3 * 64, 7 * 64, 3)] * 3 + [(64, 7 * 64, 3)]
    page = report.read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 4 and "http" not in page and "<script" not in page


def test_most_frontal_frame_ignores_untracked_frames(data_set):
    motion = Motion.load(next(data_set.glob("clips/*.npz")))
    camera = motion.camera.copy()
    camera[:] = Camera.orbit(20.0).to_vector()
    camera[3], camera[5] = Camera.orbit(1.0).to_vector(), Camera.orbit(0.0).to_vector()
    found = np.ones(len(motion), bool)
    found[5] = False
    assert most_frontal_frame(Motion(**{**vars(motion), "camera": camera, "found": found})) == 3


def test_cross_with_shared_tracks_has_a_ground_truth(animator, heads):
    """Both heads are copies here, so the flow of the other head's track is that of its own."""
    own = evaluate(animator, heads, EvaluateOptions(max_frames=4))
    crossed = evaluate(animator, heads, EvaluateOptions(max_frames=4, cross=True, pairs=2))
    assert crossed.cases == 2
    assert crossed.mean["flow"]["akd478"] == pytest.approx(own.mean["flow"]["akd478"], rel=0.3)
    assert all(len({part[:1] for part in row["case"].split("-by-")}) == 2 for row in crossed.clips)


def test_cross_without_shared_tracks_has_no_ground_truth(animator, heads, tmp_path):
    shutil.copytree(heads / "clips", tmp_path / "clips")
    lines = (heads / "manifest.jsonl").read_text().replace("_t0", "_0").splitlines()
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    result = evaluate(animator, tmp_path, EvaluateOptions(max_frames=3, cross=True, pairs=2), out=tmp_path / "out")
    assert result.mean["flow"]["psnr"] is None and result.mean["flow"]["akd478"] is None
    assert result.mean["flow"]["aed"] is not None


def test_evaluate_interval_needs_two_clips(animator, data_set, heads, result):
    assert result.interval["flow"]["psnr"] is None
    more = evaluate(animator, heads, EvaluateOptions(max_frames=3, views=False))
    low, high = more.interval["flow"]["psnr"]
    assert low == pytest.approx(high) and low == pytest.approx(more.mean["flow"]["psnr"])  # the clips are copies
    assert more.views == [] and more.mean["model"]["view_lost"] is None


def test_evaluate_reports_novel_views_by_yaw(result):
    assert [view["yaw"] for view in result.views] == [-30, -20, -10, 0, 10, 20, 30]
    seen = [view for view in result.views if view["view_pose"] is not None]
    assert all(0 <= view["view_pose"] <= 180 for view in seen) and len(seen) == sum(
        view["view_lost"] == 0 for view in result.views
    )
    lost = np.mean([view["view_lost"] for view in result.views])
    assert result.mean["model"]["view_lost"] == pytest.approx(lost) and result.mean["flow"]["view_pose"] is None


def test_evaluate_scores_results_of_other_tools(animator, data_set, tmp_path):
    """The driver itself is a perfect result."""
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


@pytest.mark.parametrize(("size", "frames", "message"), [((64, 64), 3, "too short"), ((96, 64), 10, "must be square")])
def test_evaluate_refuses_results_of_wrong_length_or_shape(animator, data_set, tmp_path, size, frames, message):
    name = read_clips(data_set)[0].id
    with VideoWriter(tmp_path / f"{name}.mp4", size=size, fps=Fraction(25)) as writer:
        for _ in range(frames):
            writer.write(np.zeros((size[1], size[0], 3), np.uint8))
    with pytest.raises(InputError, match=message):
        evaluate(animator, data_set, EvaluateOptions(results=(tmp_path,), model=False))


def test_select_frames_and_consecutive_frames(data_set):
    clip = read_clips(data_set)[0]
    found = np.ones(40, bool)
    found[[4, 20]] = False
    motion = Motion(**{**vars(clip.motion), **{
        key: np.repeat(getattr(clip.motion, key)[:1], 40, axis=0) for key in ("beta", "camera", "landmarks")
    }, "found": found})  # fmt: skip
    clip = replace(clip, motion=motion)
    case = Case(clip, clip, clip)
    assert select_frames(case, 5, "first").tolist() == [1, 2, 3, 5, 6]  # frame 0 is the source
    assert select_frames(case, 3).tolist() == [1, 21, 39] and len(select_frames(case, None)) == 37
    assert consecutive_frames(case, 4).tolist() == [17, 18, 19]
    assert len(consecutive_frames(case, 50)) == 12 and 20 not in consecutive_frames(case, 50)
    found[:] = np.arange(40) % 3 != 0
    assert len(consecutive_frames(case, 50)) == 0


def test_render_methods_smooths_the_driver_as_reenact_does(animator, data_set):
    """Light smoothing gives the frames of a driver that was smoothed before; without smoothing they differ."""
    clip = read_clips(data_set)[0]
    rows, photo = np.arange(3, 6), load_source_image(clip, 64)
    smoothed = replace(clip, motion=smooth_motion(clip.motion, "light"))
    case, smoothed_case = Case(clip, clip, clip), Case(clip, smoothed, smoothed)
    light = render_methods(animator, case, photo, rows, EvaluateOptions())
    off = render_methods(animator, case, photo, rows, EvaluateOptions(smooth="off"))
    expected = render_methods(animator, smoothed_case, photo, rows, EvaluateOptions(smooth="off"))
    assert np.array_equal(light["model"], expected["model"]) and np.array_equal(light["flow"], expected["flow"])
    assert not np.array_equal(light["model"], off["model"])


def test_cross_cases_are_fixed_by_the_seed(heads):
    clips = read_clips(heads)
    names = [[case.name for case in cross_cases(clips, 4, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


@pytest.fixture
def backbone(tmp_path):
    """Return a narrow random VGG16 with torchvision's parameter names."""
    torch.manual_seed(0)
    state, inside = {}, 3
    for number, out in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (64, 64, *[8] * 11), strict=True):
        state[f"features.{number}.weight"] = torch.randn(out, inside, 3, 3) / (9 * inside) ** 0.5
        state[f"features.{number}.bias"], inside = torch.zeros(out), out
    save_file(state, tmp_path / "vgg.safetensors")
    return tmp_path / "vgg.safetensors"


def test_evaluate_names_perceptual_distance_after_its_backbone(animator, data_set, backbone):
    result = evaluate(animator, data_set, EvaluateOptions(max_frames=3, perceptual=backbone, views=False))
    repeat = result.mean["repeat"]
    assert repeat["lpips"] is None and repeat["mobilenetv2"] is None
    clip = read_clips(data_set)[0]
    truth = decode_frames(clip, select_frames(Case(clip, clip, clip), 3), 64)
    photo = to_tensor(decode_frames(clip, np.array([most_frontal_frame(clip.motion)]), 64)[0])
    expected = [float(load_perceptual(backbone)(photo[None], to_tensor(frame)[None], scales=1)) for frame in truth]
    assert repeat["vgg16"] == pytest.approx(np.mean(expected), rel=1e-4) and min(expected) >= 0
    with pytest.raises(InputError, match="give the VGG16"):
        evaluate(animator, data_set, EvaluateOptions(lpips=backbone))


class _Colours(torch.nn.Module):
    """An `identity` that is the mean colour."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + 1.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_evaluate_identity_of_the_repeated_source_is_one(animator, data_set, tmp_path):
    torch.jit.script(_Colours()).save(str(tmp_path / "id.pt"))
    result = evaluate(animator, data_set, EvaluateOptions(max_frames=3, identity=str(tmp_path / "id.pt")))
    assert result.mean["repeat"]["identity"] == pytest.approx(1.0, abs=1e-4)


def test_evaluate_unusable_input_raises_input_error(animator, data_set, tmp_path):
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


def test_evaluate_command(weights, data_set, tmp_path):
    args = ["evaluate", str(data_set), "--weights", str(weights), "--max-frames", "3", "--device", "cpu"]
    done = CliRunner().invoke(cli, [*args, "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["mean"]["repeat"]["lost"] == 0.0 and not math.isnan(summary["mean"]["flow"]["psnr"])
    chosen = (summary["quality"], summary["options"]["smooth"], summary["options"]["views"])
    assert chosen == ("balanced", "light", True)
    assert Path(summary["files"][0]).is_file()
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0 and "repeat" in done.stderr and "akd478" in done.stderr
    assert CliRunner().invoke(cli, ["evaluate", str(tmp_path), "--weights", str(weights)]).exit_code == 2
    assert CliRunner().invoke(cli, [*args, "--pairs", "0"]).exit_code == 2
    for options, message in (
        (["--no-model"], "nothing to score"),
        (["--pairs", "5"], "--pairs applies to --cross"),
        (["--cross", "--views"], "--views applies to self-reenactment"),
        (["--no-model", "--results", str(tmp_path), "--views"], "--views applies to the model"),
        (["--no-model", "--results", str(tmp_path), "--smooth", "off"], "--smooth applies to the model"),
        (["--no-model", "--results", str(tmp_path), "--quality", "best"], "--quality has no effect with --no-model"),
        (["--write-inputs", "in", "-o", "x"], "--output, --max-frames has no effect with --write-inputs"),
        (["--lpips", __file__], "give the VGG16 file"),
    ):
        done = CliRunner().invoke(cli, [*args, *options])
        assert done.exit_code == 2 and message in " ".join(done.stderr.replace("│", "").split()), done.stderr
    done = CliRunner().invoke(cli, [*args, "--quality", "fast", "--smooth", "off", "--no-views", "--json"])
    summary = json.loads(done.stdout)
    assert (summary["quality"], summary["options"]["smooth"], summary["options"]["views"]) == ("fast", "off", False)
    assert CliRunner().invoke(cli, [*args, "--identity", "unknown"]).exit_code == 2
    args = ["evaluate", str(data_set), "--weights", str(weights), "--write-inputs", str(tmp_path / "in"), "--json"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0 and len(json.loads(done.stdout)["files"]) == len(list((tmp_path / "in").iterdir())) == 2
