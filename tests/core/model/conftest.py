"""Fixtures: the canonical face, cameras around it, untrained tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.head_pose import CanonicalFace, load_canonical_face
from export3d_cli.core.model.export3d import Export3D, Output
from export3d_cli.core.model.volume_renderer import pixel_grid
from export3d_cli.core.model.warp.mesh_flow import BasisFlow
from export3d_cli.core.runtime.camera import orbit_camera


@pytest.fixture(scope="session")
def canonical() -> CanonicalFace:
    return load_canonical_face()


@pytest.fixture
def points(canonical: CanonicalFace) -> Tensor:
    """Landmarks of the canonical face, (1, 478, 3)."""
    return torch.from_numpy(canonical.points)[None].float()


@pytest.fixture
def orbit() -> Callable[..., Tensor]:
    """Return a function: yaw angles (and one pitch) in degrees -> cameras (B, 25)."""

    def cameras(*yaws: float, pitch: float = 0.0) -> Tensor:
        return torch.from_numpy(np.stack([orbit_camera(yaw, pitch) for yaw in yaws]))

    return cameras


@pytest.fixture
def flow(canonical: CanonicalFace) -> BasisFlow:
    """Basis flow of the tiny preset with the canonical face's triangles."""
    flow = BasisFlow(PRESETS["tiny"])
    flow.triangles.copy_(torch.from_numpy(canonical.flow_triangles))
    return flow


@pytest.fixture
def tiny(canonical: CanonicalFace) -> Export3D:
    """An untrained tiny model; parameters initialised to 0 get random values, so that every layer contributes."""
    torch.manual_seed(0)
    model = Export3D(PRESETS["tiny"])
    assert model.flow is not None
    model.flow.triangles.copy_(torch.from_numpy(canonical.flow_triangles))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture
def inpainted_results(tiny: Export3D, orbit: Callable[..., Tensor]) -> Callable[..., tuple[Output, Output, Output]]:
    """Return a function that drives landmarks frontally: `tiny`, `tiny` with an inpainter, the latter undriven."""

    def results(name: str, points: Tensor, moved: Tensor) -> tuple[Output, Output, Output]:
        torch.manual_seed(1)
        inpainting = Export3D(replace(PRESETS["tiny"], **{name: 4})).eval()
        inpainting.load_state_dict({**inpainting.state_dict(), **tiny.state_dict()})
        image, camera = torch.rand(1, 3, 64, 64), orbit(0.0)
        outputs = []
        with torch.no_grad():
            for model in (tiny, inpainting):
                assert model.flow is not None
                model.flow.basis.zero_()[0] = (moved - points)[0]
                source = model.encode_source(image, torch.zeros(1, 64), camera, points)
                lam = source.lam + torch.eye(len(source.lam[0]))[:1]
                outputs.append(model.drive(source, lam, camera))
            return outputs[0], outputs[1], inpainting.drive(source, source.lam, camera)

    return results


@pytest.fixture
def differ_only_near() -> Callable[..., bool]:
    """Return a check: 64 x 64 results differ, and only within 3 px of the bounding boxes of landmarks uv (N, 2)."""

    def check(a: Output, b: Output, *uvs: Tensor) -> bool:
        changed = (a.image - b.image).abs().sum(1)[0] > 1e-6
        place = pixel_grid(64).view(64, 64, 2) * 64
        boxes = [(64 * uv.amin(0) - 3, 64 * uv.amax(0) + 3) for uv in uvs]
        within = torch.stack([((place >= low) & (place <= high)).all(-1) for low, high in boxes]).any(0)
        return bool(changed.any() and within[changed].all())

    return check
