"""A portrait looked at instead of driven: the camera moves (`novel_view`), or lambda does (`edit_basis`, fig. 9).

Each writes a video, one picture where there is one view, or a contact sheet of them all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from export3d_cli.core.animation.animator import Animator
from export3d_cli.core.animation.compositor import read_portrait
from export3d_cli.core.animation.driver_stream import DriverStream
from export3d_cli.core.animation.mesh_export import check_mesh_output, extract_head_mesh, write_mesh
from export3d_cli.core.animation.options import Crop, Progress, Summary, check_overwrite
from export3d_cli.core.animation.pipeline import BackgroundWriter
from export3d_cli.core.animation.watermark import Watermark, get_watermarker
from export3d_cli.core.media.encoder_settings import check_crf
from export3d_cli.core.media.image import MAX_PIXELS, write_image
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT, VideoWriter
from export3d_cli.core.runtime.camera import Camera, rotation_from_angles
from export3d_cli.core.runtime.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg")  # they carry the mark that they are synthetic
GRID_VALUES = 5  # of each basis vector in a contact sheet
KEPT_BYTES = 128 << 20  # of frames that will be shown again, at most
Range = tuple[float, float]


@dataclass(frozen=True)
class NovelViewOptions:
    """A sweep of the camera around the portrait; angles in degrees, first and last."""

    yaw: Range | None = (-30.0, 30.0)  # +: the head turns to the image's right; None: frontal
    pitch: Range | None = None  # +: up
    roll: Range | None = None  # +: clockwise
    frames: int = 60
    loop: Literal["pingpong", "once"] = "pingpong"
    fps: Fraction = Fraction(25)
    crf: int | None = None  # constant rate factor, 0 to 51; None: 18
    overwrite: bool = False
    grid: bool = False  # a contact sheet instead of a video
    depth: bool = False  # the depth in colours
    watermark: Watermark = "none"  # beside the mark in the metadata
    drive: Path | None = None  # whose expression: an image, a video or a motion file; None: the photo's own
    mesh: Path | None = None  # where the head's surface goes too, .ply or .glb, with the first expression
    face: str = "largest"  # of the photo: largest | left | right | index:N
    crop: Crop = "auto"  # of the photo: a square around the face, or none: the picture as it is
    size: int = 0  # side of the frames, pixels; 0: as the photo allows, see `frames.frame_size`

    @property
    def single(self) -> bool:
        """Whether all frames would show the same."""
        ranges = (self.yaw, self.pitch, self.roll)
        return self.frames == 1 or all(r is None or r[0] == r[1] for r in ranges)


@dataclass(frozen=True)
class EditOptions:
    """Expression directions to move along; the camera stays the source's."""

    edits: tuple[tuple[int, Range], ...] = ((1, (0.0, 1.0)),)  # i of v_i from 1: change of lambda_i
    frames: int = 60
    fps: Fraction = Fraction(25)
    crf: int | None = None  # constant rate factor, 0 to 51; None: 18
    overwrite: bool = False
    watermark: Watermark = "none"  # beside the mark in the metadata
    face: str = "largest"  # of the photo: largest | left | right | index:N
    crop: Crop = "auto"  # of the photo: a square around the face, or none: the picture as it is
    size: int = 0  # side of the frames, pixels; 0: as the photo allows, see `frames.frame_size`
    grid: bool = False  # a contact sheet: a row for each of `edits`, `GRID_VALUES` of it


