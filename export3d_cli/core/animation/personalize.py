"""Personalise (beyond the paper): from photos and a video of one person, make a file that stands for a photo.

The frames of the video that add most are kept as further photos, and the expression basis is fitted to the person.
"""

import itertools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.compositor import read_photo
from export3d_cli.core.animation.framing import DEFAULT_MAX_SIDE_PX, PHOTO_MARGIN
from export3d_cli.core.animation.options import Progress, check_overwrite
from export3d_cli.core.animation.person import MAX_PHOTOS, Person
from export3d_cli.core.face.crop import fit_clip_crop
from export3d_cli.core.face.face_track import Face, TargetFaceTracker, find_photo_face
from export3d_cli.core.face.head_pose import landmarks_to_head_frame
from export3d_cli.core.face.landmarks import NUM_LANDMARKS
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.model.warp.photo_selection import ANGLE_SCALE, EXPRESSION_SCALE
from export3d_cli.core.runtime.camera import FOCAL, RADIUS, head_pose
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.weights import file_sha256

SUFFIX = ".person.safetensors"
MAX_FRAMES = 250  # of the video that are tracked, evenly over its length
MAX_CROP_PX = 768  # longer side at which additional photos are stored, cropped around the head
PIXELS_PER_UNIT = 256 * FOCAL / RADIUS  # of an image of 256 pixels, head-frame units at the head
# Weight of the shipped basis against the person's frames, in frames: 0 fits the frames alone. Of 30, 50 and 100 all
# bring the landmarks of frames that the fit did not see equally near; 5 frames suffice for two thirds of it.
PRIOR_FRAMES = 50


@dataclass(frozen=True)
class PersonalizeOptions:
    """From what a person file is made."""

    also: tuple[Path, ...] = ()  # more photos of the person
    video: Path | None = None  # of the person
    start: float = 0.0  # seconds of the video to skip
    duration: float = 20.0  # seconds of the video to use, at most
    frames: int = 4  # of the video that are kept as photos
    force: bool = False  # use photos and video even if they seem to show somebody else
    overwrite: bool = False


@dataclass(frozen=True)
class PersonSummary:
    """What a person file was made of."""

    out: Path
    photos: tuple[str, ...]  # names, with the time of frames of the video
    tracked: int | None  # frames of the video with the face; None without a video
    landmark_error: tuple[float, float] | None  # see `fit_basis`
    size_mb: float
    seconds: float
    notes: tuple[str, ...] = field(default=())


