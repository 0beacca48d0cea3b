"""The engine: frames depend on their arguments alone, in one thread or several, in every precision and quality."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.animation.animator import RENDER_SCALES, Animator, Portrait
from export3d_cli.core.animation.expression_controls import EditedExpression
from export3d_cli.core.animation.novel_view import NovelViewOptions, orbit_cameras
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.animation.retargeting import Control
from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image
from export3d_cli.core.model.checkpoint import load_into, load_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.device import pick_device, pick_precision, precision_notes
from export3d_cli.core.runtime.errors import Export3DError, InputError
from export3d_cli.core.runtime.weights import example_path

PHOTO = read_image(example_path("source.jpg"))
TALL = np.ascontiguousarray(PHOTO[:, 64:448])  # 3:4
WIDE = np.pad(PHOTO, ((0, 0), (0, 398), (0, 0)), "edge")  # 16:9, the person at the left
NO_CHANGE = np.zeros((1, 10), np.float32)


def load_model(weights: Path) -> Export3D:
    state, config, _ = load_weights(weights)
    model = Export3D(config)
    load_into(model, state)
    return model


@pytest.fixture(scope="module")
def portrait(animator: Animator) -> Portrait:
    return animator.portrait(PHOTO)


def moving(portrait: Portrait, frames: int, seed: int = 0) -> Motion:
    """A head that turns and changes its expression, from random numbers."""
    rng = np.random.default_rng(seed)
    motion = portrait.motion.select(np.zeros(frames, np.int64))
    motion.camera[:] = np.stack([orbit_camera(*rng.uniform(-15, 15, 2)) for _ in range(frames)])
    motion.beta[:] = rng.uniform(0, 0.5, motion.beta.shape)
    return motion


def stack(frames: Iterator[np.ndarray]) -> np.ndarray:
    return np.stack(list(frames))


def test_animate_by_its_own_motion_is_the_portrait_s_own_view(animator: Animator, portrait: Portrait) -> None:
    (driven,) = animator.animate(portrait, [portrait.motion])
    (viewed,) = animator.view(portrait, portrait.motion.camera)
    (edited,) = animator.edit(portrait, NO_CHANGE)
    for other in (viewed, edited):
        assert np.abs(other.astype(int) - driven).max() <= 1


def test_edit_changes_only_the_frames_whose_lambda_changes(animator: Animator, portrait: Portrait) -> None:
    changes = np.zeros((3, 10), np.float32)
    changes[2, 4] = 5
    still, same, changed = (frame.astype(int) for frame in animator.edit(portrait, changes))
    assert np.abs(same - still).max() <= 1
    assert np.abs(changed - still).max() > 2


def test_crop_scale_is_the_crop_in_face_boxes(portrait: Portrait) -> None:
    extent = np.ptp(portrait.motion.landmarks[0, :, :2], axis=0).max()
    assert portrait.crop_scale == pytest.approx(1 / extent)
    assert portrait.crop.shape == (*2 * (round(portrait.square[2]),), 3)
    np.testing.assert_allclose(portrait.camera, portrait.motion.camera[0], atol=1e-6)


def test_portrait_cannot_be_changed(animator: Animator, portrait: Portrait) -> None:
    with pytest.raises(AttributeError):
        portrait.precision = "bf16"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        portrait.crop[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        portrait.motion.beta[0] = 0
    crop, photo = np.full((64, 64, 3), 90, np.uint8), PHOTO.copy()
    tracked, whole = animator.portrait_from_motion(crop, portrait.motion), animator.portrait(photo)
    crop[:] = photo[:] = 0  # the caller's arrays stay the caller's
    assert tracked.crop.min() == 90
    np.testing.assert_array_equal(whole.canvas.photo, PHOTO)
    with pytest.raises(ValueError, match="read-only"):
        whole.canvas.photo[0] = 0


@pytest.mark.parametrize("photo", [TALL, WIDE], ids=["3:4", "16:9"])
def test_frames_show_the_whole_photo(animator: Animator, photo: np.ndarray) -> None:
    portrait = animator.portrait(photo)
    height, width = photo.shape[:2]
    assert portrait.frame_size == (width, height)
    motion = moving(portrait, 2)
    frames = [
        *animator.animate(portrait, [motion]),
        *animator.view(portrait, motion.camera),
        *animator.edit(portrait, 5 * np.eye(10, dtype=np.float32)[:1]),
    ]
    assert {frame.shape for frame in frames} == {photo.shape}
    outside = np.ones((height, width), bool)
    outside[portrait.canvas.window] = False
    assert outside.any() == (photo is WIDE)  # where the person cannot come
    for frame in frames:
        np.testing.assert_array_equal(frame[outside], photo[outside])
        assert np.abs(frame[~outside].astype(int) - photo[~outside]).max() > 20


def test_layers_composed_are_the_frames(animator: Animator, portrait: Portrait) -> None:
    motion = moving(portrait, 3)
    layers = list(animator.animate(portrait, [motion], layers=True))
    composed = np.stack([portrait.canvas.compose(layer) for layer in layers])
    np.testing.assert_array_equal(composed, stack(animator.animate(portrait, [motion])))
    assert {layer.image.shape for layer in layers} == {portrait.crop.shape}


def test_portraits_of_two_photos_do_not_mix(animator: Animator) -> None:
    portraits = [animator.portrait(photo) for photo in (TALL, np.ascontiguousarray(WIDE[:, ::-1]))]
    motions = [moving(portrait, 5, seed) for seed, portrait in enumerate(portraits)]
    alone = [stack(animator.animate(*args)) for args in zip(portraits, [[m] for m in motions], strict=True)]
    pairs = zip(*(animator.animate(p, [m]) for p, m in zip(portraits, motions, strict=True)), strict=True)
    for index, frames in enumerate(pairs):
        for frame, expected in zip(frames, alone, strict=True):
            np.testing.assert_array_equal(frame, expected[index])


@pytest.mark.parametrize("sizes", [[1] * 11, [3, 5, 3], [11]])
def test_frames_do_not_depend_on_how_motions_are_chunked(
    animator: Animator, portrait: Portrait, sizes: list[int]
) -> None:
    motion = moving(portrait, 11)
    ends = np.cumsum(sizes)
    chunks = [motion.select(np.arange(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    assert animator.chunk_size == 4
    expected = stack(animator.animate(portrait, [motion.select(np.arange(k, min(k + 4, 11))) for k in (0, 4, 8)]))
    np.testing.assert_array_equal(stack(animator.animate(portrait, chunks)), expected)


def test_frames_do_not_depend_on_earlier_animations(tiny_weights: Path, animator: Animator, portrait: Portrait) -> None:
    motion = moving(portrait, 6)
    fresh = Animator.from_weights(tiny_weights, device="cpu", precision="fp32")
    expected = stack(fresh.animate(fresh.portrait(PHOTO), [motion]))
    other = animator.portrait(np.ascontiguousarray(PHOTO[:, ::-1]))
    list(animator.animate(other, [moving(portrait, 5, seed=1)]))
    abandoned = animator.animate(portrait, [moving(portrait, 9, seed=2)], control=Control(expression_scale=3))
    next(abandoned)
    np.testing.assert_array_equal(stack(animator.animate(portrait, [motion])), expected)


def test_animations_leave_nothing_to_the_garbage_collector(animator: Animator, portrait: Portrait) -> None:
    """Each frame of a camera is an animation of its own, and leaves megabytes of tri-planes if they are in a cycle."""
    gc.collect()
    gc.disable()
    try:
        for frames in (1, 9):
            list(animator.animate(portrait, [moving(portrait, frames)]))
        next(animator.animate(portrait, [portrait.motion]))
        list(animator.edit(portrait, NO_CHANGE))
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_interleaved_animations_do_not_affect_each_other(animator: Animator, portrait: Portrait) -> None:
    motions = [moving(portrait, 6, seed) for seed in (0, 1)]
    expected = [stack(animator.animate(portrait, [motion])) for motion in motions]
    pairs = zip(*(animator.animate(portrait, [motion]) for motion in motions), strict=True)
    for index, frames in enumerate(pairs):
        for frame, alone in zip(frames, expected, strict=True):
            np.testing.assert_array_equal(frame, alone[index])


def test_two_threads_give_the_bytes_of_two_separate_runs(tiny_weights: Path, tmp_path: Path, make_clip) -> None:  # type: ignore[no-untyped-def]
    """From files to files: tracking, encoding, rendering, composition and writing at the same time."""
    driver = make_clip("clip3.mp4", frames=3)
    jobs = {
        "a": (example_path("source.jpg"), ReenactOptions(compare=True)),
        "b": (example_path("astronaut.jpg"), ReenactOptions(background="#204060", pose="relative")),
    }
    for name, (source, options) in jobs.items():
        alone = Animator.from_weights(tiny_weights, device="cpu", precision="fp32")
        reenact(alone, source, driver, tmp_path / f"{name}-alone.mp4", options)
    shared = Animator.from_weights(tiny_weights, device="cpu", precision="fp32")
    for attempt in range(2):
        with ThreadPoolExecutor(2) as pool:
            outs = {name: tmp_path / f"{name}-{attempt}.mp4" for name in jobs}
            runs = [
                pool.submit(reenact, shared, source, driver, outs[name], options)
                for name, (source, options) in jobs.items()
            ]
            for run in runs:
                run.result()
        for name, out in outs.items():
            assert out.read_bytes() == (tmp_path / f"{name}-alone.mp4").read_bytes(), (name, attempt)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_model_that_is_passed_in_is_not_changed(tiny_weights: Path, precision: str) -> None:
    model = load_model(tiny_weights).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    animator = Animator(model, device=torch.device("cpu"), precision=precision)
    portrait = animator.portrait(PHOTO)
    list(animator.animate(portrait, [moving(portrait, 3)]))
    assert model.training and all(part.training for part in model.modules())
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_half_precision_casts_a_copy_and_fp32_shares_the_weights(tiny_weights: Path) -> None:
    model = load_model(tiny_weights)
    frames = {}
    for precision in ("fp32", "bf16"):
        animator = Animator(model, device=torch.device("cpu"), precision=precision)
        (frames[precision],) = animator.edit(animator.portrait(PHOTO), NO_CHANGE)
        shares = animator.model.superres.to1.weight is model.superres.to1.weight
        assert shares == (precision == "fp32")
    assert animator.model.superres.to1.weight.dtype == torch.bfloat16
    assert animator.model.expression.basis().dtype == torch.float32
    assert np.square(frames["bf16"].astype(float) - frames["fp32"]).mean() < 255**2 / 10**3.8


def test_frames_that_overflow_in_half_precision_are_rendered_in_fp32(
    tiny_weights: Path, animator: Animator, portrait: Portrait, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half-precision tri-planes are not finite; other animations of the same Animator are not affected."""
    half = Animator.from_weights(tiny_weights, device="cpu", precision="bf16", batch=2)
    half_portrait = half.portrait(PHOTO)
    cameras = orbit_cameras(portrait.camera, NovelViewOptions(frames=5))
    expected = stack(animator.view(portrait, cameras))
    before = stack(half.view(half_portrait, cameras))
    notes: list[str] = []
    with monkeypatch.context() as patch:
        generate = half.model.generate_planes
        patch.setattr(half.model, "generate_planes", lambda *args: generate(*args) * torch.inf)
        frames = stack(half.view(half_portrait, cameras, notify=notes.append))
    assert np.abs(frames.astype(int) - expected).max() <= 1
    assert notes == ["bf16 gave values that are not finite: rendered in fp32 instead"]
    assert half.precision == half_portrait.precision == "bf16"
    np.testing.assert_array_equal(stack(half.view(half_portrait, cameras)), before)


