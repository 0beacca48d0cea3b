"""Photo and driver in, video out, with tiny untrained weights: rates, frames, sound; not how it looks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.animation import views as module
from export3d_cli.core.animation.animator import Animator, ReenactOptions, reenact
from export3d_cli.core.animation.output_size import QUALITIES, sampling
from export3d_cli.core.animation.views import EditOptions, NovelViewOptions, edit_basis, novel_view, orbit_cameras
from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.probe import ffmpeg_path, probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.model.checkpoint import load_into, load_weights
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.device import pick_device, pick_precision, restore_fp32
from export3d_cli.core.runtime.errors import Export3DError, InputError
from export3d_cli.core.runtime.weights import example_path

MakeClip = Callable[..., Path]
SOURCE = example_path("source.jpg")
LOSSLESS = {"audio": "none", "crf": 0}


def frames_of(path: Path) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return [frame.astype(int) for frame in reader]


def test_length_and_rate_are_the_driver_s(animator: Animator, make_clip: MakeClip, tmp_path: Path) -> None:
    out, told = tmp_path / "out.mp4", []
    summary = reenact(
        animator, SOURCE, make_clip("clip.mp4"), out, progress=lambda stage, k, n: told.append((stage, k, n))
    )
    info = probe(out)
    assert info.fps == summary.fps == Fraction(30000, 1001)
    assert (info.width, info.height, info.frame_count) == (128, 128, 6)
    assert (summary.frames, summary.missing, summary.out, summary.notes) == (6, 0, out, ())
    assert told == [("frames", k, 6) for k in range(1, 7)]
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    frames = frames_of(out)
    assert any(np.abs(frame - frames[0]).max() > 2 for frame in frames)  # it moves


def test_a_static_driver_gives_a_static_result(animator: Animator, make_clip: MakeClip, tmp_path: Path) -> None:
    clip = make_clip("static.mp4", filters="loop=loop=-1:size=1:start=0")
    reenact(animator, SOURCE, clip, tmp_path / "out.mp4", ReenactOptions(**LOSSLESS))
    frames = frames_of(tmp_path / "out.mp4")
    assert len(frames) == 6
    assert max(np.abs(frame - frames[0]).max() for frame in frames) <= 1


def test_frames_without_a_face_are_held(animator: Animator, make_clip: MakeClip, tmp_path: Path) -> None:
    clip = make_clip("gap2.mp4", filters="drawbox=enable='between(n,3,4)':t=fill:color=black:w=iw:h=ih")
    summary = reenact(animator, SOURCE, clip, tmp_path / "out.mp4", ReenactOptions(**LOSSLESS))
    assert (summary.frames, summary.missing) == (6, 2)
    frames = frames_of(tmp_path / "out.mp4")
    np.testing.assert_array_equal(frames[3], frames[2])
    np.testing.assert_array_equal(frames[4], frames[2])


def test_compare_shows_source_driver_and_result(animator: Animator, make_clip: MakeClip, tmp_path: Path) -> None:
    clip = make_clip("clip.mp4")
    reenact(animator, SOURCE, clip, tmp_path / "alone.mp4", ReenactOptions(**LOSSLESS))
    reenact(animator, SOURCE, clip, tmp_path / "three.mp4", ReenactOptions(**LOSSLESS, compare=True))
    alone, three = frames_of(tmp_path / "alone.mp4"), frames_of(tmp_path / "three.mp4")
    assert three[0].shape == (128, 384, 3)
    for one, wide in zip(alone, three, strict=True):
        assert np.abs(wide[:, :127] - animator.source_crop()[:, :127]).mean() < 6  # colour is kept at half size
        assert np.abs(wide[:, 257:] - one[:, 1:]).mean() < 2
    assert np.abs(three[0][:, 128:256] - three[5][:, 128:256]).max() > 5  # the driver moves
    motion = tmp_path / "a.motion.npz"
    animator.set_source(read_image(SOURCE)).save(motion)
    with pytest.raises(InputError, match="no pictures"):
        reenact(animator, SOURCE, motion, tmp_path / "no.mp4", ReenactOptions(compare=True))
    assert not (tmp_path / "no.mp4").exists()


def test_a_crop_is_as_wide_in_the_driver_as_in_the_source(animator: Animator) -> None:
    motion = animator.set_source(read_image(SOURCE))
    extent = np.ptp(motion.landmarks[0, :, :2], axis=0).max()
    assert animator.crop_scale == pytest.approx(1 / extent)
    assert animator.source_crop().shape == (128, 128, 3)
    np.testing.assert_allclose(animator.source_camera().to_vector(), motion.camera[0], atol=1e-6)


def onset(path: Path) -> float:
    """Seconds before a file is first heard."""
    command = [ffmpeg_path(), "-loglevel", "error", "-i", str(path), "-f", "s16le", "-ac", "1", "-ar", "8000", "pipe:1"]
    samples = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.int16)
    return float(np.argmax(np.abs(samples.astype(int)) > 2000)) / 8000


def test_the_driver_s_sound_is_skipped_along_and_another_file_s_is_not(
    animator: Animator, make_clip: MakeClip, tmp_path: Path
) -> None:
    """A tone begins 0.6 s into both; half a second of the driver is skipped."""
    tone = ["-f", "lavfi", "-i", "sine=f=800:d=1,volume=8,adelay=600"]
    clip = make_clip("sound.mkv", *tone, "-map", "0:v", "-map", "1:a", "-c:a", "pcm_s16le", frames=12, rate="10")
    other, motion = tmp_path / "other.wav", tmp_path / "a.motion.npz"
    subprocess.run([ffmpeg_path(), "-loglevel", "error", *tone, str(other)], check=True)
    animator.set_source(read_image(SOURCE)).save(motion)
    heard = {}
    for name, driver, options in (
        ("driver", clip, ReenactOptions(start=0.5)),
        ("file", clip, ReenactOptions(start=0.5, audio=str(other))),
        ("none", clip, ReenactOptions(audio="none", max_frames=2)),
        ("motion", motion, ReenactOptions()),
        ("motion and file", motion, ReenactOptions(audio=str(other))),
    ):
        out = tmp_path / f"{name}.mkv"
        reenact(animator, SOURCE, driver, out, options)
        heard[name] = probe(out).has_audio
        if name in ("driver", "file"):
            assert onset(out) == pytest.approx({"driver": 0.1, "file": 0.6}[name], abs=0.05)
    assert heard == {"driver": True, "file": True, "none": False, "motion": False, "motion and file": True}


def test_the_same_weights_and_files_give_the_same_frames(
    tiny_weights: Path, animator: Animator, make_clip: MakeClip, tmp_path: Path
) -> None:
    """Whatever went through the animator before, and whoever made it."""
    clip = make_clip("clip.mp4")
    again = Animator.from_weights(tiny_weights, device="cpu", precision="fp32")
    for name, who in (("a.mp4", animator), ("b.mp4", animator), ("c.mp4", again)):
        reenact(who, SOURCE, clip, tmp_path / name, ReenactOptions(max_frames=3))
    assert len({(tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4")}) == 1


def test_driving_with_its_own_motion_is_the_source_s_own_view(animator: Animator) -> None:
    motion = animator.set_source(read_image(SOURCE))
    (driven,) = animator.drive([motion])
    (viewed,) = animator.view(motion.camera)
    (edited,) = animator.edit(np.zeros((1, 10), np.float32))
    for other in (viewed, edited):
        assert np.abs(other.astype(int) - driven).max() <= 1


def test_views_and_edits_change_what_they_say(animator: Animator, tmp_path: Path) -> None:
    animator.set_source(read_image(SOURCE))
    changes = np.zeros((3, 10), np.float32)
    changes[2, 4] = 5
    still, same, changed = (frame.astype(int) for frame in animator.edit(changes))
    assert np.abs(same - still).max() <= 1
    assert np.abs(changed - still).max() > 2
    summary = novel_view(animator, SOURCE, tmp_path / "view.mp4", NovelViewOptions(frames=4, crf=0))
    assert (summary.frames, summary.fps) == (4, 25)
    views = frames_of(tmp_path / "view.mp4")
    assert np.abs(views[0] - views[2]).max() > 5  # from one side, then from the other
    assert np.abs(views[1] - views[3]).max() <= 1  # on the way there and back
    edit_basis(animator, SOURCE, tmp_path / "edit.mp4", EditOptions(edits=((1, (0.0, 3.0)), (2, (0.0, 3.0))), frames=3))
    assert len(frames_of(tmp_path / "edit.mp4")) == 3
    for v in (0, 11):
        with pytest.raises(InputError, match="1 to 10"):
            edit_basis(animator, SOURCE, tmp_path / "x.mp4", EditOptions(edits=((v, (0.0, 1.0)),)))


def test_a_sweep_goes_on_in_full_precision_where_half_overflows(
    tiny_weights: Path, animator: Animator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one tri-plane was no number: it is made again."""
    half = Animator.from_weights(tiny_weights, device="cpu", precision="bf16", batch=2)
    make = half.model.generate_planes
    monkeypatch.setattr(
        half.model, "planes", lambda *given: make(*given) * (torch.inf if half.precision == "bf16" else 1)
    )
    made = []
    for who in (half, animator):
        who.set_source(read_image(SOURCE))
        made.append(np.stack(list(who.view(orbit_cameras(who.source_camera(), NovelViewOptions(frames=5))))))
    assert sum("not finite" in note for note in half.notes) == 1 and half.precision == "fp32"
    assert np.abs(made[0].astype(int) - made[1]).max() <= 1


