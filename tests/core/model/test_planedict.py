"""PlaneDict: orthogonal bases, their slow sum, bounded corrections; training of its parts, and `reenact --motion`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.live import LiveOptions
from export3d_cli.core.animation.retargeting import Control
from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image, to_tensor
from export3d_cli.core.model.checkpoint import load_weights, save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.planedict import MAX_CORRECTION, NUM_BASES, PlaneDict, correct, cut_faces
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.core.train.training_data import cut_driver_face
from export3d_cli.main import cli

SMALL = ("--frame", "face", "--size", "64", "--watermark", "none")
FACTORS = ("planedict.to_factors.weight", "planedict.to_factors.bias")
TINY = replace(PRESETS["tiny"], motion="planedict")


def test_bases_are_orthogonal_in_each_channel_and_planes_are_their_weighted_sum():
    torch.manual_seed(0)
    network, s = PlaneDict(TINY), TINY.plane_size // 2
    torch.nn.init.normal_(network.to_factors.weight)
    bases = network.bases()
    assert bases.shape == (NUM_BASES, 3, TINY.plane_channels, s, s)
    columns = bases[:, 1, 5].flatten(1) / s
    assert torch.allclose(columns @ columns.T, torch.eye(NUM_BASES), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.read_lambda(torch.randn(2, 32), torch.randn(2, 32)).dtype == torch.float32
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
    state = load_weights(planedict_weights)[0]
    save_weights(other := tmp_path / "other.safetensors", state | {k: -state[k] for k in FACTORS}, TINY, {}, half=False)
    for kind, (*_, before) in zip(("pixels", "both"), results[1:], strict=True):  # only pixels uses the bases
        assert (run(kind, "--overwrite", weights=other)[2] == before) == (kind == "both")
    motion = tmp_path / "drive.motion.npz"
    done = CliRunner().invoke(cli, ["preprocess", str(driver), "-o", str(motion), "--max-frames", "3", "-q"])
    assert done.exit_code == 0, done.output
    for options, more, message in (
        ({"drive": motion}, (), "holds no pictures to read motion from"),
        ({"weights": tiny_weights}, (), "these weights read no motion from pixels"),
        ({}, ("--drive", "mouth"), "drives the whole face"),
        ({}, ("--tracker", "fan"), "need 478 landmarks"),
        ({}, ("--smile", "0.4"), "leave out the controls"),
        ({}, ("--lips-shut-when-silent",), "reads lips from pixels"),
        ({}, ("--eyes-to-camera",), "leave out --expression-scale"),
    ):
        code, output, _ = run("pixels", "--overwrite", *more, **options)
        assert code != 0 and message in " ".join(output.split()) and "Traceback" not in output
    animator = Animator.from_weights(planedict_weights, device="cpu")
    with pytest.raises(InputError, match="the codes it reads"):
        next(animator.animate(animator.portrait(read_image(photo)), [Motion.load(motion)],
                              control=Control(motion="pixels")))  # fmt: skip
    with pytest.raises(InputError, match="live follows landmarks"):
        LiveOptions(motion="both")


def test_frames_of_pixels_that_overflow_in_half_precision_are_rendered_in_fp32(planedict_weights, monkeypatch):
    photo, frames, control = read_image(example_path("source.jpg")), [], Control(motion="pixels")
    for precision in ("fp32", "bf16"):
        animator = Animator.from_weights(planedict_weights, device="cpu", precision=precision)
        portrait = animator.portrait(photo, framing="face", size=64)
        planes = animator.model.identity_planes
        if precision == "bf16":
            monkeypatch.setattr(animator.model, "identity_planes", lambda *args, make=planes: make(*args) * torch.inf)
        for scale in (0, 5):
            motion = replace(portrait.motion, code=np.full((1, 32), scale, np.float32))
            frames.append(next(animator.animate(portrait, [motion], control=control)).astype(int))
    still, moved, still_half, moved_half = frames
    assert max(np.abs(still_half - still).max(), np.abs(moved_half - moved).max()) <= 2 < np.abs(moved - still).max()
