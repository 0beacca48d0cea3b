"""Checks of the installation: versions, devices, ffmpeg, weights, tracker. Each failed check says what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from export3d_cli import __version__
from export3d_cli.core.runtime.errors import Export3DError
from export3d_cli.core.runtime.opencv import find_opencv_problem

_REINSTALL = "`pip install --force-reinstall export3d-cli` repairs it"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    ok: bool
    found: str
    advice: str  # what to do; '' if the check passed


def versions() -> dict[str, str]:
    """Return the versions that affect results, without importing anything; 'missing' if not installed."""
    try:
        encoder = _ffmpeg_version()
    except (Export3DError, OSError, ImportError):
        encoder = "missing"
    return {
        "export3d": __version__,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "cuda": _cuda_of_torch() or "none",
        "ffmpeg": encoder,
    }


def examine(weights: str | None = None) -> list[Finding]:
    """Run all checks; `weights` names other weights than the default ones."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]], str]] = [
        ("python", _python, "use Python 3.10 to 3.13"),
        ("torch", _torch, "install torch: https://pytorch.org/get-started/locally"),
        ("cv2", _opencv, "`pip install --force-reinstall opencv-python`"),
        ("ffmpeg", _ffmpeg, "`pip install --force-reinstall imageio-ffmpeg`, or name one in IMAGEIO_FFMPEG_EXE"),
        ("weights", lambda: _weights(weights), _REINSTALL),
        ("detector", _detector, _REINSTALL),
        ("litert", _tracker, "`pip install --force-reinstall ai-edge-litert`"),
        ("hub", _hub, "`pip install --force-reinstall huggingface-hub`; embedded weights work without it"),
    ]
    findings = []
    for what, check, advice in checks:
        try:
            findings += list(check())
        except Export3DError as error:
            findings.append(Finding(what, False, *_split_advice(str(error), advice)))
        except Exception as error:  # any defect must not hide the other findings
            reason = " ".join(str(error).split())[:200]
            findings.append(Finding(what, False, f"{type(error).__name__}: {reason}", advice))
    return findings


def _python() -> Iterator[Finding]:
    supported = (3, 10) <= sys.version_info[:2] < (3, 14)
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, export3d {__version__}"
    yield Finding("python", supported, found, "" if supported else "use Python 3.10 to 3.13")


def _torch() -> Iterator[Finding]:
    import torch

    torch.zeros(2, 2) @ torch.zeros(2, 2)
    yield Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()}", "")
    built = torch.version.cuda
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            found = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {built}"
            torch.zeros(1, device=f"cuda:{index}").add_(1).cpu()
            yield Finding(f"cuda:{index}", True, found, "")
    elif built and Path("/proc/driver/nvidia").exists():
        found = f"NVIDIA driver and torch for CUDA {built} present, but no usable GPU"
        yield Finding("cuda", False, found, "`nvidia-smi` shows the driver's CUDA: install a torch for it")
    else:
        yield Finding("cuda", True, "none, using the CPU", "")
    if torch.backends.mps.is_available():
        yield Finding("mps", True, "usable with --device mps", "")


def _opencv() -> Iterator[Finding]:
    if problem := find_opencv_problem():
        raise Export3DError(problem)
    yield Finding("cv2", True, str(importlib.import_module("cv2").__version__), "")


def _ffmpeg() -> Iterator[Finding]:
    """Decode two frames and encode them with the filters and encoders that the commands use."""
    from export3d_cli.core.media.encoder_settings import DEFAULT_CRF, encoder_arguments
    from export3d_cli.core.media.ffmpeg_process import run_ffmpeg
    from export3d_cli.core.media.probe import ffmpeg_path
    from export3d_cli.core.media.reader import VideoReader
    from export3d_cli.core.runtime.weights import example_path

    program = ffmpeg_path()
    advice = "`pip install --force-reinstall imageio-ffmpeg`" + " and unset IMAGEIO_FFMPEG_EXE" * (
        "IMAGEIO_FFMPEG_EXE" in os.environ
    )
    with VideoReader(example_path("drive.mp4"), start=0.04, duration=0.08, size=(64, 64)) as reader:
        try:
            frames = len(list(reader))
        except Export3DError as error:
            yield Finding("ffmpeg", False, f"{program} cannot decode ({error})", advice)
            return
    if frames != 2:
        yield Finding("ffmpeg", False, f"{program} decodes {frames} frames of 2", advice)
        return
    command = [program, "-hide_banner", "-nostdin", "-loglevel", "error", "-f", "lavfi"]
    command += ["-i", "color=size=64x64:rate=25:duration=0.08"]
    done = run_ffmpeg([*command, *encoder_arguments(".mp4", DEFAULT_CRF, (64, 64), alpha=False), "-f", "null", "-"])
    if done.returncode:
        reason = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["unknown error"])[-1][:200]
        yield Finding("ffmpeg", False, f"{program} cannot encode H.264 ({reason})", advice)
        return
    yield Finding("ffmpeg", True, f"{_ffmpeg_version()}, decodes and encodes H.264 ({program})", "")