@pytest.mark.parametrize(("kept", "made"), [(1 << 20, 4), (0, 6)])
def test_what_is_seen_again_is_made_once(
    animator: Animator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int, made: int
) -> None:
    """On the way there and back, in bounded memory; and it is what would be made again."""
    views, asked, view = [], [], animator.view
    monkeypatch.setattr(module, "KEPT_BYTES", kept)
    monkeypatch.setattr(animator, "view", lambda cameras, **how: asked.append(len(cameras)) or view(cameras, **how))
    for name, marked in (("plain.mp4", "none"), ("marked.mp4", "visible")):
        options = NovelViewOptions(frames=6, crf=0, watermark=marked)
        novel_view(animator, SOURCE, tmp_path / name, options)
        views.append(frames_of(tmp_path / name))
    assert asked == [made] * 2
    alone = list(view(orbit_cameras(animator.source_camera(), options)))
    for k in range(6):
        assert np.abs(views[0][k] - alone[k]).mean() < 2  # colour is kept at half size
        for seen in views:
            assert np.abs(seen[k] - seen[-k % 6]).max() <= 1
    assert np.abs(alone[0].astype(int) - alone[3]).max() > 5


def test_orbits_take_the_angles_asked_for_at_the_photo_s_distance() -> None:
    pose = np.linalg.inv(Camera.orbit(12, 3, 4, radius=3.1).cam2world)
    pose[:2, 3] += 0.05
    photo = Camera(np.linalg.inv(pose), Camera.orbit(0).intrinsics)
    sweep = orbit_cameras(photo, NovelViewOptions(yaw=(-30, 30), pitch=(0, 10), frames=5, loop="once"))
    cameras = [Camera.from_vector(row) for row in sweep]
    expected = [(-30, 0, 0), (-15, 2.5, 0), (0, 5, 0), (15, 7.5, 0), (30, 10, 0)]
    np.testing.assert_allclose([camera.angles() for camera in cameras], expected, atol=1e-4)
    centre = photo.project(np.zeros((1, 3)))
    for camera in cameras:
        np.testing.assert_allclose(camera.project(np.zeros((1, 3))), centre, atol=1e-5)
    loop = orbit_cameras(photo, NovelViewOptions(yaw=(-30, 30), frames=8))
    yaw = np.array([Camera.from_vector(row).angles()[0] for row in loop])
    assert yaw[0] == pytest.approx(-30, abs=1e-4)
    assert yaw[4] == pytest.approx(30, abs=1e-4)
    np.testing.assert_allclose(yaw[1:4], yaw[:4:-1], atol=1e-4)  # there and back


