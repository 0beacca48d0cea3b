import weakref
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from export3d_cli.core.dataset.segmentation import (
    ClipFilter,
    Segment,
    landmark_jitter,
    sharpness,
    track_segments,
    yaw_pitch_roll,
)
from export3d_cli.core.face.canonical_face import load_canonical_face
from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import weights_dir

RATE = Fraction(25)
SIZE = (160, 120)


def scene(colour, shift=0):
    """A picture of one colour with a darker band."""
    frame = np.full((SIZE[1], SIZE[0], 3), colour, np.uint8)
    frame[:, 20 + shift : 60 + shift] //= 2
    return frame


@pytest.fixture(scope="module")
def canonical():
    return load_canonical_face(weights_dir() / "face_landmarker.task")


@pytest.fixture
def follow(canonical):
    """Segments of a video whose faces are given: None, or where the nose is in pixels."""
    shape = Camera.orbit(0).project(canonical.points) - 0.5
    depth = canonical.points[:, 2:] * 100

    def run(places, frames=None, max_seconds=60.0):
        def face(place):
            if place is None:
                return None
            points = np.concatenate([shape * 100 + place, depth], axis=1).astype(np.float32)
            return Face(points, np.zeros(52, np.float32), 1.0)

        rows = iter(places)
        tracker = SimpleNamespace(canonical=canonical)
        seen = {}

        def track(frame):
            if id(frame) != seen.get("frame"):
                seen.update(frame=id(frame), face=face(next(rows)))
            return seen["face"]

        tracker.landmarker = SimpleNamespace(track=track, reset=lambda: None)
        tracker.motion = lambda *args: LandmarkerTracker.make_motion(tracker, *args)
        if frames is None:
            frames = [scene((90, 120, 90), i % 2) for i in range(len(places))]
        return list(track_segments(frames, tracker, RATE, SIZE, max_seconds))

    return run


def spans(found):
    return [(part.start, len(part.motion)) for part in found]


def test_a_video_of_one_face_is_one_segment(follow):
    found = follow([(80, 60)] * 30)
    assert spans(found) == [(0, 30)]
    x0, y0, side = found[0].motion.crop
    nose = found[0].motion.landmarks[:, 1, :2] * side + [x0, y0]
    assert np.abs(nose - [x0 + side / 2, y0 + side / 2]).max() < 0.01


def test_short_gaps_are_bridged_and_long_ones_divide(follow):
    places = [None] * 3 + [(80, 60)] * 10 + [None] * 4 + [(80, 60)] * 10 + [None] * 9 + [(80, 60)] * 8 + [None] * 2
    found = follow(places)
    assert spans(found) == [(3, 24), (36, 8)]
    assert found[0].motion.found.sum() == 20


def test_a_leap_of_the_face_divides(follow):
    assert spans(follow([(60, 60)] * 12 + [(110, 60)] * 8)) == [(0, 12), (12, 8)]


def test_a_cut_divides_where_the_face_stays(follow):
    frames = [scene((90, 120, 90), i % 2) for i in range(12)] + [scene((220, 60, 30), i % 2) for i in range(9)]
    assert spans(follow([(80, 60)] * 21, frames)) == [(0, 12), (12, 9)]


def test_long_tracks_are_split(follow):
    assert spans(follow([(80, 60)] * 60, max_seconds=1.0)) == [(0, 25), (25, 25), (50, 10)]


def test_no_face_is_no_segment(follow):
    assert follow([None] * 8) == []


def test_frames_are_not_kept(follow):
    alive: list[weakref.ref] = []
    most = 0

    def frames():
        nonlocal most
        for i in range(80):
            frame = scene((90, 120, 90), i % 2)
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            most = max(most, sum(ref() is not None for ref in alive))

    follow([(80, 60)] * 400, frames())
    assert most <= 3


def test_a_dissolve_divides_and_belongs_to_neither(follow):
    one, two = (scene(colour).astype(float) for colour in ((90, 120, 90), (220, 60, 30)))
    two = two[:, ::-1]
    shares = [0.0] * 25 + [i / 13 for i in range(1, 13)] + [1.0] * 25
    frames = [(one * (1 - share) + two * share).astype(np.uint8) for share in shares]
    frames = [frame + np.uint8(i % 2) for i, frame in enumerate(frames)]
    found = spans(follow([(80, 60)] * len(frames), frames))
    assert [start for start, _ in found] == [0, 40]  # three frames late
    assert 24 <= found[0][1] <= 26
    assert found[1][1] == 62 - 40


def motion(count=50, yaw=0.0, pitch=0.0, shake=0.0):
    rng = np.random.default_rng(1)
    landmarks = np.tile(rng.random((1, 478, 3)) / 2 + 0.25, (count, 1, 1))
    landmarks[..., :2] += rng.normal(0, 1, (count, 1, 2)) * shake
    camera = np.tile(Camera.orbit(yaw, pitch).to_vector(), (count, 1))
    found = np.ones(count, bool)
    return Motion(
        np.zeros((count, 64), np.float32), camera, landmarks.astype(np.float32), found, RATE, (0, 0, 200), SIZE
    )


def test_gates_say_why():
    good = Segment(0, motion(), 100.0, 0.1)
    gates = ClipFilter()
    assert gates.rejection_reason(good) == ""
    assert gates.rejection_reason(replace(good, motion=motion(yaw=45, pitch=-20))) == ""
    lost = replace(motion(), found=np.arange(50) % 2 == 0)
    for part, reason in (
        (replace(good, motion=motion(20)), "too short: 0.80 s"),
        (replace(good, motion=lost), "only 50% of the frames"),
        (replace(good, face=40.0), "face too small: 40 px"),
        (replace(good, motion=motion(yaw=-75)), "turned too far: yaw 75"),
        (replace(good, motion=motion(pitch=60)), "pitch 60"),
        (replace(good, sharpness=0.001), "blurred"),
        (replace(good, motion=motion(shake=0.05)), "unsteady"),
    ):
        assert reason in gates.rejection_reason(part)
    with pytest.raises(InputError, match="min <= max"):
        ClipFilter(min_seconds=5, max_seconds=2)


def test_angles_are_those_of_the_camera():
    cameras = [Camera.orbit(20, -10, 5), Camera.orbit(-35, 12, -3)]
    got = yaw_pitch_roll(np.stack([camera.to_vector() for camera in cameras]))
    assert np.allclose(got, [camera.angles() for camera in cameras], atol=1e-3)


def test_jitter_does_not_count_steady_motion():
    still = motion(30)
    moving = replace(still, landmarks=still.landmarks + np.linspace(0, 0.3, 30, dtype=np.float32)[:, None, None])
    assert landmark_jitter(moving, 100.0) < 1e-4
    assert landmark_jitter(motion(30, shake=0.01), 100.0) > 0.01
    assert landmark_jitter(motion(1), 100.0) == 0.0


def test_a_blurred_face_is_less_sharp():
    import cv2

    frame = np.random.default_rng(0).integers(0, 255, (120, 160, 3)).astype(np.uint8)
    face = Face(np.array([[20, 10, 0], [120, 110, 0]], np.float32), np.zeros(52, np.float32), 1.0)
    assert sharpness(frame, face) > 10 * sharpness(cv2.GaussianBlur(frame, (0, 0), 3), face)
    assert sharpness(frame, replace(face, landmarks=face.landmarks + 500)) == 0.0
