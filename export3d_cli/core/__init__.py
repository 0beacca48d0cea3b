"""The core package's public API; each name is imported from its module on first use.

Every command is one function from files to files, such as `reenact`, `novel_view`, `edit_basis`, `build_dataset` and
`train_model`; README.md shows them. From arrays to arrays, a photo is encoded once and then animated, viewed or edited:

    >>> import numpy as np
    >>> from export3d_cli.core import Animator, example_path, read_image
    >>> animator = Animator.from_weights(device="cpu")
    >>> portrait = animator.portrait(read_image(example_path("source.jpg")))
    >>> portrait.motion.beta.shape, portrait.motion.camera.shape
    ((1, 64), (1, 25))
    >>> frame = next(animator.animate(portrait, [portrait.motion]))
    >>> frame.shape, frame.dtype
    ((512, 512, 3), dtype('uint8'))
    >>> view = next(animator.view(portrait, portrait.motion.camera))
    >>> int(np.abs(view.astype(int) - frame).max()) <= 1
    True
    >>> changes = np.zeros((1, animator.model.config.num_coefficients), np.float32)
    >>> next(animator.edit(portrait, changes)).shape
    (512, 512, 3)

An `Animator` holds no portrait: threads may share it, and a frame depends on the arguments of its call alone.

An error that the user can correct is an `Export3DError`; its message says what to do:

    >>> from export3d_cli.core import find_marks, resolve_weights
    >>> find_marks(example_path("drive.mp4")).found
    False
    >>> resolve_weights("nothing")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    WeightsError: no weights 'nothing': ...

Axis letters in shapes:

    B  batch                    H, W  height and width of an image in pixels
    T  frames of a clip         h, w  height and width of the raw render
    K  side of a face crop
    C  channels                 P     side of a tri-plane
    N  tokens, points or rays   S     samples along a ray
    n  basis vectors of LeBS    d     dimension of beta'

Images are RGB: uint8 (H, W, 3) at the borders, float (B, 3, H, W) in [-1, 1] inside (`media.image` converts).
beta (64) is an expression, camera (25) is cam2world then intrinsics in the head frame (`camera`).
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {  # public name -> module of this package that defines it
    "Animator": "animation.animator",
    "Portrait": "animation.animator",
    "Motion": "face.motion",
    "ReenactOptions": "animation.options",
    "NovelViewOptions": "animation.novel_view",
    "EditOptions": "animation.edit_basis",
    "ExpressionEdit": "animation.expression_controls",
    "Look": "animation.look",
    "write_look": "animation.compositor",
    "PortraitOptions": "animation.options",
    "edit_clip": "animation.clip_editing",
    "edit_expression": "animation.expression_controls",
    "read_preset": "animation.expression_controls",
    "reenact": "animation.reenact",
    "LiveOptions": "animation.live",
    "run_live": "animation.live:live",
    "reenact_all": "animation.batch",
    "plan_edit": "animation.batch",
    "plan_reenact": "animation.batch",
    "output_paths": "animation.batch",
    "read_image": "media.image",
    "read_portrait": "animation.compositor",
    "Person": "animation.person",
    "PersonalizeOptions": "animation.personalize",
    "personalize": "animation.personalize",
    "check_person_output": "animation.personalize",
    "novel_view": "animation.novel_view",
    "check_overwrite": "animation.options",
    "check_has_sound": "media.soundtrack",
    "torch_state": "runtime.device",
    "check_mesh_output": "animation.mesh_export",
    "edit_basis": "animation.edit_basis",
    "describe_basis": "animation.basis_description",
    "SampleOptions": "animation.sample",
    "sample": "animation.sample",
    "find_marks": "animation.watermark",
    "sign_file": "media.content_credentials",
    "ClipFilter": "dataset.segmentation",
    "build_dataset": "dataset.preprocess:preprocess",  # three functions have their module's name
    "EvaluateOptions": "evaluation.evaluate",
    "PROTOCOLS": "evaluation.evaluate",
    "evaluate_model": "evaluation.evaluate:evaluate",
    "write_inputs": "evaluation.evaluate",
    "METRICS": "evaluation.metrics",
    "describe_evaluation": "evaluation.report:describe",
    "mean_table": "evaluation.report",
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
    "compare_speed": "diagnostics.benchmark",
    "run_benchmark": "diagnostics.benchmark",
    "examine": "diagnostics.doctor",
    "versions": "diagnostics.doctor",
}

_RENAMED = {  # names of earlier versions
    "Gates": "ClipFilter",
    "check_free": "check_overwrite",
    "check_mesh": "check_mesh_output",
    "example": "example_path",
    "manifest": "weights_manifest",
    "resolve": "resolve_weights",
    "run_bench": "run_benchmark",
    "upload": "upload_weights",
    "verify": "verify_weights",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(f"{__name__}.{name} no longer exists: use {_RENAMED[name]}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
