"""Problems of the OpenCV installation, and how to repair them."""

from __future__ import annotations

import importlib
import importlib.metadata
import re

_MIN_MAJOR_VERSION = 5  # earlier ones cannot read the face detector
_USED_NAMES = ("FaceDetectorYN", "blendLinear", "error", "imencode", "pyrUp", "resize", "warpAffine")
_DISTRIBUTIONS = (
    "opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless",
)  # fmt: skip
_DEBIAN_PACKAGES = {  # that contain a library; slim containers and servers lack them
    "libGL": "libgl1 libglib2.0-0", "libgthread": "libglib2.0-0", "libglib": "libglib2.0-0", "libSM": "libsm6",
    "libICE": "libice6", "libXext": "libxext6", "libXrender": "libxrender1", "libX11": "libx11-6", "libxcb": "libxcb1",
}  # fmt: skip


def find_opencv_problem() -> str:
    """Return what is wrong with OpenCV and, after the last colon, the remedy; '' if it can be used."""
    try:
        cv2 = importlib.import_module("cv2")
    except ModuleNotFoundError as error:
        if error.name == "cv2":
            return "OpenCV is not installed: run `pip install opencv-python`"
        return f"OpenCV cannot be loaded ({error}): {_reinstall('opencv-python')}"
    except Exception as error:  # half-removed files can fail in any way
        reason = " ".join(str(error).split())[:200].replace(": ", ", ")
        library = re.search(r"\b(lib\w+)[-.\w]*\.so", reason)
        if library is None:
            return f"OpenCV cannot be loaded ({reason}): {_reinstall('opencv-python')}"
        package = _DEBIAN_PACKAGES.get(library[1])
        system = (
            f"run `apt-get install {package}` (or install what contains {library[1]} on this system), or "
            if package
            else ""
        )
        return f"OpenCV cannot be loaded ({reason}): {system}{_reinstall('opencv-python-headless')}"
    version = str(getattr(cv2, "__version__", ""))
    missing = [name for name in _USED_NAMES if not hasattr(cv2, name)]
    if not version or (missing and int(version.partition(".")[0]) >= _MIN_MAJOR_VERSION):
        return (
            f"OpenCV is damaged (cv2 lacks {missing[0] if version else 'its version'}): {_reinstall('opencv-python')}"
        )
    if int(version.partition(".")[0]) < _MIN_MAJOR_VERSION:
        text = f"OpenCV {version} is installed, and the face detector needs {_MIN_MAJOR_VERSION} or later"
        return f"{text}: {_reinstall('opencv-python')}"
    return ""


def _reinstall(package: str) -> str:
    """Return the commands that remove all packages of OpenCV, which share one folder, and install one."""
    installed = [name for name in _DISTRIBUTIONS if _is_installed(name)]
    removal = f"`pip uninstall -y {' '.join(installed)}`, then " if installed else ""
    return f"run {removal}`pip install --force-reinstall '{package}>={_MIN_MAJOR_VERSION}'`"


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
