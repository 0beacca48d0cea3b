"""Batches limited by memory, and the state of PyTorch."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.device import AdaptiveBatcher, torch_state
from export3d_cli.core.runtime.weights import example_path


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_batcher_halves_batch_when_memory_runs_out(error: RuntimeError) -> None:
    sizes: list[int] = []

    def make(part: slice) -> np.ndarray:
        sizes.append(part.stop - part.start)
        if sizes[-1] > 3:
            raise error
        return np.arange(part.start, part.stop)

    fitting = AdaptiveBatcher()
    assert list(fitting(make, 0, 16)) == list(range(16))
    assert sizes[:3] == [16, 8, 4]  # then 2
    tries = len(sizes)
    assert list(fitting(make, 0, 5)) == list(range(5))
    assert max(sizes[tries:]) <= 2  # the limit is kept


def test_batcher_raises_for_single_row_and_other_errors() -> None:
    def never(part: slice) -> np.ndarray:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        list(AdaptiveBatcher()(never, 0, 4))

    def broken(part: slice) -> np.ndarray:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        list(AdaptiveBatcher()(broken, 0, 4))


def test_animator_short_of_memory_returns_same_frames(animator: Animator, monkeypatch: pytest.MonkeyPatch) -> None:
    portrait = animator.portrait(read_image(example_path("source.jpg")))
    cameras = np.repeat(portrait.motion.camera, 4, axis=0)
    monkeypatch.setattr(animator, "batch", 4)
    whole = list(animator.view(portrait, cameras))
    drive = animator.model.drive

    def little(source, *args, **named):  # type: ignore[no-untyped-def]
        if len(source.lam) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return drive(source, *args, **named)

    monkeypatch.setattr(animator.model, "drive", little)
    parts = list(animator.view(portrait, cameras))
    assert len(parts) == 4
    assert np.abs(np.stack(parts).astype(int) - np.stack(whole)).max() <= 1


def test_torch_state_restores_threads_and_seed() -> None:
    threads, of_opencv, state = torch.get_num_threads(), cv2.getNumThreads(), torch.get_rng_state()
    with torch_state(threads=threads + 1, seed=7):
        assert torch.get_num_threads() == cv2.getNumThreads() == threads + 1
        first = torch.rand(3)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == (threads, of_opencv)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError), torch_state(threads=threads + 1, seed=7):  # noqa: PT012
        assert torch.equal(torch.rand(3), first)
        raise KeyError
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
