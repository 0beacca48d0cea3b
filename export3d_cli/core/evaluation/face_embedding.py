"""Face embedders for the metric `identity`; none of them is part of the package.

`dlib` comes from PyPI (`pip install 'export3d-cli[eval]'`); any other is a TorchScript file the user gives.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from export3d_cli.core.face.landmarks import ARCFACE_POINTS, DLIB_POINTS, LEFT_EYE, RIGHT_EYE
from export3d_cli.core.media.image import to_tensor
from export3d_cli.core.runtime.errors import InputError

# frames, uint8 (H, W, 3) each, and their landmarks (F, 478, 2) in pixels -> unit vectors (F, D) float32
Embedder = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
# ArcFace's template at 112 px: eye on the image's left, on its right, nose, left and right mouth corner.
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
ARCFACE_SIZE_PX = 112
DLIB_CHIP_SIZE_PX, DLIB_PADDING = 150, 0.25  # of the face chips that dlib's network was trained on
_DLIB_FILE = "models/dlib_face_recognition_resnet_model_v1.dat"


def load_embedder(name: str, device: torch.device) -> Embedder:
    """Load `dlib` or the TorchScript file of that path; raise `InputError` if it is missing or unreadable."""
    network = _load_dlib() if name == "dlib" else _load_torchscript(Path(name), device)

    def embed(frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        vectors = network(frames, points)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return embed


def crop_to_arcface(image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """Return the face with `keypoints` (5, 2), in pixels, on ArcFace's template by a least-squares similarity."""
    z, w = (p[:, 0] + 1j * p[:, 1] for p in (keypoints, ARCFACE_TEMPLATE))  # as complex numbers it is w = a z + b
    a = np.vdot(z - z.mean(), w - w.mean()) / np.vdot(z - z.mean(), z - z.mean())
    b = w.mean() - a * z.mean()
    matrix = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
    return cv2.warpAffine(image, matrix, (ARCFACE_SIZE_PX, ARCFACE_SIZE_PX), flags=cv2.INTER_LINEAR)


def _load_torchscript(path: Path, device: torch.device) -> Embedder:
    """Load a user's network: faces on ArcFace's template, (B, 3, 112, 112) RGB, ImageNet mean and std -> (B, D)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a TorchScript face embedder ({reason}): "
                         "give one, or --identity dlib") from error  # fmt: skip
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def embed(frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        eyes = [points[:, list(eye)].mean(1) for eye in (RIGHT_EYE, LEFT_EYE)]  # left to right in the image
        keypoints = np.stack([*eyes, *(points[:, k] for k in ARCFACE_POINTS)], axis=1)
        crops = [crop_to_arcface(frame, five) for frame, five in zip(frames, keypoints, strict=True)]
        batch = (to_tensor(np.stack(crops)).to(device) * 0.5 + 0.5 - mean) / std
        with torch.inference_mode():
            return torch.cat([network(chunk) for chunk in batch.split(32)]).float().cpu().numpy()

    return embed


def _load_dlib() -> Embedder:
    """Load dlib's ResNet (128 numbers). Cosines are about .97 for one person, and .85 (.79 to .92) for strangers."""
    # not imported: the models' package needs pkg_resources, which setuptools removed
    models = importlib.util.find_spec("face_recognition_models")
    if importlib.util.find_spec("dlib") is None or models is None or not models.submodule_search_locations:
        raise InputError("identity dlib needs two more packages: pip install 'export3d-cli[eval]'")
    dlib = importlib.import_module("dlib")
    network = dlib.face_recognition_model_v1(str(Path(models.submodule_search_locations[0]) / _DLIB_FILE))

    def embed(frames: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
        vectors = []
        for frame, five in zip(frames, points[:, list(DLIB_POINTS)], strict=True):
            corners = dlib.points()
            for x, y in five:
                corners.append(dlib.point(round(float(x)), round(float(y))))
            face = dlib.full_object_detection(dlib.rectangle(0, 0, frame.shape[1], frame.shape[0]), corners)
            chip = dlib.get_face_chip(frame, face, size=DLIB_CHIP_SIZE_PX, padding=DLIB_PADDING)
            vectors.append(network.compute_face_descriptor(chip))
        return np.array(vectors, dtype=np.float32)

    return embed
