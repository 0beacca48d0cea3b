"""Hypothesis profile and tiny weights shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `main`; before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.model.checkpoint import save_weights
from export3d_cli.core.model.export3d import Export3D

settings.register_profile("ci", derandomize=True)  # repeatable in CI, new examples on each local run
if os.environ.get("CI"):
    settings.load_profile("ci")


TINY = replace(PRESETS["tiny"], expression_gain=1.1, triplane_tolerance=(6.0, 3.5))  # calibrated as the shipped weights


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write tiny untrained weights; parameters initialised to 0 are randomised so that every input has an effect."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(0)
    model = Export3D(PRESETS["tiny"])
    assert model.flow is not None
    triangles = load_canonical_face().flow_triangles
    model.flow.triangles.copy_(torch.from_numpy(triangles))
    model.flow.basis.normal_(std=0.003)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    save_weights(path, model.state_dict(), TINY, {}, half=False)
    return path
