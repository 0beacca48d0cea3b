import weakref
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from export3d_cli.core.dataset.segmentation import ClipFilter, Segment, landmark_jitter, sharpness, track_segments
from export3d_cli.core.face.face_track import Face
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.tracker import LandmarkerTracker
from export3d_cli.core.runtime.camera import orbit_camera, project_points
from export3d_cli.core.runtime.errors import InputError

RATE = Fraction(25)
SIZE = (160, 120)


def scene(colour, shift=0):
    """Return a picture of one colour with a darker band."""
    frame = np.full((SIZE[1], SIZE[0], 3), colour, np.uint8)
    frame[:, 20 + shift : 60 + shift] //= 2
    return frame


@pytest.fixture(scope="module")
def canonical():
    return load_canonical_face()


@pytest.fixture
def split_video(canonical):
    """Return a function that splits a video with given faces: None, or the nose's position in pixels."""
    shape = project_points(orbit_camera(0), canonical.points) - 0.5
    depth = canonical.points[:, 2:] * 100

    def run(nose_positions, frames=None, max_seconds=60.0):
        def face(position):
            if position is None:
                return None
            points = np.concatenate([shape * 100 + position, depth], axis=1).astype(np.float32)
            return Face(points, np.zeros(52, np.float32), 1.0)

        positions = iter(nose_positions)
        tracker = LandmarkerTracker.__new__(LandmarkerTracker)
        current = {}

        def track(frame):
            if id(frame) != current.get("frame"):
                current.update(frame=id(frame), face=face(next(positions)))
            return current["face"]

        tracker.find = lambda frame, thorough: track(frame)
        tracker.find_near = lambda frame, face: track(frame)
        if frames is None:
            frames = [scene((90, 120, 90), i % 2) for i in range(len(nose_positions))]
        return list(track_segments(frames, tracker, RATE, SIZE, max_seconds))

    return run


def spans(segments):
    return [(segment.start, len(segment.motion)) for segment in segments]


def test_track_segments_one_face_is_one_segment(split_video):
    segments = split_video([(80, 60)] * 30)
    assert spans(segments) == [(0, 30)]
    x0, y0, side = segments[0].motion.crop
    nose = segments[0].motion.landmarks[:, 1, :2] * side + [x0, y0]
    assert np.abs(nose - [x0 + side / 2, y0 + side / 2]).max() < 0.01


def test_track_segments_only_long_gaps_split(split_video):
    places = [None] * 3 + [(80, 60)] * 10 + [None] * 4 + [(80, 60)] * 10 + [None] * 9 + [(80, 60)] * 8 + [None] * 2
    segments = split_video(places)
    assert spans(segments) == [(3, 24), (36, 8)]
    assert segments[0].motion.found.sum() == 20


def test_track_segments_jump_of_the_face_splits(split_video):
    assert spans(split_video([(60, 60)] * 12 + [(110, 60)] * 8)) == [(0, 12), (12, 8)]


def test_track_segments_cut_with_unmoved_face_splits(split_video):
    frames = [scene((90, 120, 90), i % 2) for i in range(12)] + [scene((220, 60, 30), i % 2) for i in range(9)]
    assert spans(split_video([(80, 60)] * 21, frames)) == [(0, 12), (12, 9)]


def test_track_segments_longer_than_max_seconds_splits(split_video):
    assert spans(split_video([(80, 60)] * 60, max_seconds=1.0)) == [(0, 25), (25, 25), (50, 10)]


def test_track_segments_without_face_is_empty(split_video):
    assert split_video([None] * 8) == []


def test_track_segments_keeps_no_frames(split_video):
    alive: list[weakref.ref] = []
    max_alive = 0

    def frames():
        nonlocal max_alive
        for i in range(80):
            frame = scene((90, 120, 90), i % 2)
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            max_alive = max(max_alive, sum(ref() is not None for ref in alive))

    split_video([(80, 60)] * 400, frames())
    assert max_alive <= 3


def test_track_segments_dissolve_splits_and_is_dropped(split_video):
    one, two = (scene(colour).astype(float) for colour in ((90, 120, 90), (220, 60, 30)))
    two = two[:, ::-1]
    weights = [0.0] * 25 + [i / 13 for i in range(1, 13)] + [1.0] * 25
    frames = [(one * (1 - weight) + two * weight).astype(np.uint8) for weight in weights]
    frames = [frame + np.uint8(i % 2) for i, frame in enumerate(frames)]
    clip_spans = spans(split_video([(80, 60)] * len(frames), frames))
    assert [start for start, _ in clip_spans] == [0, 40]  # three frames late
    assert 24 <= clip_spans[0][1] <= 26
    assert clip_spans[1][1] == 62 - 40


def motion(count=50, yaw=0.0, pitch=0.0, noise=0.0):
    rng = np.random.default_rng(1)
    landmarks = np.tile(rng.random((1, 478, 3)) / 2 + 0.25, (count, 1, 1))
    landmarks[..., :2] += rng.normal(0, 1, (count, 1, 2)) * noise
    camera = np.tile(orbit_camera(yaw, pitch), (count, 1))
    found = np.ones(count, bool)
    return Motion(
        np.zeros((count, 64), np.float32), camera, landmarks.astype(np.float32), found, RATE, (0, 0, 200), SIZE
    )


def test_clip_filter_names_the_reason():
    good = Segment(0, motion(), 100.0, 0.1)
    clip_filter = ClipFilter()
    assert clip_filter.rejection_reason(good) == ""
    assert clip_filter.rejection_reason(replace(good, motion=motion(yaw=45, pitch=-20))) == ""
    lost = replace(motion(), found=np.arange(50) % 2 == 0)
    for segment, reason in (
        (replace(good, motion=motion(20)), "too short: 0.80 s"),
        (replace(good, motion=lost), "only 50% of the frames"),
        (replace(good, face_px=40.0), "face too small: 40 px"),
        (replace(good, motion=motion(yaw=-75)), "turned too far: yaw 75"),
        (replace(good, motion=motion(pitch=60)), "pitch 60"),
        (replace(good, sharpness=0.001), "blurred"),
        (replace(good, motion=motion(noise=0.05)), "unsteady"),
    ):
        assert reason in clip_filter.rejection_reason(segment)
    with pytest.raises(InputError, match="min <= max"):
        ClipFilter(min_seconds=5, max_seconds=2)


def test_landmark_jitter_ignores_uniform_motion():
    still = motion(30)
    moving = replace(still, landmarks=still.landmarks + np.linspace(0, 0.3, 30, dtype=np.float32)[:, None, None])
    assert landmark_jitter(moving, 100.0) < 1e-4
    assert landmark_jitter(motion(30, noise=0.01), 100.0) > 0.01
    assert landmark_jitter(motion(1), 100.0) == 0.0


def test_sharpness_of_a_blurred_face_is_lower():
    import cv2

    frame = np.random.default_rng(0).integers(0, 255, (120, 160, 3)).astype(np.uint8)
    face = Face(np.array([[20, 10, 0], [120, 110, 0]], np.float32), np.zeros(52, np.float32), 1.0)
    assert sharpness(frame, face) > 10 * sharpness(cv2.GaussianBlur(frame, (0, 0), 3), face)
    assert sharpness(frame, replace(face, landmarks=face.landmarks + 500)) == 0.0