def test_calls_out_of_order_say_what_comes_first(tiny_weights: Path, animator: Animator) -> None:
    state, config, _ = load_weights(tiny_weights)
    assert config == PRESETS["tiny"]
    model = Export3D(config)
    load_into(model, state)
    fresh = Animator(model, animator.tracker, device=torch.device("cpu"), precision="fp32")
    empty = Motion(
        np.zeros((1, 64), np.float32), Camera.orbit(0).to_vector()[None], np.zeros((1, 478, 3), np.float32),
        np.ones(1, bool), Fraction(25), (0.0, 0.0, 1.0), (1, 1),
    )  # fmt: skip
    for call in (
        lambda: next(fresh.drive([empty])), lambda: next(fresh.view(empty.camera)), fresh.source_camera,
        fresh.source_crop, lambda: fresh.crop_scale,
    ):  # fmt: skip
        with pytest.raises(Export3DError, match="set_source"):
            call()


def test_devices_and_precisions() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="meta"):
        pick_device("meta")
    with pytest.raises(InputError, match="unknown"):
        pick_device("banana")
    assert pick_precision("bf16", torch.device("cpu")) == "bf16"
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")


def test_half_precision_that_a_cpu_lacks_is_told(animator: Animator, monkeypatch: pytest.MonkeyPatch) -> None:
    def notes(precision: str, capable: bool) -> list[str]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
        model = Export3D(animator.model.config)
        return Animator(model, animator.tracker, device=torch.device("cpu"), precision=precision).notes

    assert notes("fp32", False) == [] and notes("bf16", True) == []
    (note,) = notes("bf16", False)
    assert "bf16" in note and "auto" in note


