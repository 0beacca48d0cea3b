"""One video, photo or recording of a phone -> its Motion."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from export3d_cli.core.face.arkit import read_csv
from export3d_cli.core.face.landmarker import Face
from export3d_cli.core.face.motion import Motion, resample_rows
from export3d_cli.core.face.target_face import TargetFaceTracker, choose_face
from export3d_cli.core.face.tracker import TrackerName, open_tracker
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.image_folder import DEFAULT_FOLDER_FPS
from export3d_cli.core.media.video import VideoReader
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.errors import NoFaceError
from export3d_cli.core.runtime.weights import resolve_weights


def is_arkit_csv(path: Path) -> bool:
    """Whether a file is a phone's recording of a face: numbers without pictures."""
    return path.suffix.lower() == ".csv"


def extract_motion(
    path: Path,
    *,
    fps: Fraction | None = None,
    max_frames: int | None = None,
    face: str = "largest",
    tracker_name: TrackerName = "landmarker",
    progress: Callable[[str, int, int | None], None] | None = None,
) -> tuple[Motion, list[str]]:
    """Motion of one face of a video, read in a stream, or of a photo (one frame); and what the user should know.

    Args:
        path: a video, a folder of pictures, a photo, or a CSV of Live Link Face, seen from EG3D's usual distance.
        fps: rate of the frames; None keeps the video's.
        max_frames: most frames to take; None: all.
        face: which one of several: largest, left, right or index:N, the N-th from the left, from 0.
        name: the tracker.
        progress: told what is done, how many frames of it, and of how many.

    Raises `NoFaceError` when there is none.
    """
    if is_arkit_csv(path):
        motion, notes = read_csv(path, resolve_weights("arkit_measures"), Camera.orbit(0).to_vector())
        rate = fps or motion.fps
        rows = resample_rows(len(motion), motion.fps, rate, 0.0, None)[:max_frames]
        return replace(motion.select(rows), fps=rate), notes
    tracker = open_tracker(tracker_name)
    faces: list[Face | None] = []
    if has_image_suffix(path):
        image = read_image(path)
        found = tracker.landmarker.find_all(image)
        faces += [choose_face(found, face, str(path))] if found else []
        rate, size, notes = DEFAULT_FOLDER_FPS, (image.shape[1], image.shape[0]), []
    else:
        with VideoReader(path, fps=fps) as reader:
            rate, size, notes = reader.info.fps, (reader.info.width, reader.info.height), reader.notes
            total = min(reader.info.frame_count, max_frames or reader.info.frame_count)
            follow = TargetFaceTracker(tracker.landmarker, rate, choice=face, name=str(path))
            for frame in itertools.islice(reader, max_frames):
                faces.append(follow(frame))
                if progress is not None:
                    progress("tracking", len(faces), total)
    if not any(found is not None for found in faces):
        raise NoFaceError(f"no face found in {path}: use one where a face is large, upright and turned to the camera")
    return tracker.make_motion(faces, rate, size), notes
