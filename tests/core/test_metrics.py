"""Each metric against scikit-image or a closed form."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from export3d_cli.core import metrics


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:70, :53]
    smooth = np.stack([128 + 90 * np.sin(x / 9), 100 + y, 200 - x - y], axis=-1)
    a = np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    b = np.clip(np.roll(smooth, 2, axis=1) + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    return a, b


def test_psnr_is_that_of_scikit_image(pair):
    assert metrics.psnr(*pair) == pytest.approx(peak_signal_noise_ratio(*pair, data_range=255), abs=1e-9)
    assert metrics.psnr(pair[0], pair[0]) == 100.0
    black = np.zeros((4, 4, 3), np.uint8)
    assert metrics.psnr(black, black + 255) == pytest.approx(0.0)


def test_ssim_is_that_of_scikit_image(pair):
    reference = structural_similarity(
        *pair, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert 0.1 < reference < 0.95
    assert metrics.ssim(*pair) == pytest.approx(reference, abs=1e-9)
    assert metrics.ssim(pair[1], pair[1]) == pytest.approx(1.0)


def test_landmark_distance_is_in_pixels_at_256_and_looks_at_the_image_plane():
    a = np.random.default_rng(1).uniform(0, 1, (4, 478, 3))
    assert metrics.landmark_distance(a, a + [3 / 256, 4 / 256, 9]) == pytest.approx(5.0)
    b = a.copy()
    b[:, metrics.IBUG68[0], 0] += 68 / 256
    assert metrics.landmark_distance(a, b, metrics.IBUG68) == pytest.approx(1.0)
    assert metrics.landmark_distance(a, b) == pytest.approx(68 / 478)


def test_the_68_points_lie_where_ibug_has_them():
    from export3d_cli.core.face.mesh import LEFT_EYE, LIPS, RIGHT_EYE, canonical_face
    from export3d_cli.core.weights import weights_dir

    assert len(set(metrics.IBUG68)) == 68
    points = canonical_face(weights_dir() / "face_landmarker.task").points[list(metrics.IBUG68)]
    assert set(metrics.IBUG68[36:42]) <= set(RIGHT_EYE) and set(metrics.IBUG68[42:48]) <= set(LEFT_EYE)
    assert set(metrics.IBUG68[48:]) <= set(LIPS)
    assert (np.diff(points[1:16, 0]) > 0).all()  # the jaw runs from the image's left to its right
    assert points[:17, 1].argmax() == 8  # the chin is its middle
    assert (np.diff(points[27:31, 1]) > 0).all()  # the bridge of the nose runs down


def test_mean_difference():
    assert metrics.mean_difference(np.array([[0.0, 1.0], [0.5, 0.5]]), np.full((2, 2), 0.5)) == pytest.approx(0.25)


def test_correlation_counts_only_what_moves():
    t = np.linspace(0, 6, 40)
    truth = np.sin(t)
    assert metrics.correlation(truth, 3 * truth + 1, 0.1) == pytest.approx(1.0)
    assert metrics.correlation(truth, -truth, 0.1) == pytest.approx(-1.0)
    assert metrics.correlation(truth, np.full(40, 0.3), 0.1) == 0.0
    assert math.isnan(metrics.correlation(0.01 * truth, truth, 0.1))
    assert math.isnan(metrics.correlation(truth[:2], truth[:2], 0.0))


def test_similarity_is_recovered():
    points = np.random.default_rng(2).uniform(0, 100, (5, 2))
    c, s = 1.7 * np.cos(0.4), 1.7 * np.sin(0.4)
    matrix = np.array([[c, -s, 12.0], [s, c, -7.0]])
    assert np.allclose(metrics.similarity(points, points @ matrix[:, :2].T + matrix[:, 2]), matrix)


def test_arcface_crop_puts_the_points_on_the_template():
    image = np.zeros((256, 256, 3), np.uint8)
    five = metrics.ARCFACE * 2 + 10
    x, y = five[2].round().astype(int)
    image[y - 3 : y + 4, x - 3 : x + 4] = 255
    crop = metrics.arcface_crop(image, five)
    assert crop.shape == (112, 112, 3)
    where = np.argwhere(crop[..., 0] > 128).mean(0)[::-1]
    assert np.abs(where - metrics.ARCFACE[2]).max() < 0.6


def test_mean_leaves_out_what_is_unknown():
    assert metrics.mean_of([1.0, float("nan"), 3.0]) == 2.0
    assert math.isnan(metrics.mean_of([float("nan")])) and math.isnan(metrics.mean_of([]))
