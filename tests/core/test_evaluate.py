"""A tiny, untrained model on a small data set: the baselines' scores are known, the model's only have to be there."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from export3d_cli.core.animate import Animator
from export3d_cli.core.camera import Camera
from export3d_cli.core.checkpoint import save_weights
from export3d_cli.core.config import PRESETS
from export3d_cli.core.errors import InputError
from export3d_cli.core.evaluate import METRICS, EvaluateOptions, evaluate
from export3d_cli.core.face.mesh import canonical_face, flow_triangles
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.preprocess import preprocess
from export3d_cli.core.weights import example, weights_dir
from export3d_cli.main import cli

FRAMES = 10


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """The example driver as a clip, and the same moving picture as two heads that share their tracks."""
    folder = tmp_path_factory.mktemp("faces")
    preprocess([example("drive.mp4")], folder, size=64, max_frames=FRAMES)
    return folder


@pytest.fixture(scope="module")
def heads(data_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    line = json.loads((data_set / "manifest.jsonl").read_text())
    lines = [
        {**line, "id": f"{head}_t{t:02d}", "person": head, **{k: str(data_set / line[k]) for k in ("file", "motion")}}
        for head in ("a", "b") for t in range(2)
    ]  # fmt: skip
    (folder / "manifest.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    model = Export3D(PRESETS["tiny"])
    triangles = flow_triangles(canonical_face(weights_dir() / "face_landmarker.task"))
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
    assert repeat["found"] == 1.0 and flow["found"] == 1.0
    assert 20 < repeat["psnr"] < 100 and 0 < repeat["ssim"] < 1
    assert abs(model["psnr"] - flow["psnr"]) < 3  # an untrained network starts as the flow
    assert repeat["akd478"] > 0 and repeat["aed"] < 0.3
    assert repeat["identity"] is None


def test_rigid_flow_follows_the_head(result):
    """With b_i = 0 the mesh still moves rigidly: closer to the truth than standing still, if the head turns at all."""
    assert result.mean["flow"]["akd478"] <= result.mean["repeat"]["akd478"] + 0.2


def test_tables_and_pictures_are_written(result):
    table, whole = result.files[:2]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["model", "flow", "repeat"] and rows[0]["identity"] == ""
    assert json.loads(whole.read_text())["mean"]["flow"]["psnr"] == result.mean["flow"]["psnr"]
    sheets = [read_image(path) for path in result.files[2:]]
    assert sheets and all(sheet.shape == (3 * 64, 7 * 64, 3) for sheet in sheets)


def test_source_is_the_most_frontal_frame(data_set):
    from export3d_cli.core.evaluate import _frontal

    motion = Motion.load(next(data_set.glob("clips/*.npz")))
    camera = motion.camera.copy()
    camera[:] = Camera.orbit(20.0).vector()
    camera[3], camera[5] = Camera.orbit(1.0).vector(), Camera.orbit(0.0).vector()
    found = np.ones(len(motion), bool)
    found[5] = False
    assert _frontal(Motion(**{**vars(motion), "camera": camera, "found": found})) == 3


def test_heads_that_share_tracks_have_a_truth(animator, heads):
    """Both heads are one here, so that the flow of another head's track is that of one's own."""
    own = evaluate(animator, heads, EvaluateOptions(max_frames=4))
    crossed = evaluate(animator, heads, EvaluateOptions(max_frames=4, cross=True, pairs=2))
    assert crossed.cases == 2
    assert crossed.mean["flow"]["akd478"] == pytest.approx(own.mean["flow"]["akd478"])
    assert all(len({part[:1] for part in row["case"].split("-by-")}) == 2 for row in crossed.clips)


def test_two_people_without_a_truth(animator, heads, tmp_path):
    lines = (heads / "manifest.jsonl").read_text().replace("_t0", "_0").splitlines()
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    result = evaluate(animator, tmp_path, EvaluateOptions(max_frames=3, cross=True), out=tmp_path / "out")
    assert result.mean["flow"]["psnr"] is None and result.mean["flow"]["akd478"] is None
    assert result.mean["flow"]["aed"] is not None
    again = evaluate(animator, tmp_path, EvaluateOptions(max_frames=3, cross=True))
    assert [row["case"] for row in again.clips] == [row["case"] for row in result.clips]


class _Colours(torch.nn.Module):
    """An `identity` that is the mean colour."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + 1.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_identity_of_the_repeated_source_is_one(animator, data_set, tmp_path):
    torch.jit.script(_Colours()).save(str(tmp_path / "id.pt"))
    result = evaluate(animator, data_set, EvaluateOptions(max_frames=3, identity=tmp_path / "id.pt"))
    assert result.mean["repeat"]["identity"] == pytest.approx(1.0, abs=1e-4)


def test_what_cannot_be_used_is_an_input_error(animator, data_set, tmp_path):
    with pytest.raises(InputError, match="is not a data set"):
        evaluate(animator, tmp_path)
    with pytest.raises(InputError, match="no pair of two people"):
        evaluate(animator, data_set, EvaluateOptions(cross=True))
    (tmp_path / "id.pt").write_bytes(b"no network")
    with pytest.raises(InputError, match="not a TorchScript face embedder"):
        evaluate(animator, data_set, EvaluateOptions(identity=tmp_path / "id.pt"))


def test_command(weights, data_set, tmp_path):
    args = ["evaluate", str(data_set), "--weights", str(weights), "--max-frames", "3", "--device", "cpu"]
    done = CliRunner().invoke(cli, [*args, "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["mean"]["repeat"]["found"] == 1.0 and not math.isnan(told["mean"]["flow"]["psnr"])
    assert Path(told["files"][0]).is_file()
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0 and "repeat" in done.stderr and "akd478" in done.stderr
    assert CliRunner().invoke(cli, ["evaluate", str(tmp_path), "--weights", str(weights)]).exit_code == 2
    assert CliRunner().invoke(cli, [*args, "--pairs", "0"]).exit_code == 2
