"""The landmark network in PyTorch against LiteRT, and the landmark loss."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from export3d_cli.core.face.tracker import LiteRTNetwork, open_landmarker_tracker, read_bundle
from export3d_cli.core.media.image import read_image
from export3d_cli.core.model.warp.mesh_flow import warp
from export3d_cli.core.runtime.weights import example_path, resolve_weights
from export3d_cli.core.train.losses import VIEW_SIZE_PX, LandmarkLoss, LandmarkNetwork, landmarker_view_grid


@pytest.fixture(scope="module")
def network() -> LandmarkNetwork:
    return LandmarkNetwork(resolve_weights("face_landmarker"))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(256, 256, 3) uint8."""
    return cv2.resize(
        read_image(example_path("source.jpg")), (VIEW_SIZE_PX, VIEW_SIZE_PX), interpolation=cv2.INTER_AREA
    )


def test_network_matches_litert(network: LandmarkNetwork, photo: np.ndarray) -> None:
    bundle = resolve_weights("face_landmarker")
    own = LiteRTNetwork(*read_bundle(bundle, "face_landmarks_detector.tflite"), bundle, 1)
    face = photo.astype(np.float32) / 255
    with torch.no_grad():
        found = network(torch.from_numpy(face).permute(2, 0, 1)[None])[0]
    np.testing.assert_allclose(found.numpy(), own(face)[0].reshape(-1, 3), atol=0.01)


def test_view_grid_matches_the_landmarkers_crop(network: LandmarkNetwork, photo: np.ndarray) -> None:
    """Landmarks found in the crop of a tilted face, mapped back, equal the landmarker's."""
    tilted = cv2.warpAffine(photo, cv2.getRotationMatrix2D((128, 128), 20, 0.8), (VIEW_SIZE_PX, VIEW_SIZE_PX))
    landmarker = open_landmarker_tracker()
    face = landmarker.find(tilted)
    assert face is not None
    face = landmarker.find_near(tilted, face)
    assert face is not None
    where = landmarker_view_grid(torch.from_numpy(face.landmarks[None, :, :2]) / VIEW_SIZE_PX)
    image = torch.from_numpy(tilted).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        seen = network(warp(image, where))[0, :, :2]
    back = warp(where, seen.T[None, :, None] / VIEW_SIZE_PX)
    np.testing.assert_allclose(back[0, :, 0].T.numpy() * VIEW_SIZE_PX, face.landmarks[:, :2], atol=1.0)


def test_loss_is_zero_for_equal_images_and_measures_a_moved_mouth(network: LandmarkNetwork, photo: np.ndarray) -> None:
    face = open_landmarker_tracker().find(photo)
    assert face is not None
    marks = torch.from_numpy(face.landmarks[None, :, :2]) / VIEW_SIZE_PX
    image = torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1
    loss = LandmarkLoss(network)
    assert loss(image, image, marks) == 0
    moved = image.roll(3, dims=3).requires_grad_()
    found = loss(moved, image, marks)
    wide = (
        landmarker_view_grid(marks)[0, 0, 0, -1] - landmarker_view_grid(marks)[0, 0, 0, 0]
    ).item()  # fractions of the image
    assert found.item() == pytest.approx(100 * 3 / VIEW_SIZE_PX / wide / 3, rel=0.3)  # along one of three axes
    found.backward()
    assert moved.grad is not None and moved.grad.isfinite().all() and moved.grad.any()
    assert not [p for p in loss.parameters() if p.requires_grad]
