"""Networks shared by threads: each call gets the outputs of its own input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from export3d_cli.core.face.face_track import FaceTrack
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.face.tracker import LiteRTNetwork, open_landmarker_tracker, read_bundle
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.weights import example_path, resolve_weights


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return cv2.resize(read_image(example_path("source.jpg")), (256, 256), interpolation=cv2.INTER_AREA)


def test_network_shared_by_threads_returns_the_outputs_of_each_input() -> None:
    bundle = resolve_weights("face_landmarker")
    network = LiteRTNetwork(*read_bundle(bundle, "face_landmarks_detector.tflite"), bundle, 1)
    inputs = list(np.random.default_rng(0).random((12, 256, 256, 3), np.float32))
    expected = [network(array)[0] for array in inputs]
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda array: network(array)[0], inputs))
    np.testing.assert_array_equal(outputs, expected)


def test_landmarker_shared_by_threads_finds_the_face_of_each_image(photo: np.ndarray) -> None:
    landmarker = open_landmarker_tracker()
    canvas = np.full((256, 256, 3), 127, np.uint8)
    images = [cv2.resize(photo, (side, side)) for side in range(180, 260, 20)] + [canvas] * 2
    expected = [landmarker.find_all(image) for image in images]
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(landmarker.find_all, images))
    for faces, expected_faces in zip(outputs, expected, strict=True):
        assert len(faces) == len(expected_faces)
        for face, expected_face in zip(faces, expected_faces, strict=True):
            np.testing.assert_array_equal(face.landmarks, expected_face.landmarks)


def test_matting_shared_by_threads_returns_the_alpha_of_each_picture(photo: np.ndarray) -> None:
    matting = PersonMatting(resolve_weights("selfie_segmentation"))
    pictures = [np.roll(photo, 8 * k, axis=1) for k in range(8)]
    expected = [matting.alpha(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as threads:
        np.testing.assert_array_equal(list(threads.map(matting.alpha, pictures)), expected)


def test_tracks_and_mattings_of_two_videos_in_threads_equal_separate_runs(photo: np.ndarray) -> None:
    landmarker = open_landmarker_tracker()
    matting = PersonMatting(resolve_weights("selfie_segmentation"))
    videos = [
        [np.roll(image, 2 * k, axis=1) for k in range(6)] for image in (photo, np.ascontiguousarray(photo[:, ::-1]))
    ]

    def run(video: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        track = FaceTrack(landmarker)
        faces = [track.track(frame) for frame in video]
        alphas = np.stack([matting.alpha(frame) for frame in video])
        return np.stack([face.landmarks for face in faces if face is not None]), alphas

    expected = [run(video) for video in videos]
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(run, videos))
    for (landmarks, alphas), (expected_landmarks, expected_alphas) in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(landmarks, expected_landmarks)
        np.testing.assert_array_equal(alphas, expected_alphas)
