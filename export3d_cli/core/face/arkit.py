"""The CSV of Live Link Face, with 52 ARKit coefficients and the head angles per row: drivers recorded by a phone.

The 12 measures of beta that a CSV lacks are predicted from the 52 coefficients by `BetaStatistics`.

Live Link's angles are radians about the axes of ARKit's face: positive yaw turns the head to the person's left (the
image's right), positive pitch lowers the nose, positive roll turns counter-clockwise in the image; roll is applied
first, then pitch, then yaw. Other programs write degrees: a file with an angle beyond pi is read as degrees.
"""

import csv
import json
import re
from array import array
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, BetaStatistics
from export3d_cli.core.face.motion import MIRROR_ORDER, Motion
from export3d_cli.core.runtime.camera import head_pose, rotation_exp, with_head_pose
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import check_file, write_atomic

ANGLE_COLUMNS = ("HeadYaw", "HeadPitch", "HeadRoll")
MAX_BYTES = 2**30  # about eight hours at 60 frames a second
MAX_GAP_S = 60  # between two rows
_MAX_DEVIATION = 10  # standard deviations within clips; face trackers hardly report cheeks, sneers and the tongue
SNEER_LIFT = 0.7  # of `mouthUpperUp` per `noseSneer`
MAX_ROWS_PER_S = 1000
_TIMECODE = re.compile(r"(\d+):(\d+):(\d+)[:;](\d+(?:\.\d+)?)")
_TIMECODE_BASES = (24, 25, 30, 48, 50, 60, 100, 120)  # frames per second in a timecode's last field
_STANDARD_RATES = [
    *map(Fraction, (15, *_TIMECODE_BASES)), *(Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120)),
]  # fmt: skip


def read_csv(path: Path, camera: np.ndarray) -> tuple[Motion, list[str]]:
    """Read a Live Link Face CSV as Motion with landmarks (T, 0, 3), that is none; also return notes for the user.

    `camera` (25,) gives the head's place, and its pose if the CSV has no angles. Raises `InputError` for other files.
    """
    values, timecodes = _read_columns(path)
    count, notes = len(timecodes), list[str]()
    coefficients = np.stack([values.get(name, np.zeros(count)) for name in ARKIT_NAMES], axis=1).clip(0, 1)
    cameras = np.repeat(np.asarray(camera, dtype=np.float32)[None], count, axis=0)
    if all(name in values for name in ANGLE_COLUMNS):
        angles = np.stack([values[name] for name in ANGLE_COLUMNS], axis=1)
        largest = float(np.abs(angles).max())
        if largest > 360:
            raise InputError(f"{path} has a head angle of {largest:.3g}: angles must be in radians or in degrees")
        if largest > 1.001 * np.pi:
            angles = np.radians(angles)
            notes.append(f"{path} has head angles up to {largest:.3g}: they were read as degrees")
        cameras = with_head_pose(cameras, head_rotations(angles), head_pose(cameras)[1])
    seconds, timecode_base = _timecodes_to_seconds(path, timecodes)
    fps, rows = estimate_frame_rate(seconds, timecode_base)
    return make_motion(coefficients[rows], cameras[rows], fps), notes


def make_motion(coefficients: np.ndarray, cameras: np.ndarray, fps: Fraction) -> Motion:
    """Return the motion without landmarks of ARKit's coefficients (T, 52) and cameras (T, 25).

    Coefficients are limited to what the tracker reports, on which the network is trained: others destroy the picture.
    It reports no sneers: they count as lifts of the upper lip.
    """
    n, statistics = len(ARKIT_NAMES), BetaStatistics.load()
    limits = statistics.mean + _MAX_DEVIATION * np.sqrt(statistics.covariance.diagonal())
    coefficients = coefficients.copy()
    for side in ("Left", "Right"):
        lip, sneer = (coefficients[:, ARKIT_NAMES.index(name + side)] for name in ("mouthUpperUp", "noseSneer"))
        lip += SNEER_LIFT * sneer
    coefficients = np.minimum(coefficients, np.maximum(limits, limits[MIRROR_ORDER])[:n].clip(max=1))
    slope = statistics.regression(range(n))[n:]  # (12, 52)
    measures = statistics.mean[n:] + (coefficients - statistics.mean[:n]) @ slope.T
    beta = np.concatenate([coefficients, measures], axis=1).astype(np.float32)
    landmarks, found = np.zeros((len(beta), 0, 3), np.float32), np.ones(len(beta), bool)
    return Motion(beta, cameras, landmarks, found, fps, (0.0, 0.0, 1.0), (1, 1))


def head_rotations(angles: np.ndarray) -> np.ndarray:
    """Convert Live Link's yaw, pitch, roll in radians (T, 3) to head-to-camera rotations (T, 3, 3)."""
    x, y, z = np.eye(3)
    yaw, pitch, roll = angles.T[..., None]
    return rotation_exp(-yaw * y) @ rotation_exp(pitch * x) @ rotation_exp(-roll * z)


