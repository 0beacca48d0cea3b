"""The error tree. A message says what was wrong, the value, and what to do.

Export3DError            exit 1   something failed
  InputError             exit 2   a file, option or array the user gave cannot be used
    ConfigError          exit 2   a configuration that cannot be run
  MediaError             exit 1   reading or writing media failed half-way
  NoFaceError            exit 3   no usable face
  WeightsError           exit 4   weights are missing, damaged or do not fit
  TrainingError          exit 1   training cannot go on
"""

from __future__ import annotations

MAX_MESSAGE_CHARS = 1600  # characters of a message


class Export3DError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is what the command line returns.

    A message longer than a screen (libraries quote what a file holds) loses its middle: what to do stands at the end.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(
            message
            if len(message) <= MAX_MESSAGE_CHARS
            else f"{message[: MAX_MESSAGE_CHARS // 2]} ... {message[-400:]}"
        )


class InputError(Export3DError):
    """A file, option or array the user gave cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration that cannot be run."""


class MediaError(Export3DError):
    """Reading or writing media failed half-way."""


class NoFaceError(Export3DError):
    """No usable face where one is needed."""

    exit_code = 3


class WeightsError(Export3DError):
    """Weights are missing, damaged, or do not fit what is asked of them."""

    exit_code = 4


class TrainingError(Export3DError):
    """Training cannot go on."""
