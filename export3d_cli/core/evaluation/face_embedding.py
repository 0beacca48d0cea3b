"""Face embedders for the metric `identity`; none of them is part of the package.

`dlib` comes from PyPI (`pip install 'export3d-cli[eval]'`); any other is a TorchScript file the user gives.
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
from export3d_cli.core.face.landmarks import ARCFACE_POINTS, DLIB_POINTS, LEFT_EYE, RIGHT_EYE
from export3d_cli.core.media.image import to_tensor
from export3d_cli.core.runtime.errors import InputError

# frames, uint8 (H, W, 3) each, and their landmarks (F, 478, 2) in pixels -> unit vectors (F, D) float32
Embedder = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
DLIB_CHIP_SIZE_PX, DLIB_PADDING = 150, 0.25  # of the face chips that dlib's network was trained on
_DLIB_FILE = "models/dlib_face_recognition_resnet_model_v1.dat"


def load_embedder(name: str, device: torch.device) -> Embedder:
    """Load `dlib` or the TorchScript file of that path; raise `InputError` if it is missing or unreadable."""
    return DlibEmbedder() if name == "dlib" else TorchScriptEmbedder(Path(name), device)


class TorchScriptEmbedder:
    """A user's network: faces on ArcFace's template, (B, 3, 112, 112) RGB, ImageNet mean and std -> (B, D)."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.device = device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{path} is not a TorchScript face embedder ({reason}): give one, or --identity dlib"
            ) from error
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def __call__(self, frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        """Return unit vectors (F, D) for frames with landmarks (F, 478, 2) in pixels."""
        eyes = [points[:, list(eye)].mean(1) for eye in (RIGHT_EYE, LEFT_EYE)]  # left to right in the image
        keypoints = np.stack([*eyes, *(points[:, k] for k in ARCFACE_POINTS)], axis=1)
        crops = [metrics.crop_to_arcface(frame, five) for frame, five in zip(frames, keypoints, strict=True)]
        batch = (to_tensor(np.stack(crops)).to(self.device) * 0.5 + 0.5 - self.mean) / self.std
        with torch.inference_mode():
            vectors = torch.cat([self.network(chunk) for chunk in batch.split(32)])
        unit: np.ndarray = F.normalize(vectors.float(), dim=1).cpu().numpy()
        return unit


class DlibEmbedder:
    """dlib's ResNet (128 numbers). Cosines are about .97 for one person, but also .85 (.79 to .92) for strangers."""

    def __init__(self) -> None:
        # not imported: the models' package needs pkg_resources, which setuptools removed
        models = importlib.util.find_spec("face_recognition_models")
        if importlib.util.find_spec("dlib") is None or models is None or not models.submodule_search_locations:
            raise InputError("identity dlib needs two more packages: pip install 'export3d-cli[eval]'")
        self.dlib: Any = importlib.import_module("dlib")
        self.network = self.dlib.face_recognition_model_v1(str(Path(models.submodule_search_locations[0]) / _DLIB_FILE))

    def __call__(self, frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        """Return unit vectors (F, 128) for frames with landmarks (F, 478, 2) in pixels."""
        keypoints = points[:, list(DLIB_POINTS)]
        chips = [self._chip(frame, five) for frame, five in zip(frames, keypoints, strict=True)]
        vectors = np.array([self.network.compute_face_descriptor(chip) for chip in chips], dtype=np.float32)
        unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    def _chip(self, frame: np.ndarray, five: np.ndarray) -> np.ndarray:
        points = self.dlib.points()
        for x, y in five:
            points.append(self.dlib.point(round(float(x)), round(float(y))))
        face = self.dlib.full_object_detection(self.dlib.rectangle(0, 0, frame.shape[1], frame.shape[0]), points)
        chip: np.ndarray = self.dlib.get_face_chip(frame, face, size=DLIB_CHIP_SIZE_PX, padding=DLIB_PADDING)
        return chip
