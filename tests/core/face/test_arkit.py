"""Live Link Face CSVs: column names, frame rate, signs of the angles, and files that are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.face.arkit import SNEER_LIFT, estimate_frame_rate, read_csv, write_coefficients
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, BETA_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.runtime.camera import head_pose, orbit_camera, project_points, yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError

EYES = ("LeftEyeYaw", "LeftEyePitch", "LeftEyeRoll", "RightEyeYaw", "RightEyePitch", "RightEyeRoll")
COLUMNS = [name[0].upper() + name[1:] for name in reversed(ARKIT_NAMES)] + ["HeadYaw", "HeadPitch", "HeadRoll", *EYES]
CAMERA = orbit_camera(20, 5, radius=3.1)
Write = Callable[..., Path]


def timecode(seconds: float, clock: int = 60) -> str:
    whole = int(seconds)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}:{(seconds - whole) * clock:06.3f}"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a CSV of `rows` (values by column name, the others 0) at `rate` frames a second."""

    def make(
        rows: list[dict[str, float]], rate: Fraction = Fraction(60000, 1001), begin: float = 36000.4,
        columns: list[str] = COLUMNS,
    ) -> Path:  # fmt: skip
        lines = [",".join(["Timecode", "BlendshapeCount", *columns])]
        for k, row in enumerate(rows):
            lines.append(",".join([timecode(begin + k / float(rate)), "61", *(str(row.get(c, 0)) for c in columns)]))
        path = tmp_path / "take.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return make


def read(path: Path) -> Motion:
    return read_csv(path, CAMERA)[0]


def test_read_csv_assigns_coefficients_by_name_and_predicts_measures(write: Write) -> None:
    motion = read(write([{}, {"JawOpen": 0.8}, {"EyeBlinkLeft": 1.0, "EyeBlinkRight": 0.9}, {"EyeLookOutLeft": 0.7}]))
    assert motion.beta.shape == (4, 64)
    beta = dict(zip(BETA_NAMES, motion.beta.T, strict=True))
    np.testing.assert_allclose(beta["jawOpen"], [0, 0.8, 0, 0], atol=1e-6)
    np.testing.assert_allclose(beta["eyeBlinkRight"], [0, 0, 0.9, 0], atol=1e-6)
    assert beta["lipGapCentre"][1] > beta["lipGapCentre"][0] + 0.1  # inter-ocular distances
    assert beta["eyeOpeningLeft"][2] < 0.5 * beta["eyeOpeningLeft"][0]
    assert beta["irisXLeft"][3] > beta["irisXLeft"][0] + 0.02  # the face's left is the image's right


def test_read_csv_limits_coefficients_that_trackers_hardly_report(write: Write) -> None:
    """The network has never seen them: a tongue would destroy the picture. A sneer lifts the lip."""
    unseen = ("CheekSquintRight", "CheekPuff", "TongueOut")
    frown = {"MouthFrownLeft": 1.0, "MouthFrownRight": 1.0}
    motion = read(write([{}, dict.fromkeys(unseen, 1.0), frown, {"NoseSneerLeft": 0.5}]))
    np.testing.assert_allclose(motion.beta[1], motion.beta[0], atol=0.01)
    left, right = (motion.beta[2, ARKIT_NAMES.index(f"mouthFrown{side}")] for side in ("Left", "Right"))
    assert left == right
    assert 0.2 < left < 0.4
    sneer = dict(zip(BETA_NAMES, motion.beta[3], strict=True))
    assert sneer["noseSneerLeft"] < 0.01
    assert sneer["mouthUpperUpLeft"] == pytest.approx(0.5 * SNEER_LIFT)
    assert sneer["mouthUpperUpRight"] == 0


@pytest.mark.parametrize(
    "rate", [Fraction(60000, 1001), Fraction(60), Fraction(30), Fraction(30000, 1001), Fraction(24)]
)
def test_read_csv_takes_the_frame_rate_from_the_timecodes(write: Write, rate: Fraction) -> None:
    rows = [{"JawOpen": k / 100} for k in range(100)]
    motion = read(write(rows, rate, begin=86399.2))  # past midnight
    assert (motion.fps, len(motion)) == (rate, 100)
    np.testing.assert_allclose(motion.beta[:, ARKIT_NAMES.index("jawOpen")], np.arange(100) / 100, atol=1e-6)


def test_estimate_frame_rate_fills_dropped_frames() -> None:
    kept = np.delete(np.arange(200), [50, 51, 52, 120])
    fps, rows = estimate_frame_rate(kept / 60, 60)
    assert (fps, len(rows)) == (60, 200)
    assert np.abs(kept[rows] - np.arange(200)).max() <= 2
    assert estimate_frame_rate(np.zeros(1), 60)[0] == 60


