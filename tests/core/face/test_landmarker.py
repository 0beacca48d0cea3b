"""The landmarker with the shipped networks, on the example photo."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from export3d_cli.core.face.detector import Detection, FaceDetector
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.face_track import WARMUP_PASSES, FaceTrack, FaceTracker
from export3d_cli.core.face.landmarks import LEFT_EYE_OUTER, NOSE_TIP, RIGHT_EYE_OUTER
from export3d_cli.core.face.tracker import LandmarkerTracker
from export3d_cli.core.runtime.errors import InputError, WeightsError

REPO = Path(__file__).parents[3]
BUNDLE = REPO / "weights" / "face_landmarker.task"
DETECTOR = FaceDetector(REPO / "weights" / "yunet_n_dynamic.onnx")


@pytest.fixture(scope="module")
def landmarker() -> FaceTracker:
    return LandmarkerTracker(BUNDLE, DETECTOR)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    bgr = cv2.imread(str(REPO / "examples" / "source.jpg"))
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)  # (512, 512, 3)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, :2] - b[:, :2], axis=1)


def test_find_returns_landmarks_and_blendshapes_of_the_face(landmarker: FaceTracker, photo: np.ndarray) -> None:
    (detection,) = DETECTOR(photo)
    face = landmarker.find(photo)
    assert face is not None
    assert face.score > 0.9

    h, w = photo.shape[:2]
    assert face.landmarks.shape == (478, 3)
    assert face.landmarks.dtype == np.float32
    assert (face.landmarks[:, :2] >= 0).all()
    assert (face.landmarks[:, :2] <= (w, h)).all()
    x0, y0, x1, y1 = detection.box
    x, y, z = face.landmarks[NOSE_TIP]
    assert x0 < x < x1
    assert y0 < y < y1
    assert z < face.landmarks[RIGHT_EYE_OUTER, 2]  # the nose is nearer to the camera
    assert np.linalg.norm(detection.keypoints[2] - (x, y)) < 0.1 * (x1 - x0)

    assert face.blendshapes.shape == (52,) == (len(ARKIT_NAMES),)
    assert face.blendshapes.dtype == np.float32
    assert (face.blendshapes >= 0).all()
    assert (face.blendshapes <= 1).all()


def test_track_agrees_with_find_on_a_still(landmarker: FaceTracker, photo: np.ndarray) -> None:
    track = FaceTrack(landmarker).track
    reference = landmarker.find(photo)
    frames = [track(photo) for _ in range(5)]
    np.testing.assert_array_equal(frames[0].landmarks, reference.landmarks)  # the first frame is a detection
    for frame in frames[1:]:
        assert distance(frame.landmarks, reference.landmarks).mean() < 2
    assert distance(frames[3].landmarks, frames[4].landmarks).max() < 0.5


def test_track_loses_a_face_that_left(landmarker: FaceTracker, photo: np.ndarray) -> None:
    track = FaceTrack(landmarker).track
    assert track(photo) is not None
    assert track(np.zeros_like(photo)) is None
    assert track(photo) is not None
    smaller = cv2.resize(photo, (300, 300), interpolation=cv2.INTER_AREA)  # another size: another video
    np.testing.assert_array_equal(track(smaller).landmarks, landmarker.find(smaller).landmarks)


def test_find_in_a_mirrored_photo_swaps_left_and_right(landmarker: FaceTracker, photo: np.ndarray) -> None:
    tracks = FaceTrack(landmarker), FaceTrack(landmarker)
    for _ in range(WARMUP_PASSES):
        face, mirrored = tracks[0].track(photo), tracks[1].track(photo[:, ::-1])
    swap = {"Left": "Right", "Right": "Left"}
    for i, name in enumerate(ARKIT_NAMES):
        side = next((side for side in swap if name.endswith(side)), None)
        j = i if side is None else ARKIT_NAMES.index(name.removesuffix(side) + swap[side])
        assert mirrored.blendshapes[j] == pytest.approx(face.blendshapes[i], abs=0.3), name
    width = photo.shape[1]
    assert mirrored.landmarks[LEFT_EYE_OUTER, 0] == pytest.approx(width - face.landmarks[RIGHT_EYE_OUTER, 0], abs=4)


@pytest.mark.parametrize("degrees", [-30, 30])
def test_find_in_a_rotated_photo_rotates_the_landmarks(
    landmarker: FaceTracker, photo: np.ndarray, degrees: float
) -> None:
    h, w = photo.shape[:2]
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), degrees, 1.0)  # (2, 3)
    rolled = landmarker.find(cv2.warpAffine(photo, turn, (w, h), borderMode=cv2.BORDER_REPLICATE))
    expected = landmarker.find(photo).landmarks[:, :2] @ turn[:, :2].T + turn[:, 2]
    assert distance(rolled.landmarks, expected).mean() < 0.01 * w


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_find_in_a_photo_on_its_side_or_upside_down(landmarker: FaceTracker, photo: np.ndarray, quarters: int) -> None:
    side = photo.shape[0]  # square
    expected = landmarker.find(photo).landmarks[:, :2]
    for _ in range(quarters):  # clockwise
        expected = np.stack([side - expected[:, 1], expected[:, 0]], axis=1)
    face = landmarker.find(np.rot90(photo, -quarters))
    assert distance(face.landmarks, expected).mean() < 0.01 * side


def test_find_all_finds_several_faces_and_small_ones_once(landmarker: FaceTracker, photo: np.ndarray) -> None:
    expected = landmarker.find(photo).landmarks
    canvas = np.full((720, 1280, 3), 127, np.uint8)
    places = ((500, 500), (1000, 180), (300, 80), (100, 60))  # the face is half as high as the photo
    for x, side in places:
        canvas[100 : 100 + side, x : x + side] = cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA)
    faces = landmarker.find_all(canvas)
    assert len(faces) == len(places)  # none missed next to a larger one, none counted twice
    for face, (x, side) in zip(faces, places, strict=True):
        assert distance(face.landmarks, expected * (side / photo.shape[1]) + (x, 100, 0)).mean() < 0.03 * side


def test_track_finds_a_lost_small_face_again(landmarker: FaceTracker, photo: np.ndarray) -> None:
    canvas = np.full((720, 1280, 3), 127, np.uint8)
    small = canvas.copy()
    small[400:460, 900:960] = cv2.resize(photo, (60, 60), interpolation=cv2.INTER_AREA)
    track = FaceTrack(landmarker).track
    assert track(small) is not None
    assert track(canvas) is None
    assert any(track(small) is not None for _ in range(8))


def test_track_without_a_face_rarely_searches_large_images_and_finds_a_large_face_at_once(
    landmarker: FaceTracker, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, sides = landmarker.detector, list[int]()

    def count(image: np.ndarray, **options: Any) -> list[Detection]:
        sides.append(options["max_side"])
        return detector(image, **options)

    monkeypatch.setattr(landmarker, "detector", count)
    count.rotation_to_upright = detector.rotation_to_upright  # type: ignore[attr-defined]
    canvas = np.full((720, 1280, 3), 127, np.uint8)
    track = FaceTrack(landmarker).track
    assert [track(canvas) for _ in range(15)] == [None] * 15
    assert sum(side > 320 for side in sides) == 4  # in two thorough searches
    canvas[100:600, 400:900] = cv2.resize(photo, (500, 500))
    assert track(canvas) is not None


def test_find_in_a_photo_whose_border_cuts_the_face(landmarker: FaceTracker, photo: np.ndarray) -> None:
    whole = landmarker.find(photo).landmarks
    cut = int(whole[:, 0].min() + 0.3 * np.ptp(whole[:, 0]))
    face = landmarker.find(photo[:, cut:])
    inside = whole[:, 0] > cut
    assert distance(face.landmarks[inside] + (cut, 0, 0), whole[inside]).mean() < 0.03 * np.ptp(whole[:, 0])


def test_find_searches_with_a_margin_where_no_face_is_found_without(
    landmarker: FaceTracker, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some faces that fill the picture are found only then; on its side, too, the place is right."""
    whole, detector = landmarker.find(photo).landmarks, landmarker.detector
    low, high = (extreme(whole[:, :2], axis=0).astype(int) for extreme in (np.min, np.max))
    face = photo[low[1] : high[1], low[0] : high[0]]

    def needs_margin(image: np.ndarray, **options: Any) -> list[Detection]:
        return detector(image, **options) if options.get("margin") else []

    monkeypatch.setattr(landmarker, "detector", needs_margin)
    needs_margin.rotation_to_upright = detector.rotation_to_upright  # type: ignore[attr-defined]
    found = landmarker.find(face)
    assert distance(found.landmarks + (*low, 0), whole).mean() < 0.02 * np.ptp(whole[:, 0])
    assert landmarker.find(face, thorough=False) is None
    detections = [detector(np.rot90(face), rotation=90, margin=margin)[0] for margin in (0.0, 0.25)]
    np.testing.assert_allclose(detections[0].box, detections[1].box, atol=0.06 * np.ptp(whole[:, 0]))


