"""Evaluation of a tiny, untrained model: the baselines' scores are checked, the model's only need to exist."""

import csv
import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.config.schema import PRESETS, LossConfig
from export3d_cli.core.dataset.preprocess import preprocess
from export3d_cli.core.evaluation.evaluate import EvaluateOptions, evaluate, render_layers, warp_piecewise, write_inputs
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
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image, to_tensor, write_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.model.checkpoint import save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.core.train import perceptual
from export3d_cli.core.train.perceptual import load_perceptual
from export3d_cli.main import cli

FRAMES = 10


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """Return a data set with the example driver as its one clip."""
    folder = tmp_path_factory.mktemp("faces")
    preprocess([example_path("drive.mp4")], folder, size=128, max_frames=FRAMES)
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
    triangles = load_canonical_face().flow_triangles
    model.flow.triangles.copy_(torch.from_numpy(triangles))
    save_weights(path, model.state_dict(), PRESETS["tiny"], {}, half=False)
    return path


@pytest.fixture(scope="module")
def animator(weights):
    return Animator.from_weights(weights, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def result(animator, data_set, tmp_path_factory):
    return evaluate(animator, data_set, EvaluateOptions(max_frames=6), out=tmp_path_factory.mktemp("out"))


def test_evaluate_scores_model_volume_and_baselines(result):
    assert list(result.mean) == ["model", "raw", "pwa", "repeat", "view 15", "view 30", "view 45", "view 60"]
    assert (result.protocol, result.cases, result.frames, len(result.clips)) == ("self-reenactment", 1, 6, 8)
    assert all(set(METRICS) <= set(row) for row in result.clips)
    repeat, pwa, model, raw = (result.mean[name] for name in ("repeat", "pwa", "model", "raw"))
    assert repeat["lost"] == pwa["lost"] == 0.0
    assert 20 < repeat["psnr"] < 100 and 0 < repeat["ssim"] < 1
    assert pwa["akd478"] < 0.6 < repeat["akd478"] and pwa["aed"] < repeat["aed"] < 0.3
    assert model["psnr"] > raw["psnr"]  # an untrained network shows the photo along the flow, its volume shows nothing
    assert 0.3 < model["copied"] < 1 and raw["copied"] is None
    assert repeat["identity"] is None and repeat["view_pose"] is None
    assert 0 <= result.mean["view 15"]["view_pose"] < 30 and result.mean["view 15"]["psnr"] is None


def test_write_report_writes_tables_and_pictures(result):
    table, whole, report, sheet = result.files
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(result.mean) and rows[0]["identity"] == ""
    assert json.loads(whole.read_text())["mean"]["pwa"]["psnr"] == result.mean["pwa"]["psnr"]
    assert read_image(sheet).shape == (5 * 192, 9 * 192, 3)  # truth, model, raw, pwa and views
    text = report.read_text(encoding="utf-8")
    assert (
        "frame photo, motion landmarks, pose auto, smooth light, watermark invisible, quality balanced" in text
        and f"({sheet.name})" in text
    )
    (line,) = (line for line in text.splitlines() if line.startswith("| psnr dB ↑"))
    assert line.split("|")[2].strip() == f"{result.mean['model']['psnr']:.2f}" and line.split("|")[6].strip() == ""


@pytest.mark.parametrize("framing", ["photo", "face"])
def test_render_layers_are_the_frames_that_reenact_writes(animator, data_set, tmp_path, framing):
    clip, rows = read_clips(data_set)[0], np.array([0, 4, 9])
    photo = decode_frames(clip, np.array([Case(clip, clip).photo_row]))[0]
    options = ReenactOptions(framing=framing, watermark="none")
    portrait = animator.portrait(photo, framing=framing)
    layers = list(render_layers(animator, portrait, clip.file, rows, options))
    write_image(tmp_path / "photo.png", photo)
    reenact(animator, tmp_path / "photo.png", clip.file, tmp_path / "%03d.png", options)
    written = [read_image(path) for path in sorted(tmp_path.glob("[0-9]*.png"))]
    assert len(written) == FRAMES
    for row, layer in zip(rows, layers, strict=True):
        difference = np.abs(portrait.canvas.compose(layer).astype(int) - written[row])
        assert difference.mean() < 0.5  # tri-planes are interpolated between other frames


def test_evaluate_compares_the_part_that_frames_show(animator, data_set):
    options = EvaluateOptions(max_frames=3, reenact=ReenactOptions(framing="face"))
    result = evaluate(animator, data_set, options)
    assert result.mean["repeat"]["psnr"] > 18 and result.mean["pwa"]["akd478"] < 1


def test_warp_piecewise_moves_the_landmarks_and_pins_the_border():
    rng = np.random.default_rng(0)
    photo = cv2.GaussianBlur(rng.integers(0, 256, (120, 160, 3)).astype(np.uint8), (0, 0), 4)
    source = rng.uniform(0.3, 0.6, (478, 3))
    assert np.abs(warp_piecewise(photo, source, source).astype(int) - photo).max() <= 1
    warped = warp_piecewise(photo, source, source + [0.1, 0.05, 0])  # 16 pixels to the right, 6 down
    inside = warped[54:66, 72:104].astype(int)
    assert np.abs(inside - photo[48:60, 56:88]).max() <= 2
    assert np.abs(warped[[0, -1]].astype(int) - photo[[0, -1]]).max() <= 8


def test_most_frontal_frame_ignores_untracked_frames(data_set):
    motion = Motion.load(next(data_set.glob("clips/*.npz")))
    camera = motion.camera.copy()
    camera[:] = orbit_camera(20.0)
    camera[3], camera[5] = orbit_camera(1.0), orbit_camera(0.0)
    found = np.ones(len(motion), bool)
    found[5] = False
    assert most_frontal_frame(Motion(**{**vars(motion), "camera": camera, "found": found})) == 3


def test_cross_with_shared_tracks_has_a_ground_truth(animator, heads):
    """Both heads are copies here, so the other head's track is that of its own."""
    crossed = evaluate(animator, heads, EvaluateOptions(max_frames=4, cross=True, cases=2))
    assert crossed.protocol == "cross-reenactment" and crossed.cases == 2
    for row in crossed.clips:
        source, driver = row["case"].split("-by-")
        assert source[0] != driver[0] and source[1:] == driver[1:]
    assert crossed.mean["pwa"]["akd478"] < 1 and crossed.mean["model"]["psnr"] is not None


def test_cross_without_shared_tracks_has_no_ground_truth(animator, heads, tmp_path):
    shutil.copytree(heads / "clips", tmp_path / "clips")
    lines = (heads / "manifest.jsonl").read_text().replace("_t0", "_0").splitlines()
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    result = evaluate(animator, tmp_path, EvaluateOptions(max_frames=3, cross=True, cases=2))
    assert result.mean["pwa"]["psnr"] is None and result.mean["pwa"]["akd478"] is None
    assert result.mean["pwa"]["aed"] is not None


def test_evaluate_interval_needs_two_clips(animator, data_set, heads, result):
    assert result.interval["pwa"]["psnr"] is None
    more = evaluate(animator, heads, EvaluateOptions(max_frames=3, cases=2))
    low, high = more.interval["pwa"]["psnr"]
    assert low == pytest.approx(high) and low == pytest.approx(more.mean["pwa"]["psnr"])  # the clips are copies


def test_evaluate_scores_results_of_other_tools(animator, data_set, tmp_path):
    """The driver itself is a perfect result."""
    options = EvaluateOptions(max_frames=4, results=(tmp_path / "tool",), model=False)
    clip = read_clips(data_set)[0]
    files = write_inputs(data_set, options, tmp_path / "in")
    assert [file.name for file in files] == [f"{clip.id}-source.png", f"{clip.id}-driver.mp4"]
    assert read_image(files[0]).shape == (128, 128, 3)
    with pytest.raises(InputError, match=f"no result for {clip.id}"):
        evaluate(animator, data_set, options)
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / f"{clip.id}.mp4").write_bytes(files[1].read_bytes())
    result = evaluate(animator, data_set, options, out=tmp_path / "out")
    assert list(result.mean) == ["tool", "pwa", "repeat"] and result.frames == 4
    score = result.mean["tool"]
    assert (score["psnr"], score["akd478"], score["apd"], score["gaze_error"]) == pytest.approx(
        (100, 0, 0, 0), abs=1e-6
    )
    assert score["flicker"] == 0 and score["jitter"] == 0 and score["lost"] == 0
    assert result.mean["repeat"]["psnr"] < 60


