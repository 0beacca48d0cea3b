"""Angles, and the view of an orbiting camera."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export3d_cli.core.runtime.camera import (
    FOCAL,
    RADIUS,
    default_intrinsics,
    head_pose,
    orbit_camera,
    project_points,
    rotation_from_angles,
    with_head_pose,
    yaw_pitch_roll,
)

half_turn, quarter = st.floats(-179, 179), st.floats(-89, 89)  # yaw beyond 90 degrees has no unique angles


@given(quarter, half_turn, half_turn)
@settings(deadline=None)
def test_orbit_angles_round_trip(yaw: float, pitch: float, roll: float) -> None:
    rotation = rotation_from_angles(yaw, pitch, roll)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert yaw_pitch_roll(orbit_camera(yaw, pitch, roll)) == pytest.approx((yaw, pitch, roll), abs=1e-4)


@given(quarter, half_turn, half_turn, st.floats(1, 10))
@settings(deadline=None)
def test_orbit_centres_the_head_at_the_radius(yaw: float, pitch: float, roll: float, radius: float) -> None:
    camera = orbit_camera(yaw, pitch, roll, radius=radius)
    np.testing.assert_allclose(project_points(camera, np.zeros((1, 3))), [[0.5, 0.5]], atol=1e-6)
    assert np.linalg.norm(head_pose(camera)[1]) == pytest.approx(radius)


def test_orbit_angle_signs() -> None:
    nose, temple = np.array([[0, 0, -0.1]]), np.array([[0.1, 0, 0]])  # the temple at the image's right
    (x, y), *_ = project_points(orbit_camera(20), nose)
    assert x > 0.55
    assert y == pytest.approx(0.5)
    (x, y), *_ = project_points(orbit_camera(0, 20), nose)
    assert x == pytest.approx(0.5)
    assert y < 0.45
    (x, y), *_ = project_points(orbit_camera(0, 0, 20), temple)  # clockwise: the right side goes down
    assert x > 0.5
    assert y > 0.55


def test_frontal_camera_is_in_front_of_the_face() -> None:
    camera = orbit_camera(0)
    cam2world = camera[:16].reshape(4, 4)
    np.testing.assert_allclose(cam2world[:3, 3], [0, 0, -RADIUS], atol=1e-6)
    np.testing.assert_allclose(cam2world[:3, :3], np.eye(3), atol=1e-6)
    np.testing.assert_array_equal(cam2world[3], [0, 0, 0, 1])
    np.testing.assert_array_equal(camera[16:], default_intrinsics().ravel().astype(np.float32))
    corner = RADIUS / FOCAL / 2  # of the image, in the plane of the head's centre
    np.testing.assert_allclose(project_points(camera, np.array([[-corner, -corner, 0.0]])), [[0, 0]], atol=1e-6)


def test_head_pose_round_trips() -> None:
    cameras = np.stack([orbit_camera(10, -5, 3), orbit_camera(-60, 20)])
    rotation, centre = head_pose(cameras)
    again = with_head_pose(cameras, rotation, centre)
    assert again.shape == (2, 25)
    assert again.dtype == np.float32
    np.testing.assert_allclose(again, cameras, atol=1e-6)