def write_coefficients(path: Path, motion: Motion) -> None:
    """Write the 52 coefficients and the head angles, radians, of a motion atomically.

    A .json holds `fps`, `names` and `frames`, a list of numbers for each; anything else is a Live Link Face CSV.
    """
    rotation = head_pose(motion.camera)[0]  # (T, 3, 3), the inverse of `head_rotations`
    yaw = -np.arctan2(rotation[:, 0, 2], rotation[:, 2, 2])
    pitch = -np.arcsin(rotation[:, 1, 2].clip(-1, 1))
    roll = -np.arctan2(rotation[:, 1, 0], rotation[:, 1, 1])
    values = np.concatenate([motion.beta[:, : len(ARKIT_NAMES)], np.stack([yaw, pitch, roll], axis=1)], axis=1)
    names = [name[0].upper() + name[1:] for name in ARKIT_NAMES] + list(ANGLE_COLUMNS)
    with write_atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".json":
            json.dump({"fps": float(motion.fps), "names": names, "frames": values.round(6).tolist()}, file)
            return
        writer = csv.writer(file)
        writer.writerow(["Timecode", "BlendshapeCount", *names])
        for number, row in enumerate(values):
            second, fraction = divmod(number / motion.fps, 1)
            clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}:{float(fraction * 60):09.6f}"
            writer.writerow([clock, len(names), *(f"{value:.6f}" for value in row)])


def estimate_frame_rate(seconds: np.ndarray, timecode_base: int) -> tuple[Fraction, np.ndarray]:
    """Return the rate of rows taken at `seconds` (T,), and the row nearest to each frame, as a phone drops some."""
    steps = np.diff(seconds)
    if not len(steps):
        return Fraction(timecode_base), np.zeros(1, dtype=np.int64)
    regular = steps[steps < 1.5 * float(np.median(steps))]  # without dropped frames
    rate = 1 / float(regular.mean())
    nearest = min(_STANDARD_RATES, key=lambda standard: abs(float(standard) / rate - 1))
    fps = nearest if abs(float(nearest) / rate - 1) < 2e-3 else Fraction(rate).limit_denominator(1000)
    times = seconds[0] + np.arange(round((seconds[-1] - seconds[0]) * fps) + 1) / float(fps)
    after = np.searchsorted(seconds, times).clip(1, len(seconds) - 1)
    return fps, after - (times - seconds[after - 1] < seconds[after] - times)


def _read_columns(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the columns in use, by their name in `ARKIT_NAMES` or `ANGLE_COLUMNS`, and the timecodes (T, 4)."""
    check_file(path, MAX_BYTES)
    values, times = array("d"), array("d")  # row by row, so that only numbers stay in memory
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = [name.strip().lower().replace("_", "") for name in next(lines, [])]
            needed = [name for name in ("Timecode", *ARKIT_NAMES) if name != "tongueOut"]
            missing = [name for name in needed if name.lower() not in header]
            if missing:
                count = f"{missing[0]} ({len(missing)} in all)"
                raise InputError(f"{path} lacks the column {count}: export it from Live Link Face")
            named = {name: name.lower() for name in (*ARKIT_NAMES, *ANGLE_COLUMNS)}
            columns = {name: header.index(lower) for name, lower in named.items() if lower in header}
            for row in lines:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
                    raise ValueError(f"{len(row)} values, not {len(header)}")
                values.extend(float(row[column]) for column in columns.values())
                code = row[header.index("timecode")].strip()
                if not (match := _TIMECODE.fullmatch(code)):
                    raise ValueError(f"the timecode {code!r}, not HH:MM:SS:FF.fff")
                times.extend(float(text) for text in match.groups())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV ({error}): export it from Live Link Face") from error
    except ValueError as error:
        raise InputError(f"{path} cannot be read in row {lines.line_num} ({error}): export it again") from error
    if not times:
        raise InputError(f"{path} has no rows of numbers: export it from Live Link Face")
    table = np.array(values).reshape(-1, len(columns))
    if not np.isfinite(table).all():
        raise InputError(f"{path} holds numbers that are not finite: export it again")
    return dict(zip(columns, table.T, strict=True)), np.array(times).reshape(-1, 4)


def _timecodes_to_seconds(path: Path, timecodes: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the time of each row in seconds, from timecodes (T, 4), and the timecode's frames per second."""
    whole, frames = timecodes[:, :3] @ [3600, 60, 1], timecodes[:, 3]
    base = 120 if frames.max() >= 60 else 60  # Live Link Face counts 60
    rollovers = np.flatnonzero(np.diff(whole) == 1)  # last rows before a full second
    frame_steps = np.diff(frames)[np.diff(whole) == 0]
    if len(rollovers) and len(frame_steps):
        measured = float(np.median(frames[rollovers] + np.median(frame_steps) - frames[rollovers + 1]))
        base = min(_TIMECODE_BASES, key=lambda n: abs(n - measured))
    seconds = whole + frames / base
    seconds += 86400 * np.cumsum(np.diff(seconds, prepend=seconds[0]) < -43200)  # past midnight
    steps = np.diff(seconds)
    jumps = np.flatnonzero((steps <= 0) | (steps > MAX_GAP_S))
    if len(jumps):
        row, step = jumps[0] + 3, steps[jumps[0]]
        raise InputError(f"{path} has a time step of {step:.3g} s before row {row}: give a single recording")
    if len(steps) and np.median(steps) < 1 / MAX_ROWS_PER_S:
        raise InputError(f"{path} has more than {MAX_ROWS_PER_S} rows a second: export it again")
    return seconds, base
