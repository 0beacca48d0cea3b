"""Animate the bundled portrait from Python: `python examples/animate.py` writes example.mp4."""

from __future__ import annotations

from pathlib import Path

from export3d_cli.core import Animator, ReenactOptions, reenact

HERE = Path(__file__).parent

if __name__ == "__main__":
    animator = Animator.from_weights()
    options = ReenactOptions(overwrite=True, compare=True)
    print(reenact(animator, HERE / "source.jpg", HERE / "drive.mp4", Path("example.mp4"), options))
