"""Move the camera around a portrait: a video, an image of one view, a contact sheet, and the head as a mesh."""

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from export3d_cli.core.animation.animator import Animator, Portrait
from export3d_cli.core.animation.compositor import load_photo
from export3d_cli.core.animation.driver_stream import DriverStream
from export3d_cli.core.animation.expression_controls import Range, edit_expression
from export3d_cli.core.animation.frame_writer import SHEET_CELL_PX, ViewOptions, is_image_output, write_views
from export3d_cli.core.animation.mesh_export import check_mesh_output, extract_head_mesh, write_mesh
from export3d_cli.core.animation.options import Progress, ReenactOptions, Summary, check_overwrite
from export3d_cli.core.animation.photo_canvas import VolumeRender
from export3d_cli.core.media.writer import check_crf
from export3d_cli.core.runtime.camera import rotation_from_angles, yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError

MAX_CACHED_BYTES = 128 << 20  # of frames kept because their camera may recur
DEPTH_RANGE = 0.45  # head-frame units before and behind the head's centre that the depth colours span
ROW_COLUMNS = 5  # so many views of a contact sheet stay in one row


@dataclass(frozen=True)
class NovelViewOptions(ViewOptions):
    """A sweep of the camera around the portrait; angles in degrees, first and last."""

    yaw: Range | None = (-30.0, 30.0)  # +: the head turns to the image's right; None: frontal
    pitch: Range | None = None  # +: up
    roll: Range | None = None  # +: clockwise
    loop: Literal["pingpong", "once"] = "pingpong"
    depth: bool = False  # the depth in colours
    drive: Path | None = None  # image, video or motion file with the expression; None: the photo's
    mesh: Path | None = None  # where the head's surface is written, .ply or .glb, with the first expression
    morphs: Literal["none", "arkit"] = "none"  # of the mesh: 52 morph targets

    @property
    def single(self) -> bool:
        """Whether all frames would show the same view."""
        return super().single and (self.frames == 1 or all(r is None or r[0] == r[1] for r in self._ranges))

    @property
    def _ranges(self) -> tuple[Range | None, ...]:
        return self.yaw, self.pitch, self.roll

    def check_outputs(self, *outputs: Path) -> None:
        """Raise `InputError` for outputs, and a mesh, that exist or cannot hold what is asked; or if there is none."""
        if self.mesh is not None:
            check_mesh_output(self.mesh, morphs=self.morphs == "arkit")
            check_overwrite(self.mesh, self.overwrite)
        elif not outputs:
            raise InputError("nothing to write: give an output, a mesh, or both")
        if not outputs and self.mesh is not None:
            check_crf(self.mesh, self.crf)
        super().check_outputs(*outputs)


def novel_view(animator: Animator, source: Path | Portrait, out: Path | None, options: NovelViewOptions | None = None,
               *, progress: Progress | None = None) -> Summary:  # fmt: skip
    """Orbit the portrait: one tri-plane, many cameras; 0 degrees is frontal, whatever the photo's angle.

    Where `out` is None, only the mesh is written.
    """
    options, began = options or NovelViewOptions(), time.monotonic()
    options.check_outputs(*([] if out is None else [out]))
    portrait = load_photo(animator, source, options, max_side=SHEET_CELL_PX if options.grid else 0)
    cameras = orbit_cameras(portrait.camera, options)
    if out is None or (is_image_output(out) and not options.grid):
        cameras = cameras[:1]
    count = len(cameras)
    beta, base, notes = _read_expressions(animator, portrait, options, count)
    if options.mesh is not None:
        report = progress or (lambda stage, done, total: None)
        report("mesh", 0, 1)
        first = [None if x is None else x[:1] for x in (beta, base)]
        mesh = extract_head_mesh(animator, portrait, beta=first[0], base=first[1], morphs=options.morphs == "arkit")
        write_mesh(options.mesh, mesh)
        report("mesh", 1, 1)
        if out is None:
            return Summary(options.mesh, 0, 0, Fraction(0), time.monotonic() - began, animator.device_name, notes)
    assert out is not None  # `check_outputs` checks it
    angles = yaw_pitch_roll(cameras).tolist()
    return write_views(
        animator, _view_once(animator, portrait, cameras, beta, base, options.depth), count, out, options,
        portrait.crop.shape[1::-1] if options.depth else portrait.frame_size,  # type: ignore[arg-type]
        columns=count if count <= ROW_COLUMNS else math.ceil(math.sqrt(count)),
        labels=[f"{round(yaw):+d} {round(pitch):+d}" for yaw, pitch, _ in angles] if options.grid else [],
        notes=notes, began=began, progress=progress,
    )  # fmt: skip


