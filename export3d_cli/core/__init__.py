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
    m  measures beyond lambda

Images are RGB: uint8 (H, W, 3) at the borders, float (B, 3, H, W) in [-1, 1] inside (`media.image` converts).
beta (64) is an expression, camera (25) is cam2world then intrinsics in the head frame (`camera`).
"""

import importlib
from typing import Any

_NAMES = {  # module of this package -> the public names that it defines
    "animation.animator": "Animator Portrait",
    "face.motion": "Motion",
    "animation.options": "ReenactOptions PortraitOptions check_overwrite",
    "animation.novel_view": "NovelViewOptions novel_view",
    "animation.edit_basis": "EditOptions describe_basis edit_basis",
    "animation.expression_controls": "ExpressionEdit edit_expression read_preset",
    "animation.attribute_editing": "Look",
    "animation.compositor": "write_look read_portrait",
    "animation.clip_editing": "edit_clip",
    "animation.reenact": "reenact",
    "animation.live": "LiveOptions",
    "animation.batch": "reenact_all plan_edit plan_reenact output_paths",
    "media.image": "read_image",
    "animation.person": "Person",
    "animation.personalize": "PersonalizeOptions personalize check_person_output",
    "media.soundtrack": "check_has_sound",
    "runtime.device": "torch_state",
    "animation.mesh_export": "check_mesh_output",
    "animation.sample": "SampleOptions sample",
    "animation.watermark": "find_marks",
    "media.content_credentials": "sign_file",
    "dataset.segmentation": "ClipFilter",
    "evaluation.evaluate": "EvaluateOptions PROTOCOLS write_inputs",
    "evaluation.metrics": "METRICS",
    "evaluation.report": "mean_table",
    "train.training_plan": "plan_training",
    "config.loading": "load_train_config to_dict",
    "runtime.errors": "Export3DError InputError",
    "runtime.weights": "example_path weights_manifest resolve_weights verify_weights weights_info weights_card "
    "upload_weights",
    "diagnostics.benchmark": "compare_speed run_benchmark",
    "diagnostics.doctor": "examine versions",
}
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names.split()}
_PUBLIC |= {  # public names that differ from the functions'
    "run_live": "animation.live:live",
    "build_dataset": "dataset.preprocess:preprocess",
    "evaluate_model": "evaluation.evaluate:evaluate",
    "describe_evaluation": "evaluation.report:describe",
    "train_model": "train.trainer:train",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
