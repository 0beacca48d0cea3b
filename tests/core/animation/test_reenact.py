"""Photo and driver in, video out, with tiny untrained weights: rates, frames, sound; not how it looks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.probe import ffmpeg_path, probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

MakeClip = Callable[..., Path]
SOURCE = example_path("source.jpg")
LOSSLESS = ReenactOptions(audio="none", crf=0)


def read_frames(path: Path) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return [frame.astype(int) for frame in reader]


def test_reenact_keeps_the_driver_s_length_and_rate(animator: Animator, make_clip: MakeClip, tmp_path: Path) -> None:
    out, reports = tmp_path / "out.mp4", []
    summary = reenact(
        animator, SOURCE, make_clip("clip.mp4"), out, progress=lambda stage, k, n: reports.append((stage, k, n))
    )
    info = probe(out)
    assert info.fps == summary.fps == Fraction(30000, 1001)
    assert (info.width, info.height, info.frame_count) == (512, 512, 6)
    assert (summary.frames, summary.missing, summary.out, summary.notes) == (6, 0, out, ())
    assert reports == [("frames", k, 6) for k in range(1, 7)]
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    frames = read_frames(out)
    assert any(np.abs(frame - frames[0]).max() > 2 for frame in frames)  # it moves


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (390, 520)), ({"size": 256}, (192, 256)), ({"framing": "face", "size": 200}, (200, 200)),
        ({"crop": "none"}, (512, 512)), ({"crop": "none", "framing": "face", "size": 200}, (200, 200)),
    ],
)  # fmt: skip
def test_video_has_the_size_of_the_photo_or_the_given_one(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, options: dict[str, Any], size: tuple[int, int]
) -> None:
    photo = read_image(SOURCE)
    tall = photo if "crop" in options else np.pad(photo, ((8, 0), (0, 0), (0, 0)), "edge")[:, 61:451]
    write_image(tmp_path / "tall.png", np.ascontiguousarray(tall))
    reenact(animator, tmp_path / "tall.png", make_clip("clip.mp4"), tmp_path / "out.mp4", replace(LOSSLESS, **options))
    info = probe(tmp_path / "out.mp4")
    assert ((info.width, info.height), info.frame_count) == (size, 6)


def test_reenact_by_a_static_driver_is_static(animator: Animator, make_clip: MakeClip, tmp_path: Path) -> None:
    clip = make_clip("static.mp4", filters="loop=loop=-1:size=1:start=0")
    reenact(animator, SOURCE, clip, tmp_path / "out.mp4", LOSSLESS)
    frames = read_frames(tmp_path / "out.mp4")
    assert len(frames) == 6
    assert max(np.abs(frame - frames[0]).max() for frame in frames) <= 2  # batches of other sizes round differently


def test_reenact_holds_the_last_frame_where_the_driver_has_no_face(
    animator: Animator, make_clip: MakeClip, tmp_path: Path
) -> None:
    clip = make_clip("gap2.mp4", filters="drawbox=enable='between(n,3,4)':t=fill:color=black:w=iw:h=ih")
    summary = reenact(animator, SOURCE, clip, tmp_path / "out.mp4", LOSSLESS)
    assert (summary.frames, summary.missing) == (6, 2)
    frames = read_frames(tmp_path / "out.mp4")
    for held in frames[3:5]:  # rendered again, in batches of other sizes: roundings may differ
        np.testing.assert_allclose(held.astype(int), frames[2], atol=2)


def test_compare_shows_source_driver_and_result(animator: Animator, make_clip: MakeClip, tmp_path: Path) -> None:
    clip, photo = make_clip("clip.mp4"), read_image(SOURCE)
    reenact(animator, SOURCE, clip, tmp_path / "alone.mp4", LOSSLESS)
    reenact(animator, SOURCE, clip, tmp_path / "three.mp4", ReenactOptions(audio="none", crf=0, compare=True))
    alone, three = read_frames(tmp_path / "alone.mp4"), read_frames(tmp_path / "three.mp4")
    assert three[0].shape == (512, 3 * 512, 3)
    for one, wide in zip(alone, three, strict=True):
        assert np.abs(wide[:, :511] - photo[:, :511]).mean() < 6  # colour is kept at half size
        assert np.abs(wide[:, 1025:] - one[:, 1:]).mean() < 2
    assert np.abs(three[0][:, 512:1024] - three[5][:, 512:1024]).max() > 5  # the driver moves
    motion = tmp_path / "a.motion.npz"
    animator.portrait(photo).motion.save(motion)
    with pytest.raises(InputError, match="--compare"):
        reenact(animator, SOURCE, motion, tmp_path / "no.mp4", ReenactOptions(compare=True))
    with pytest.raises(InputError, match="a video as SRC"):
        reenact(animator, SOURCE, clip, tmp_path / "no.mp4", ReenactOptions(length="loop"))
    assert not (tmp_path / "no.mp4").exists()


def sound_onset(path: Path) -> float:
    """Return the seconds of silence at the start of a file."""
    command = [ffmpeg_path(), "-loglevel", "error", "-i", str(path), "-f", "s16le", "-ac", "1", "-ar", "8000", "pipe:1"]
    samples = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.int16)
    return float(np.argmax(np.abs(samples.astype(int)) > 2000)) / 8000


def test_start_skips_the_driver_s_sound_and_not_another_file_s(
    animator: Animator, make_clip: MakeClip, tmp_path: Path
) -> None:
    """A tone begins 0.6 s into both; half a second of the driver is skipped."""
    tone = ["-f", "lavfi", "-i", "sine=f=800:d=1,volume=8,adelay=600"]
    clip = make_clip("sound.mkv", *tone, "-map", "0:v", "-map", "1:a", "-c:a", "pcm_s16le", frames=12, rate="10")
    other, motion = tmp_path / "other.wav", tmp_path / "a.motion.npz"
    subprocess.run([ffmpeg_path(), "-loglevel", "error", *tone, str(other)], check=True)
    animator.portrait(read_image(SOURCE)).motion.save(motion)
    has_sound = {}
    for name, driver, options in (
        ("driver", clip, ReenactOptions(start=0.5)),
        ("file", clip, ReenactOptions(start=0.5, audio=str(other))),
        ("none", clip, ReenactOptions(audio="none", max_frames=2)),
        ("motion", motion, ReenactOptions()),
        ("motion and file", motion, ReenactOptions(audio=str(other))),
    ):
        out = tmp_path / f"{name}.mkv"
        reenact(animator, SOURCE, driver, out, options)
        has_sound[name] = probe(out).has_audio
        if name in ("driver", "file"):
            assert sound_onset(out) == pytest.approx({"driver": 0.1, "file": 0.6}[name], abs=0.05)
    assert has_sound == {"driver": True, "file": True, "none": False, "motion": False, "motion and file": True}


def test_reenact_writes_the_same_bytes_each_time(
    tiny_weights: Path, animator: Animator, make_clip: MakeClip, tmp_path: Path
) -> None:
    clip = make_clip("clip.mp4")
    other = Animator.from_weights(tiny_weights, device="cpu", precision="fp32")
    for name, engine in (("a.mp4", animator), ("b.mp4", animator), ("c.mp4", other)):
        reenact(engine, SOURCE, clip, tmp_path / name, ReenactOptions(max_frames=3))
    assert len({(tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4")}) == 1


def test_notes_of_one_job_are_not_in_the_next(
    tiny_weights: Path, make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    animator = Animator.from_weights(tiny_weights, device="cpu", precision="bf16")
    notes = []
    for index, factor in enumerate((torch.inf, 1.0)):
        with monkeypatch.context() as patch:
            generate = animator.model.generate_planes
            patch.setattr(animator.model, "generate_planes", lambda *a, f=factor, g=generate: g(*a) * f)
            summary = reenact(animator, SOURCE, make_clip("clip.mp4"), tmp_path / f"{index}.mp4", LOSSLESS)
        notes.append([note for note in summary.notes if "not finite" in note])
    assert len(notes[0]) == 1 and notes[1] == []


def test_several_faces_of_a_photo_are_animated_together(
    animator: Animator, make_clip: MakeClip, tmp_path: Path
) -> None:
    one, other = read_image(SOURCE)[::2, ::2], read_image(example_path("astronaut.jpg"))
    other = cv2.resize(other, (256, 256), interpolation=cv2.INTER_AREA)
    write_image(tmp_path / "two.png", np.concatenate([one, np.full_like(one, 128), other], axis=1))
    driver, still = make_clip("late.mp4", "-ss", "1.5", frames=4), make_clip("clip.mp4")

    def moved_faces(name: str, **options: Any) -> list[bool]:
        reenact(animator, tmp_path / "two.png", driver, tmp_path / name / "%05d.png", ReenactOptions(**options))
        frames = [read_image(tmp_path / name / f"0000{k}.png").astype(int) for k in (0, 3)]
        faces = (part[:, 40:150, 80:180] for part in np.split(np.stack(frames), 3, axis=2)[::2])
        return [bool(np.abs(np.diff(face, axis=0)).mean() > 0.5) for face in faces]

    assert moved_faces("left", face="left") == [True, False]
    assert moved_faces("all", face="all") == [True, True]
    assert moved_faces("pair", face="right", pairs=(("left", still),)) == [True, True]
    assert len(list((tmp_path / "pair").glob("*.png"))) == 4
    with pytest.raises(InputError, match="two drivers are given to one face"):
        moved_faces("same", face="left", pairs=(("index:0", still),))
    for bad in ({"face": "all", "compare": True}, {"face": "all", "pairs": (("left", still),)}):
        with pytest.raises(InputError, match="leave"):
            ReenactOptions(**bad)