@pytest.mark.parametrize("hidden", [slice(0.55, 1.0), slice(0.25, 0.48)])
def test_find_with_a_covered_mouth_or_covered_eyes(landmarker: FaceTracker, photo: np.ndarray, hidden: slice) -> None:
    whole = landmarker.find(photo).landmarks
    low, high = whole[:, :2].min(0), whole[:, :2].max(0)
    image = photo.copy()
    top, bottom = (int(low[1] + part * (high - low)[1]) for part in (hidden.start, hidden.stop))
    image[top:bottom, int(low[0]) : int(high[0])] = 40
    assert distance(landmarker.find(image).landmarks, whole).mean() < 0.05 * (high - low)[1]


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_rotation_to_upright_of_a_rotated_photo(landmarker: FaceTracker, photo: np.ndarray, quarters: int) -> None:
    """The landmark network alone would take the face upside down for an upright one."""
    assert landmarker.rotation_to_upright(np.rot90(photo, quarters)) == 90 * quarters


def test_pictures_without_a_face_give_none(landmarker: FaceTracker) -> None:
    black = np.zeros((240, 320, 3), np.uint8)
    assert landmarker.find(black) is None
    assert landmarker.find_all(black) == []
    assert landmarker.rotation_to_upright(black) is None
    for shape in ((1, 1, 3), (1, 3000, 3), (3000, 2, 3)):
        assert landmarker.find(np.zeros(shape, np.uint8)) is None


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8), np.zeros((0, 64, 3), np.uint8)]
)
def test_invalid_images_raise_input_errors(landmarker: FaceTracker, image: np.ndarray) -> None:
    for call in (landmarker.find, landmarker.find_all):
        with pytest.raises(InputError, match="got"):
            call(image)