@pytest.mark.parametrize(
    ("column", "expected"),
    [("HeadYaw", (20, 0, 0)), ("HeadPitch", (0, -20, 0)), ("HeadRoll", (0, 0, -20))],  # left, down, counter-clockwise
)
def test_head_angles_rotate_the_camera_at_its_distance(
    write: Write, column: str, expected: tuple[float, float, float]
) -> None:
    camera = read(write([{}, {column: np.radians(20)}])).camera[1]
    np.testing.assert_allclose(yaw_pitch_roll(camera), expected, atol=1e-3)
    assert np.linalg.norm(head_pose(camera)[1]) == pytest.approx(3.1, abs=1e-5)
    # the nose tip, in front of the head's centre, moves to the image's right, down, or not at all
    nose = project_points(camera, np.array([[0.0, 0.0, -0.2]]))[0] - project_points(camera, np.zeros((1, 3)))[0]
    assert [int(v) for v in np.sign(nose.round(3))] == {"HeadYaw": [1, 0], "HeadPitch": [0, 1], "HeadRoll": [0, 0]}[
        column
    ]


def test_angles_beyond_pi_are_read_as_degrees(write: Write) -> None:
    degrees = [{"HeadYaw": 20.0, "HeadPitch": -10.0, "HeadRoll": 2.0}, {"HeadYaw": 1.0}]
    radians = [{name: float(np.radians(angle)) for name, angle in row.items()} for row in degrees]
    motion, notes = read_csv(write(degrees), CAMERA)
    assert "degrees" in notes[0]
    same, none = read_csv(write(radians), CAMERA)
    assert none == []
    np.testing.assert_allclose(motion.camera, same.camera, atol=1e-6)


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001), Fraction(60)])
def test_written_csv_reads_back(tmp_path: Path, rate: Fraction) -> None:
    generator = np.random.default_rng(0)
    beta = generator.uniform(0, 0.28, (70, len(BETA_NAMES))).astype(np.float32)
    never_seen = r"tongueOut|cheek\w*|noseSneer\w*|jawForward"  # which reading limits to nearly 0
    beta[:, [k for k, name in enumerate(BETA_NAMES) if re.fullmatch(never_seen, name)]] = 0
    cameras = np.stack([orbit_camera(k - 35, k / 3, 20 - k / 2, radius=3.1) for k in range(70)])
    found = np.ones(70, bool)
    motion = Motion(beta, cameras, np.zeros((70, 0, 3), np.float32), found, rate, (0.0, 0.0, 1.0), (1, 1))
    write_coefficients(tmp_path / "take.csv", motion)
    write_coefficients(tmp_path / "take.json", motion)
    written = json.loads((tmp_path / "take.json").read_text())
    assert written["fps"] == float(rate) and written["names"][-1] == "HeadRoll"
    np.testing.assert_allclose(np.array(written["frames"])[:, :52], beta[:, :52], atol=1e-6)
    again = read(tmp_path / "take.csv")
    assert again.fps == rate
    np.testing.assert_allclose(again.beta[:, :52], beta[:, :52], atol=1e-6)
    np.testing.assert_allclose(again.camera, cameras, atol=1e-5)


def test_csv_without_head_angles_keeps_the_camera(write: Write) -> None:
    motion = read(write([{}, {}], columns=COLUMNS[:52]))
    np.testing.assert_array_equal(motion.camera, np.stack([CAMERA, CAMERA]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "lacks the column Timecode"),
        (lambda text: text.splitlines()[0], "no rows"),
        (lambda text: text.replace("JawOpen", "Jaw"), "lacks the column jawOpen"),
        (lambda text: text.replace("Timecode", "Time"), "Timecode"),
        (lambda text: text.replace("10:00:00:24", "ten o'clock"), "ten o'clock"),
        (lambda text: text.replace(",61,0,", ",61,much,"), "much"),
        (lambda text: text.replace(",61,0,", ",61,nan,"), "not finite"),
        (lambda text: text.replace(",0,0,0,0,0,0,0,0,0\n", ",600,0,0,0,0,0,0,0,0\n"), "radians"),
        (lambda text: text[:-30], "in row 4 .* values"),
        (lambda text: text + text.splitlines()[3].replace("10:00:", "10:09:") + "\n", "step of 540 s before row 5"),
        (lambda text: text + text.splitlines()[1] + "\n", "before row 5"),
        (lambda text: "\0\x01", "lacks the column|cannot be read"),
    ],
)
def test_bad_csv_raises_one_line_that_names_the_file(write: Write, change: Callable[[str], str], words: str) -> None:
    path = write([{}, {}, {}], rate=Fraction(60), begin=36000.4)
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read(path)
    assert "take.csv" in str(caught.value)
    assert "\n" not in str(caught.value)
