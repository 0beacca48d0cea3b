"""Rendering on an accelerator, emulated on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerator import CUDA, FakeAccelerator

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.novel_view import NovelViewOptions, orbit_cameras
from export3d_cli.core.media.image import read_image
from export3d_cli.core.model.inpaint.eyelids import EyelidInpainter
from export3d_cli.core.model.inpaint.eyes import EyeInpainter
from export3d_cli.core.model.inpaint.mouth import MouthInpainter
from export3d_cli.core.runtime.weights import example_path


def test_fake_accelerator_refuses_mixed_devices() -> None:
    with FakeAccelerator():
        here, there = torch.ones(2), torch.ones(2).to("cuda")
        assert there.device == (there + 1).device == torch.ones(1, device="cuda").device == CUDA
        assert here.device.type == there.cpu().device.type == "cpu"
        for wrong in (lambda: here + there, lambda: torch.cat([there, here]), lambda: there.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()


def test_accelerator_frames_equal_cpu_frames(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = read_image(example_path("source.jpg"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    painted: list[tuple[str, str]] = []
    kinds = {"mouth": MouthInpainter, "eyes": EyeInpainter, "lids": EyelidInpainter}

    def made(where: str) -> list[np.ndarray]:
        animator = Animator.from_weights(tiny_weights, device=where, precision="fp32", batch=2, quality="best")
        torch.manual_seed(0)
        for name, kind in kinds.items():
            animator.model.inpainters[name] = kind(4).eval().to(animator.device)
            animator.model.inpainters[name].register_forward_hook(lambda *_, name=name: painted.append((name, where)))
        portrait = animator.portrait(photo)
        cameras = orbit_cameras(portrait.camera, NovelViewOptions(yaw=(-20, 20), frames=3, loop="once"))
        turned = replace(portrait.motion.select(np.zeros(3, int)), camera=cameras)
        lam = np.eye(3, animator.model.config.num_coefficients, dtype=np.float32)
        points = np.random.default_rng(0).uniform(-0.2, 0.2, (50, 3)).astype(np.float32)
        pictures = [
            *animator.animate(portrait, [turned]),
            *animator.view(portrait, cameras),
            *animator.edit(portrait, lam),
        ]
        volumes = [layers.volume for layers in animator.view(portrait, cameras, layers=True)]
        depths = [depth for volume in volumes for depth in (volume.depth, volume.opacity)]
        return [*pictures, *depths, *animator.query_field(portrait, points)]

    on_cpu = made("cpu")
    with FakeAccelerator() as accelerator:
        on_gpu = made("cuda")
    assert accelerator.calls > 1000
    assert not torch.backends.cudnn.allow_tf32  # fp32 is fp32
    assert set(painted) == {(name, where) for name in kinds for where in ("cpu", "cuda")}
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert np.abs(a.astype(float) - b.astype(float)).mean() < 0.5
