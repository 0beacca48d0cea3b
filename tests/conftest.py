"""Hypothesis profile and tiny weights shared by all tests."""

from __future__ import annotations

import hashlib
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `main`; before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn

from export3d_cli.core.animation import photo_canvas
from export3d_cli.core.config.schema import PRESETS
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.tracker import LiteRTNetwork
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


_results: dict[bytes, Any] = {}
_MAX_RESULTS = 600  # of up to 256 KiB each, mostly


def _remember(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays, or a network's method, that computes each result once."""

    def remembered(*arguments: Any, **options: Any) -> Any:
        key = hashlib.blake2b(repr((call.__qualname__, options)).encode(), digest_size=16)
        for value in arguments:
            if isinstance(value, np.ndarray):
                key.update(repr((value.shape, value.dtype)).encode() + value.tobytes())
            else:  # a face detector or a tflite network
                key.update(repr(getattr(value, "network", None) or value._input).encode())
        result = _results.get(key.digest())
        if result is None:
            if len(_results) >= _MAX_RESULTS:
                _results.clear()
            result = _results[key.digest()] = call(*arguments, **options)
            for value in (result,) if isinstance(result, np.ndarray) else result:
                if isinstance(value, np.ndarray):
                    value.flags.writeable = False
        return result

    return remembered


@pytest.fixture(autouse=True)
def remembered_results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute once what takes most of the time and depends on pixels alone: most tests use one photo and one driver."""
    if not {"face", "diagnostics"} & set(request.path.parts):  # whose tests are of the networks themselves
        monkeypatch.setattr(FaceDetector, "__call__", _remember(FaceDetector.__call__))
        monkeypatch.setattr(LiteRTNetwork, "__call__", _remember(LiteRTNetwork.__call__))
        monkeypatch.setattr(photo_canvas, "fill_hole", _remember(photo_canvas.fill_hole))
