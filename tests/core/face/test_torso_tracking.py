"""Motion of the torso in the example driver: moved pictures, moved faces, cuts and covers."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from export3d_cli.core.face.face_track import Face
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.face.torso_tracking import TorsoTracker
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.weights import example_path, resolve_weights


@pytest.fixture(scope="module")
def matting() -> PersonMatting:
    return PersonMatting(resolve_weights("selfie_segmentation"))


@pytest.fixture(scope="module")
def shown() -> tuple[np.ndarray, Face]:
    """Return the first frame of the example driver, 512 x 512, and its face."""
    with VideoReader(example_path("drive.mp4")) as frames:
        image = next(iter(frames))
    face = open_landmarker_tracker().find(image)
    assert face is not None
    return image, face


def moved(face: Face, x: float) -> Face:
    return replace(face, landmarks=face.landmarks + np.float32([x, 0, 0]))


def test_torso_moves_as_the_picture(matting: PersonMatting, shown: tuple[np.ndarray, Face]) -> None:
    image, face = shown
    torso = TorsoTracker(matting)
    first = torso(image, face, is_new_shot=False)
    matrix = cv2.getRotationMatrix2D((float(first[0]), float(first[1])), -3, 1.04) + [[0, 0, 9], [0, 0, 5]]
    picture = cv2.warpAffine(image, matrix, image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
    change = torso(picture, face, is_new_shot=False) - first
    np.testing.assert_allclose(change[:2], [9, 5], atol=0.5)
    np.testing.assert_allclose(change[2:], [np.radians(3), np.log(1.04)], atol=0.004)
    again = torso(picture, face, is_new_shot=True)
    np.testing.assert_allclose(again, first)  # a shot begins at the face, without roll and at its own size
    assert not torso.unseen


def test_torso_and_face_move_apart(matting: PersonMatting, shown: tuple[np.ndarray, Face]) -> None:
    image, face = shown
    torso = TorsoTracker(matting)
    first = torso(image, face, is_new_shot=False)
    np.testing.assert_allclose(torso(image, moved(face, 20), is_new_shot=False), first, atol=0.1)
    chin, picture = int(face.landmarks[:, 1].max()), image.copy()
    picture[chin:] = np.roll(picture[chin:], 8, axis=1)
    np.testing.assert_allclose(torso(picture, face, is_new_shot=False) - first, [8, 0, 0, 0], atol=0.5)


def test_covered_torso_moves_with_the_face(matting: PersonMatting, shown: tuple[np.ndarray, Face]) -> None:
    image, face = shown
    torso = TorsoTracker(matting)
    first = torso(image, face, is_new_shot=False)
    covered = image.copy()
    covered[int(face.landmarks[:, 1].max()) :] = 128
    np.testing.assert_allclose(torso(covered, moved(face, 6), is_new_shot=False) - first, [6, 0, 0, 0], atol=1e-3)
    np.testing.assert_allclose(torso(image, face, is_new_shot=False), first, atol=0.2)


@pytest.mark.filterwarnings("error")
def test_torso_without_texture_counts_as_unseen(matting: PersonMatting, shown: tuple[np.ndarray, Face]) -> None:
    image, face = shown
    torso, flat = TorsoTracker(matting), image.copy()
    flat[int(face.landmarks[:, 1].max()) - 30 :] = 77
    assert np.isnan(torso(flat, face, is_new_shot=False)).all()
    assert torso.unseen
    first = torso(image, face, is_new_shot=True)
    blank = np.full_like(image, 77)  # matches nowhere
    np.testing.assert_allclose(torso(blank, moved(face, 6), is_new_shot=False) - first, [6, 0, 0, 0], atol=1e-3)


def test_head_alone_shows_no_torso(matting: PersonMatting, shown: tuple[np.ndarray, Face]) -> None:
    image, face = shown
    torso = TorsoTracker(matting)
    head = np.ascontiguousarray(image[: int(face.landmarks[:, 1].max())])
    assert np.isnan(torso(head, face, is_new_shot=False)).all()
    assert torso.unseen
