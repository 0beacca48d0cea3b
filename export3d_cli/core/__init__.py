"""The compact core: full model and trainer. This is its public door; everything behind it is resolved when first used.

From files to files a command is one call (`reenact`, `novel_view`, `edit_basis`, `build_dataset`, `train_model`), shown
in README.md. From arrays to arrays, a portrait is set once and then driven, seen or changed:

    >>> import numpy as np
    >>> from export3d_cli.core import Animator, example, read_image
    >>> animator = Animator.from_weights(device="cpu")
    >>> portrait = animator.set_source(read_image(example("source.jpg")))
    >>> portrait.beta.shape, portrait.camera.shape
    ((1, 64), (1, 25))
    >>> frame = next(animator.drive([portrait]))
    >>> frame.shape, frame.dtype
    ((512, 512, 3), dtype('uint8'))
    >>> int(np.abs(next(animator.view(portrait.camera)).astype(int) - frame).max()) <= 1
    True
    >>> changes = np.zeros((1, animator.model.config.coefficients), np.float32)
    >>> next(animator.edit(changes)).shape
    (512, 512, 3)

What cannot be done is an `Export3DError` that says what to do:

    >>> from export3d_cli.core import find_marks, resolve
    >>> find_marks(example("drive.mp4")).found
    False
    >>> resolve("nothing")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    WeightsError: no weights 'nothing': ...

Axis letters used throughout:

    B  batch                    H, W  height and width of an image in pixels
    T  frames of a clip         h, w  height and width of the raw render
    K  side of a frame
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
    "Animator": "animation.animator",
    "Portrait": "animation.animator",
    "ReenactOptions": "animation.options",
    "NovelViewOptions": "animation.novel_view",
    "EditOptions": "animation.edit_basis",
    "reenact": "animation.reenact",
    "reenact_all": "animation.batch",
    "plan_reenact": "animation.batch",
    "output_paths": "animation.batch",
    "read_image": "media.image",
    "check_outputs": "animation.compositor",
    "novel_view": "animation.novel_view",
    "check_overwrite": "animation.options",
    "check_crf": "media.encoder_settings",
    "check_mesh_output": "animation.mesh_export",
    "edit_basis": "animation.edit_basis",
    "describe_basis": "animation.basis_description",
    "find_marks": "animation.watermark",
    "ClipFilter": "dataset.segmentation",
    "build_dataset": "dataset.preprocess:preprocess",  # the functions are called as their modules: other names at the door
    "EvaluateOptions": "evaluation.evaluate",
    "evaluate_model": "evaluation.evaluate:evaluate",
    "write_inputs": "evaluation.evaluate",
    "METRICS": "evaluation.metrics",
    "train_model": "train.trainer:train",
    "plan_training": "train.training_plan",
    "load_train_config": "config.loading",
    "to_dict": "config.loading",
    "Export3DError": "runtime.errors",
    "InputError": "runtime.errors",
    "example_path": "runtime.weights",
    "weights_manifest": "runtime.weights",
    "resolve_weights": "runtime.weights",
    "verify_weights": "runtime.weights",
    "weights_info": "runtime.weights",
    "weights_card": "runtime.weights",
    "upload_weights": "runtime.weights",
    "run_benchmark": "diagnostics.benchmark",
    "cost_curves": "diagnostics.cost_curves",
    "examine": "diagnostics.doctor",
    "versions": "diagnostics.doctor",
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
