"""A cache of tracked faces in a temporary file: a driver is tracked once for several sources, in constant memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import TracebackType

import numpy as np

from export3d_cli.core.face import landmarks as mesh
from export3d_cli.core.face.beta import ARKIT_NAMES
from export3d_cli.core.face.landmarker import Face

_LANDMARK_VALUES = mesh.NUM_LANDMARKS * 3
_RECORD_LENGTH = (
    2 + _LANDMARK_VALUES + len(ARKIT_NAMES)
)  # float32: score (0: no face), number of landmarks, landmarks, blendshapes


class TrackCache:
    """The faces of one driver's frames, in order; a context manager. `complete` is set once all are recorded."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="export3d-")  # noqa: SIM115 - closed by __exit__
        self.size = (0, 0)  # width, height of the frames
        self.complete = False

    def __enter__(self) -> TrackCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def clear(self) -> None:
        """Remove all records."""
        self._file.seek(0)
        self._file.truncate()
        self.complete = False

    def append(self, face: Face | None, size: tuple[int, int]) -> None:
        """Record the face of the next frame, None if it shows none; `size` is its (width, height)."""
        record = np.zeros(_RECORD_LENGTH, dtype=np.float32)
        if face is not None:
            count = len(face.landmarks)
            record[:2], record[2 + _LANDMARK_VALUES :] = (face.score, count), face.blendshapes
            record[2 : 2 + 3 * count] = face.landmarks.ravel()
        self.size = size
        self._file.write(record.tobytes())

    def __iter__(self) -> Iterator[Face | None]:
        position = 0
        while True:
            self._file.seek(position)
            content = self._file.read(4 * _RECORD_LENGTH)
            if not content:
                return
            position += len(content)
            record = np.frombuffer(content, dtype=np.float32)
            landmarks = record[2 : 2 + 3 * int(record[1])].reshape(-1, 3)
            yield Face(landmarks, record[2 + _LANDMARK_VALUES :], float(record[0])) if record[0] else None