def personalize(animator: Animator, source: Path, out: Path, options: PersonalizeOptions | None = None, *,
                progress: Progress | None = None) -> PersonSummary:  # fmt: skip
    """Write a person file, which is accepted wherever a photo is; frames show the photo `source`.

    Each photo and the video must show one person, the largest face in them. Raises `InputError` if one seems to show
    somebody else.
    """
    options, began, notes = options or PersonalizeOptions(), time.monotonic(), list[str]()
    check_person_output(out, options)
    photos = {str(path): read_photo(path) for path in (source, *options.also)}
    files = [source, *options.also, *([] if options.video is None else [options.video])]
    made_from = {file_sha256(path): path.name for path in files}
    if len(made_from) < len(files):
        raise InputError(f"two of the photos are the same file, of {', '.join(map(str, files))}: give each once")
    if max(photos[str(source)].shape[:2]) > DEFAULT_MAX_SIDE_PX:
        notes.append(f"{source} is kept at {DEFAULT_MAX_SIDE_PX} pixels, its longer side")
    also = {name: photo for name, photo in photos.items() if name != str(source)}
    portrait = animator.portrait(photos[str(source)], name=str(source), also=also, force=options.force)
    motions = [portrait.motion, *(face.motion for face in portrait.others)]
    tracker, kept, basis, tracked, errors = animator.tracker(), dict[str, np.ndarray](), None, None, None
    for name, photo in also.items():
        kept[name] = _cut_head(photo, find_photo_face(tracker, photo, name=name))
    if options.video is not None:
        faces, motion, video_notes = _track_video(animator, options.video, options, progress)
        notes += video_notes
        tracked, count = len(motion), len(motions)
        motions.append(motion)
        asked = min(options.frames, MAX_PHOTOS - count)
        nearest, *chosen = (row - count for row in choose_frames(Motion.concatenate(motions), count, asked))
        if len(chosen) < asked:
            notes.append(f"{len(chosen)} of {asked} frames of {options.video} are kept: no other adds anything")
        numbers = {list(faces)[row]: row for row in (nearest, *chosen)}
        with _open(options.video, options) as reader:
            frames = enumerate(itertools.islice(reader, max(numbers) + 1))
            cut = {numbers[k]: _cut_head(frame, faces[k]) for k, frame in frames if k in numbers}
        # the video follows one face: the frame that is most like a photo tells whose
        name = f"{options.video} at {float(list(faces)[nearest] / motion.fps):.1f} s"
        animator.portrait(photos[str(source)], name=str(source), also={name: cut[nearest]}, force=options.force)
        kept |= {f"{options.video.name} at {float(list(faces)[k] / motion.fps):.2f} s": cut[k] for k in chosen}
        basis, errors = fit_basis(animator, Motion.concatenate(motions))
        if errors[1] >= errors[0]:
            basis = None
            notes.append(f"{options.video} does not improve the expression basis, which stays as it is")
    Person((_shrink(photos[str(source)], DEFAULT_MAX_SIDE_PX), *kept.values()), basis, animator.fingerprint,
           made_from).save(out)  # fmt: skip
    errors = errors and (round(errors[0], 2), round(errors[1], 2))
    size_mb = round(out.stat().st_size / 1e6, 1)
    return PersonSummary(out, (str(source), *kept), tracked, errors, size_mb, time.monotonic() - began, tuple(notes))


def check_person_output(out: Path, options: PersonalizeOptions) -> None:
    """Raise `InputError` for an output that is no person file or exists, and for a single photo without a video."""
    if not out.name.lower().endswith(SUFFIX):
        raise InputError(f"{out} must end in {SUFFIX}")
    check_overwrite(out, options.overwrite)
    if not options.also and options.video is None:
        raise InputError("one photo alone has nothing to add: give more photos of the person, or a video of them")
    if len(options.also) >= MAX_PHOTOS:
        raise InputError(f"a person file holds at most {MAX_PHOTOS} photos, got {1 + len(options.also)}")


def choose_frames(motion: Motion, photos: int, count: int) -> list[int]:
    """Return the row of the frame most like a photo, then those of `count` frames that add most to the photos.

    The first rows of `motion` are the photos, the others frames of a video. Frames are added greedily, so that the mean
    squared distance of the frames to the nearest photo falls most, while any adds something; distances are the logits
    of `select_photos`.
    """
    points = landmarks_to_head_frame(motion.landmarks, motion.camera)
    rotation = head_pose(motion.camera)[0]
    cosine = ((np.einsum("aij,bij->ab", rotation, rotation) - 1) / 2).clip(-1, 1)
    moved = np.stack([np.linalg.norm(points - row, axis=-1).mean(1) for row in points])  # (T, T) head-frame units
    distance = np.square(2 / EXPRESSION_SCALE * moved + 2 / ANGLE_SCALE * np.sqrt(1 - cosine**2))[:, photos:]
    nearest = distance[:photos].min(0)  # (T,)
    chosen = [photos + int(nearest.argmin())]
    for _ in range(min(count, len(points) - photos)):
        best = photos + int(np.minimum(nearest, distance[photos:]).mean(1).argmin())
        if (distance[best] >= nearest).all():
            break
        chosen.append(best)
        nearest = np.minimum(nearest, distance[best])
    return chosen