def test_unusable_bundles_raise_weights_errors(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing\.task"):
        LandmarkerTracker(tmp_path / "missing.task", DETECTOR)

    cut = tmp_path / "cut.task"
    cut.write_bytes(BUNDLE.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match="not a whole"):
        LandmarkerTracker(cut, DETECTOR)

    empty = tmp_path / "empty.task"
    with zipfile.ZipFile(empty, "w"):
        pass
    with pytest.raises(WeightsError, match="not a whole"):
        LandmarkerTracker(empty, DETECTOR)

    flipped = tmp_path / "flipped.task"
    shutil.copy(BUNDLE, flipped)
    data = bytearray(flipped.read_bytes())
    data[2_000_000] ^= 0xFF  # of the landmark network
    flipped.write_bytes(data)
    with pytest.raises(WeightsError):
        LandmarkerTracker(flipped, DETECTOR)
    with zipfile.ZipFile(flipped, "w") as archive:
        for name in ("face_landmarks_detector.tflite", "face_blendshapes.tflite"):
            archive.writestr(name, b"not a network")
    with pytest.raises(WeightsError, match="does not load"):
        LandmarkerTracker(flipped, DETECTOR)


def test_unusable_detectors_raise_weights_errors(photo: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.onnx"):
        FaceDetector(tmp_path / "none.onnx")(photo)
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    with pytest.raises(WeightsError, match=r"broken\.onnx does not load"):
        FaceDetector(tmp_path / "broken.onnx")(photo)


@pytest.mark.parametrize("closed", [False, True])
def test_loading_does_not_redirect_stderr(closed: bool) -> None:
    """Other threads of the process write to file descriptor 2 at the same time."""
    code = f"""
import os, sys, threading
from pathlib import Path
from typing import Any
from export3d_cli.core.face.detector import Detection, FaceDetector
from export3d_cli.core.face.tracker import LandmarkerTracker
if {closed}:
    os.close(2)
before = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
stop, number = threading.Event(), 0
def write():
    global number
    while not stop.wait(0.0005):
        os.write(2, b"<%d>" % number)
        number += 1
writer = threading.Thread(target=write)
if not {closed}:
    writer.start()
LandmarkerTracker(Path({str(BUNDLE)!r}), FaceDetector(Path()))
while not {closed} and number < 5:  # until the other thread has written during a load
    LandmarkerTracker(Path({str(BUNDLE)!r}), FaceDetector(Path()))
stop.set()
if not {closed}:
    writer.join()
assert before is None or sorted(os.listdir("/proc/self/fd")) == before
print(number)
sys.stdout.flush()
os._exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 7, done.stderr
    assert re.findall(r"<(\d+)>", done.stderr) == [str(number) for number in range(int(done.stdout))]
    assert closed or int(done.stdout) > 3
