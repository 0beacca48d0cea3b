"""Several portraits with one driver, and their plan, with tiny untrained weights."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.batch import output_paths, plan_edit, plan_reenact, reenact_all
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import reenact
from export3d_cli.core.face.face_track import FaceTrack
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.weights import example_path

MakeClip = Callable[..., Path]
SOURCE = example_path("source.jpg")
FAST = ReenactOptions(audio="none", max_frames=3)


@pytest.fixture
def portraits(tmp_path: Path) -> list[Path]:
    """A photo, a plain wall, and the photo mirrored."""
    photo = read_image(SOURCE)
    for name, image in (("a", photo), ("wall", np.full_like(photo, 90)), ("b", np.ascontiguousarray(photo[:, ::-1]))):
        write_image(tmp_path / f"{name}.png", image)
    return [tmp_path / f"{name}.png" for name in ("a", "wall", "b")]


def test_reenact_all_tracks_the_driver_once_and_continues_after_a_failure(
    animator: Animator, portraits: list[Path], make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_clip("gap2.mp4", filters="drawbox=enable='between(n,3,4)':t=fill:color=black:w=iw:h=ih")
    options = ReenactOptions(audio="none", crf=0, compare=True)
    alone = tmp_path / "alone.mp4"
    reenact(animator, portraits[2], clip, alone, options)
    tracked = []
    track = FaceTrack.track
    monkeypatch.setattr(FaceTrack, "track", lambda self, image: tracked.append(image.shape) or track(self, image))
    summary = reenact_all(animator, portraits, clip, str(tmp_path / "out" / "{src}-{drive}.mp4"), options)
    assert [s.out.name for s in summary.done] == ["a-gap2.mp4", "b-gap2.mp4"]
    assert [s.missing for s in summary.done] == [2, 2]
    assert len(summary.failed) == 1
    assert "wall.png" in summary.failed[0]
    # two sources three times, the wall once; the driver once, but a first frame and one after a cut three times and a
    # repeated one never
    assert len(tracked) == 2 * 3 + 1 + 9
    shared, expected = (list(VideoReader(path)) for path in (tmp_path / "out" / "b-gap2.mp4", alone))
    np.testing.assert_array_equal(shared, expected)  # the cache gives the driver's motion


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Node 3 failed\nat invoke"), MemoryError("x")]
)
def test_reenact_all_records_a_portrait_that_runs_out_of_memory_and_continues(
    animator: Animator, portraits: list[Path], make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:  # fmt: skip
    first, calls, render = [], [], Animator._render

    def failing(self: Animator, portrait: Portrait, *args: object, **named: object) -> object:
        first[:] = first or [portrait]
        calls.append(portrait)
        if portrait is first[0]:
            raise error
        return render(self, portrait, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Animator, "_render", failing)
    summary = reenact_all(animator, portraits[::2], make_clip("clip.mp4"), str(tmp_path / "{src}.mp4"), FAST)
    assert [done.out.name for done in summary.done] == ["b.mp4"]
    (failure,) = summary.failed
    assert "a.png" in failure and type(error).__name__ in failure and "\n" not in failure
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("error", [TypeError("bug"), NotImplementedError("bug"), KeyboardInterrupt()])
def test_reenact_all_raises_programming_errors(
    animator: Animator, portraits: list[Path], make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:  # fmt: skip
    def failing(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(Animator, "_render", failing)
    with pytest.raises(type(error)):
        reenact_all(animator, portraits[::2], make_clip("clip.mp4"), str(tmp_path / "{src}.mp4"), FAST)


def test_reenact_all_keeps_existing_outputs_without_overwrite(
    animator: Animator, portraits: list[Path], make_clip: MakeClip, tmp_path: Path
) -> None:
    out = tmp_path / "a-clip.mp4"
    out.write_bytes(b"mine")
    args = (animator, portraits[::2], make_clip("clip.mp4"), str(tmp_path))
    summary = reenact_all(*args, FAST)
    assert (summary.skipped, len(summary.done), summary.failed) == ((out,), 1, ())
    assert "--overwrite" in summary.notes[0]
    assert out.read_bytes() == b"mine"
    again = reenact_all(*args, ReenactOptions(audio="none", max_frames=3, overwrite=True))
    assert (again.skipped, len(again.done)) == ((), 2)
    assert len(list(VideoReader(out))) == 3


def test_output_paths_stay_inside_their_folder(tmp_path: Path) -> None:
    sources = [Path("x/my photo.jpg"), Path("..me.jpg"), Path("y/日本.png"), Path("z/a;rm -rf $HOME.png")]
    paths = output_paths(sources, Path("d/drive.motion.npz"), f"{tmp_path}/{{src}}/{{src}}-{{drive}}.mp4")
    assert [str(p.relative_to(tmp_path)) for p in paths] == [
        "my_photo/my_photo-drive.mp4", "me/me-drive.mp4",
        "日本/日本-drive.mp4", "a_rm_-rf_HOME/a_rm_-rf_HOME-drive.mp4",
    ]  # fmt: skip
    assert output_paths(sources[:1], Path("d.mp4"), str(tmp_path)) == [tmp_path / "my_photo-d.mp4"]
    assert output_paths([Path("..")], Path("d.mp4"), "{src}.mp4") == [Path("file-9608161c.mp4")]
    with pytest.raises(InputError, match="template"):
        output_paths(sources, Path("d.mp4"), "out.mp4")
    with pytest.raises(InputError, match="rename"):
        output_paths([Path("x/a.png"), Path("y/a.jpg")], Path("d.mp4"), "{src}.mp4")
    for bad in ("{name}.mp4", "{src.parent}.mp4", "{src", "{0}.mp4"):
        with pytest.raises(InputError, match="placeholder"):
            output_paths(sources[:1], Path("d.mp4"), bad)


@pytest.mark.parametrize("name", ["画" * 80, "😀" * 60, "Ж" * 120, "a" * 200])
def test_output_paths_of_long_names_fit_and_stay_different(tmp_path: Path, name: str) -> None:
    sources = [Path(f"{name}{end}.jpg") for end in ("甲", "乙")]
    paths = output_paths(sources, Path(f"{name}.mp4"), str(tmp_path / "{src}-{drive}.mp4"))
    assert len(set(paths)) == 2
    for path in paths:
        path.write_bytes(b"")  # the system accepts the name


def test_output_paths_of_short_names_keep_them(tmp_path: Path) -> None:
    (path,) = output_paths([Path("肖像 1.jpg")], Path("drive.take2.mp4"), str(tmp_path / "{src}-{drive}.mp4"))
    assert path.name == "肖像_1-drive.mp4"


def test_output_paths_refuse_too_long_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose a shorter name"):
        output_paths([Path("a.jpg")], Path("b.mp4"), str(tmp_path / ("画" * 90 + ".mp4")))


def test_plan_reenact_writes_nothing(
    animator: Animator, portraits: list[Path], make_clip: MakeClip, tmp_path: Path
) -> None:
    clip = make_clip("clip.mp4")
    before = sorted(tmp_path.rglob("*"))
    plan = plan_reenact(animator, portraits[::2], clip, str(tmp_path), ReenactOptions(compare=True, pose="relative"))
    assert sorted(tmp_path.rglob("*")) == before
    assert (plan.frames, plan.fps, plan.device) == (6, read_fps(clip), "cpu fp32")
    assert [s.size for s in plan.sources] == [(3 * 512, 512)] * 2
    assert [s.out.name for s in plan.sources] == ["a-clip.mp4", "b-clip.mp4"]
    width = read_image(SOURCE).shape[1]
    (a, b) = (s.face for s in plan.sources)
    small = plan_reenact(animator, portraits[:1], clip, str(tmp_path), ReenactOptions(size=128, framing="face"))
    assert (small.sources[0].size, small.sources[0].face) == ((128, 128), a)  # in pixels of the photo
    assert abs(a[0] - (width - b[2])) < 0.05 * width  # mirrored
    assert plan.seconds is not None and plan.seconds > 0
    assert plan.memory_mb is None or plan.memory_mb > 50
    with pytest.raises(NoFaceError, match="wall"):
        plan_reenact(animator, portraits, clip, str(tmp_path))


def test_plan_of_a_clip_tracks_its_driver_as_asked_and_estimates_nothing_without_a_face(
    animator: Animator, make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, landmarker = list[str](), animator.tracker()

    def open_tracker(name: str = "landmarker") -> object:
        names.append(name)
        return landmarker

    monkeypatch.setattr(animator, "tracker", open_tracker)
    driver, wall = make_clip("driver.mp4"), tmp_path / "wall.mp4"
    with VideoWriter(wall, size=(64, 64), fps=Fraction(25)) as writer:
        for _ in range(3):
            writer.write(np.full((64, 64, 3), 128, np.uint8))
    plan = plan_edit(animator, wall, tmp_path / "out.mp4", ReenactOptions(tracker="fan"), driver=driver)
    assert names == ["landmarker", "landmarker", "fan"]
    assert (plan.seconds, plan.frames) == (None, 3)
    assert plan.notes == (f"no face found in {wall}: use a video that shows one large, upright face",)
    assert str(plan.sources[0]).endswith("64x64, no face found")


def read_fps(clip: Path) -> object:
    with VideoReader(clip) as reader:
        return reader.info.fps
