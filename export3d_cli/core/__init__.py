"""The compact core: full model and trainer. This is its public door; everything behind it is resolved when first used.

    from export3d_cli.core import Animator, ReenactOptions, reenact

Axis letters used throughout:

    B  batch                    H, W  height and width of an image in pixels
    T  frames of a clip         h, w  height and width of the raw render
    C  channels                 P     side of a tri-plane
    N  tokens, points or rays   S     samples along a ray
    n  basis vectors of LeBS    d     dimension of beta'

Images are RGB: uint8 (H, W, 3) at the borders, float (B, 3, H, W) in [-1, 1] inside (`media.image` converts).
beta (64) is an expression, camera (25) is cam2world then intrinsics in the head frame (`camera`).
"""

from __future__ import annotations

import importlib
from typing import Any

_DOOR = {  # public name -> module of this package that defines it
    "Animator": "animate",
    "ReenactOptions": "animate",
    "NovelViewOptions": "views",
    "EditOptions": "views",
    "reenact": "animate",
    "reenact_all": "batch",
    "plan_reenact": "batch:plan",
    "output_paths": "batch",
    "novel_view": "views",
    "edit_basis": "views",
    "describe_basis": "basis",
    "find_marks": "watermark",
    "Gates": "clips",
    "build_dataset": "preprocess:preprocess",  # the functions are called as their modules: other names at the door
    "EvaluateOptions": "evaluate",
    "evaluate_model": "evaluate:evaluate",
    "write_inputs": "evaluate",
    "METRICS": "metrics",
    "train_model": "train.trainer:train",
    "plan_training": "train.plan:plan",
    "load_train_config": "config",
    "to_dict": "config",
    "Export3DError": "errors",
    "InputError": "errors",
    "example": "weights",
    "manifest": "weights",
    "resolve": "weights",
    "verify": "weights",
    "weights_info": "weights:info",
    "weights_card": "weights:card",
    "upload": "weights",
    "run_bench": "bench:bench",
    "examine": "doctor",
    "versions": "doctor",
}

__all__ = sorted(_DOOR)


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _DOOR[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