def test_quality_is_how_finely_the_volume_is_sampled(tiny_weights: Path) -> None:
    config = PRESETS["compact"]
    assert sampling(config, "best") == (64, (16, 16))
    assert sampling(config, "balanced") == (32, (12, 12))
    assert sampling(config, "fast") == (32, (8, 8))
    made, rays = {}, {}
    for quality in QUALITIES:
        animator = Animator.from_weights(tiny_weights, device="cpu", precision="fp32", quality=quality)
        animator.set_source(read_image(SOURCE))
        made[quality] = next(animator.edit(np.zeros((1, 10), np.float32))).astype(float)
        with torch.inference_mode():
            lam = animator._need_source().lam
            rays[quality] = animator._drive(animator.source_camera().to_vector()[None], lam, None).raw.shape[-1]
    assert rays == {"fast": 8, "balanced": 8, "best": 16}
    assert 0 < np.square(made["balanced"] - made["best"]).mean() < 255**2 / 10**3.8


def test_half_precision_keeps_its_weights_and_full_ones_for_when_it_fails(tiny_weights: Path) -> None:
    made, weights = {}, {}
    for precision in ("fp32", "bf16"):
        animator = Animator.from_weights(tiny_weights, device="cpu", precision=precision)
        animator.set_source(read_image(SOURCE))
        made[precision] = next(animator.edit(np.zeros((1, 10), np.float32))).astype(float)
        weights[precision] = {name: p.detach().clone() for name, p in animator.model.named_parameters()}
    assert animator.model.superres.to1.weight.dtype == torch.bfloat16
    assert animator.model.expression.basis().dtype == torch.float32
    assert np.square(made["bf16"] - made["fp32"]).mean() < 255**2 / 10**3.8
    assert not torch.equal(weights["bf16"]["superres.to1.weight"].float(), weights["fp32"]["superres.to1.weight"])
    for part, full in zip(animator._parts, animator._full, strict=True):
        restore_fp32(part, full)
    for name, parameter in animator.model.named_parameters():
        assert torch.equal(parameter, weights["fp32"][name]), name