def _weights(name: str | None) -> Iterator[Finding]:
    from export3d_cli.core.runtime.weights import DEFAULT_WEIGHTS, verify_weights, weights_info, weights_manifest

    listed = weights_manifest()
    for entry in listed.values():
        try:
            verify_weights(entry)
            facts = f"checksum correct, {entry.size / 1e6:.1f} MB, {entry.licence}"
            yield Finding(f"weights {entry.name}", True, facts, "")
        except Export3DError as error:
            yield Finding(f"weights {entry.name}", False, *_split_advice(str(error), _REINSTALL))
    name = name or DEFAULT_WEIGHTS
    if name == DEFAULT_WEIGHTS and name not in listed:
        advice = "name a file or hf:owner/repo with --weights"
        yield Finding(f"weights {name}", False, "the default weights are not part of this installation", advice)
    elif name not in listed or listed[name].path.is_file():
        about = weights_info(name)
        facts = f"{about.parameters or 0:,} parameters, licence {about.licence}, {about.path}"
        yield Finding(f"header of {name}", bool(about.config), facts, "" if about.config else "give weights of a model")


def _detector() -> Iterator[Finding]:
    if find_opencv_problem():
        raise Export3DError("the face detector was not tested, because OpenCV cannot be used: repair OpenCV first")
    from export3d_cli.core.face.detector import FaceDetector
    from export3d_cli.core.media.image import read_image
    from export3d_cli.core.runtime.weights import example_path, resolve_weights

    found = len(FaceDetector(resolve_weights("yunet"))(read_image(example_path("source.jpg"))))
    yield Finding("detector", found == 1, f"finds {found} of 1 face in the example", "" if found == 1 else _REINSTALL)


def _tracker() -> Iterator[Finding]:
    if find_opencv_problem():
        raise Export3DError("the face tracker was not tested, because OpenCV cannot be used: repair OpenCV first")
    from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
    from export3d_cli.core.media.image import read_image
    from export3d_cli.core.runtime.weights import example_path, resolve_weights

    found = any(
        LandmarkerTracker(resolve_weights("face_landmarker")).track_frames([read_image(example_path("source.jpg"))] * 2)
    )
    result = "finds the face in the example" if found else "finds no face in the example"
    yield Finding("litert", found, f"{_version('ai-edge-litert')}, {result}", "" if found else _REINSTALL)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    endpoint = "offline" if constants.HF_HUB_OFFLINE else re.sub(r"//[^/@]+@", "//", constants.ENDPOINT)
    yield Finding("hub", True, f"{_version('huggingface-hub')}, {endpoint}, cache {constants.HF_HUB_CACHE}", "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _cuda_of_torch() -> str | None:
    """Return the CUDA version torch was built for, from its version file, because importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = file.read_text(encoding="utf-8") if file and file.is_file() else ""
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def _ffmpeg_version() -> str:
    from export3d_cli.core.media.ffmpeg_process import run_ffmpeg
    from export3d_cli.core.media.probe import ffmpeg_path

    output = run_ffmpeg([ffmpeg_path(), "-version"]).stdout.decode("utf-8", "replace")
    match = re.match(r"ffmpeg version (\S+)", output)
    return match.group(1) if match else "unknown"


def _split_advice(message: str, advice: str) -> tuple[str, str]:
    """Split one of our error messages into the problem and, after the last colon, what to do."""
    problem, _, remedy = message.rpartition(": ")
    return (problem, remedy) if problem else (message, advice)
