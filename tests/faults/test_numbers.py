"""Numerical limits: overflow is recomputed in fp32, extreme inputs stay finite, runs are reproducible."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import motion_of
from faultkit import run

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image, to_uint8
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.model.checkpoint import load_weights, save_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.weights import example_path

SMALL = ("--device", "cpu", "--precision", "fp32", "--audio", "none", "--batch", "2")


@pytest.fixture(params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def animator(request: pytest.FixtureRequest, good: SimpleNamespace) -> Animator:
    weights = good.weights if request.param == "tiny" else None
    return Animator.from_weights(weights, device="cpu", precision="fp32")


def check_finite(animator: Animator, portrait: Portrait, **inputs: object) -> None:
    """The model gives finite numbers, before they become bytes."""
    finite = []
    drive = animator.model.drive

    def checked_drive(*args: object, **options: object) -> object:
        out = drive(*args, **options)  # type: ignore[arg-type]
        finite.append(all(bool(value.isfinite().all()) for value in (out.image, out.raw, out.depth, out.opacity)))
        return out

    animator.model.drive = checked_drive  # type: ignore[method-assign, assignment]
    try:
        frames = [
            frame for method, argument in inputs.items() for frame in getattr(animator, method)(portrait, argument)
        ]
    finally:
        animator.model.drive = drive  # type: ignore[method-assign]
    assert frames
    assert finite
    assert all(finite)


def test_animator_extreme_inputs_give_finite_results(animator: Animator) -> None:
    """Coefficients of a million, cameras behind the head, in it, far away and at its centre."""
    portrait = animator.portrait(read_image(example_path("source.jpg")))
    count = animator.model.config.num_coefficients
    changes = [np.eye(count)[:2] * 1e6, np.full((1, count), -1e6), np.zeros((1, count))]
    check_finite(animator, portrait, edit=np.concatenate(changes))
    turned = [orbit_camera(yaw, pitch) for yaw, pitch in ((180, 0), (90, 89), (-90, -89), (0, 180), (0, 90))]
    vectors = np.stack(turned)
    moved = np.repeat(orbit_camera(0, 0)[None], 5, axis=0)
    for row, distance in enumerate((0.3, 0.01, 0.0, 1e3, 1e6)):  # of its centre from the head's
        moved[row, [3, 7, 11]] *= distance / np.linalg.norm(moved[row, [3, 7, 11]])
    check_finite(animator, portrait, view=np.concatenate([vectors, moved]))
    motion = motion_of(0, 2)
    check_finite(
        animator,
        portrait,
        animate=[Motion(**{**vars(motion), "beta": np.full_like(motion.beta, value)}) for value in (1e6, -1e6)],
    )


@pytest.mark.parametrize("value", [0, 128, 255])
def test_animator_constant_image_gives_finite_results(value: int, animator: Animator) -> None:
    motion = motion_of(0, 1)
    size = animator.model.config.image_size
    portrait = animator.portrait_from_motion(np.full((size, size, 3), value, np.uint8), motion)
    check_finite(animator, portrait, animate=[motion_of(1, 2)])


def make_overflowing_weights(good: SimpleNamespace, folder: Path, factor: float) -> Path:
    """Scale one weight of the tiny model by `factor`, so that activations overflow float16 or float32."""
    state, config, _ = load_weights(good.weights)
    key = next(
        name for name in state if name.startswith("generator.") and name.endswith("weight") and state[name].ndim > 1
    )
    state[key] = state[key] * factor
    path = folder / "large.safetensors"
    save_weights(path, state, config, {}, half=False)
    return path


def test_reenact_overflow_in_fp16_is_recomputed_in_fp32(good: SimpleNamespace, tmp_path: Path) -> None:
    """In float16 on a CPU the first convolutions exceed 65504."""
    weights = make_overflowing_weights(good, tmp_path, 1e6)
    summaries = {}
    for precision in ("fp16", "fp32"):
        out = tmp_path / f"{precision}.mp4"
        animator = Animator.from_weights(weights, device="cpu", precision=precision)
        # lossless, because lossy encoding amplifies rounding differences
        summaries[precision] = reenact(animator, good.source, good.motion, out, ReenactOptions(crf=0))
    assert [note for note in summaries["fp16"].notes if "fp32" in note]
    assert not [note for note in summaries["fp32"].notes if "fp32" in note]
    a, b = (np.stack(list(VideoReader(tmp_path / f"{name}.mp4"))).astype(int) for name in summaries)
    assert np.abs(a - b).max() <= 4


def test_reenact_non_finite_in_fp32_is_an_error(good: SimpleNamespace, tmp_path: Path) -> None:
    ended = run("reenact", good.source, good.motion, "-o", tmp_path / "o.mp4", *SMALL, "--weights",
                make_overflowing_weights(good, tmp_path, 1e38))  # fmt: skip
    assert ended.exit_code == 1, ended
    assert "not finite" in ended.stderr
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_animator_cuda_matches_the_cpu(good: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32: no pixel further than 6 of 255, and 0.05 in the mean, of all that a CPU otherwise leaves out in part."""
    monkeypatch.setattr(Export3D, "_use_sparse_path", lambda *_: False)
    frames = []
    for device in ("cpu", "cuda"):
        animator = Animator.from_weights(None, device=device, precision="fp32", quality="best")
        portrait = animator.portrait(read_image(good.source))
        frames.append(np.stack(list(animator.animate(portrait, [motion_of(3, 4)]))).astype(int))
    assert np.abs(frames[0] - frames[1]).max() <= 6
    assert np.abs(frames[0] - frames[1]).mean() <= 0.05


def test_to_uint8_of_infinities() -> None:
    """Where it comes to it, a picture of infinities is still a picture."""
    assert to_uint8(torch.tensor([np.inf, -np.inf, 0.0]).reshape(3, 1, 1)).ravel().tolist() == [255, 0, 128]
