"""The tracker fan: with a stand-in for its network, and the network itself with random weights."""

from __future__ import annotations

import importlib.util
import sys
import urllib.error
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.face import fan_tracker as fan
from export3d_cli.core.face.beta import ARKIT_NAMES, MEASURE_NAMES
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.fan_tracker import FanLandmarker, FanTracker
from export3d_cli.core.face.landmark_fitting import FaceBasis
from export3d_cli.core.face.landmarker import Landmarker
from export3d_cli.core.face.landmarker_tracker import LandmarkerTracker
from export3d_cli.core.face.landmarks import IBUG68
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.camera import Camera
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.weights import example_path, weights_dir

BASIS = weights_dir() / "fan_basis.npz"
WEIGHTS = "3DFAN4-7835d9f11d.pth.tar"


class StandIn:
    """Sees 68 of the landmarker's points, where the package would see its own."""

    def __init__(self) -> None:
        self.landmarker = Landmarker(weights_dir() / "face_landmarker.task")

    def get_landmarks_from_image(self, image: np.ndarray, detected_faces: list[np.ndarray]) -> list[np.ndarray]:
        (x0, y0, x1, y1), side = detected_faces[0], fan.INPUT_SIDE_PX
        assert (x1 - x0 + y1 - y0) / 195 * 200 == pytest.approx(side)  # what it looks at is the whole patch
        assert ((x0 + x1) / 2, (y0 + y1) / 2 - 0.12 * (y1 - y0)) == pytest.approx((side / 2, side / 2))
        face = self.landmarker.find(image)
        return [np.full((68, 2), 7.0) if face is None else np.floor(face.landmarks[list(IBUG68), :2])]


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector(weights_dir() / "yunet_n_dynamic.onnx")


