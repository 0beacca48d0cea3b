"""novel-view, edit-basis and doctor on tiny weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.expression_coefficients import BETA_NAMES
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.model.checkpoint import load_weights, save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Untrained: lambda_3 depends on jawOpen alone, and b_3 moves the lips alone, 0.01 to the right."""
    torch.manual_seed(0)
    model = Export3D(PRESETS["tiny"])
    with torch.no_grad():
        lebs = model.expression
        lebs.fc1.weight[5] = 0
        lebs.fc1.weight[5, BETA_NAMES.index("jawOpen")] = 2.0
        lebs.fc1.bias[5] = 100  # on the linear side of the leaky ReLU
        lebs.fc2.weight[2] = 0
        lebs.fc2.weight[2, 5] = -1.5
        lebs.beta_std.fill_(0.25)
        model.flow.triangles.copy_(torch.from_numpy(load_canonical_face().flow_triangles))
        model.flow.basis[2, [13, 14], 0] = 0.01
    for parameter in model.parameters():
        if not parameter.any():  # parameters initialised to 0 would have no effect
            torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, model.state_dict(), PRESETS["tiny"], {})
    return path


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)


def run_tiny(tiny, *args):
    return run(*args, "--weights", tiny, "--device", "cpu")


def test_novel_view_single_yaw_writes_a_marked_image(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_tiny(tiny, "novel-view", "--yaw", "20").exit_code == 0
    assert run_tiny(tiny, "novel-view", "--frames", "1", "-o", "one.jpg").exit_code == 0
    for name in ("novel_view.png", "one.jpg"):
        assert read_image(Path(name)).shape == (512, 512, 3)
        assert SYNTHETIC_COMMENT.encode() in Path(name).read_bytes()[:200]
    many = run_tiny(tiny, "novel-view", "-o", "many.png")
    assert many.exit_code == 2
    assert "--grid" in many.stderr
    assert run_tiny(tiny, "novel-view", "--grid", "-o", "grid.mp4").exit_code == 2


def test_grid_shows_all_yaws_and_basis_vectors(tiny, tmp_path):
    views, basis = tmp_path / "views.png", tmp_path / "basis.png"
    small = ["--frame", "face", "--size", "128"]
    assert run_tiny(tiny, "novel-view", "--grid", "--frames", "7", "-o", views, *small).exit_code == 0
    assert read_image(views).shape == (3 * 128, 3 * 128, 3)
    sheet_args = ["--grid", "--v", "3", "--v", "1", "-o", basis]
    assert run_tiny(tiny, "edit-basis", *sheet_args, "--scale", "-50:50").exit_code == 0
    sheet = read_image(basis).astype(int)
    assert sheet.shape == (2 * 512, 5 * 512, 3)
    top = [sheet[:384, k * 512 : (k + 1) * 512] for k in range(5)]  # without the labels
    assert np.abs(top[0] - top[4]).max() > 5
    assert run_tiny(tiny, "edit-basis", *sheet_args, "--overwrite", *small).exit_code == 0
    assert read_image(basis).shape == (2 * 128, 5 * 128, 3)
    photo = read_image(example_path("source.jpg"))
    write_image(tmp_path / "tall.png", np.pad(photo, ((100, 588), (0, 288), (0, 0)), "edge"))
    tall = [tmp_path / "tall.png", "--yaw", "0", "--frames", "1"]
    for args, shape in (([], (1080, 720, 3)), (["--grid"], (512, 341, 3)), (["--depth", "--size", "512"], None)):
        assert run_tiny(tiny, "novel-view", *tall, *args, "-o", views, "--overwrite").exit_code == 0
        height, width, _ = found = read_image(views).shape
        assert found == shape or (shape is None and height == width < 720)  # the depth of the face crop


def test_novel_view_depth_and_driven_expression(tiny, tmp_path):
    for name, args in (
        ("depth.mp4", ["--depth"]),
        ("driven.mp4", ["--drive", example_path("drive.mp4")]),
        ("image.mp4", ["--drive", example_path("source.jpg")]),
    ):
        result = run_tiny(tiny, "novel-view", "--frames", "3", "-o", tmp_path / name, *args)
        assert result.exit_code == 0, result.output
        assert len(list(VideoReader(tmp_path / name))) == 3


def test_novel_view_mesh_alone_or_with_pictures(tiny, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("export3d_cli.core.animation.mesh_export.RESOLUTION", 24)
    state, config, record = load_weights(tiny)
    tiny = tmp_path_factory.mktemp("weights") / "low_density.safetensors"
    save_weights(tiny, state, replace(config, surface_density=0.5), record)
    result = run_tiny(tiny, "novel-view", "--mesh", "head.ply", "--drive", example_path("source.jpg"), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["out"] == "head.ply"
    assert [path.name for path in tmp_path.iterdir()] == ["head.ply"]
    again = run_tiny(tiny, "novel-view", "--mesh", "head.ply")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert run_tiny(tiny, "novel-view", "--mesh", "head.glb", "--yaw", "5", "-o", "view.png").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.glb", "head.ply", "view.png"]
    wrong = run("novel-view", "--mesh", "head.obj", "--weights", "no-such-weights")
    assert wrong.exit_code == 2
    assert ".ply or .glb" in wrong.stderr


def test_views_keep_fps_and_crop_options(tiny, tmp_path):
    args = ["--fps", "29.97", "--crop", "none", "--face", "index:0", "--frames", "2"]
    assert run_tiny(tiny, "novel-view", "-o", tmp_path / "a.mp4", *args).exit_code == 0
    assert run_tiny(tiny, "edit-basis", "--v", "1", "--scale", "1:2", "-o", tmp_path / "b.mp4", *args).exit_code == 0
    for name in ("a.mp4", "b.mp4"):
        with VideoReader(tmp_path / name) as reader:
            assert str(reader.info.fps) == "30000/1001"
    assert run_tiny(tiny, "novel-view", "-o", tmp_path / "c.mp4", "--face", "index:3").exit_code == 2


def test_edit_basis_accepts_negative_ranges_and_requires_v_and_scale(tiny, tmp_path):
    out = tmp_path / "out.mp4"
    several = ["--v", "1", "--scale", "-3:-1", "--v", "2", "--scale", "2:-2"]
    assert run_tiny(tiny, "edit-basis", *several, "--frames", "2", "-o", out).exit_code == 0
    for args in ([], ["--v", "1"], ["--scale", "1:2"]):
        result = run_tiny(tiny, "edit-basis", *args)
        assert result.exit_code == 2
        assert "Missing option" in result.stderr


def test_edit_basis_describe_names_coefficients_and_regions(tiny):
    result = run_tiny(tiny, "edit-basis", "--describe", "--json")
    assert result.exit_code == 0, result.output
    vectors = json.loads(result.stdout)["vectors"]
    assert [vector["v"] for vector in vectors] == list(range(1, 11))
    third = vectors[2]
    assert next(iter(third["moved_by"])) == "jawOpen"
    assert third["moved_by"]["jawOpen"] == pytest.approx(-1.5 * 2.0, abs=1e-3)
    assert third["moves"]["lips"] == pytest.approx(2 / 40 * 0.01 * 4.2647 / 2.7 * 256, rel=1e-2)
    assert third["moves"]["brows"] == 0
    assert "v3: jawOpen -3.00" in run_tiny(tiny, "edit-basis", "--describe").stdout


def test_doctor_passes_here(tiny):
    result = run("doctor", "--weights", tiny, "--json")
    summary = json.loads(result.stdout)
    assert summary["ok"] is all(finding["ok"] for finding in summary["findings"])
    assert result.exit_code == (0 if summary["ok"] else 1)
    passed = {finding["what"] for finding in summary["findings"] if finding["ok"]}
    assert {"torch", "cv2", "ffmpeg", "tracker", "model"} <= passed


def test_expression_controls_make_pictures_and_videos(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("grin: {smile: 1, mouthDimpleLeft: 0.2}\n")
    small = ["--frame", "face", "--size", "64"]
    many = ["--preset", "mine.yaml#grin", "--smile", ".6", "--jaw", ".2", "--brows", "-.5", "--gaze", ".2,0"]
    many += ["--blink", ".3", "--from", "neutral", "--set", "mouthFunnel=.3"]
    for command in ("edit-basis", "novel-view"):
        still = ["--yaw", "0"] if command == "novel-view" else []
        result = run_tiny(tiny, command, *many, *small, *still, "-o", f"{command}.png")
        assert result.exit_code == 0, result.output
        assert "reaches" in result.stderr
        assert read_image(tmp_path / f"{command}.png").shape == (64, 64, 3)
    assert run_tiny(tiny, "edit-basis", "--pucker", "0:1", *small, "--frames", "3", "-o", "a.mp4").exit_code == 0
    assert len(list(VideoReader(tmp_path / "a.mp4"))) == 3
    assert run_tiny(tiny, "edit-basis", "--from", "neutral", *small, "-o", "neutral.png").exit_code == 0
    assert read_image(tmp_path / "neutral.png").shape == (64, 64, 3)
    assert run_tiny(tiny, "edit-basis", "--eyes-open", ".3", "--grid", *small, "-o", "sheet.png").exit_code == 0
    assert read_image(tmp_path / "sheet.png").shape == (64, 5 * 64, 3)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--set", "smyle=1"], "did you mean smile"),
        (["--set", "smile"], "must be A:B"),
        (["--smile", "2"], "smile must be 0 to 1"),
        (["--gaze", "1"], "must be X,Y"),
        (["--blink", "1", "--eyes-open", "1"], "two controls set"),
        (["--preset", "jot"], "did you mean joy"),
        (["--smile", "0:1", "-o", "a.png"], "can hold one view"),
    ],
)
def test_bad_expression_controls_exit_2(tiny, args, words):
    result = run_tiny(tiny, "edit-basis", *args)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
