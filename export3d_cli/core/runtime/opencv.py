"""Problems of the OpenCV installation, and how to repair them."""

import importlib

_MIN_MAJOR_VERSION = 5  # earlier ones cannot read the face detector
_REINSTALL = (  # the packages share one folder; the headless one needs no system library such as libGL
    "run `pip uninstall -y opencv-python opencv-contrib-python opencv-python-headless opencv-contrib-python-headless`, "
    f"then `pip install 'opencv-python-headless>={_MIN_MAJOR_VERSION}'`"
)


def find_opencv_problem() -> str:
    """Return what is wrong with OpenCV and, after the last colon, the remedy; '' if it can be used."""
    try:
        cv2 = importlib.import_module("cv2")
    except Exception as error:  # half-removed files can fail in any way
        reason = " ".join(str(error).split())[:200].replace(": ", ", ")
        return f"OpenCV cannot be loaded ({reason}): {_REINSTALL}"
    version = str(getattr(cv2, "__version__", ""))
    if not version:
        return f"OpenCV is damaged (cv2 lacks its version): {_REINSTALL}"
    if int(version.partition(".")[0]) < _MIN_MAJOR_VERSION:
        return f"OpenCV {version} is installed, and the face detector needs {_MIN_MAJOR_VERSION} or later: {_REINSTALL}"
    return ""
