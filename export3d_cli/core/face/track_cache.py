"""A cache of tracked faces in a temporary file: a driver is tracked once for several sources, in constant memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.face_track import Face
from export3d_cli.core.face.landmarks import NUM_LANDMARKS

_RECORD = np.dtype([
    ("is_new_shot", "?"), ("score", "f4"), ("count", "i4"),  # score 0: no face; number of landmarks
    ("landmarks", "f4", (NUM_LANDMARKS, 3)), ("blendshapes", "f4", len(ARKIT_NAMES)),
])  # fmt: skip


class TrackCache:
    """The faces of the frames of one pass over a driver, in order; a context manager.

    A pass is identified by a key: everything that its faces depend on, such as driver, tracker and face. Recording
    another pass replaces the one before.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="export3d-")  # noqa: SIM115 - closed by __exit__
        self._key: object = None
        self._complete = False
        self.size = (0, 0)  # width, height of the rotated frames
        self.rotation = 0  # clockwise degrees by which the frames were rotated
        self.notes: tuple[str, ...] = ()  # for the user, about the pass

    def __enter__(self) -> TrackCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def is_complete(self, key: object) -> bool:
        """Return whether all faces of the pass `key` are recorded."""
        return self._complete and self._key == key

    def restart(self, key: object) -> None:
        """Remove all records and begin to record the pass `key`."""
        self._file.seek(0)
        self._file.truncate()
        self._key, self._complete, self.notes = key, False, ()

    def append(self, face: Face | None, size: tuple[int, int], *, is_new_shot: bool = False) -> None:
        """Record the face of the next frame, None if it shows none; `size` is its (width, height)."""
        record = np.zeros((), _RECORD)
        record["is_new_shot"] = is_new_shot
        if face is not None:
            record["score"], record["count"] = face.score, len(face.landmarks)
            record["landmarks"][: len(face.landmarks)], record["blendshapes"] = face.landmarks, face.blendshapes
        self.size = size
        self._file.write(record.tobytes())

    def finish(self, notes: Iterable[str] = ()) -> None:
        """Mark the pass as complete."""
        self._complete, self.notes = True, tuple(notes)

    def __iter__(self) -> Iterator[tuple[Face | None, bool]]:
        """Yield the face of each frame, and whether a shot begins there."""
        self._file.seek(0)
        while content := self._file.read(_RECORD.itemsize):
            record = np.frombuffer(content, _RECORD)[0]
            landmarks = record["landmarks"][: record["count"]]
            face = Face(landmarks, record["blendshapes"], float(record["score"])) if record["score"] else None
            yield face, bool(record["is_new_shot"])