def novel_view(
    animator: Animator,
    source: Path,
    out: Path | None,
    options: NovelViewOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Summary:
    """Orbit the portrait: one tri-plane, many cameras; 0 degrees is frontal, whatever the photo's own angle.

    Where `out` is None, only the mesh is written.
    """
    options = options or NovelViewOptions()
    began = time.monotonic()
    if options.mesh is not None:
        check_mesh_output(options.mesh)
        if out is None:
            check_crf(options.mesh, options.crf)
        check_overwrite(options.mesh, options.overwrite)
    if out is None:
        if options.mesh is None:
            raise InputError("nothing to write: give an output, a mesh, or both")
        _set_source(animator, source, options)
        _mesh(animator, options.mesh, _expressions(animator, options.drive, options.fps, 1), progress)
        return Summary(options.mesh, 0, 0, Fraction(0), time.monotonic() - began, animator.device_name)
    check_overwrite(out, options.overwrite)
    check_crf(out, options.crf)
    picture = _is_picture(out)
    if options.grid and not picture:
        raise InputError(f"a contact sheet is a picture: give an output that ends in .png or .jpg, not {out.name!r}")
    if picture and not options.grid and not options.single:
        raise InputError(f"{out} can hold one view: give one angle (--yaw 20), --frames 1, --grid, or a video's name")
    _set_source(animator, source, options)
    cameras = orbit_cameras(animator.source_camera(), options)
    if picture and not options.grid:
        cameras = cameras[:1]
    beta = _expressions(animator, options.drive, options.fps, len(cameras))
    if options.mesh is not None:
        _mesh(animator, options.mesh, beta, progress)
    frames = _counted(_views(animator, cameras, beta, options.depth), len(cameras), progress)
    if not picture:
        return _video(animator, frames, len(cameras), out, options, began)
    labels: list[str] = []
    if options.grid:
        angles = [Camera.from_vector(camera).angles() for camera in cameras]
        labels = [f"{round(yaw):+d} {round(pitch):+d}" for yaw, pitch, _ in angles]  # yaw and pitch
    return _picture(animator, frames, len(cameras), out, _columns(len(cameras)), labels, options.watermark, began)


def edit_basis(
    animator: Animator, source: Path, out: Path, options: EditOptions | None = None, *, progress: Progress | None = None
) -> Summary:
    """Move basis coefficients of the portrait's expression (fig. 9): lambda_i changes, nothing else does."""
    options = options or EditOptions()
    began = time.monotonic()
    check_overwrite(out, options.overwrite)
    check_crf(out, options.crf)
    n, picture = animator.model.config.num_coefficients, _is_picture(out)
    for v, _ in options.edits:
        if not 1 <= v <= n:
            raise InputError(f"basis vector {v} does not exist: these weights have 1 to {n}")
    if options.grid and not picture:
        raise InputError(f"a contact sheet is a picture: give an output that ends in .png or .jpg, not {out.name!r}")
    if picture and not options.grid and options.frames > 1:
        raise InputError(f"{out} can hold one frame: give --frames 1, --grid, or a video's name")
    _set_source(animator, source, options)
    labels: list[str] = []
    if options.grid:
        rows = []
        for v, (first, last) in options.edits:
            for value in np.linspace(first, last, GRID_VALUES):
                rows.append(value * np.eye(n)[v - 1])
                labels.append(f"v{v} {value:+.3g}")
        changes = np.stack(rows).astype(np.float32)
    else:
        changes = np.zeros((options.frames, n), dtype=np.float32)
        for v, (first, last) in options.edits:
            changes[:, v - 1] += np.linspace(first, last, options.frames, dtype=np.float32)
    frames = _counted(animator.edit(changes), len(changes), progress)
    if picture:
        columns = GRID_VALUES if options.grid else 1
        return _picture(animator, frames, len(changes), out, columns, labels, options.watermark, began)
    return _video(animator, frames, len(changes), out, options, began)


def orbit_cameras(camera: Camera, options: NovelViewOptions) -> np.ndarray:
    """Cameras (T, 25) that see the head at the angles asked for, where and as far away as `camera` sees it."""
    count = options.frames
    where = np.linspace(0, 1, count)
    if options.loop == "pingpong" and count > 2 and not options.grid:
        there = np.minimum(np.arange(count), count - np.arange(count))  # back as it came, to the last bit
        where = 0.5 - 0.5 * np.cos(2 * np.pi * there / count)
    ranges = [r or (0.0, 0.0) for r in (options.yaw, options.pitch, options.roll)]
    pose = np.linalg.inv(camera.cam2world)  # its last column stays
    out = []
    for t in where:
        yaw, pitch, roll = (a + t * (b - a) for a, b in ranges)
        pose[:3, :3] = rotation_from_angles(yaw, pitch, roll)
        out.append(Camera(np.linalg.inv(pose), camera.intrinsics).to_vector())
    return np.stack(out)


def contact_sheet(images: Sequence[np.ndarray], columns: int, labels: Sequence[str] = ()) -> np.ndarray:
    """Images of one size, uint8 (H, W, 3), row by row, each with its label in a corner."""
    import cv2

    H, W = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.zeros((rows * H, columns * W, 3), dtype=np.uint8)
    for k, image in enumerate(images):
        cell = np.ascontiguousarray(image)
        if labels:
            at, scale = (W // 32, H - H // 24), W / 512
            for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):  # a dark outline under light letters
                cv2.putText(cell, labels[k], at, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, width, cv2.LINE_AA)
        row, column = divmod(k, columns)
        sheet[row * H : (row + 1) * H, column * W : (column + 1) * W] = cell
    return sheet


def _set_source(animator: Animator, source: Path, options: NovelViewOptions | EditOptions) -> None:
    photo = read_portrait(source)
    animator.set_source(photo, name=str(source), face=options.face, crop=options.crop, size=options.size)


def _is_picture(out: Path) -> bool:
    return out.suffix.lower() in PICTURES


def _columns(count: int) -> int:
    """As wide as high, or a little wider; up to five views stay in a row."""
    return count if count <= 5 else int(np.ceil(np.sqrt(count)))


def _mesh(animator: Animator, path: Path, beta: np.ndarray | None, progress: Progress | None) -> None:
    """Write the head with the first of the expressions."""
    if progress is not None:
        progress("mesh", 0, 1)
    write_mesh(path, extract_head_mesh(animator, beta=None if beta is None else beta[:1]))
    if progress is not None:
        progress("mesh", 1, 1)


def _expressions(animator: Animator, driver: Path | None, fps: Fraction, count: int) -> np.ndarray | None:
    """beta (1, 64) of an image, or (count, 64) of a video; the last one is held where the driver is shorter."""
    if driver is None:
        return None
    with DriverStream(
        driver, animator.tracker, batch=animator.batch, crop_scale=animator.crop_scale, fps=fps, max_frames=count
    ) as stream:
        beta = np.concatenate([part[0].beta for part in stream])
    return beta if len(beta) == 1 else beta[np.arange(count).clip(max=len(beta) - 1)]


def _views(animator: Animator, cameras: np.ndarray, beta: np.ndarray | None, depth: bool) -> Iterator[np.ndarray]:
    """`Animator.view`; a camera that comes again, as on the way back, gets the frame that was made before."""
    size = animator.size
    _, first, which = np.unique(cameras, axis=0, return_index=True, return_inverse=True)
    first = first[which.reshape(-1)]  # frame that shows the same
    left = Counter(first.tolist())
    again = sum(times > 1 for times in left.values())
    if (beta is not None and len(beta) > 1) or again * size * size * 3 > KEPT_BYTES:
        yield from animator.view(cameras, beta=beta, depth=depth)
        return
    made = animator.view(cameras[sorted(left)], beta=beta, depth=depth)
    kept: dict[int, np.ndarray] = {}
    for at, k in enumerate(first.tolist()):
        frame = next(made) if k == at else kept.pop(k)
        left[k] -= 1
        if left[k]:
            kept[k] = frame.copy()  # what is yielded may be written into
        yield frame


def _counted(frames: Iterator[np.ndarray], total: int, progress: Progress | None) -> Iterator[np.ndarray]:
    for count, frame in enumerate(frames, start=1):
        yield frame
        if progress is not None:
            progress("frames", count, total)


def _video(
    animator: Animator, frames: Iterator[np.ndarray], total: int, out: Path, options: NovelViewOptions | EditOptions,
    began: float,
) -> Summary:  # fmt: skip
    size, mark = animator.size, get_watermarker(options.watermark)
    with (
        VideoWriter(out, size=(size, size), fps=options.fps, crf=options.crf) as writer,
        BackgroundWriter[np.ndarray](
            lambda frame: writer.write(mark(frame)), animator.batch, stop=writer.abort
        ) as behind,
    ):
        for frame in frames:
            behind.put(frame)
    return Summary(out, total, 0, options.fps, time.monotonic() - began, animator.device_name)


def _picture(
    animator: Animator, frames: Iterator[np.ndarray], total: int, out: Path, columns: int, labels: Sequence[str],
    watermark: Watermark, began: float,
) -> Summary:  # fmt: skip
    size = animator.size
    if total * size * size > MAX_PIXELS:
        most = MAX_PIXELS // (size * size)
        raise InputError(f"a contact sheet of {total} views would be too large: {most} fit, set --frames or --size")
    write_image(
        out, get_watermarker(watermark)(contact_sheet(list(frames), columns, labels)), comment=SYNTHETIC_COMMENT
    )
    return Summary(out, total, 0, Fraction(0), time.monotonic() - began, animator.device_name)
