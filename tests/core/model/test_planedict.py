"""PlaneDict: orthogonal bases, their slow sum, bounded corrections; training of its parts, and `reenact --motion`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.media.image import to_tensor
from export3d_cli.core.model.checkpoint import load_weights, save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.planedict import MAX_CORRECTION, NUM_BASES, PlaneDict, correct, cut_faces
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.core.train.training_data import cut_driver_face
from export3d_cli.main import cli

SMALL = ("--frame", "face", "--size", "64", "--watermark", "none")
TINY = replace(PRESETS["tiny"], motion="planedict")


def test_bases_are_orthogonal_in_each_channel_and_planes_are_their_weighted_sum():
    torch.manual_seed(0)
    network, s = PlaneDict(TINY), TINY.plane_size // 2
    torch.nn.init.normal_(network.to_factors.weight)
    bases = network.bases()
    assert bases.shape == (NUM_BASES, 3, TINY.plane_channels, s, s)
    columns = bases[:, 1, 5].flatten(1) / s
    assert torch.allclose(columns @ columns.T, torch.eye(NUM_BASES), atol=1e-5)
    factors, motion = [], torch.randn(2, 32)
    network.to_factors.register_forward_hook(lambda *call: factors.append(call[-1].unflatten(1, (NUM_BASES, 3))))
    planes = network.planes(motion)
    slow = sum(factors[0][:, n, :, None] * bases[n] for n in range(NUM_BASES))
    expected = torch.nn.functional.interpolate(slow.flatten(1, 2), (2 * s, 2 * s), mode="bilinear")
    assert torch.allclose(planes.flatten(1, 2), expected, atol=1e-4)
    planes.sum().backward()
    assert network.bases_weight.grad.abs().sum() > 0


def test_correction_is_bounded_and_none_where_pixels_and_landmarks_agree():
    lam = torch.randn(3, 10)
    assert torch.equal(correct(lam, lam), lam)
    assert ((correct(lam, lam + 100) - lam - MAX_CORRECTION).abs() < 1e-5).all()


def test_training_cuts_drivers_faces_as_inference_does():
    class NoChange:
        def normal(self, mean, deviation, size):
            return np.zeros(size)

    rng = np.random.default_rng(0)
    frame = np.repeat(np.repeat(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), 16, 0), 16, 1)
    landmarks = rng.uniform(0.3, 0.7, (478, 3))
    own = cut_faces(to_tensor(frame[None]), torch.from_numpy(landmarks[None, :, :2]).float())[0]
    for flip in (False, True):
        cut = to_tensor(cut_driver_face(frame, landmarks, NoChange(), flip=flip)[None])[0]
        assert (cut - (own.flip(2) if flip else own)).abs().mean() < 0.02


@pytest.fixture(scope="module")
def planedict_weights(tiny_weights, tmp_path_factory):
    """The tiny weights with untrained `PlaneDict`."""
    path = tmp_path_factory.mktemp("planedict") / "planedict.safetensors"
    torch.manual_seed(1)
    network = PlaneDict(TINY)
    torch.nn.init.normal_(network.to_factors.weight)
    state = load_weights(tiny_weights)[0] | {f"planedict.{k}": v for k, v in network.state_dict().items()}
    Export3D(TINY).load_state_dict(state)
    save_weights(path, state, TINY, {}, half=False)
    return path


def test_reenact_reads_motion_from_pixels(planedict_weights, tiny_weights, tmp_path):
    """Each kind of motion gives its own frames; drivers without pictures and weights without the part are refused."""
    photo, driver = example_path("source.jpg"), example_path("drive.mp4")

    def run(kind, *more, drive=driver, weights=planedict_weights):
        out = tmp_path / f"{kind}.mp4"
        args = ["reenact", str(photo), str(drive), "-o", str(out), "--weights", str(weights), "--device", "cpu"]
        done = CliRunner().invoke(cli, [*args, "--motion", kind, "--max-frames", "2", "-q", *SMALL, *more])
        return done.exit_code, done.output, out.read_bytes() if out.exists() else b""

    results = [run(kind) for kind in ("landmarks", "pixels", "both")]
    assert [code for code, *_ in results] == [0, 0, 0], results
    assert len({content for *_, content in results}) == 3
    motion = tmp_path / "drive.motion.npz"
    done = CliRunner().invoke(cli, ["preprocess", str(driver), "-o", str(motion), "--max-frames", "3", "-q"])
    assert done.exit_code == 0, done.output
    for options, more, message in (
        ({"drive": motion}, (), "holds no pictures to read motion from"),
        ({"weights": tiny_weights}, (), "these weights read no motion from pixels"),
        ({}, ("--drive", "mouth"), "drives the whole face"),
    ):
        code, output, _ = run("pixels", "--overwrite", *more, **options)
        assert code != 0 and message in " ".join(output.split()) and "Traceback" not in output
