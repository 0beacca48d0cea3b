"""Cameras, head frame and measures of a head whose camera is known; crop, mirror image, and the Motion file."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export3d_cli.core.face.crop import CROP_SCALE, ClipCalibration, crop_image, fit_clip_crop
from export3d_cli.core.face.expression_coefficients import BETA_NAMES, compute_measures
from export3d_cli.core.face.face_track import Face, FaceTrack
from export3d_cli.core.face.head_pose import (
    RELIEF_SCALE,
    TRACKER_Z_SCALE,
    CanonicalFace,
    fit_cameras,
    head_frame_to_landmarks,
    landmarks_to_head_frame,
    load_canonical_face,
)
from export3d_cli.core.face.landmarks import RIGID_POINTS, RIGID_WEIGHTS
from export3d_cli.core.face.motion import Motion, mirror_beta, mirror_camera, mirror_landmarks, mirror_motion
from export3d_cli.core.face.tracker import LandmarkerTracker, open_landmarker_tracker
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.camera import (
    FOCAL,
    head_pose,
    orbit_camera,
    project_points,
    with_head_pose,
    yaw_pitch_roll,
)
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.weights import example_path, weights_dir

BUNDLE = weights_dir() / "face_landmarker.task"
POSES = [(0, 0, 0), (20, 0, 0), (-20, 0, 0), (0, 15, 0), (0, -15, 0), (0, 0, 25), (30, 10, -10), (-35, -12, 8)]


@pytest.fixture(scope="module")
def canonical() -> CanonicalFace:
    return load_canonical_face()


@pytest.fixture(scope="module")
def tracker() -> LandmarkerTracker:
    return open_landmarker_tracker()


def observe(points: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Return the landmarks (478, 3), crop units, of an exact tracker with the landmarker's z convention."""
    rotation, centre = head_pose(camera)
    depth = (points @ rotation.T + centre)[:, 2]
    middle = np.average(depth[list(RIGID_POINTS)], weights=list(RIGID_WEIGHTS.values()))
    return np.column_stack([project_points(camera, points), (depth / middle - 1) * FOCAL / TRACKER_Z_SCALE])


@pytest.mark.parametrize("pose", POSES)
@pytest.mark.parametrize("radius", [2.7, 3.4])
def test_fit_cameras_recovers_a_known_camera(canonical: CanonicalFace, pose: tuple[float, ...], radius: float) -> None:
    known = orbit_camera(*pose, radius=radius)
    found = fit_cameras(observe(canonical.points, known)[None])[0]
    assert yaw_pitch_roll(found) == pytest.approx(pose, abs=0.5)
    np.testing.assert_allclose(found[:16], known[:16], atol=0.02)
    np.testing.assert_allclose(
        project_points(found, canonical.points), project_points(known, canonical.points), atol=0.003
    )


def test_fit_cameras_positive_yaw_moves_the_nose_to_the_image_s_right(canonical: CanonicalFace) -> None:
    landmarks = observe(canonical.points, orbit_camera(20))
    assert landmarks[1, 0] > landmarks[[33, 263], 0].mean() + 0.03
    assert landmarks[33, 0] < landmarks[263, 0]  # the person's right eye stays at the image's left
    assert yaw_pitch_roll(fit_cameras(landmarks[None])[0])[0] > 19


def test_fit_cameras_recovers_a_translated_head(canonical: CanonicalFace) -> None:
    known = orbit_camera(10, 5)
    rotation, centre = head_pose(known)
    moved = with_head_pose(known, rotation, centre + [0.1, -0.05, 0.4])
    found = fit_cameras(observe(canonical.points, moved)[None])[0]
    np.testing.assert_allclose(found, moved, atol=0.02)


def test_landmarks_to_head_frame_recovers_the_head(canonical: CanonicalFace) -> None:
    cameras = [orbit_camera(*pose) for pose in POSES]
    landmarks = np.stack([observe(canonical.points, camera) for camera in cameras])
    points = landmarks_to_head_frame(landmarks, np.stack(cameras), 1.0)
    assert points.dtype == np.float32
    np.testing.assert_allclose(points, np.broadcast_to(canonical.points, points.shape), atol=1e-4)