def test_protocol_vfhq_takes_the_first_frame_on_black_at_512(weights, tmp_path):
    """With the layout of VFHQ-Test: a folder of pictures for each clip, named by its number in VFHQ."""
    pictures = tmp_path / "VFHQ-Test" / "Clip+G0DGRma_p48+P0+C0+F11208-11383"
    with VideoReader(example_path("drive.mp4"), duration=FRAMES / 25) as reader:
        for number, frame in enumerate(reader):
            write_image(pictures / f"{number:08d}.png", frame)
    with VideoWriter(tmp_path / f"{pictures.name}.mp4", size=frame.shape[1::-1], fps=Fraction(25), crf=10) as writer:
        for frame in VideoReader(pictures):
            writer.write(frame)
    preprocess([tmp_path / f"{pictures.name}.mp4"], tmp_path / "data", size=512, max_frames=FRAMES)
    args = ["evaluate", str(tmp_path / "data"), "--protocol", "vfhq", "--weights", str(weights), "--device", "cpu"]
    done = CliRunner().invoke(cli, ["evaluate", args[1], "--protocol", "vfhq", "--write-inputs", str(tmp_path / "in")])
    assert done.exit_code == 0, done.output
    (clip,) = read_clips(tmp_path / "data")
    photo, first = read_image(tmp_path / "in" / f"{clip.id}-source.png"), decode_frames(clip, np.array([0]))[0]
    assert photo.shape == first.shape == (512, 512, 3)
    assert photo[:40, :40].max() == 0 < first[:40, :40].max()  # the background
    assert (photo[200:300, 200:300] == first[200:300, 200:300]).all()  # the face
    (tmp_path / "tool").mkdir()
    shutil.copyfile(clip.file, tmp_path / "tool" / f"{clip.id}.mp4")
    done = CliRunner().invoke(cli, [*args, "--results", str(tmp_path / "tool"), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["cases"], result["frames"]) == (1, FRAMES - 1)
    assert (result["options"]["photo"], result["options"]["size"]) == ("first", 512)
    assert result["mean"]["tool"]["akd478"] < 1 and result["mean"]["tool"]["psnr"] < 40  # its background is not black
    assert result["mean"]["model"]["psnr"] > result["mean"]["raw"]["psnr"]
    assert CliRunner().invoke(cli, [*args, "--max-frames", "3"]).exit_code == 2


def test_protocol_talkinghead_takes_all_frames_with_their_background(tmp_path):
    """With the layout of TalkingHead-1KH: clips named by video, number, frames and place, some with a leading dash."""
    clips = tmp_path / "val" / "cropped_clips"
    clips.mkdir(parents=True)
    shutil.copyfile(example_path("drive.mp4"), clips / "-3LwmCQ_UVw_0001_S0_E112_L412_T0_R1068_B656.mp4")
    preprocess([clips], tmp_path / "data", size=512, max_frames=FRAMES)
    (clip,) = read_clips(tmp_path / "data")
    (tmp_path / "tool").mkdir()
    shutil.copyfile(clip.file, tmp_path / "tool" / f"{clip.id}.mp4")
    args = ["evaluate", str(tmp_path / "data"), "--protocol", "talkinghead", "--no-model", "--json"]
    done = CliRunner().invoke(cli, [*args, "--results", str(tmp_path / "tool")])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["cases"], result["frames"]) == (1, FRAMES - 1)
    assert (result["options"]["photo"], result["options"]["size"]) == ("first", 512)
    assert result["mean"]["tool"]["psnr"] == 100  # the truth, with its background


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
    case = Case(clip, clip)
    assert select_frames(case, 5, "first").tolist() == [1, 2, 3, 5, 6]  # frame 0 is the source
    assert select_frames(case, 3).tolist() == [1, 21, 39] and len(select_frames(case, None)) == 37
    assert consecutive_frames(case, 4).tolist() == [17, 18, 19]
    assert len(consecutive_frames(case, 50)) == 12 and 20 not in consecutive_frames(case, 50)
    found[:] = np.arange(40) % 3 != 0
    assert len(consecutive_frames(case, 50)) == 0


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


