"""Tri-plane interpolation against a known linear function."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image
from export3d_cli.core.model.fast.triplane_interpolation import KEYFRAME_INTERVAL, TriplaneInterpolator
from export3d_cli.core.runtime.weights import example_path


class CountingGenerator:
    """A generator linear in lambda that records its calls."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def __call__(self, lam: Tensor) -> Tensor:
        assert lam.shape == (1, 2)
        self.calls.append(float(lam[0, 0]))
        return lam.sum().expand(1, 3, 1, 2, 2).clone()


def values(planes: Tensor) -> list[float]:
    return planes[:, 0, 0, 0, 0].tolist()


def test_frames_on_a_line_are_interpolated_between_key_frames() -> None:
    generator = CountingGenerator()
    interpolator = TriplaneInterpolator(generator, max_deviation=0.1)
    line = torch.stack([torch.arange(9.0), 2 * torch.arange(9.0)], dim=1)
    first, second = interpolator(line[:5]), interpolator(line[5:])
    assert generator.calls == [0, 4, 8]
    assert values(torch.cat([first, second])) == pytest.approx((3 * torch.arange(9.0)).tolist())


def test_frames_off_the_line_become_key_frames() -> None:
    generator = CountingGenerator()
    curve = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0], [3.0, 0.05], [4.0, 0.0]])
    planes = values(TriplaneInterpolator(generator, max_deviation=0.3)(curve))
    assert sorted(generator.calls) == [0, 1, 2, 3, 4]
    assert planes == pytest.approx(curve.sum(1).tolist())
    generator = CountingGenerator()
    # frames 1 and 3 are 0.45 from the lines through 2
    planes = values(TriplaneInterpolator(generator, max_deviation=0.6)(curve))
    assert sorted(generator.calls) == [0, 2, 4]
    assert planes != pytest.approx(curve.sum(1).tolist()) and planes[2] == 3


def test_constant_expression_is_generated_once() -> None:
    generator = CountingGenerator()
    interpolator = TriplaneInterpolator(generator, max_deviation=0.1)
    constant = torch.ones(KEYFRAME_INTERVAL, 2)
    planes = torch.cat([interpolator(constant), interpolator(constant), interpolator(constant[:1])])
    assert values(planes) == [2.0] * (2 * KEYFRAME_INTERVAL + 1)
    assert generator.calls == [1]


def test_unused_tri_planes_are_freed_without_garbage_collection() -> None:
    """Tri-planes take megabytes each; hundreds would pile up in a long video before a collection."""
    generated: list[weakref.ref[Tensor]] = []

    def generate(lam: Tensor) -> Tensor:
        planes = lam.sum().expand(1, 3, 1, 2, 2).clone()
        generated.append(weakref.ref(planes))
        return planes

    interpolator = TriplaneInterpolator(generate, max_deviation=0.1)
    gc.disable()
    try:
        interpolator(torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 0.0], [3.0, 5.0], [4.0, 0.0]]))
        alive = sum(planes() is not None for planes in generated)
    finally:
        gc.enable()
    assert len(generated) == 5 and alive == 1  # the last one, where the next frames start


def test_animation_repeats_and_best_quality_does_not_interpolate(animator: Animator) -> None:
    best = Animator(animator.model, device=animator.device, precision="fp32", quality="best")
    assert best.chunk_size == best.batch and animator.chunk_size == KEYFRAME_INTERVAL
    photo = read_image(example_path("source.jpg"))
    moving = animator.portrait(photo).motion.select(np.zeros(6, dtype=int))
    beta = moving.beta + np.linspace(0, 0.2, 6, dtype=np.float32)[:, None]
    moving = Motion(**{**moving.__dict__, "beta": beta})
    made = []
    for engine in (animator, animator, best):
        made.append(np.stack(list(engine.animate(engine.portrait(photo), [moving]))).astype(int))
    assert len(made[0]) == 6 and (made[0] == made[1]).all()
    assert 0 < np.abs(made[0] - made[2]).mean() < 10  # `best` also samples more finely
