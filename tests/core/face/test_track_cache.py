"""The track cache: records come back as they were written, and only for the pass they were written for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from export3d_cli.core.face.face_track import Face, TrackCache


@pytest.fixture
def cache() -> Iterator[TrackCache]:
    with TrackCache() as cache:
        yield cache


def random_face(landmarks: int = 478) -> Face:
    rng = np.random.default_rng(landmarks)
    return Face(rng.random((landmarks, 3), np.float32), rng.random(52, np.float32), 0.75)


@pytest.mark.parametrize("landmarks", [478, 68])
def test_cache_returns_the_recorded_faces(cache: TrackCache, landmarks: int) -> None:
    face = random_face(landmarks)
    for _ in range(2):  # a second pass replaces the first
        cache.restart("pass")
        cache.append(face, (640, 480))
        cache.append(None, (640, 480), is_new_shot=True)
    (first, first_begins), (second, second_begins) = cache
    assert (second, first_begins, second_begins) == (None, False, True)
    assert first is not None
    np.testing.assert_array_equal(first.landmarks, face.landmarks)
    np.testing.assert_array_equal(first.blendshapes, face.blendshapes)
    assert (first.score, cache.size) == (0.75, (640, 480))


def test_cache_is_complete_only_for_its_own_key(cache: TrackCache) -> None:
    key = ("film.mp4", "landmarker", "left")
    assert not cache.is_complete(None)
    cache.restart(key)
    cache.append(random_face(), (640, 480))
    assert not cache.is_complete(key)
    cache.finish(["a note"])
    assert cache.is_complete(("film.mp4", "landmarker", "left"))
    assert cache.notes == ("a note",)
    for other in (
        ("other.mp4", "landmarker", "left"),
        ("film.mp4", "fan", "left"),
        ("film.mp4", "landmarker", "right"),
    ):
        assert not cache.is_complete(other)
    cache.restart(("film.mp4", "fan", "left"))
    assert (list(cache), cache.notes) == ([], ())
    assert not cache.is_complete(key)