def sweep_positions(options: NovelViewOptions) -> np.ndarray:
    """Return the positions (T,) of the frames along the sweep, from 0 to 1."""
    count = options.frames
    if options.loop == "pingpong" and count > 2 and not options.grid:
        steps = np.minimum(np.arange(count), count - np.arange(count))  # the way back equals the way there bit for bit
        return 0.5 - 0.5 * np.cos(2 * np.pi * steps / count)
    return np.linspace(0, 1, count)


def orbit_cameras(camera: np.ndarray, options: NovelViewOptions) -> np.ndarray:
    """Return cameras (T, 25) that see the head at the options' angles, at the place and distance of `camera` (25,)."""
    ranges = [r or (0.0, 0.0) for r in options._ranges]
    pose = np.linalg.inv(camera[:16].astype(np.float64).reshape(4, 4))  # its last column stays
    cameras = []
    for t in sweep_positions(options):
        pose[:3, :3] = rotation_from_angles(*(a + t * (b - a) for a, b in ranges))
        cameras.append(np.concatenate([np.linalg.inv(pose).ravel(), camera[16:]]))
    return np.stack(cameras).astype(np.float32)


def colour_depth(volume: VolumeRender, camera: np.ndarray, size: int) -> np.ndarray:
    """Return depth seen by `camera` (25,), uint8 (size, size, 3): red in front of the head's centre, blue behind."""
    centre = np.linalg.norm(camera[[3, 7, 11]])  # distance to the head frame's origin
    depth, opacity = (cv2.resize(part, (size, size)) for part in (volume.depth, volume.opacity))
    nearness = np.clip(0.5 - (depth - centre) / (2 * DEPTH_RANGE), 0, 1)
    colours = cv2.applyColorMap(np.uint8(255 * nearness), cv2.COLORMAP_TURBO)[..., ::-1]  # type: ignore[call-overload]
    return np.uint8(colours * opacity[..., None].clip(0, 1))  # type: ignore[return-value]


def _read_expressions(animator: Animator, portrait: Portrait, options: NovelViewOptions,
                      count: int) -> tuple[np.ndarray | None, np.ndarray | None, tuple[str, ...]]:  # fmt: skip
    """Return `beta` and `base` of `Animator.view`, and notes; the driver's last expression is held."""
    beta, base, change = None, None, np.zeros((1, 64))
    notes: tuple[str, ...] = ()
    if options.expression:
        positions = (0.0,) if options.expression.is_constant else sweep_positions(options)[:count]
        own, beta, notes = edit_expression(animator, portrait, options.expression, positions)
        change = beta - own
    if options.drive is not None:
        job = ReenactOptions(fps=options.fps, max_frames=count, smooth="off", pose="absolute")
        with DriverStream(options.drive, animator.tracker(), job, batch=animator.batch,
                          crop_scale=portrait.crop_scale) as stream:  # fmt: skip
            driver = np.concatenate([batch.motion.beta for batch in stream])
        driver = driver if len(driver) == 1 else driver[np.arange(count).clip(max=len(driver) - 1)]
        beta, base = driver + change, driver
    return beta, base, notes


def _view_once(animator: Animator, portrait: Portrait, cameras: np.ndarray, beta: np.ndarray | None,
               base: np.ndarray | None, depth: bool) -> Generator[np.ndarray, None, None]:  # fmt: skip
    """Yield the frames, or their depth in colours; of equal cameras, as on the way back, only the first is rendered."""

    def render(cameras: np.ndarray) -> Iterator[np.ndarray]:
        frames = animator.view(portrait, cameras, beta=beta, base=base, layers=depth)
        if not depth:
            return frames
        return (colour_depth(x.volume, c, len(portrait.crop)) for x, c in zip(frames, cameras, strict=True))

    _, first, inverse = np.unique(cameras, axis=0, return_index=True, return_inverse=True)
    if (beta is not None and len(beta) > 1) or len(first) * math.prod(portrait.frame_size) * 3 > MAX_CACHED_BYTES:
        yield from render(cameras)
        return
    rendered, cache = render(cameras[np.sort(first)]), dict[int, np.ndarray]()
    for index, k in enumerate(first[inverse.reshape(-1)].tolist()):  # k is the first frame with the same camera
        if k == index:
            cache[k] = next(rendered)
        yield cache[k].copy()  # the consumer may write into the frame
