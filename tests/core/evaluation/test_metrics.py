"""Metrics against scikit-image or a closed form."""

import math
from fractions import Fraction

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from export3d_cli.core.evaluation import metrics
from export3d_cli.core.face.expression_coefficients import BetaStatistics
from export3d_cli.core.face.head_pose import head_frame_to_landmarks, load_canonical_face
from export3d_cli.core.face.landmarks import IBUG68, MEASURE_POINTS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import orbit_camera


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:70, :53]
    smooth = np.stack([128 + 90 * np.sin(x / 9), 100 + y, 200 - x - y], axis=-1)
    a = np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    b = np.clip(np.roll(smooth, 2, axis=1) + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    return a, b


def test_psnr_matches_scikit_image(pair):
    assert metrics.psnr(*pair) == pytest.approx(peak_signal_noise_ratio(*pair, data_range=255), abs=1e-9)
    assert metrics.psnr(pair[0], pair[0]) == 100.0
    black = np.zeros((4, 4, 3), np.uint8)
    assert metrics.psnr(black, black + 255) == pytest.approx(0.0)


def test_ssim_matches_scikit_image(pair):
    reference = structural_similarity(
        *pair, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert 0.1 < reference < 0.95
    assert metrics.ssim(*pair) == pytest.approx(reference, abs=1e-9)
    assert metrics.ssim(pair[1], pair[1]) == pytest.approx(1.0)


def test_landmark_distance_is_in_the_image_plane_in_pixels_at_256():
    a = np.random.default_rng(1).uniform(0, 1, (4, 478, 3))
    assert metrics.landmark_distance(a, a + [3 / 256, 4 / 256, 9]) == pytest.approx(5.0)
    b = a.copy()
    b[:, 5, 0] += 68 / 256
    assert metrics.landmark_distance(a, b) == pytest.approx(68 / 478)


def test_ibug68_points_lie_on_the_right_features():
    from export3d_cli.core.face.landmarks import LEFT_EYE, LIPS, RIGHT_EYE

    assert len(set(IBUG68)) == 68
    points = load_canonical_face().points[list(IBUG68)]
    assert set(IBUG68[36:42]) <= set(RIGHT_EYE) and set(IBUG68[42:48]) <= set(LEFT_EYE)
    assert set(IBUG68[48:]) <= set(LIPS)
    assert (np.diff(points[1:16, 0]) > 0).all()  # the jaw is listed from the image's left to its right
    assert points[:17, 1].argmax() == 8  # the chin is its middle
    assert (np.diff(points[27:31, 1]) > 0).all()  # the bridge of the nose runs down


def test_mean_abs_difference():
    assert metrics.mean_abs_difference(np.array([[0.0, 1.0], [0.5, 0.5]]), np.full((2, 2), 0.5)) == pytest.approx(0.25)


def test_pose_vector_is_in_radians_and_head_units():
    a, b = (orbit_camera(yaw, radius=radius)[None] for yaw, radius in ((10.0, 2.7), (40.0, 3.3)))
    expected = np.array([np.radians(30), 0.6])  # rotation about the vertical axis; depth
    difference = np.abs(metrics.pose_vector(a) - metrics.pose_vector(b))[0]
    assert np.allclose(difference[[1, 5]], expected, atol=1e-5) and np.allclose(difference[[0, 2, 3, 4]], 0, atol=1e-5)
    assert metrics.mean_abs_difference(metrics.pose_vector(a), metrics.pose_vector(b)) == pytest.approx(
        expected.sum() / 6, abs=1e-5
    )


def test_measures_of_planedict_match_closed_forms():
    """AUCON, PRMSE, ET; AVD does not see the expression that its fit explains, nor size and place."""
    beta = np.zeros((2, 64))
    beta[0, metrics.ARKIT_NAMES.index("jawOpen")] = 0.21
    beta[:, metrics.ARKIT_NAMES.index("eyeLookInLeft")] = 1  # gaze is no action unit
    count = len(metrics.ACTION_UNITS)
    assert count == 38 and metrics.action_unit_consistency(beta, 0 * beta) == 1 - 1 / (2 * count)
    a, b = (np.stack([orbit_camera(yaw, pitch) for yaw, pitch in at]) for at in (((0, 0), (3, 4)), ((6, 0), (3, 0))))
    assert metrics.pose_rmse(a, b) == pytest.approx(np.sqrt((36 + 16) / 6), abs=1e-3)
    irises = np.zeros((3, 2, 2))
    assert metrics.eye_tracking_error(irises, irises + [3 / 64, 4 / 64]) == pytest.approx(5)
    points, camera, statistics = load_canonical_face().points, orbit_camera(0)[None], BetaStatistics.load()
    width = np.linalg.norm(np.subtract(*(points[list(corners)].mean(0) for corners in MEASURE_POINTS.eye_corners)))

    def motion(points, beta):
        landmarks = head_frame_to_landmarks(points[None].astype(np.float32), camera)
        return Motion(beta[None], camera, landmarks, np.ones(1, bool), Fraction(25), (0, 0, 1), (1, 1))

    change = np.random.default_rng(0).uniform(0, 0.3, 64)
    moved = points + width * np.tensordot(change @ statistics.slopes, statistics.modes, 1)
    rest, smile = motion(points, statistics.mean), motion(moved, statistics.mean + change)
    assert metrics.vertex_distance(rest, motion(moved * 1.1 + 0.01, statistics.mean)) > 0.01
    assert metrics.vertex_distance(rest, smile) == pytest.approx(0, abs=1e-4)
    larger = motion(points * 1.1 + 0.01, statistics.mean)
    assert metrics.vertex_distance(rest, larger) == pytest.approx(0, abs=1e-3)


def test_rotation_angle_of_known_cameras():
    a = np.stack([orbit_camera(0, 0, roll) for roll in (0.0, 25.0)])
    b = np.stack([orbit_camera(0, 20.0), orbit_camera(0, 0, -20.0, radius=5)])
    assert np.allclose(metrics.rotation_angle(a, b), [20, 45], atol=1e-3)


def test_gaze_direction_follows_the_iris():
    angle = np.radians([0.0, 20.0, -35.0])
    side = metrics.IRIS_RADIUS * np.stack([np.sin(angle), np.zeros(3)], axis=-1)
    directions = metrics.gaze_direction(side)
    assert np.allclose(directions, np.stack([np.sin(angle), np.zeros(3), -np.cos(angle)], axis=-1))
    assert metrics.gaze_error(directions[:1], directions[1:2]) == pytest.approx(20)
    assert metrics.gaze_error(directions, directions[:1]) == pytest.approx((20 + 35) / 3)
    far = metrics.gaze_direction(np.array([9.0, 0.0]))  # farther than an eye can turn
    assert np.allclose(far, [1, 0, 0])


def test_gaze_direction_from_iris_entries_of_beta():
    """Move both irises of the canonical face to where eyes turned by 15 degrees have them."""
    from export3d_cli.core.face.expression_coefficients import compute_measures
    from export3d_cli.core.face.landmarks import LEFT_IRIS, RIGHT_IRIS

    points = np.repeat(load_canonical_face().points[None], 2, axis=0)
    eyes = [points[0, list(corners)].mean(0) for corners in ((362, 263), (33, 133))]
    unit = np.linalg.norm(eyes[0] - eyes[1])
    for iris, eye in zip((LEFT_IRIS, RIGHT_IRIS), eyes, strict=True):
        points[:, list(iris)] = eye
        points[1, list(iris), 0] += metrics.IRIS_RADIUS * unit * np.sin(np.radians(15))
    directions = metrics.gaze_direction(compute_measures(points)[:, 8:12].reshape(2, 2, 2))
    assert metrics.gaze_error(directions[0], directions[1]) == pytest.approx(15, abs=1e-3)


def test_flicker_ignores_errors_that_change_linearly():
    t = np.arange(6)[:, None, None, None]
    truth = np.random.default_rng(3).integers(40, 90, (6, 8, 8, 3)).astype(np.uint8)
    assert metrics.flicker((truth + 7).astype(np.uint8), truth) == 0
    assert metrics.flicker((truth + 5 * t).astype(np.uint8), truth) == 0
    blinking = (truth + 10 * (t % 2)).astype(np.uint8)  # +10, 0, +10: second differences of 20
    assert metrics.flicker(blinking, truth) == pytest.approx(20)


def test_excess_jitter_subtracts_the_driver_s():
    t = np.arange(8)[:, None]
    truth = np.zeros((8, 478, 3))
    truth[..., 0] = 0.01 * t**2  # constant acceleration: second differences of 0.02
    shaken = truth.copy()
    shaken[..., 1] += (t % 2) * 3 / 256  # second differences of 6 pixels across
    pixels = np.hypot(0.02 * 256, 6) - 0.02 * 256
    assert metrics.excess_jitter(shaken, truth) == pytest.approx(pixels)
    assert metrics.excess_jitter(truth + [0.1, 0, 5], truth) == pytest.approx(0)
    assert metrics.excess_jitter(truth, shaken) == pytest.approx(-pixels)


def test_bootstrap_interval_agrees_with_the_normal_interval():
    values = np.random.default_rng(4).normal(5, 2, 400)
    low, high = metrics.bootstrap_interval([*values, float("nan")])
    half_width = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half_width, abs=0.02) and high == pytest.approx(
        values.mean() + half_width, abs=0.02
    )
    assert metrics.bootstrap_interval([*values]) == metrics.bootstrap_interval([*values], seed=0)
    assert all(math.isnan(bound) for bound in metrics.bootstrap_interval([1.0, float("nan")]))
    assert metrics.bootstrap_interval([3.0, 3.0]) == (3.0, 3.0)


def test_correlation_and_slope_need_a_driver_that_moves():
    t = np.linspace(0, 6, 40)
    truth = np.sin(t)
    assert metrics.correlation_and_slope(truth, 0.3 * truth + 1, 0.1) == pytest.approx((1.0, 0.3))
    assert metrics.correlation_and_slope(truth, -truth, 0.1) == pytest.approx((-1.0, -1.0))
    assert metrics.correlation_and_slope(truth, np.full(40, 0.3), 0.1) == pytest.approx((0.0, 0.0))
    for still in (0.01 * truth, truth[:2]):
        assert np.isnan(metrics.correlation_and_slope(still, truth[: len(still)], 0.1)).all()


def test_finite_mean_ignores_nan():
    assert metrics.finite_mean([1.0, float("nan"), 3.0]) == 2.0
    assert math.isnan(metrics.finite_mean([float("nan")])) and math.isnan(metrics.finite_mean([]))
