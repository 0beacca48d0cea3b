"""A video as the source: which pixels and frames change, lengths, sound; and what controls show in its frames."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.attribute_editing import Look
from export3d_cli.core.animation.clip_editing import edit_clip
from export3d_cli.core.animation.expression_controls import CONTROLS, ExpressionEdit
from export3d_cli.core.animation.options import ReenactOptions, choose_sound
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.animation.retouching import WINDOW_SCALE
from export3d_cli.core.face.face_track import FaceTrack, rotate_clockwise
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.probe import ffmpeg_path, probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

MakeClip = Callable[..., Path]
SMILE = ReenactOptions(expression=ExpressionEdit({"smile": 0.6}), watermark="none")
BLANK = "drawbox=color=gray:t=fill:enable='between(n,4,6)'"  # frames 4 to 6 show no face


def frames_of(path: Path) -> np.ndarray:
    with VideoReader(path) as reader:
        return np.stack(list(reader)).astype(int)


@pytest.fixture
def clip(make_clip: MakeClip) -> Path:
    return make_clip("wide.mp4", frames=12, filters=f"scale=256:256,pad=480:270:100:7:green,{BLANK}")


def test_only_the_face_changes_and_frames_without_a_face_pass(animator: Animator, clip: Path, tmp_path: Path) -> None:
    summary = edit_clip(animator, clip, tmp_path / "%05d.png", SMILE)
    before = frames_of(clip)
    after = np.stack([read_image(path) for path in sorted(tmp_path.glob("*.png"))]).astype(int)
    assert (summary.frames, summary.missing, summary.fps) == (12, 3, Fraction(30000, 1001))
    changed = np.abs(after - before).max(-1) > 0
    frames = changed.any((1, 2))
    assert frames[[0, 1, 11]].all() and not frames[4:7].any()
    track = FaceTrack(animator.tracker())
    with VideoReader(clip) as reader:
        faces = [track.track(frame) for frame in reader]
    for mask, face in zip(changed, faces, strict=True):
        if face is not None:
            low, high = face.landmarks[:, :2].min(0), face.landmarks[:, :2].max(0)
            reach = WINDOW_SCALE / 2 * (high - low).max() + 2
            left, top = np.floor((low + high) / 2 - reach).astype(int)
            right, bottom = np.ceil((low + high) / 2 + reach).astype(int)
            mask[max(0, top) : bottom, max(0, left) : right] = False
    assert not changed.any()


@pytest.mark.parametrize(
    ("length", "frames", "edited"), [("source", 12, 8), ("driver", 15, 15), ("shortest", 12, 12), ("loop", 12, 12)]
)
def test_length_of_clip_and_driver(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, length: Any, frames: int, edited: int
) -> None:
    clip = make_clip("clip12.mp4", frames=12)
    driver = make_clip(f"driver-{length}.mp4", "-ss", "1", frames={"source": 3, "loop": 5}.get(length, 15))
    options = ReenactOptions(drive=("mouth",), length=length, max_frames=20, watermark="none")
    summary = reenact(animator, clip, driver, tmp_path / "%05d.png", options)
    assert summary.frames == len(list(tmp_path.glob("*.png"))) == frames
    before = frames_of(clip)
    changed = [bool((read_image(tmp_path / f"{k:05d}.png") != before[k % 12]).any()) for k in range(frames)]
    assert changed == [True] * edited + [False] * (frames - edited)


def test_corrections_alone_edit_a_clip_and_a_photo(animator: Animator, clip: Path, tmp_path: Path) -> None:
    options = ReenactOptions(eyes_to_camera=True, max_frames=2)
    edit_clip(animator, clip, tmp_path / "%05d.png", options)
    assert (read_image(tmp_path / "00001.png") != frames_of(clip)[1]).any()
    with pytest.raises(InputError, match="has no sound"):
        edit_clip(animator, clip, tmp_path / "out.mp4", ReenactOptions(lips_shut_when_silent=True))
    plain, looking = (tmp_path / name / "%05d.png" for name in ("plain", "looking"))
    reenact(animator, example_path("source.jpg"), clip, plain, ReenactOptions(max_frames=2))
    reenact(animator, example_path("source.jpg"), clip, looking, options)
    assert (read_image(plain.with_name("00001.png")) != read_image(looking.with_name("00001.png"))).any()


def test_sound_and_rate_are_the_clip_s(animator: Animator, clip: Path, tmp_path: Path) -> None:
    loud, out = tmp_path / "loud.mp4", tmp_path / "out.mp4"
    command = [ffmpeg_path(), "-loglevel", "error", "-i", str(clip), "-f", "lavfi", "-i", "sine=330:d=0.4"]
    subprocess.run([*command, "-c:v", "copy", "-c:a", "aac", str(loud)], check=True)
    reenact(animator, loud, example_path("drive.mp4"), out, ReenactOptions(drive=("mouth",), max_frames=6))
    info = probe(out)
    assert (info.has_audio, info.fps, info.width, info.height) == (True, Fraction(30000, 1001), 480, 270)
    auto, own, driven = (ReenactOptions(audio=audio) for audio in ("auto", "source", "driver"))
    photo, driver = None, example_path("drive.mp4")
    assert [choose_sound(o, photo, driver) for o in (auto, driven, ReenactOptions(audio="none"))] == [
        driver,
        driver,
        None,
    ]
    assert [choose_sound(o, loud, driver) for o in (auto, own, driven)] == [loud, loud, driver]
    assert choose_sound(ReenactOptions(drive_by="sound"), loud, driver) == driver
    assert choose_sound(auto, photo, Path("take.csv")) is None
    with pytest.raises(InputError, match="needs a video"):
        choose_sound(own, photo, driver)


def test_a_clip_on_its_side_is_edited_as_the_upright_one(animator: Animator, clip: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned.mp4"
    encoder = ["-c:v", "libx264rgb", "-crf", "0"]
    subprocess.run(
        [ffmpeg_path(), "-loglevel", "error", "-i", str(clip), "-vf", "transpose=1", *encoder, str(turned)], check=True
    )
    upright = tmp_path / "upright.mp4"
    subprocess.run([ffmpeg_path(), "-loglevel", "error", "-i", str(clip), *encoder, str(upright)], check=True)
    for path in (turned, upright):
        edit_clip(animator, path, tmp_path / path.stem / "%05d.png", replace(SMILE, max_frames=2))
    one, other = (read_image(tmp_path / name / "00001.png") for name in ("turned", "upright"))
    np.testing.assert_array_equal(rotate_clockwise(one, 270), other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compare": True, "framing": "face"}, "leave out --frame, --compare"),
        ({"look": Look(age=5)}, "leave out --look"),
        ({"drive": ("head", "mouth")}, "leave head out"),
        ({"drive": ("head",)}, "leave head out"),
        ({"scales": (("all", 0.0),)}, None),
    ],
)
def test_options_of_photos_are_refused(
    animator: Animator, clip: Path, tmp_path: Path, options: dict[str, Any], words: str | None
) -> None:
    if words is None:
        with pytest.raises(InputError, match="nothing to edit"):
            edit_clip(animator, clip, tmp_path / "out.mp4")
        with pytest.raises(InputError, match="is not a video"):
            edit_clip(animator, example_path("source.jpg"), tmp_path / "out.mp4", SMILE)
        return
    with pytest.raises(InputError, match=words):
        reenact(animator, clip, example_path("drive.mp4"), tmp_path / "out.mp4", ReenactOptions(**options))


def test_shipped_weights_hold_a_control_in_every_frame(make_clip: MakeClip, tmp_path: Path) -> None:
    animator = Animator.from_weights(device="cpu")
    clip = make_clip("talk.mp4", frames=24)
    options = ReenactOptions(expression=ExpressionEdit({"smile": 0.6}), smooth="off")
    edit_clip(animator, clip, tmp_path / "%05d.png", options)
    tracker = animator.tracker()
    before, after = (
        tracker.track_crops(list(frames.astype(np.uint8)))  # type: ignore[attr-defined]
        for frames in (frames_of(clip), np.stack([read_image(p) for p in sorted(tmp_path.glob("*.png"))]))
    )
    smile, blink = CONTROLS["smile"].measure, CONTROLS["blink"].measure
    assert np.abs(smile(after.beta) - 0.6).mean() < 0.12
    assert np.abs(smile(before.beta) - 0.6).mean() > 0.3
    assert np.abs(blink(after.beta) - blink(before.beta)).mean() < 0.03
