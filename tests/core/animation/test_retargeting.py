"""Retargeting: identities that hold for any weights and any face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.reenact import open_driver, reenact
from export3d_cli.core.animation.retargeting import Control, TravelLimits, reference_rows
from export3d_cli.core.face.expression_coefficients import REGIONS
from export3d_cli.core.face.face_track import choose_face
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.camera import head_pose, orbit_camera, project_points, with_head_pose, yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.weights import example_path

MakeClip = Callable[..., Path]
SOURCE = example_path("source.jpg")
OWN = orbit_camera(15, 5, -3, radius=2.9)
CAMERAS = np.stack([orbit_camera(y, p, r, radius=2.6) for y, p, r in ((0, 0, 0), (20, -10, 5), (-30, 8, 0))])


def angles(cameras: np.ndarray) -> np.ndarray:
    return np.array([yaw_pitch_roll(camera) for camera in cameras])


def test_absolute_pose_interpolates_from_source_to_driver() -> None:
    np.testing.assert_array_equal(Control().target_cameras(OWN, CAMERAS, None), CAMERAS)
    for still in (Control(drive=("expression",)), Control(pose_scale=0)):
        np.testing.assert_allclose(still.target_cameras(OWN, CAMERAS, None), OWN[None].repeat(3, axis=0), atol=1e-6)
    straight = orbit_camera(10, radius=2.7)
    turned = np.stack([orbit_camera(30, radius=2.7)])
    for scale, yaw in ((0.5, 20), (1.5, 40)):
        np.testing.assert_allclose(
            angles(Control(pose_scale=scale).target_cameras(straight, turned, None)), [[yaw, 0, 0]], atol=1e-3
        )


def test_relative_pose_moves_the_source_camera() -> None:
    relative = Control(pose="relative")
    np.testing.assert_allclose(
        relative.target_cameras(OWN, CAMERAS[:1], CAMERAS[0])[0], OWN, atol=1e-6
    )  # at the reference
    np.testing.assert_allclose(relative.target_cameras(CAMERAS[1], CAMERAS, CAMERAS[1]), CAMERAS, atol=1e-5)  # itself
    nod = np.stack([orbit_camera(0, -12, radius=2.6)])  # from frontal, the nose down by 12 degrees
    side = orbit_camera(40, radius=2.9)
    (rotation,), _ = head_pose(relative.target_cameras(side, nod, CAMERAS[0]))
    ears = np.array([1.0, 0.0, 0.0])
    np.testing.assert_allclose(rotation @ ears, head_pose(side)[0] @ ears, atol=1e-5)  # about the axis through its ears
    shifted = CAMERAS[:1].copy()
    shifted[0, 3] -= 0.1  # the camera to the left: the head appears further right
    seen = relative.target_cameras(side, shifted, CAMERAS[0])
    centre = [project_points(c, np.zeros((1, 3)))[0] for c in (side, seen[0])]
    assert centre[1][0] > centre[0][0] + 0.05
    assert centre[1][1] == pytest.approx(centre[0][1], abs=1e-6)


def test_relative_movement_is_a_fraction_of_the_head_at_any_zoom() -> None:
    """A driver seen twice as large, who moves twice as far in the image, moves the source alike."""
    still, moved = orbit_camera(0, radius=2.6), orbit_camera(10, radius=2.6)
    moved[:16] = np.linalg.inv(
        np.linalg.inv(moved[:16].reshape(4, 4)) + [[0, 0, 0, 0.1], [0] * 4, [0, 0, 0, 0.3], [0] * 4]
    ).ravel()

    def zoomed(camera: np.ndarray, factor: float) -> np.ndarray:
        rotation, centre = head_pose(camera)
        place, depth = centre[:2] / centre[2] * factor, centre[2] / factor
        return with_head_pose(camera, rotation, np.array([*(place * depth), depth]))

    relative = Control(pose="relative")
    results = [
        relative.target_cameras(OWN, zoomed(moved, factor)[None], zoomed(still, factor)) for factor in (1, 2, 0.5)
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=1e-5)
    own, (target,) = head_pose(OWN)[1], head_pose(results[0])[1]
    assert target[2] / own[2] == pytest.approx(2.9 / 2.6, rel=1e-4)  # sizes are ratios
    heads = (target[0] / target[2] - own[0] / own[2]) * own[2]
    assert heads == pytest.approx(0.1 / 2.9 * 2.6, rel=1e-3)


def test_reference_frame_is_the_photo_itself_or_the_earliest_of_its_rotation(animator: Animator) -> None:
    portrait = animator.portrait(read_image(SOURCE)).motion
    yaws = [20, 3.9, -10, 4.5, 4.0]
    driver = replace(portrait.select(np.zeros(5, dtype=np.int64)), camera=np.stack([orbit_camera(yaw) for yaw in yaws]))

    def best(yaw: float) -> int:
        rows = reference_rows(driver, replace(portrait, camera=orbit_camera(yaw)[None]))
        assert rows[1:].tolist() in ([], [0, 1, 2, 3, 4])
        return int(rows[0])

    assert best(4.4) == 3 and best(-30) == 2
    driver.beta[[0, 2, 3, 4]] += 0.1  # another expression outweighs the tracker's noise, but not a turn
    assert best(4.4) == 1 and best(20) == 0
    driver.beta[1] += 1  # another person: 3.9 and 4.5 degrees are a tie
    assert best(4.6) == 1


def test_target_torso_moves_as_far_from_its_reference_as_the_drivers() -> None:
    reference = Motion(
        np.zeros((3, 64), np.float32), orbit_camera(0, radius=2.61)[None].repeat(3, axis=0),
        np.zeros((3, 0, 3), np.float32), np.ones(3, bool), Fraction(25), (0.0, 0.0, 1.0), (1, 1),
        np.array([[0.5, 1.2, 0.1, 0.0], [0.6] * 4, [0.7] * 4], np.float32),  # of the face at rest: without effect
    )  # fmt: skip
    torso = np.array([[0.55, 1.18, 0.12, -0.03], [9, 9, 9, 9], [np.nan] * 4], np.float32)
    limits = TravelLimits(0.2, 0.2, 0.2, 0.2)
    control = Control(pose="relative", torso="driver", pose_scale=0.5)
    near, far, unseen, _ = control.target_torso(OWN, np.concatenate([torso, torso[:1]]), reference, limits)
    np.testing.assert_allclose(near, [0.025 * 0.9, -0.01 * 0.9, 0.01, -0.015], atol=1e-6)
    assert (far < [0.201, 0.201, 0.121, 0.121]).all() and (far > 0.1).all()
    assert np.isnan(unseen).all()
    assert Control().target_torso(OWN, torso, reference, limits) is None
    with pytest.raises(InputError, match="use --pose auto or relative"):
        Control(torso="driver")
    for bad in ("follow", 1.5, float("nan")):
        with pytest.raises(InputError, match=f"torso must be .*, got {bad}"):
            Control(torso=bad)


def test_pose_auto_moves_the_torso_as_the_driver_s(animator: Animator, tmp_path: Path) -> None:
    options = ReenactOptions(torso="driver", max_frames=3, size=128)
    summary = reenact(animator, SOURCE, example_path("drive.mp4"), tmp_path / "out.mp4", options)
    assert (summary.frames, summary.notes) == (3, ())


def test_target_expression_scales_changes_of_lambda() -> None:
    source, reference = torch.full((1, 4), 2.0), torch.full((1, 4), 1.0)
    driver = torch.arange(8.0).view(2, 4)
    assert Control().target_expression(source, driver, None) is driver
    assert torch.equal(Control(drive=("pose",)).target_expression(source, driver, None), source.expand(2, 4))
    assert torch.allclose(Control(expression_scale=2).target_expression(source, driver, None), 2 * driver - 2)
    relative = Control(relative_expression=True, expression_scale=0.5)
    assert torch.allclose(relative.target_expression(source, driver, reference), 2 + 0.5 * (driver - 1))
    for bad, words in (((), "regions are"), (("mouht",), "did you mean mouth"), (("torso",), "use head")):
        with pytest.raises(InputError, match=words):
            Control(drive=bad)


def test_select_regions_keeps_the_base_in_other_regions() -> None:
    base, driver = np.full(64, 0.25, np.float32), np.random.default_rng(0).random((3, 64), dtype=np.float32)
    assert Control().select_regions(base, driver) is driver
    mouth, brows = list(REGIONS["mouth"]), list(REGIONS["brows"])
    assert sorted(sum(REGIONS.values(), ())) == list(range(64))
    selected = Control(drive=("mouth", "head"), scales=(("mouth", 2.0),)).select_regions(base, driver)
    np.testing.assert_allclose(selected[:, mouth], 2 * driver[:, mouth] - 0.25, atol=1e-6)
    others = np.setdiff1d(np.arange(64), mouth)
    np.testing.assert_array_equal(selected[:, others], np.full((3, len(others)), 0.25, np.float32))
    halved = Control(scales=(("all", 0.5), ("brows", 0.0))).select_regions(base, driver)
    np.testing.assert_array_equal(halved[:, brows], np.full((3, len(brows)), 0.25, np.float32))
    np.testing.assert_allclose(halved[:, mouth], (driver[:, mouth] + 0.25) / 2, atol=1e-6)
    head = Control(scales=(("head", 0.0),)).target_cameras(OWN, CAMERAS, None)
    np.testing.assert_allclose(head, OWN[None].repeat(3, axis=0), atol=1e-6)


@pytest.mark.parametrize("reference_frame", [0, 3])
def test_relative_driver_at_its_reference_frame_leaves_the_source_unchanged(
    animator: Animator, make_clip: MakeClip, monkeypatch: pytest.MonkeyPatch, reference_frame: int
) -> None:
    """The stream waits for the reference frame even without look-ahead."""
    monkeypatch.setattr("export3d_cli.core.animation.driver_stream.LOOKAHEAD_S", 0)
    clip = make_clip("clip.mp4")
    options = ReenactOptions(pose="relative", relative_expression=True, reference_frame=reference_frame)
    portrait = animator.portrait(read_image(SOURCE))
    (still,) = animator.animate(portrait, [portrait.motion])
    with open_driver(animator, portrait, clip, options) as stream:
        motions, _, references = zip(*stream, strict=True)
    frames = list(animator.animate(portrait, motions, control=options, reference=references[0]))
    assert len(frames) == 6
    difference = [np.abs(frame.astype(int) - still).max() for frame in frames]
    assert difference[reference_frame] <= 1
    assert max(difference) > 2
    with (
        pytest.raises(InputError, match="6 frames"),
        open_driver(animator, portrait, clip, replace(options, reference_frame=6)) as stream,
    ):
        next(iter(stream))


def test_pose_auto_keeps_the_source_s_pose_and_place_at_the_most_similar_frame(
    animator: Animator, make_clip: MakeClip
) -> None:
    portrait, options = animator.portrait(read_image(SOURCE)), ReenactOptions(smooth="off")
    own = portrait.camera
    with open_driver(animator, portrait, make_clip("clip.mp4"), options) as stream:
        motions, _, references = zip(*stream, strict=True)
    cameras = np.concatenate([motion.camera for motion in motions])
    targets = options.target_cameras(own, cameras, references[0].camera[0])
    row = reference_rows(Motion.concatenate(motions), portrait.motion)[0]
    np.testing.assert_array_equal(references[0].camera[0], cameras[row])
    np.testing.assert_allclose(targets[row], own, atol=1e-5)
    moved = angles(targets) - angles(targets[row : row + 1])
    np.testing.assert_allclose(moved, angles(cameras) - angles(cameras[row : row + 1]), atol=0.6)
    itself = options.target_cameras(cameras[row], cameras, cameras[row])
    np.testing.assert_allclose(itself, cameras, atol=1e-5)  # self-reenactment: absolute pose


def test_pose_auto_of_a_picture_is_the_picture_s_own() -> None:
    assert ReenactOptions().for_driver(Path("smile.jpg")).pose == "absolute"
    assert ReenactOptions().for_driver(Path("smile.mp4")).needs_reference
    with pytest.raises(InputError, match=r"smile\.jpg is a picture.*leave out --torso driver"):
        ReenactOptions(torso="driver").for_driver(Path("smile.jpg"))
    assert ReenactOptions().reference == "auto"
    assert ReenactOptions(reference_frame=3).reference == 3
    assert ReenactOptions(pose="relative").reference == 0
    assert ReenactOptions(pose="absolute").reference is None
    assert ReenactOptions(pose="absolute", relative_expression=True).reference == 0


def test_motion_file_has_a_reference_frame(animator: Animator, tmp_path: Path) -> None:
    portrait = animator.portrait(read_image(SOURCE))
    motion = portrait.motion.select(np.zeros(5, dtype=np.int64))
    motion.camera[:] = orbit_camera(12)
    motion.save(tmp_path / "a.motion.npz")
    options = ReenactOptions(pose="relative", reference_frame=4)
    with open_driver(animator, portrait, tmp_path / "a.motion.npz", options) as stream:
        batches = list(stream)
    np.testing.assert_allclose(batches[0].reference.camera, motion.camera[:1], atol=1e-6)
    assert sum(len(batch.motion) for batch in batches) == 5
    with (
        pytest.raises(InputError, match="5 frames"),
        open_driver(animator, portrait, tmp_path / "a.motion.npz", replace(options, reference_frame=5)) as stream,
    ):
        next(iter(stream))


def test_smoothing_reduces_camera_motion(animator: Animator, make_clip: MakeClip) -> None:
    portrait = animator.portrait(read_image(SOURCE))
    turns = {}
    for smooth in ("off", "strong"):
        with open_driver(animator, portrait, make_clip("clip.mp4"), ReenactOptions(smooth=smooth)) as stream:
            camera = np.concatenate([batch.motion.camera for batch in stream])
        turns[smooth] = np.abs(np.diff(camera, axis=0)).sum()
    assert turns["strong"] < 0.8 * turns["off"]


def test_face_index_counts_from_left_to_right(animator: Animator, tmp_path: Path) -> None:
    photo = read_image(SOURCE)
    small = photo[::2, ::2]
    pair = np.full((photo.shape[0], photo.shape[1] + small.shape[1], 3), 255, np.uint8)
    pair[: small.shape[0], : small.shape[1]], pair[:, small.shape[1] :] = small, photo
    across = {}
    for face in ("largest", "left", "right", "index:0", "index:1"):
        x0, _, side = animator.portrait(pair, face=face).square
        across[face] = x0 + side / 2 > small.shape[1]  # whether it is the right one
    assert across == {"largest": True, "left": False, "right": True, "index:0": False, "index:1": True}
    with pytest.raises(InputError, match="shows 2 face"):
        animator.portrait(pair, face="index:2")
    with pytest.raises(NoFaceError, match=r"wall"):
        choose_face([], "left", "wall.png")


def test_live_link_face_csv_drives(animator: Animator, tmp_path: Path) -> None:
    from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES

    header = ["Timecode", "BlendshapeCount", *ARKIT_NAMES, "HeadYaw", "HeadPitch", "HeadRoll"]
    rows = [f"00:00:01:{k * 1.001:06.3f},61,{','.join(['0.1'] * 52)},{k * 0.05},0,0" for k in range(6)]
    (tmp_path / "take.csv").write_text("\n".join([",".join(header), *rows]))
    summary = reenact(animator, SOURCE, tmp_path / "take.csv", tmp_path / "out.mp4")
    assert (summary.frames, summary.missing, summary.fps) == (6, 0, Fraction(60000, 1001))
    with pytest.raises(InputError, match="holds no images"):
        reenact(animator, SOURCE, tmp_path / "take.csv", tmp_path / "no.mp4", ReenactOptions(compare=True))


def test_travel_limits_hold_position_and_size_of_the_head() -> None:
    source = orbit_camera(10, 5)
    far = np.stack([orbit_camera(yaw, radius=radius) for yaw, radius in ((0, 2.7), (20, 2.0), (-20, 4.0))])
    pose = np.linalg.inv(far[:, :16].reshape(-1, 4, 4).astype(float))
    pose[:, 0, 3] += [0.002, 0.4, -0.4]
    far[:, :16] = np.linalg.inv(pose).reshape(-1, 16)
    limits = TravelLimits(left=0.05, right=0.04, up=0.05, down=0.05)
    free, kept = (Control().target_cameras(source, far, None, limit) for limit in (None, limits))
    np.testing.assert_array_equal(free, far)
    own_uv = project_points(source, np.zeros((1, 3)))
    shift = np.array([project_points(row, np.zeros((1, 3)))[0] - own_uv[0] for row in kept])
    assert shift[0, 0] == pytest.approx(0.002 * 4.2647 / 2.7, rel=1e-3)  # small shifts stay
    assert 0.039 < shift[1, 0] <= 0.0401 and -0.0501 <= shift[2, 0] < -0.049  # each side has its own limit
    for row, wanted in zip(kept, far, strict=True):
        rotation, centre = head_pose(row)
        np.testing.assert_allclose(rotation, head_pose(wanted)[0], atol=1e-5)  # it may turn
        assert abs(np.log(centre[2] / 2.7)) <= 0.1201
    still = Control().target_cameras(source, far, None, TravelLimits(0, 0, 0, 0))
    np.testing.assert_allclose(
        [project_points(row, np.zeros((1, 3)))[0] for row in still],
        np.repeat(own_uv.reshape(1, 2), 3, axis=0),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("own", "turn", "least", "most"),
    [(0, 30, 30, 30), (0, -30, -30, -30), (0, 80, 45, 50), (50, -60, 44, 46), (-50, 60, -46, -44), (20, 25, 45, 45),
     (40, 60, 60, 65), (60, 40, 62, 66)],
)  # fmt: skip
def test_relative_pose_turns_no_farther_than_the_photo_can_show(
    own: float, turn: float, least: float, most: float
) -> None:
    source, reference, driver = orbit_camera(own), orbit_camera(0), np.stack([orbit_camera(turn)])
    limits = TravelLimits(0.2, 0.2, 0.2, 0.2)
    yaw = angles(Control(pose="relative").target_cameras(source, driver, reference, limits))[0, 0]
    assert least - 1e-3 <= yaw <= most + 1e-3
    free = angles(Control().target_cameras(source, driver, None, limits))[0, 0]
    assert abs(free - turn) < 1e-3  # absolute: as asked


def test_pose_auto_keeps_a_driver_who_walks_past_within_the_photo(animator: Animator, tmp_path: Path) -> None:
    """The head crosses five crops; its centre stays within the photo's limits."""
    portrait, options = animator.portrait(read_image(SOURCE)), ReenactOptions(smooth="off")
    motion = portrait.motion.select(np.zeros(50, dtype=np.int64))
    rotation, centre = head_pose(motion.camera)
    centre[:, 0] += np.linspace(-1.6, 1.6, 50)
    replace(motion, camera=with_head_pose(motion.camera, rotation, centre)).save(tmp_path / "walk.motion.npz")
    with open_driver(animator, portrait, tmp_path / "walk.motion.npz", options) as stream:
        batches = list(stream)
    cameras = np.concatenate([batch.motion.camera for batch in batches])
    limits = portrait.canvas.limits
    targets = options.target_cameras(portrait.camera, cameras, batches[0].reference.camera[0], limits)
    u = np.array([project_points(row, np.zeros((1, 3)))[0, 0] for row in targets])
    own = project_points(portrait.camera, np.zeros((1, 3)))[0, 0]
    assert -limits.left - 1e-4 <= (u - own).min() and (u - own).max() <= limits.right + 1e-4
    assert (np.diff(u) >= -1e-6).all() and np.ptp(u) > 0.1  # it moves, to the right