def fit_basis(animator: Animator, motion: Motion) -> tuple[Tensor, tuple[float, float]]:
    """Fit the displacement fields b_i of the expression basis to a person: ridge regression around the shipped ones.

    The first row of `motion` is the photo. Returns the basis (n, 478, 3), and the mean error of the landmarks in pixels
    at 256, by the shipped basis and by one that is fitted to the first two thirds of the rows, in the last third.
    """
    assert animator.model.flow is not None
    shipped = animator.model.flow.basis.float().cpu().numpy().astype(np.float64)  # (n, 478, 3)
    n = len(shipped)
    landmarks = landmarks_to_head_frame(motion.landmarks, motion.camera)  # (T, 478, 3)
    lam = animator.coefficients(motion.beta)[:, :n].astype(np.float64)
    change = (lam - lam[0]) * animator.model.config.expression_gain  # (T, n), as rendered
    residual = (landmarks - landmarks[0]).reshape(len(lam), -1) - change @ shipped.reshape(n, -1)  # (T, 478 * 3)
    prior = PRIOR_FRAMES * max(float(np.square(change).mean()), 1e-6) * np.eye(n)

    def fit(rows: slice) -> np.ndarray:
        x = change[rows]
        return np.linalg.solve(x.T @ x + prior, x.T @ residual[rows])

    def error(rest: np.ndarray) -> float:
        return float(np.linalg.norm(rest.reshape(-1, NUM_LANDMARKS, 3)[..., :2], axis=-1).mean() * PIXELS_PER_UNIT)

    split = max(1, len(lam) * 2 // 3)
    held_out = slice(split, None)
    errors = error(residual[held_out]), error(residual[held_out] - change[held_out] @ fit(slice(split)))
    basis = shipped + fit(slice(None)).reshape(shipped.shape)
    return torch.from_numpy(basis.astype(np.float32)), errors


def _track_video(animator: Animator, video: Path, options: PersonalizeOptions,
                 progress: Progress | None) -> tuple[dict[int, Face], Motion, list[str]]:  # fmt: skip
    """Return the faces of a video's first shot, by the numbers of their frames, their motion, and notes."""
    faces, cut = dict[int, Face](), False
    with _open(video, options) as reader:
        track = TargetFaceTracker(animator.tracker(), reader.info.fps, name=str(video))
        for number, frame in enumerate(itertools.islice(reader, MAX_FRAMES)):
            face = track(frame)
            cut = track.is_new_shot and bool(faces)
            if cut:
                break
            if face is not None:
                faces[number] = face
            if progress is not None:
                progress("tracking", number + 1, min(reader.info.frame_count, MAX_FRAMES))
        fps, size = reader.info.fps, (reader.info.width, reader.info.height)
    if not faces:
        raise NoFaceError(f"no face found in {video}: use a video with one large, upright face")
    notes = [*track.notes, *([f"{video} is used until its first cut"] if cut else [])]
    return faces, animator.tracker().make_motion([*faces.values()], fps, size), notes


def _open(video: Path, options: PersonalizeOptions) -> VideoReader:
    """Open a video at a rate at which it has at most `MAX_FRAMES` frames."""
    reader = VideoReader(video, start=options.start, duration=options.duration)
    if reader.info.frame_count <= MAX_FRAMES:
        return reader
    fps = (reader.info.fps * MAX_FRAMES / reader.info.frame_count).limit_denominator(1000)
    return VideoReader(video, start=options.start, duration=options.duration, fps=fps)


def _cut_head(photo: np.ndarray, face: Face) -> np.ndarray:
    """Cut out the part of an additional photo that `Animator.portrait` uses: it finds the same square in it."""
    H, W = photo.shape[:2]
    x0, y0, side = fit_clip_crop(face.landmarks[None], (W, H))
    reach = (0.5 + PHOTO_MARGIN) * side
    spans = ((start + side / 2, length) for start, length in ((x0, W), (y0, H)))
    (left, right), (top, bottom) = (
        (max(0, math.floor(middle - reach)), min(length, math.ceil(middle + reach))) for middle, length in spans
    )
    return _shrink(np.ascontiguousarray(photo[top:bottom, left:right]), MAX_CROP_PX)


def _shrink(photo: np.ndarray, longer: int) -> np.ndarray:
    """Reduce a photo, uint8 (H, W, 3), to a longer side."""
    scale = min(1.0, longer / max(photo.shape[:2]))
    return cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else photo
