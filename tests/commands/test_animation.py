"""Animation commands with tiny untrained weights: options, files, exit codes; not how results look."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.probe import probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.main import cli


@pytest.fixture
def tiny(tiny_weights):
    return tiny_weights


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)


def reenact(tiny, out, *args, source=None, driver=None):
    files = source or example_path("source.jpg"), driver or example_path("drive.mp4")
    return run("reenact", *files, "-o", out, "--weights", tiny, "--device", "cpu", *args)


def test_reenact_keeps_the_frame_rate_and_prints_json(tiny, tmp_path):
    out = tmp_path / "out.mp4"
    result = reenact(tiny, out, "--max-frames", "5", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["frames"] == 5
    assert Path(summary["out"]) == out
    info = probe(out)
    assert info.fps == probe(example_path("drive.mp4")).fps
    assert str(info.fps) == summary["fps"]
    assert (info.width, info.height, info.frame_count) == (512, 512, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_reenact_compare_start_duration_and_fps(tiny, tmp_path):
    out = tmp_path / "out.mkv"
    result = reenact(tiny, out, "--compare", "--start", "0.2", "--duration", "0.5", "--fps", "10")
    assert result.exit_code == 0, result.output
    info = probe(out)
    assert (info.width, info.height, info.fps, info.frame_count) == (3 * 512, 512, 10, 5)


def test_pairs_stand_in_place_of_the_driver(tiny, tmp_path):
    short = "--max-frames", "2", "--weights", tiny, "--device", "cpu"
    photo, pair = example_path("source.jpg"), ("--pair", f"left={example_path('drive.mp4')}")
    assert run("reenact", photo, *pair, "-o", tmp_path / "pair.mp4", *short).exit_code == 0
    assert reenact(tiny, tmp_path / "driver.mp4", "--max-frames", "2", "--face", "left").exit_code == 0
    assert (tmp_path / "pair.mp4").read_bytes() == (tmp_path / "driver.mp4").read_bytes()
    for extra, words in (((), "DRIVE"), ((*pair, "--face", "left"), "--face has no effect")):
        result = run("reenact", photo, *extra, "-o", tmp_path / "x.mp4", *short)
        assert result.exit_code == 2 and words in result.stderr


def test_existing_output_is_kept_without_overwrite(tiny, tmp_path):
    out = tmp_path / "out.mp4"
    out.write_bytes(b"mine")
    result = reenact(tiny, out, "--max-frames", "1")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert out.read_bytes() == b"mine"
    files = example_path("source.jpg"), example_path("drive.mp4")
    for command in (("reenact", *files), ("novel-view",), ("edit-basis", "--grid")):
        early = run(*command, "-o", out, "--weights", "nowhere")  # refused before weights are loaded
        assert early.exit_code == 2, early.output
    assert reenact(tiny, out, "--max-frames", "1", "--overwrite").exit_code == 0
    assert probe(out).width == 512


def test_missing_face_exits_3_and_names_the_file(tiny, tmp_path):
    write_image(tmp_path / "wall.png", np.full((200, 200, 3), 128, np.uint8))
    result = reenact(tiny, tmp_path / "out.mp4", source=tmp_path / "wall.png")
    assert result.exit_code == 3
    assert "wall.png" in result.stderr
    assert not (tmp_path / "out.mp4").exists()


def test_additional_photo_of_somebody_else_is_refused_by_name_unless_forced(tiny_weights, tmp_path):
    other = example_path("astronaut.jpg")
    refused = reenact(tiny_weights, tmp_path / "out.mp4", "--max-frames", "1", "--also", other)
    assert refused.exit_code == 2
    assert f"{other} seems to show somebody else" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    forced = reenact(tiny_weights, tmp_path / "out.mp4", "--max-frames", "1", "--also", other, "--force")
    assert forced.exit_code == 0, forced.output
    assert len(list(VideoReader(tmp_path / "out.mp4"))) == 1


def test_bad_files_exit_2_and_bad_weights_exit_4(tiny, tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    assert reenact(tiny, tmp_path / "out.mp4", source=tmp_path / "text.jpg").exit_code == 2
    assert reenact(tiny, tmp_path / "out.mp4", driver=tmp_path / "text.jpg").exit_code == 2
    assert reenact(tiny, tmp_path / "out.xyz").exit_code == 2
    assert reenact("no-such-weights", tmp_path / "out.mp4").exit_code == 4
    assert reenact(tmp_path / "text.jpg", tmp_path / "out.mp4").exit_code == 4
    assert [p.name for p in tmp_path.iterdir()] == ["text.jpg"]


@pytest.mark.parametrize("name", ["drive.motion.npz", "drive.csv"])
def test_preprocessed_motion_drives(tiny, tmp_path, name):
    motion = tmp_path / name
    assert run("preprocess", example_path("drive.mp4"), "-o", motion, "--max-frames", "4").exit_code == 0
    assert reenact(tiny, tmp_path / "out.mp4", driver=motion).exit_code == 0
    assert len(list(VideoReader(tmp_path / "out.mp4"))) == 4


@pytest.mark.parametrize(
    "args", [["novel-view", "--yaw", "-30:30", "--loop", "once"], ["edit-basis", "--v", "4", "--scale", "1:10"]]
)
def test_novel_view_and_edit_basis_default_to_the_example(tiny, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the default output is replaced
        result = run(*args, "--frames", "3", "--weights", tiny, "--device", "cpu")
        assert result.exit_code == 0, result.output
    (out,) = tmp_path.iterdir()
    assert out.name == args[0].replace("-", "_") + ".mp4"
    assert len(list(VideoReader(out))) == 3


def test_missing_basis_vector_exits_2(tiny, tmp_path):
    result = run("edit-basis", "--v", "99", "--scale", "1:2", "--weights", tiny, "-o", tmp_path / "x.mp4")
    assert result.exit_code == 2
    assert "99" in result.stderr


def test_failure_among_several_sources_exits_1(tiny, tmp_path):
    write_image(tmp_path / "wall.png", np.full((200, 200, 3), 128, np.uint8))
    files = [example_path("source.jpg"), tmp_path / "wall.png", example_path("drive.mp4")]
    options = ["--weights", tiny, "--device", "cpu", "--max-frames", "2", "--audio", "none"]
    result = run("reenact", *files, "-o", tmp_path / "{src}-{drive}.mp4", *options)
    assert result.exit_code == 1
    assert "failed: " in result.stderr
    assert "wall.png" in result.stderr
    assert (tmp_path / "source-drive.mp4").exists()
    assert run("reenact", *files, "-o", tmp_path / "one.mp4", *options).exit_code == 2
    again = run("reenact", files[0], files[0], files[2], "-o", tmp_path / "{drive}.mp4", *options)
    assert again.exit_code == 2


def test_reenact_controls_and_dry_run(tiny, tmp_path):
    controls = ["--drive", "mouth,head", "--scale", "mouth=1.5", "--pose", "relative", "--pose-scale", "1.5"]
    controls += ["--smooth", "strong", "--seed", "3", "--smile", ".5"]
    out = tmp_path / "{src}.mp4"
    result = reenact(tiny, out, "--max-frames", "3", *controls, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["frames"], plan["sources"][0]["size"], plan["sources"][0]["exists"]) == (3, [512, 512], False)
    assert list(tmp_path.iterdir()) == []
    assert "face at" in reenact(tiny, out, "--max-frames", "3", "--dry-run").stderr
    relative = ["--relative-expression", "--reference-frame", "1", "--face", "index:0"]
    assert reenact(tiny, out, "--max-frames", "3", *controls, *relative).exit_code == 0
    assert len(list(VideoReader(tmp_path / "source.mp4"))) == 3
    for bad in (
        ["--size", "301"],
        ["--size", "-2"],
        ["--size", "large"],
        ["--size", "32"],
        ["--drive", "hair"],
        ["--drive", "mouth,torso"],
        ["--scale", "mouth"],
        ["--scale", "nose=1"],
        ["--smile", "0:1"],
        ["--face", "index:-1"],
        ["--smooth", "much"],
        ["--pose-scale", "nan"],
    ):
        result = reenact(tiny, tmp_path / "no.mp4", *bad)
        assert result.exit_code == 2, bad
    late = [*relative, "--reference-frame", "3", "--max-frames", "3"]
    assert reenact(tiny, tmp_path / "no.mp4", *late).exit_code == 2
    assert not (tmp_path / "no.mp4").exists()


def test_reenact_from_and_to_image_folders(tiny, tmp_path):
    shots = tmp_path / "shots"
    shots.mkdir()
    for i in range(2):
        (shots / f"{i}.jpg").write_bytes(example_path("source.jpg").read_bytes())
    out = tmp_path / "frames" / "%03d.png"
    result = run("reenact", example_path("source.jpg"), shots, "-o", out, "--weights", tiny, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["000.png", "001.png"]


def test_reenact_paste_back_and_backgrounds(tiny, tmp_path):
    fast = ["--max-frames", "2", "--audio", "none"]
    photo = np.pad(read_image(example_path("source.jpg"))[::2, ::2], ((0, 0), (0, 256), (0, 0)), "edge")
    wide = tmp_path / "wide.png"
    write_image(wide, photo)
    out = tmp_path / "back.mp4"
    assert reenact(tiny, out, *fast, "--paste-back", "--crf", "0", source=wide).exit_code == 0
    with VideoReader(out) as reader:
        shown = next(iter(reader)).astype(int)
    assert shown.shape == photo.shape
    assert np.abs(shown[:, -8:] - photo[:, -8:]).mean() < 4  # away from the person
    for args, size in (
        (["--frame", "photo", "--size", "1500"], [1500, 750]),
        (["--frame", "face", "--size", "200", "--compare"], [600, 200]),
    ):  # fmt: skip
        result = reenact(tiny, out, *fast, *args, "--dry-run", "--overwrite", "--json", source=wide)
        assert json.loads(result.stdout)["sources"][0]["size"] == size
    result = reenact(tiny, out, *fast, "--frame", "face", "--dry-run", "--json", source=wide)
    width, height = json.loads(result.stdout)["sources"][0]["size"]
    assert width == height < 256
    for name, args in (
        ("a.webm", ["transparent", "--compare"]), ("f/%02d.png", ["transparent", "--frame", "face"]),
        ("c.mp4", [example_path("source.jpg"), "--compare"]),
    ):  # fmt: skip
        result = reenact(tiny, tmp_path / name, *fast, "--size", "256", "--background", *args)
        assert result.exit_code == 0, result.output
    assert probe(tmp_path / "a.webm").alpha_source
    assert (probe(tmp_path / "a.webm").width, probe(tmp_path / "c.mp4").width) == (3 * 256, 3 * 256)
    cut = [read_image(path) for path in (tmp_path / "f").iterdir()]
    assert len(cut) == 2 and cut[0].shape[0] == cut[0].shape[1] == 256


def test_conflicting_options_exit_2_before_weights_are_read(tmp_path):
    for name, args, hint in (
        ("a.mp4", ["--background", "transparent"], ".webm"),
        ("a.mp4", ["--background", "#12345"], "#00ff00"),
        ("a.mp4", ["--background", "no-such.png"], "no-such.png"),
        ("a.mp4", ["--background", example_path("drive.mp4")], "not an image"),
        ("a.xyz", ["--dry-run"], ".xyz"),
        ("a.mp4", ["--frame", "face", "--paste-back"], "leave out one"),
    ):
        result = reenact("no-such-weights", tmp_path / name, *args)
        assert result.exit_code == 2, name
        assert hint in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_video_as_portrait_of_views_is_refused_and_crop_none_keeps_the_photo(tiny, tmp_path):
    film = example_path("drive.mp4")
    for result in (
        run("novel-view", film, "--weights", tiny, "--device", "cpu", "-o", tmp_path / "b.mp4"),
        run(
            "edit-basis",
            film,
            "--v",
            "1",
            "--scale",
            "1",
            "--weights",
            tiny,
            "--device",
            "cpu",
            "-o",
            tmp_path / "c.mp4",
        ),
    ):
        assert result.exit_code == 2
        assert "must be a photo" in result.stderr
    still = ["--max-frames", "1", "--crop", "none", "--drive", "expression", "--expression-scale", "0", "--size", "64"]
    assert reenact(tiny, tmp_path / "d.mp4", *still, "--compare").exit_code == 0
    with VideoReader(tmp_path / "d.mp4") as reader:
        left = next(iter(reader))[:, :64].astype(int)
    photo = read_image(example_path("source.jpg"))
    whole = photo.reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert np.abs(left - whole).mean() < 6
    write_image(tmp_path / "wide.png", photo[:400])
    result = reenact(tiny, tmp_path / "e.mp4", "--crop", "none", source=tmp_path / "wide.png")
    assert result.exit_code == 2
    assert "512x400" in result.stderr


@pytest.mark.parametrize(
    ("command", "output", "kind"),
    [
        (("reenact", "SRC", "DRIVE"), "out.gif", ".gif"),
        (("reenact", "SRC", "DRIVE"), "frames/%05d.png", ".png"),
        (("reenact", "SRC", "DRIVE", "--background", "transparent"), "out.mov", "transparent .mov"),
        (("novel-view", "SRC"), "out.gif", ".gif"),
        (("novel-view", "SRC", "--grid"), "out.jpg", ".jpg"),
        (("edit-basis", "SRC", "--v", "1", "--scale", "0:2", "--frames", "2"), "out.gif", ".gif"),
        (("edit-basis", "SRC", "--grid"), "out.png", ".png"),
    ],
)
def test_crf_is_refused_where_the_format_has_none(tmp_path, command, output, kind):
    names = {"SRC": example_path("source.jpg"), "DRIVE": example_path("drive.mp4")}
    args = [names.get(word, word) for word in command]
    result = run(*args, "-o", tmp_path / output, "--crf", "18", "--weights", "nowhere")
    assert result.exit_code == 2
    assert f"crf does not apply to {kind}" in result.stderr


def test_threads_applies_to_the_command_alone(tmp_path, monkeypatch):
    before, counts = torch.get_num_threads(), []

    def load(*args, **kwargs):
        counts.append(torch.get_num_threads())
        raise InputError("stop here")

    monkeypatch.setattr(Animator, "from_weights", load)
    assert run("novel-view", "-o", tmp_path / "a.png", "--yaw", "0", "--threads", before + 1).exit_code == 2
    assert counts == [before + 1]
    assert torch.get_num_threads() == before


def test_edit_writes_the_clip_with_a_changed_expression(tiny, tmp_path):
    clip, out = example_path("drive.mp4"), tmp_path / "out.mp4"
    usual = ("--weights", tiny, "--device", "cpu", "--max-frames", 3)
    result = run("edit", clip, "-o", out, "--eyes-to-camera", "--json", *usual)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["frames"] == probe(out).frame_count == 3
    plan = run("edit", clip, "-o", out, "--smile", ".4", "--dry-run", "--json", *usual)  # OUT is kept
    planned = json.loads(plan.stdout)
    assert (planned["frames"], planned["fps"]) == (3, "25") and planned["seconds"] > 0
    assert (planned["sources"][0]["size"], planned["sources"][0]["exists"]) == ([512, 512], True)
    x0, y0, x1, y1 = planned["sources"][0]["face"]
    assert 150 < x0 < 256 < x1 < 362 and 80 < y0 < 256 < y1 < 420, planned
    driven = ("--length", "driver", "--drive", "mouth", "--dry-run", "--json")
    plan = reenact(tiny, tmp_path / "no.mp4", *driven, "--max-frames", "200", source=clip)
    assert (plan.exit_code, json.loads(plan.stdout)["frames"]) == (0, 112), plan.output
    picture = (example_path("source.jpg"), "-o", tmp_path / "no.mp4", "--drive", "mouth", "--dry-run", "--json")
    plan = run("reenact", clip, *picture, *usual)
    assert (plan.exit_code, json.loads(plan.stdout)["frames"]) == (0, 3), plan.output
    for args, words in (
        ((clip,), "nothing to edit"), ((example_path("source.jpg"), "--smile", ".4"), "is not a video"),
        ((clip, "--lips-shut-when-silent"), "has no sound"), ((clip, "--smile", "0:1"), "range A:B"),
    ):  # fmt: skip
        result = run("edit", *args, "-o", tmp_path / "no.mp4", *usual)
        assert (result.exit_code, words in result.stderr) == (2, True), result.output
    assert not (tmp_path / "no.mp4").exists()
    refused = reenact(tiny, tmp_path / "no.mp4", "--compare", "--drive", "mouth", source=clip)
    assert refused.exit_code == 2
    assert "leave out --compare" in refused.stderr
