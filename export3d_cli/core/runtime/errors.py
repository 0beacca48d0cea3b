"""The exception hierarchy. A message states the problem, the value and the remedy.

Export3DError            exit 1   operation failed
  InputError             exit 2   unusable file, option or array
    ConfigError          exit 2   unusable configuration
  MediaError             exit 1   reading or writing media failed midway
  NoFaceError            exit 3   no usable face
  WeightsError           exit 4   weights are missing, damaged or incompatible
  TrainingError          exit 1   training cannot continue

Also says what is wrong with an installation of OpenCV.
"""

import importlib
import sys

_MIN_MAJOR_VERSION = 5  # earlier ones cannot read the face detector
_REINSTALL = (  # the packages share one folder; the headless one needs no system library such as libGL
    "run `pip uninstall -y opencv-python opencv-contrib-python opencv-python-headless opencv-contrib-python-headless`, "
    f"then `pip install 'opencv-python-headless>={_MIN_MAJOR_VERSION}'`"
)


class Export3DError(Exception):
    """Base class of all errors of this package; `exit_code` is the exit status of the command line."""

    exit_code = 1


class Export3DWarning(UserWarning):
    """A condition that does not stop the operation; the command line prints it as a note."""


class InputError(Export3DError):
    """A file, option or array from the user cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration is invalid or cannot run on this machine."""


class MediaError(Export3DError):
    """Reading or writing media failed midway."""


class NoFaceError(Export3DError):
    """An image or video has no usable face."""

    exit_code = 3


class WeightsError(Export3DError):
    """Weights are missing, damaged or incompatible."""

    exit_code = 4


class TrainingError(Export3DError):
    """Training cannot continue."""


def find_opencv_problem() -> str:
    """Return what is wrong with OpenCV and, after the last colon, the remedy; '' if it can be used."""
    vars(sys).pop("OpenCV_LOADER", None)  # left by a failed import; with it, the next one prints and hides the reason
    try:
        cv2 = importlib.import_module("cv2")
    except Exception as error:  # half-removed files can fail in any way
        vars(sys).pop("OpenCV_LOADER", None)
        reason = " ".join(str(error).split())[:200].replace(": ", ", ")
        return f"OpenCV cannot be loaded ({reason}): {_REINSTALL}"
    version = str(getattr(cv2, "__version__", ""))
    if not version:
        return f"OpenCV is damaged (cv2 lacks its version): {_REINSTALL}"
    if int(version.partition(".")[0]) < _MIN_MAJOR_VERSION:
        return f"OpenCV {version} is installed, and the face detector needs {_MIN_MAJOR_VERSION} or later: {_REINSTALL}"
    return ""