@pytest.fixture
def tracker(detector: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> FanTracker:
    monkeypatch.setattr(fan, "_load_network", lambda device: StandIn())
    return FanTracker(BASIS, detector)


def motions(tracker: FanTracker, step: int = 6) -> tuple[Motion, Motion]:
    """The bundled driver as fan and as the landmarker read it."""
    with VideoReader(example_path("drive.mp4")) as reader:
        frames = list(reader)[::step]
        size, fps = (reader.info.width, reader.info.height), reader.info.fps / step
    tracker.landmarker.reset()
    ours = tracker.make_motion([tracker.landmarker.track(frame) for frame in frames], fps, size)
    other = LandmarkerTracker(weights_dir() / "face_landmarker.task")
    return ours, other.make_motion(other.track_frames(frames), fps, size)


def test_it_tells_what_the_landmarker_tells(tracker: FanTracker) -> None:
    ours, theirs = motions(tracker)
    assert ours.found.all()
    assert ours.landmarks.shape == (len(theirs), 68, 3)
    assert ours.crop[2] == pytest.approx(theirs.crop[2], rel=0.06)
    np.testing.assert_allclose(ours.crop[:2], theirs.crop[:2], atol=0.05 * theirs.crop[2])
    angles = [np.array([Camera.from_vector(c).angles() for c in motion.camera]) for motion in (ours, theirs)]
    assert np.abs(angles[0] - angles[1]).mean(0).max() < 4  # degrees
    assert np.corrcoef(angles[0][:, 0], angles[1][:, 0])[0, 1] > 0.95
    for name in ("eyeBlinkLeft", "eyeBlinkRight", "jawOpen", "mouthSmileLeft"):
        k = ARKIT_NAMES.index(name)
        assert np.corrcoef(ours.beta[:, k], theirs.beta[:, k])[0, 1] > 0.7, name
    for name in ("lipGapCentre", "mouthWidth", "eyeOpeningLeft", "eyeOpeningRight"):
        k = len(ARKIT_NAMES) + MEASURE_NAMES.index(name)
        assert np.corrcoef(ours.beta[:, k], theirs.beta[:, k])[0, 1] > 0.9, name
        assert np.abs(ours.beta[:, k] - theirs.beta[:, k]).mean() < 0.05, name


def test_beta_is_that_of_a_batch_whatever_its_size(tracker: FanTracker) -> None:
    image = read_image(example_path("source.jpg"))
    size = (image.shape[1], image.shape[0])
    face = tracker.landmarker.track(image)
    moved = tracker.landmarker.track(np.roll(image, 9, axis=1))
    assert face is not None
    assert moved is not None
    crop = tracker.calibrate_clip([face, moved], size)
    whole = tracker.make_motion([face, None, moved], Fraction(25), size, crop=crop)
    assert whole.found.tolist() == [True, False, True]
    np.testing.assert_array_equal(whole.beta[0], whole.beta[1])
    single = tracker.make_motion([moved], Fraction(25), size, crop=crop)
    np.testing.assert_allclose(single.beta[0], whole.beta[2], atol=1e-5)
    np.testing.assert_allclose(single.camera[0], whole.camera[2], atol=1e-5)
    seen = Camera.from_vector(whole.camera[0]).project(np.zeros((1, 3)))  # the head's centre lies within the face
    assert (np.abs(seen - whole.landmarks[0, :, :2].mean(0)) < 0.15).all()


def test_faces_come_go_and_are_chosen(tracker: FanTracker) -> None:
    image, finder = read_image(example_path("source.jpg")), tracker.landmarker
    black = np.zeros_like(image)
    assert finder.track(black) is None
    assert finder.find_all(black) == []
    assert finder.track(image) is not None
    assert finder.track(black) is None
    both = np.concatenate([image, np.ascontiguousarray(image[:, ::-1])], axis=1)
    faces = finder.find_all(both)
    assert len(faces) == 2
    left, right = sorted(faces, key=lambda face: float(face.landmarks[:, 0].mean()))
    for face in (right, left):
        finder.follow(face, both)
        again = finder.track(both)
        assert again is not None
        assert np.abs(again.landmarks - face.landmarks).mean() < 3


def test_its_motion_is_kept_in_files_and_on_tape(tracker: FanTracker, tmp_path: Path) -> None:
    image = read_image(example_path("source.jpg"))
    face = tracker.landmarker.track(image)
    assert face is not None
    motion = tracker.make_motion([face], Fraction(25), (image.shape[1], image.shape[0]))
    motion.save(tmp_path / "a.motion.npz")
    again = Motion.load(tmp_path / "a.motion.npz", landmark_counts=(478, 68))
    np.testing.assert_array_equal(again.landmarks, motion.landmarks)


def test_the_package_missing(detector: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(WeightsError, match=r"pip install 'export3d-cli\[fan\]'"):
        FanTracker(BASIS, detector)


def test_the_network_itself_with_planted_weights(
    detector: FaceDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("face_alignment") is None:
        pytest.skip("the extra fan is not installed")
    package = fan.import_face_alignment()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    mean = FaceBasis.load(BASIS).mean
    folder = tmp_path / "hub" / "checkpoints"

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("face_alignment.utils.download_url_to_file", offline)
    with pytest.raises(WeightsError, match=rf"{WEIGHTS} and cannot be fetched .*no network"):
        FanLandmarker(detector, mean)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=rf"{WEIGHTS} does not load .*\): delete it"):
        FanLandmarker(detector, mean)
    shapes = {name: entry.shape for name, entry in package.models.FAN(4).state_dict().items()}
    noise = torch.rand(max(shape.numel() for shape in shapes.values()), generator=torch.Generator().manual_seed(0))
    torch.save({name: noise[: shape.numel()].view(shape) for name, shape in shapes.items()}, folder / WEIGHTS)
    finder = FanLandmarker(detector, mean)
    image = read_image(example_path("source.jpg"))
    points = finder.predict_points(image, (100.0, 50.0, 300.0))
    assert points.shape == (68, 2)
    assert (points >= (100, 50)).all()
    assert (points <= (400, 350)).all()
    assert finder.track(image) is None  # there is a face, but random points are none
