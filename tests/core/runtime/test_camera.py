"""Angles, and the view of an orbiting camera."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export3d_cli.core.runtime.camera import FOCAL, RADIUS, Camera, default_intrinsics, rotation_from_angles
from export3d_cli.core.runtime.errors import InputError

half_turn, quarter = st.floats(-179, 179), st.floats(-89, 89)  # yaw beyond 90 degrees has no unique angles


@given(quarter, half_turn, half_turn)
@settings(deadline=None)
def test_orbit_angles_round_trip(yaw: float, pitch: float, roll: float) -> None:
    rotation = rotation_from_angles(yaw, pitch, roll)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert Camera.orbit(yaw, pitch, roll).angles() == pytest.approx((yaw, pitch, roll), abs=1e-6)


@given(quarter, half_turn, half_turn, st.floats(1, 10))
@settings(deadline=None)
def test_orbit_centres_the_head_at_the_radius(yaw: float, pitch: float, roll: float, radius: float) -> None:
    camera = Camera.orbit(yaw, pitch, roll, radius=radius)
    np.testing.assert_allclose(camera.project(np.zeros((1, 3))), [[0.5, 0.5]], atol=1e-9)
    assert np.linalg.norm(camera.cam2world[:3, 3]) == pytest.approx(radius)


def test_orbit_angle_signs() -> None:
    nose, temple = np.array([[0, 0, -0.1]]), np.array([[0.1, 0, 0]])  # the temple at the image's right
    (x, y), *_ = Camera.orbit(20).project(nose)
    assert x > 0.55
    assert y == pytest.approx(0.5)
    (x, y), *_ = Camera.orbit(0, 20).project(nose)
    assert x == pytest.approx(0.5)
    assert y < 0.45
    (x, y), *_ = Camera.orbit(0, 0, 20).project(temple)  # clockwise: the right side goes down
    assert x > 0.5
    assert y > 0.55


def test_frontal_camera_is_in_front_of_the_face() -> None:
    camera = Camera.orbit(0)
    np.testing.assert_allclose(camera.cam2world[:3, 3], [0, 0, -RADIUS])
    np.testing.assert_allclose(camera.cam2world[:3, :3], np.eye(3), atol=1e-12)
    corner = RADIUS / FOCAL / 2  # of the image, in the plane of the head's centre
    np.testing.assert_allclose(camera.project(np.array([[-corner, -corner, 0.0]])), [[0, 0]], atol=1e-12)


def test_vector_round_trips() -> None:
    camera = Camera.orbit(10, -5, 3)
    vector = camera.to_vector()
    assert vector.shape == (25,)
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(vector[16:], default_intrinsics().ravel().astype(np.float32))
    np.testing.assert_allclose(Camera.from_vector(vector).cam2world, camera.cam2world, atol=1e-6)
    with pytest.raises(InputError, match=r"\(4, 4\)"):
        Camera.from_vector(np.eye(4))