def test_evaluate_does_not_call_every_perceptual_distance_lpips(animator, data_set, backbone, monkeypatch):
    monkeypatch.setattr(perceptual, "resolve_weights", {"hf:someone/vgg:vgg.safetensors": backbone}.__getitem__)
    result = evaluate(animator, data_set, EvaluateOptions(max_frames=3, perceptual="hf:someone/vgg:vgg.safetensors"))
    repeat = result.mean["repeat"]
    assert repeat["lpips"] is None
    clip = read_clips(data_set)[0]
    truth = decode_frames(clip, select_frames(Case(clip, clip), 3))
    photo = to_tensor(decode_frames(clip, np.array([Case(clip, clip).photo_row]))[0])
    network = load_perceptual(LossConfig(backbone=str(backbone)))
    assert network is not None
    expected = [float(network(photo[None], to_tensor(frame)[None], scales=1)) for frame in truth]
    assert repeat["perceptual"] == pytest.approx(np.mean(expected), rel=1e-4) and min(expected) >= 0
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
    invalid = (("id", "../x"), ("id", "a/b"), ("file", "/etc/passwd"), ("motion", "../m.npz"), ("file", 3))
    for key, value in (*invalid, ("depth", "/d.npz")):
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
    assert summary["mean"]["repeat"]["lost"] == 0.0 and summary["quality"] == "balanced"
    chosen = summary["options"]["reenact"]
    assert (chosen["framing"], chosen["pose"], chosen["smooth"]) == ("photo", "auto", "light")
    assert Path(summary["files"][0]).is_file()
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0 and "repeat" in done.stderr and "akd478" in done.stderr
    assert CliRunner().invoke(cli, ["evaluate", str(tmp_path), "--weights", str(weights)]).exit_code == 2
    assert CliRunner().invoke(cli, [*args, "--cases", "0"]).exit_code == 2
    for options, message in (
        (["--no-model"], "nothing to score"),
        (["--no-model", "--results", str(tmp_path), "--smooth", "off"], "--smooth has no effect with --no-model"),
        (["--no-model", "--results", str(tmp_path), "--quality", "best"], "--quality has no effect with --no-model"),
        (
            ["--write-inputs", "in", "-o", "x"],
            "--output, --max-frames, --weights, --device has no effect with --write-inputs",
        ),
        (["--lpips", __file__], "give the VGG16 file"),
        (["--perceptual", "vgg.pth"], "must be an existing file or hf:owner/repo:file, got 'vgg.pth'"),
    ):
        done = CliRunner().invoke(cli, [*args, *options])
        assert done.exit_code == 2 and message in " ".join(done.stderr.replace("│", "").split()), done.stderr
    done = CliRunner().invoke(
        cli, [*args, "--quality", "fast", "--smooth", "off", "--frame", "face", "--pose", "relative", "--json"]
    )
    summary = json.loads(done.stdout)
    chosen = summary["options"]["reenact"]
    assert (summary["quality"], chosen["smooth"], chosen["framing"], chosen["pose"]) == (
        "fast", "off", "face", "relative"
    )  # fmt: skip
    assert CliRunner().invoke(cli, [*args, "--identity", "unknown"]).exit_code == 2
    args = ["evaluate", str(data_set), "--write-inputs", str(tmp_path / "in"), "--json"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0 and len(json.loads(done.stdout)["files"]) == len(list((tmp_path / "in").iterdir())) == 2