def test_photo_that_overflows_in_half_precision_is_encoded_in_fp32(
    tiny_weights: Path, animator: Animator, portrait: Portrait, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Animator.from_weights(tiny_weights, device="cpu", precision="bf16")
    encode = half.model.generator.encode
    monkeypatch.setattr(half.model.generator, "encode", lambda image: (encode(image)[0], encode(image)[1] * torch.nan))
    found, notes = half.portrait(PHOTO), []
    assert found.precision == "fp32"
    (frame,) = half.animate(found, [portrait.motion], notify=notes.append)
    (expected,) = animator.animate(portrait, [portrait.motion])
    assert np.abs(frame.astype(int) - expected).max() <= 1
    assert len(notes) == 1 and "not finite" in notes[0]


def test_values_that_are_not_finite_in_fp32_are_an_error(
    animator: Animator, portrait: Portrait, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = animator.model.generate_planes
    monkeypatch.setattr(animator.model, "generate_planes", lambda *args: generate(*args) * torch.inf)
    with pytest.raises(Export3DError, match="not finite: use a smaller scale"):
        list(animator.edit(portrait, NO_CHANGE))


def test_arrays_of_the_wrong_shape_or_not_finite_are_refused(animator: Animator, portrait: Portrait) -> None:
    with pytest.raises(InputError, match=r"cameras must be finite numbers of shape \(T, 25\), got \(25,\)"):
        animator.view(portrait, portrait.motion.camera[0])
    with pytest.raises(InputError, match=r"beta must be .* \(T, 64\), got \(1, 52\)"):
        animator.view(portrait, portrait.motion.camera, beta=np.zeros((1, 52)))
    with pytest.raises(InputError, match=r"beta must have 1 or 3 rows, got 2"):
        animator.view(portrait, np.repeat(portrait.motion.camera, 3, axis=0), beta=np.zeros((2, 64)))
    with pytest.raises(InputError, match=r"changes must be finite numbers of shape \(T, 35\)"):
        animator.edit(portrait, NO_CHANGE * np.nan)


@pytest.mark.parametrize("same_model", [True, False])
def test_portrait_of_another_animator_is_refused(
    tiny_weights: Path, animator: Animator, portrait: Portrait, same_model: bool
) -> None:
    other = Animator.from_weights(tiny_weights, device="cpu", precision="fp32")
    if same_model:
        other = Animator(animator.model, device=animator.device, precision="fp32")
    calls = (
        (other.animate, [portrait.motion]), (other.view, portrait.motion.camera), (other.edit, NO_CHANGE),
        (other.query_field, np.zeros((1, 3))),
    )  # fmt: skip
    for call, argument in calls:
        with pytest.raises(Export3DError, match="encoded by another Animator: call portrait"):
            call(portrait, argument)


def test_relative_control_without_a_reference_frame_is_refused(animator: Animator, portrait: Portrait) -> None:
    with pytest.raises(InputError, match="needs the driver's reference frame"):
        animator.animate(portrait, [portrait.motion], control=Control(pose="relative"))


def test_expression_gain_of_the_weights_scales_the_driver_s_expression(tiny_weights: Path) -> None:
    """With the neutral gain of 1, an expression scale of 1.1 gives what these weights do by themselves."""
    calibrated = load_model(tiny_weights)
    neutral = Export3D(replace(calibrated.config, expression_gain=1.0))
    neutral.load_state_dict(calibrated.state_dict())
    assert calibrated.config.expression_gain == 1.1
    frames = []
    for model, scale in ((calibrated, 1.0), (neutral, 1.1), (neutral, 1.0)):
        animator = Animator(model, device=torch.device("cpu"), precision="fp32")
        portrait = animator.portrait(PHOTO)
        control = Control(expression_scale=scale)
        frames.append(stack(animator.animate(portrait, [moving(portrait, 3)], control=control)).astype(int))
    assert np.abs(frames[0] - frames[1]).max() <= 1
    assert np.abs(frames[0] - frames[2]).max() > 1


def test_frames_follow_landmarks_that_beta_does_not_tell(animator: Animator, portrait: Portrait) -> None:
    """Relative to the reference frame, and only where the whole face is driven."""
    still = portrait.motion.select(np.zeros(2, np.int64))
    moved = still.head_landmarks
    moved[1, [61, 146, 91]] += (0.0, 0.03, 0.0)  # a corner of the mouth
    motion = still.with_head(still.camera, moved)
    control = partial(Control, pose="relative")

    def change(control: Control) -> int:
        rest, driven = animator.animate(portrait, [motion], control=control, reference=still.select(np.array([0])))
        return int(np.abs(driven.astype(int) - rest).max())

    assert change(control()) > 20
    assert change(control(expression_scale=0.0)) == change(control(drive=("head",))) == 0
    assert change(control(drive=("head", "eyes", "brows"))) == 0


def test_edits_show_as_much_with_the_driver_s_landmarks_as_without(animator: Animator, portrait: Portrait) -> None:
    """The driver is the portrait at rest, so that its landmarks add nothing."""
    rest = portrait.motion
    bare = replace(rest, landmarks=rest.landmarks[:, :0])
    edit = EditedExpression(rest.beta[0], rest.beta + np.linspace(-0.2, 0.3, 64, dtype=np.float32), ())
    frames = [
        next(animator.animate(portrait, [x], control=Control(pose="relative"), reference=x, edit=edit)).astype(int)
        for x in (rest, bare)
    ]
    assert np.abs(frames[0] - frames[1]).max() <= 1
    assert np.abs(frames[0] - next(animator.animate(portrait, [rest]))).max() > 5


def test_pick_device_and_precision() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="meta"):
        pick_device("meta")
    with pytest.raises(InputError, match="unknown"):
        pick_device("banana")
    assert pick_precision("bf16", torch.device("cpu")) == "bf16"
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")


def test_precision_notes_name_half_precision_that_a_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def notes(precision: str, capable: bool) -> list[str]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
        return precision_notes(precision, torch.device("cpu"))

    assert notes("fp32", False) == [] and notes("bf16", True) == []
    (note,) = notes("bf16", False)
    assert "bf16" in note and "auto" in note


def test_fast_quality_generates_one_tri_plane_of_a_portrait(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    animator = Animator.from_weights(tiny_weights, device="cpu", precision="fp32", quality="fast")
    portrait, calls = animator.portrait(PHOTO), list[torch.Tensor]()
    generate = animator.model.generate_planes
    monkeypatch.setattr(
        animator.model, "generate_planes", lambda source, lam: calls.append(lam) or generate(source, lam)
    )
    frames = [stack(animator.animate(portrait, [moving(portrait, 5)])) for _ in range(2)]
    next(animator.edit(portrait, NO_CHANGE))
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], portrait.source.lam)
    np.testing.assert_array_equal(*frames)


def test_quality_sets_how_finely_the_volume_is_sampled(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, sides, samples = {}, {}, {}
    for quality in RENDER_SCALES:
        animator = Animator.from_weights(tiny_weights, device="cpu", precision="fp32", quality=quality)
        drive = animator.model.drive

        def record(*args: object, quality: str = quality, drive=drive, **named: object) -> object:  # type: ignore[no-untyped-def]
            output = drive(*args, **named)
            sides[quality] = output.raw.shape[-1]
            samples[quality] = named["samples"]
            return output

        monkeypatch.setattr(animator.model, "drive", record)
        frames[quality] = next(animator.edit(animator.portrait(PHOTO), NO_CHANGE)).astype(float)
    assert sides == {"fast": 8, "balanced": 8, "best": 16}
    best = PRESETS["tiny"].coarse_samples
    assert [samples[quality][0] / best for quality in ("fast", "balanced", "best")] == [0.5, 0.75, 1]
    assert 0 < np.square(frames["balanced"] - frames["best"]).mean() < 255**2 / 10**3.8
