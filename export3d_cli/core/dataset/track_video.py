"""Reads the motion of one file: a video, a photo, a folder of pictures, a sound or an ARKit CSV."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from export3d_cli.core.face.arkit import read_csv
from export3d_cli.core.face.face_track import Face, TargetFaceTracker, choose_face
from export3d_cli.core.face.motion import Motion, resample_rows
from export3d_cli.core.face.speech import DEFAULT_FPS, read_speech
from export3d_cli.core.face.tracker import TrackerName, open_tracker
from export3d_cli.core.media.image import has_image_suffix, read_image
from export3d_cli.core.media.probe import DEFAULT_FOLDER_FPS, is_sound
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.errors import NoFaceError


def has_no_pictures(path: Path) -> bool:
    """Return whether a file is an ARKit CSV, which holds coefficients, or a sound."""
    return path.suffix.lower() == ".csv" or (not path.is_dir() and not has_image_suffix(path) and is_sound(path))


def extract_motion(
    path: Path, *, fps: Fraction | None = None, max_frames: int | None = None, face: str = "largest",
    tracker: TrackerName = "landmarker", progress: Callable[[str, int, int | None], None] | None = None,
) -> tuple[Motion, list[str]]:  # fmt: skip
    """Track one face of a video or photo, or read a CSV or sound, at EG3D's radius; return motion and notes.

    `fps` None is the video's rate, 25 for pictures and sounds; for `face` see `choose_face`. Raises `NoFaceError`.
    """
    if path.suffix.lower() == ".csv":
        motion, notes = read_csv(path, orbit_camera(0))
        fps = fps or motion.fps
        rows = resample_rows(len(motion), motion.fps, fps, 0.0, None)[:max_frames]
        return replace(motion.select(rows), fps=fps), notes
    if has_no_pictures(path):
        fps = fps or DEFAULT_FPS
        duration = None if max_frames is None else float(max_frames / fps)
        return read_speech(path, orbit_camera(0), fps=fps, duration=duration)
    face_tracker = open_tracker(tracker)
    faces: list[Face | None] = []
    if has_image_suffix(path):
        image = read_image(path)
        candidates = face_tracker.find_all(image)
        faces += [choose_face(candidates, face, str(path))] if candidates else []
        fps, size, notes = fps or DEFAULT_FOLDER_FPS, (image.shape[1], image.shape[0]), []
    else:
        with VideoReader(path, fps=fps) as reader:
            fps, size, notes = reader.info.fps, (reader.info.width, reader.info.height), reader.notes
            total = min(reader.info.frame_count, max_frames or reader.info.frame_count)
            track = TargetFaceTracker(face_tracker, fps, choice=face, name=str(path))
            for frame in itertools.islice(reader, max_frames):
                faces.append(track(frame))
                if progress is not None:
                    progress("tracking", len(faces), total)
            notes = [*notes, *track.notes]
    if all(candidate is None for candidate in faces):
        raise NoFaceError(f"no face found in {path}: use a file where a face is large, upright and facing the camera")
    return face_tracker.make_motion(faces, fps, size), notes
