"""The exception hierarchy. A message states the problem, the value and the remedy.

Export3DError            exit 1   operation failed
  InputError             exit 2   unusable file, option or array
    ConfigError          exit 2   unusable configuration
  MediaError             exit 1   reading or writing media failed midway
  NoFaceError            exit 3   no usable face
  WeightsError           exit 4   weights are missing, damaged or incompatible
  TrainingError          exit 1   training cannot continue
"""


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
