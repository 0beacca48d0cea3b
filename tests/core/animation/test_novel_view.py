"""Camera sweeps and expression edits, from a photo to a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.animation import novel_view as module
from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.edit_basis import EditOptions, edit_basis
from export3d_cli.core.animation.novel_view import NovelViewOptions, novel_view, orbit_cameras
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.camera import head_pose, orbit_camera, project_points, with_head_pose, yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

SOURCE = example_path("source.jpg")


def read_frames(path: Path) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return [frame.astype(int) for frame in reader]


def test_novel_view_sweeps_there_and_back(animator: Animator, tmp_path: Path) -> None:
    summary = novel_view(animator, SOURCE, tmp_path / "view.mp4", NovelViewOptions(frames=4, crf=0))
    assert (summary.frames, summary.fps) == (4, 25)
    views = read_frames(tmp_path / "view.mp4")
    assert np.abs(views[0] - views[2]).max() > 5  # from one side, then from the other
    assert np.abs(views[1] - views[3]).max() <= 1  # on the way there and back


def test_edit_basis_writes_its_frames_and_refuses_vectors_that_do_not_exist(animator: Animator, tmp_path: Path) -> None:
    edit_basis(animator, SOURCE, tmp_path / "edit.mp4", EditOptions(edits=((1, (0.0, 3.0)), (2, (0.0, 3.0))), frames=3))
    assert len(read_frames(tmp_path / "edit.mp4")) == 3
    for v in (0, 11):
        with pytest.raises(InputError, match="1 to 10"):
            edit_basis(animator, SOURCE, tmp_path / "x.mp4", EditOptions(edits=((v, (0.0, 1.0)),)))


@pytest.mark.parametrize(("max_bytes", "rendered"), [(1 << 22, 4), (0, 6)])
def test_equal_cameras_are_rendered_once_within_a_memory_limit(
    animator: Animator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int, rendered: int
) -> None:
    videos, counts, view = [], [], animator.view
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", max_bytes)
    monkeypatch.setattr(
        animator,
        "view",
        lambda portrait, cameras, **named: counts.append(len(cameras)) or view(portrait, cameras, **named),
    )
    for name, watermark in (("plain.mp4", "none"), ("marked.mp4", "visible")):
        options = NovelViewOptions(frames=6, crf=0, watermark=watermark)  # type: ignore[arg-type]
        novel_view(animator, SOURCE, tmp_path / name, options)
        videos.append(read_frames(tmp_path / name))
    assert counts == [rendered] * 2
    portrait = animator.portrait(read_image(SOURCE))
    expected = list(view(portrait, orbit_cameras(portrait.camera, options)))
    for k in range(6):
        assert np.abs(videos[0][k] - expected[k]).mean() < 2  # colour is kept at half size
        for frames in videos:
            assert np.abs(frames[k] - frames[-k % 6]).max() <= 1
    assert np.abs(expected[0].astype(int) - expected[3]).max() > 5


def test_orbit_cameras_have_the_angles_and_the_photo_s_distance() -> None:
    photo = orbit_camera(12, 3, 4, radius=3.1)
    photo = with_head_pose(photo, head_pose(photo)[0], np.array([0.05, 0.05, 3.1]))
    sweep = orbit_cameras(photo, NovelViewOptions(yaw=(-30, 30), pitch=(0, 10), frames=5, loop="once"))
    expected = [(-30, 0, 0), (-15, 2.5, 0), (0, 5, 0), (15, 7.5, 0), (30, 10, 0)]
    np.testing.assert_allclose(yaw_pitch_roll(sweep), expected, atol=1e-4)
    centre = project_points(photo, np.zeros((1, 3)))
    for camera in sweep:
        np.testing.assert_allclose(project_points(camera, np.zeros((1, 3))), centre, atol=1e-5)
    loop = orbit_cameras(photo, NovelViewOptions(yaw=(-30, 30), frames=8))
    yaw = yaw_pitch_roll(loop)[:, 0]
    assert yaw[0] == pytest.approx(-30, abs=1e-4)
    assert yaw[4] == pytest.approx(30, abs=1e-4)
    np.testing.assert_allclose(yaw[1:4], yaw[:4:-1], atol=1e-4)  # there and back


def test_a_driver_shows_as_without_an_edit_and_an_edit_adds_to_it(animator: Animator) -> None:
    portrait = animator.portrait(read_image(example_path("source.jpg")))
    driver = portrait.motion.beta + np.float32(0.2)
    own = portrait.source.coefficients.float().cpu().numpy()
    plain = animator.coefficients(driver) - own
    gain = animator.model.config.expression_gain
    np.testing.assert_allclose(animator.expression_change(portrait, driver, driver), gain * plain, atol=1e-4)
    edit = np.zeros_like(driver)
    edit[0, 24] = 0.5
    added = animator.expression_change(portrait, driver + edit, driver) - gain * plain
    np.testing.assert_allclose(added, gain * animator.coefficient_change(driver + edit, driver), atol=1e-4)
