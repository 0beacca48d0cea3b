"""Checks of the installation: versions, devices, ffmpeg, weights, tracker. Each failed check says what to do."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from export3d_cli import __version__
from export3d_cli.core.runtime.errors import Export3DError, find_opencv_problem

_REINSTALL = "`pip install --force-reinstall export3d-cli` repairs it"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    ok: bool
    found: str
    advice: str = ""  # what to do; '' if the check passed


def versions() -> dict[str, str]:
    """Return the versions that affect results, without importing anything; 'missing' if not installed."""
    try:
        encoder = _ffmpeg_version()
    except (Export3DError, OSError, ImportError):
        encoder = "missing"
    return {"export3d": __version__, "python": platform.python_version(), "torch": _version("torch"),
            "cuda": _cuda_of_torch() or "none", "ffmpeg": encoder}  # fmt: skip


def examine(weights: str | None = None) -> list[Finding]:
    """Run all checks; `weights` names other weights than the default ones."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]], str]] = [
        ("torch", _torch, "install torch: https://pytorch.org/get-started/locally"),
        ("cv2", _opencv, _REINSTALL),
        ("ffmpeg", _ffmpeg, "`pip install --force-reinstall imageio-ffmpeg`, and unset IMAGEIO_FFMPEG_EXE"),
        ("weights", lambda: _weights(weights), _REINSTALL),
        ("tracker", _tracker, "`pip install --force-reinstall export3d-cli ai-edge-litert`"),
    ]
    findings = []
    for what, check, advice in checks:
        try:
            findings += list(check())
        except Exception as error:  # a defect must not hide the other findings
            reason = " ".join(str(error).split())[:500]
            found = reason if isinstance(error, Export3DError) else f"{type(error).__name__}: {reason}"
            problem = find_opencv_problem()
            if problem and (isinstance(error, ImportError | AttributeError) or str(error) == problem):
                found, _, advice = problem.rpartition(": ")
            findings.append(Finding(what, False, found, advice))
    return findings


def _torch() -> Iterator[Finding]:
    import torch

    torch.zeros(2, 2) @ torch.zeros(2, 2)
    system = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, export3d {__version__}"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    yield Finding("torch", True, f"{torch.__version__}, {threads}, {system}")
    built = torch.version.cuda
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            torch.zeros(1, device=f"cuda:{index}").add_(1).cpu()
            found = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {built}"
            yield Finding(f"cuda:{index}", True, found)
    elif built and Path("/proc/driver/nvidia").exists():
        found = f"NVIDIA driver and torch for CUDA {built} present, but no usable GPU"
        yield Finding("cuda", False, found, "`nvidia-smi` shows the driver's CUDA: install a torch for it")
    else:
        yield Finding("cuda", True, "none, using the CPU")
    if torch.backends.mps.is_available():
        yield Finding("mps", True, "usable with --device mps")


def _opencv() -> Iterator[Finding]:
    problem, _, advice = find_opencv_problem().rpartition(": ")
    yield Finding("cv2", not problem, problem or str(importlib.import_module("cv2").__version__), advice)


def _ffmpeg() -> Iterator[Finding]:
    """Decode two frames and encode them, as the commands do."""
    from export3d_cli.core.media.probe import ffmpeg_path
    from export3d_cli.core.media.reader import VideoReader
    from export3d_cli.core.media.writer import VideoWriter
    from export3d_cli.core.runtime.weights import example_path

    with (
        VideoReader(example_path("drive.mp4"), start=0.04, duration=0.08, size=(64, 64)) as reader,
        tempfile.TemporaryDirectory() as folder,
        VideoWriter(Path(folder) / "test.mp4", size=(64, 64), fps=reader.info.fps) as writer,
    ):
        for frame in reader:
            writer.write(frame)
    yield Finding("ffmpeg", True, f"{_ffmpeg_version()}, decodes and encodes H.264 ({ffmpeg_path()})")


def _weights(name: str | None) -> Iterator[Finding]:
    from export3d_cli.core.runtime.weights import verify_weights, weights_info, weights_manifest

    for entry in weights_manifest().values():
        try:
            verify_weights(entry)
            facts = f"checksum correct, {entry.size / 1e6:.1f} MB, {entry.licence}"
            yield Finding(f"weights {entry.name}", True, facts)
        except Export3DError as error:
            yield Finding(f"weights {entry.name}", False, str(error), _REINSTALL)
    info = weights_info(name)
    facts = f"{info.parameters or 0:,} parameters, licence {info.licence}, {info.path}"
    yield Finding("model", bool(info.config), facts, "" if info.config else "give weights of a model")


def _tracker() -> Iterator[Finding]:
    from export3d_cli.core.face.tracker import open_landmarker_tracker
    from export3d_cli.core.media.image import read_image
    from export3d_cli.core.runtime.weights import example_path

    found = open_landmarker_tracker().find(read_image(example_path("source.jpg"))) is not None
    result = f"LiteRT {_version('ai-edge-litert')}, finds {'the' if found else 'no'} face in the example"
    yield Finding("tracker", found, result, "" if found else _REINSTALL)


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