def test_landmarks_to_head_frame_relief_scales_depth_along_the_rays(canonical: CanonicalFace) -> None:
    camera = orbit_camera(0.0)
    landmarks, vector = observe(canonical.points, camera)[None], camera[None]
    flat, full = landmarks_to_head_frame(landmarks, vector)[0], landmarks_to_head_frame(landmarks, vector, 1.0)[0]
    assert np.ptp(flat[:, 2]) / np.ptp(full[:, 2]) == pytest.approx(RELIEF_SCALE, rel=1e-3)
    np.testing.assert_allclose(project_points(camera, flat), project_points(camera, full), atol=1e-5)


def test_landmarks_to_head_frame_projects_back_to_the_landmarks(canonical: CanonicalFace) -> None:
    """Even for noisy landmarks and cameras."""
    rng = np.random.default_rng(0)
    landmarks = np.stack([observe(canonical.points, orbit_camera(*pose)) for pose in POSES])
    landmarks += rng.normal(0, 0.01, landmarks.shape)
    cameras = fit_cameras(landmarks)
    lifted = landmarks_to_head_frame(landmarks, cameras)
    for row, points, camera in zip(landmarks, lifted, cameras, strict=True):
        np.testing.assert_allclose(project_points(camera, points), row[:, :2], atol=1e-5)
    again = landmarks_to_head_frame(head_frame_to_landmarks(lifted, cameras), cameras)
    np.testing.assert_allclose(again, lifted, atol=1e-5)


def test_compute_measures_of_the_canonical_face(canonical: CanonicalFace) -> None:
    def of(points: np.ndarray) -> dict[str, float]:
        return dict(zip(BETA_NAMES[52:], compute_measures(points[None])[0], strict=True))

    still = of(canonical.points)
    assert still["eyeOpeningLeft"] == pytest.approx(still["eyeOpeningRight"], rel=0.05)
    assert still["mouthWidth"] == pytest.approx(0.7, abs=0.3)
    assert max(abs(still[name]) for name in BETA_NAMES if name.startswith("iris")) < 0.05
    moved = canonical.points.copy()
    moved[14, 1] += 0.02  # the lower lip down
    moved[473, 0] += 0.01  # the left iris to the image's right
    changed = {name: of(moved)[name] - still[name] for name in still}
    assert changed.pop("lipGapCentre") > 0.1
    assert changed.pop("irisXLeft") > 0.05
    assert max(map(abs, changed.values())) < 1e-6
    assert of(canonical.points * 1.3) == pytest.approx(still)  # independent of the size of the head


# mirror


def test_mirroring_twice_is_the_identity(canonical: CanonicalFace) -> None:
    rng = np.random.default_rng(0)
    beta, landmarks = rng.normal(size=(3, 64)).astype(np.float32), rng.random((3, 478, 3))
    camera = np.stack([orbit_camera(a, b, c) for a, b, c in POSES[:3]])
    np.testing.assert_array_equal(mirror_beta(mirror_beta(beta)), beta)
    np.testing.assert_array_equal(mirror_camera(mirror_camera(camera)), camera)
    np.testing.assert_array_equal(canonical.mirror[canonical.mirror], np.arange(478))
    twice = mirror_landmarks(mirror_landmarks(landmarks))
    np.testing.assert_allclose(twice, landmarks, atol=1e-12)


def test_mirror_camera_negates_yaw_and_roll() -> None:
    assert yaw_pitch_roll(mirror_camera(orbit_camera(20, 10, 5))) == pytest.approx((-20, 10, -5), abs=1e-4)


def test_mirror_commutes_with_the_head_frame(canonical: CanonicalFace) -> None:
    landmarks, camera = (observe(canonical.points, orbit_camera(25, 10, 5))[None], orbit_camera(25, 10, 5)[None])
    direct = landmarks_to_head_frame(landmarks, camera)[:, canonical.mirror] * [-1, 1, 1]
    mirrored = landmarks_to_head_frame(mirror_landmarks(landmarks), mirror_camera(camera))
    np.testing.assert_allclose(mirrored, direct, atol=2e-3)  # the canonical face is nearly symmetric


def test_mirrored_torso_is_on_the_other_side(motion: Motion) -> None:
    torso = np.tile(np.float32([0.75, 1.25, 0.125, -0.5]), (3, 1))
    mirrored = mirror_motion(replace(motion, torso=torso)).torso
    np.testing.assert_array_equal(mirrored, np.tile(np.float32([0.25, 1.25, -0.125, -0.5]), (3, 1)))


