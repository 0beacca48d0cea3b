"""The identity loss: differentiable alignment against OpenCV, and an embedder with a closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from export3d_cli.core.config.loading import make_train_config
from export3d_cli.core.config.schema import LossConfig, TrainConfig
from export3d_cli.core.runtime.errors import ConfigError, InputError
from export3d_cli.core.train.identity_loss import ARCFACE_TEMPLATE, align_face, arcface_points, load_identity_loss
from export3d_cli.core.train.trainer import train

from .conftest import motion_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit, the format of embedders


class Colours(torch.nn.Module):
    """Mean colour of each half of a face."""

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        return torch.cat([face[..., :56].mean((2, 3)), face[..., 56:].mean((2, 3))], dim=1)


@pytest.fixture
def embedder(tmp_path: Path) -> str:
    path = str(tmp_path / "embedder.pt")
    torch.jit.script(Colours()).save(path)
    return path


def test_align_face_matches_opencv() -> None:
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.uniform(-1, 1, (128, 128, 3)).astype(np.float32), (0, 0), 4)
    turn = np.array([[0.8, -0.3], [0.3, 0.8]]) * 0.55
    five = (np.array(ARCFACE_TEMPLATE) - 56) @ turn.T + 64 + rng.normal(0, 0.5, (5, 2))  # pixel indices
    mean, template_mean = five.mean(0), np.array(ARCFACE_TEMPLATE).mean(0)
    x, y = (five - mean).T
    equations = np.concatenate([np.stack([x, -y], 1), np.stack([y, x], 1)])  # the same similarity transform
    a, b = np.linalg.lstsq(equations, (ARCFACE_TEMPLATE - template_mean).T.ravel(), rcond=None)[0]
    linear = np.array([[a, -b], [b, a]])
    matrix = np.column_stack([linear, template_mean - linear @ mean])
    expected = cv2.warpAffine(picture, matrix, (112, 112), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    crop_units = torch.from_numpy((five + 0.5) / 128)[None].float()
    got = align_face(torch.from_numpy(picture).permute(2, 0, 1)[None], crop_units)[0].permute(1, 2, 0).numpy()
    inside = np.abs(got - expected)[8:-8, 8:-8]
    assert inside.max() < 0.02  # OpenCV rounds positions to 1/32 pixel


def test_identity_loss_compares_faces_and_has_a_gradient(embedder: str) -> None:
    identity = load_identity_loss(embedder, torch.device("cpu"))
    landmarks = torch.from_numpy(motion_of(0, 2).landmarks[..., :2])
    assert arcface_points(landmarks).shape == (2, 5, 2)
    assert (arcface_points(landmarks)[:, 0, 0] < arcface_points(landmarks)[:, 1, 0]).all()
    target = torch.rand(2, 3, 64, 64) * 2 - 1
    assert identity(target, target, landmarks).item() == pytest.approx(0, abs=1e-6)
    image = torch.zeros(2, 3, 64, 64)
    image[:, 0, :, :32], image[:, 1, :, 32:] = 1, 1
    image.requires_grad_()
    loss = identity(image, target, landmarks)
    assert 0.05 < loss.item() < 2
    loss.backward()
    assert image.grad is not None
    nose = (landmarks[0, 1] * 64).long()
    assert image.grad[0, :, nose[1], nose[0]].abs().sum() > 0
    assert image.grad[0, :, 0, 0].abs().sum() == 0


def test_wrong_embedders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"no\.pt is not a TorchScript face embedder"):
        load_identity_loss(str(tmp_path / "no.pt"), torch.device("cpu"))
    torch.jit.script(torch.nn.Flatten(0)).save(str(tmp_path / "flat.pt"))
    with pytest.raises(InputError, match=r"not \(2, D\)"):
        load_identity_loss(str(tmp_path / "flat.pt"), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"needs loss\.embedder"):
        make_train_config({"loss": {"identity": 1.0}})


def test_identity_is_a_term_of_a_run(tiny: TrainConfig, embedder: str) -> None:
    loss = LossConfig(identity=0.5, embedder=embedder)
    values = train(replace(tiny, stages=("reconstruction",), steps=1, loss=loss)).values
    assert 0 < values["identity"] < 1
