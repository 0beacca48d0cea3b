"""The canonical face and cameras around it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export3d_cli.core.camera import Camera
from export3d_cli.core.config import PRESETS
from export3d_cli.core.face.mesh import CanonicalFace, canonical_face, flow_triangles
from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.flow import BasisFlow
from export3d_cli.core.weights import weights_dir


@pytest.fixture(scope="session")
def canonical() -> CanonicalFace:
    return canonical_face(weights_dir() / "face_landmarker.task")


@pytest.fixture
def points(canonical: CanonicalFace) -> Tensor:
    """Landmarks of the canonical face, (1, 478, 3)."""
    return torch.from_numpy(canonical.points)[None].float()


@pytest.fixture
def orbit() -> Callable[..., Tensor]:
    """Yaw angles (and one pitch) in degrees -> cameras (B, 25)."""

    def cameras(*yaws: float, pitch: float = 0.0) -> Tensor:
        return torch.from_numpy(np.stack([Camera.orbit(yaw, pitch).vector() for yaw in yaws]))

    return cameras


@pytest.fixture
def flow(canonical: CanonicalFace) -> BasisFlow:
    """The tiny preset's, on the canonical face's triangles."""
    flow = BasisFlow(PRESETS["tiny"])
    flow.triangles.copy_(torch.from_numpy(flow_triangles(canonical)))
    return flow


@pytest.fixture
def tiny(canonical: CanonicalFace) -> Export3D:
    """An untrained tiny model whose layers all take part: those that start at 0 are moved away from it."""
    torch.manual_seed(0)
    model = Export3D(PRESETS["tiny"])
    assert model.flow is not None
    model.flow.triangles.copy_(torch.from_numpy(flow_triangles(canonical)))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()