def test_mirror_agrees_with_tracking_the_flipped_image(tracker: LandmarkerTracker) -> None:
    image = read_image(example_path("source.jpg"))
    size = (image.shape[1], image.shape[0])

    def track(picture: np.ndarray) -> Motion:
        face = FaceTrack(tracker).settle(picture)
        return tracker.make_motion([face], Fraction(25), size, clip=ClipCalibration((0.0, 0.0, float(size[0]))))

    original, flipped = track(image), track(np.ascontiguousarray(image[:, ::-1]))
    expected = mirror_landmarks(original.landmarks)
    assert np.abs(flipped.landmarks - expected)[..., :2].mean() < 0.004
    angles = yaw_pitch_roll(mirror_camera(original.camera)[0])
    assert yaw_pitch_roll(flipped.camera[0]) == pytest.approx(angles, abs=1.5)
    difference = np.abs(mirror_beta(original.beta) - flipped.beta)
    assert difference.mean() < 0.03
    assert difference.max() < 0.3


# crop


def boxes(nose: tuple[float, float], side: float, frames: int = 3) -> np.ndarray:
    """Return landmarks in pixels of a face with a box of this side, the nose (point 1) in its centre."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-0.5, 0.5, (frames, 478, 3)) * side
    pixels[:, 0, :2], pixels[:, 2, :2], pixels[:, 1] = -side / 2, side / 2, 0
    return pixels + [*nose, 0]


@settings(deadline=None)
@given(
    st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 1.2),
    st.tuples(st.integers(64, 2000), st.integers(64, 2000)),
)  # fmt: skip
def test_fit_clip_crop_is_a_square_around_the_nose(x: float, y: float, part: float, size: tuple[int, int]) -> None:
    nose, box = (x * size[0], y * size[1]), part * min(size)
    x0, y0, side = fit_clip_crop(boxes(nose, box), size)
    assert (x0 + side / 2, y0 + side / 2) == pytest.approx(nose, abs=1e-6 * max(size))
    wanted, least = CROP_SCALE
    assert least * box * (1 - 1e-9) <= side <= wanted * box * (1 + 1e-9)
    inside = x0 >= -1e-6 and y0 >= -1e-6 and x0 + side <= size[0] + 1e-6 and y0 + side <= size[1] + 1e-6
    room = 2 * min(nose[0], nose[1], size[0] - nose[0], size[1] - nose[1])
    assert inside or side == pytest.approx(least * box)  # only for a face close to the border it reaches outside
    assert side == pytest.approx(wanted * box) or side >= room - 1e-6  # no smaller than necessary


def test_fit_clip_crop_ignores_one_outlier_frame() -> None:
    pixels = boxes((500, 400), 200, frames=9)
    expected = fit_clip_crop(pixels, (1000, 800))
    pixels[4] = boxes((20, 20), 40, frames=1)
    assert fit_clip_crop(pixels, (1000, 800)) == pytest.approx(expected)


def test_fit_clip_crop_scales_with_the_frames() -> None:
    small, large = fit_clip_crop(boxes((50, 45), 30), (100, 90)), fit_clip_crop(boxes((100, 90), 60), (200, 180))
    assert large == pytest.approx([2 * v for v in small])


def test_crop_image_cuts_replicates_the_border_and_resizes() -> None:
    y, x = np.mgrid[:40, :60]
    image = np.stack([x * 4, y * 4, x + y], axis=-1).astype(np.uint8)
    np.testing.assert_array_equal(crop_image(image, (10, 5, 16), 16), image[5:21, 10:26])
    outside = crop_image(image, (-20, 10, 20), 20)
    np.testing.assert_array_equal(outside, np.repeat(image[10:30, :1], 20, axis=1))
    for side in (16, 48):  # the same square at another size
        cut = crop_image(image, (8, 4, 32), side).astype(float)
        step = 32 / side
        expected = 4 * (8 + (np.arange(side) + 0.5) * step - 0.5)
        np.testing.assert_allclose(cut[side // 2, 2:-2, 0], expected[2:-2], atol=1.1)


# motion


def face(points: np.ndarray, value: float = 0.0) -> Face:
    return Face(points.astype(np.float32), np.full(52, value, np.float32), 1.0)


def test_make_motion_frames_without_a_face_repeat_the_last(tracker: LandmarkerTracker) -> None:
    points = observe(load_canonical_face().points, orbit_camera(0)) * 100
    faces = [None, face(points, 0.1), None, face(points + [5, 0, 0], 0.2), None]
    motion = tracker.make_motion(faces, Fraction(30), (100, 100), clip=ClipCalibration((0.0, 0.0, 100.0)))
    assert motion.found.tolist() == [False, True, False, True, False]
    np.testing.assert_allclose(motion.beta[:, 0], [0.1, 0.1, 0.1, 0.2, 0.2])
    np.testing.assert_array_equal(motion.landmarks[0], motion.landmarks[2])
    np.testing.assert_allclose(motion.landmarks[4] - motion.landmarks[0], [[0.05, 0, 0]] * 478, atol=1e-6)
    with pytest.raises(NoFaceError):
        tracker.make_motion([None, None], Fraction(30), (100, 100))


def test_make_motion_in_chunks_gives_the_same_motion(
    tracker: LandmarkerTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    points = [
        observe(load_canonical_face().points, orbit_camera(5 * i)) * 100 + rng.normal(0, 0.3, (478, 3))
        for i in range(7)
    ]
    faces = [face(row, i / 10) if i != 3 else None for i, row in enumerate(points)]
    whole = tracker.make_motion(faces, Fraction(30), (100, 100))
    monkeypatch.setattr("export3d_cli.core.face.face_track.CHUNK_FRAMES", 2)
    parts = tracker.make_motion(faces, Fraction(30), (100, 100))
    for name in ("beta", "camera", "landmarks", "found"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-6)
    before = np.stack([row.landmarks for row in faces if row is not None])
    np.testing.assert_allclose(whole.landmarks[4:] * whole.crop[2] + [*whole.crop[:2], 0], before[3:], atol=1e-3)


@pytest.fixture
def motion(canonical: CanonicalFace) -> Motion:
    cameras = [orbit_camera(yaw) for yaw in (0, 10, 20)]
    landmarks = np.stack([observe(canonical.points, camera) for camera in cameras]).astype(np.float32)
    beta = np.random.default_rng(0).random((3, 64)).astype(np.float32)
    found = np.array([True, False, True])
    return Motion(beta, np.stack(cameras), landmarks, found, Fraction(30000, 1001), (-3.5, 2.25, 100.0), (640, 480))


def test_motion_files_round_trip(motion: Motion, tmp_path: Path) -> None:
    path = tmp_path / "a.motion.npz"
    motion.save(path)
    again = Motion.load(path)
    for name in ("beta", "camera", "landmarks", "found"):
        np.testing.assert_array_equal(getattr(again, name), getattr(motion, name))
        assert getattr(again, name).dtype == getattr(motion, name).dtype
    assert (again.fps, again.crop, again.size, len(again)) == (motion.fps, motion.crop, motion.size, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.motion.npz"]


@pytest.mark.parametrize(
    "change",
    [
        {"beta": np.zeros((2, 64))},
        {"beta": np.zeros((0, 64)), "camera": np.zeros((0, 25)), "landmarks": np.zeros((0, 478, 3))},
        {"beta": np.zeros(())},
        {"beta": np.full((3, 64), "text")},
        {"camera": np.full((3, 25), np.nan)},
        {"landmarks": np.zeros((3, 468, 3))},
        {"fps": np.array([25, 0])},
        {"fps": np.array([-25, 1])},
        {"fps": np.array(25)},
        {"crop": np.array([0.0, 0.0])},
        {"crop": np.array([0.0, 0.0, np.inf])},
        {"size": np.array(640)},
        {"found": np.array([{}, {}, {}], dtype=object)},
        {"beta": None},
    ],
)
def test_load_wrong_contents_raises_input_error(motion: Motion, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.motion.npz"
    motion.save(path)
    with np.load(path) as data:
        arrays = {**data, **change}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(InputError, match=r"a\.motion\.npz"):
        Motion.load(path)


def test_load_damaged_files_raises_input_error(motion: Motion, tmp_path: Path) -> None:
    path = tmp_path / "a.motion.npz"
    motion.save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    blanked = whole[:100] + bytes(200) + whole[300:]
    for content in (b"", b"no motion", whole[: len(whole) // 2], blanked, bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a motion file"):
            Motion.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))  # an array, not an archive of arrays
    with pytest.raises(InputError, match="not a motion file"):
        Motion.load(path)
    for wrong in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(InputError, match="not a motion file"):
            Motion.load(wrong)


def test_load_other_shapes_raises_input_error(motion: Motion, tmp_path: Path) -> None:
    replace(motion, camera=motion.camera[:, :16]).save(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"\(3, 16\)"):
        Motion.load(tmp_path / "a.npz")
