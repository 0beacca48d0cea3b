"""The tracker fan, with a fake network, and with the real network and random weights; its fit to exact projections."""

from __future__ import annotations

import importlib.util
import urllib.error
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from export3d_cli.core.face import fan_tracker as fan
from export3d_cli.core.face.detector import FaceDetector
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES, MEASURE_NAMES
from export3d_cli.core.face.face_track import FaceTrack
from export3d_cli.core.face.fan_tracker import OBSERVABLE, FaceBasis, FaceFit, FanTracker, fit_frames, fit_neutral
from export3d_cli.core.face.head_pose import load_canonical_face
from export3d_cli.core.face.landmarks import IBUG68
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.image import read_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.camera import project_points, rotation_from_angles, yaw_pitch_roll
from export3d_cli.core.runtime.errors import WeightsError
from export3d_cli.core.runtime.weights import example_path, load_arrays, resolve_weights, weights_dir

BASIS = weights_dir() / "fan_basis.npz"
WEIGHTS = "3DFAN4-7835d9f11d.pth.tar"


class FakeNetwork:
    """Returns 68 of the landmarker's points, instead of the package's own."""

    def __init__(self) -> None:
        self.landmarker = open_landmarker_tracker()

    def get_landmarks_from_image(self, image: np.ndarray, detected_faces: list[np.ndarray]) -> list[np.ndarray]:
        (x0, y0, x1, y1), side = detected_faces[0], fan.INPUT_SIDE_PX
        assert (x1 - x0 + y1 - y0) / 195 * 200 == pytest.approx(side)  # the box covers the whole patch
        assert ((x0 + x1) / 2, (y0 + y1) / 2 - 0.12 * (y1 - y0)) == pytest.approx((side / 2, side / 2))
        face = self.landmarker.find(image)
        return [np.full((68, 2), 7.0) if face is None else np.floor(face.landmarks[list(IBUG68), :2])]


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector(weights_dir() / "yunet_n_dynamic.onnx")


@pytest.fixture
def tracker(detector: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> FanTracker:
    monkeypatch.setattr(fan, "_load_network", lambda device: FakeNetwork())
    return FanTracker(BASIS, detector)


def motions(tracker: FanTracker, step: int = 6) -> tuple[Motion, Motion]:
    """Return the motion of the bundled driver by fan and by the landmarker."""
    with VideoReader(example_path("drive.mp4")) as reader:
        frames = list(reader)[::step]
        size, fps = (reader.info.width, reader.info.height), reader.info.fps / step
    track, reference = FaceTrack(tracker).track, open_landmarker_tracker()
    fan_motion = tracker.make_motion([track(frame) for frame in frames], fps, size)
    track = FaceTrack(reference).track
    return fan_motion, reference.make_motion([track(frame) for frame in frames], fps, size)


def test_fan_motion_agrees_with_the_landmarker(tracker: FanTracker) -> None:
    fan_motion, reference = motions(tracker)
    assert fan_motion.found.all()
    assert fan_motion.landmarks.shape == (len(reference), 68, 3)
    assert fan_motion.crop[2] == pytest.approx(reference.crop[2], rel=0.06)
    np.testing.assert_allclose(fan_motion.crop[:2], reference.crop[:2], atol=0.05 * reference.crop[2])
    angles = [np.array([yaw_pitch_roll(c) for c in motion.camera]) for motion in (fan_motion, reference)]
    assert np.abs(angles[0] - angles[1]).mean(0).max() < 4  # degrees
    assert np.corrcoef(angles[0][:, 0], angles[1][:, 0])[0, 1] > 0.95
    for name in ("eyeBlinkLeft", "eyeBlinkRight", "jawOpen", "mouthSmileLeft"):
        k = ARKIT_NAMES.index(name)
        assert np.corrcoef(fan_motion.beta[:, k], reference.beta[:, k])[0, 1] > 0.7, name
    for name in ("lipGapCentre", "mouthWidth", "eyeOpeningLeft", "eyeOpeningRight"):
        k = len(ARKIT_NAMES) + MEASURE_NAMES.index(name)
        assert np.corrcoef(fan_motion.beta[:, k], reference.beta[:, k])[0, 1] > 0.9, name
        assert np.abs(fan_motion.beta[:, k] - reference.beta[:, k]).mean() < 0.05, name


def test_make_motion_does_not_depend_on_the_batch(tracker: FanTracker) -> None:
    image = read_image(example_path("source.jpg"))
    size = (image.shape[1], image.shape[0])
    face = tracker.find(image)
    moved = tracker.find(np.roll(image, 9, axis=1))
    assert face is not None
    assert moved is not None
    clip = tracker.calibrate_clip([face, moved], size)
    whole = tracker.make_motion([face, None, moved], Fraction(25), size, clip=clip)
    assert whole.found.tolist() == [True, False, True]
    np.testing.assert_array_equal(whole.beta[0], whole.beta[1])
    single = tracker.make_motion([moved], Fraction(25), size, clip=clip)
    np.testing.assert_allclose(single.beta[0], whole.beta[2], atol=1e-5)
    np.testing.assert_allclose(single.camera[0], whole.camera[2], atol=1e-5)
    head_centre = project_points(whole.camera[0], np.zeros((1, 3)))  # lies within the face
    assert (np.abs(head_centre - whole.landmarks[0, :, :2].mean(0)) < 0.15).all()


def test_finder_loses_finds_and_follows_faces(tracker: FanTracker) -> None:
    image, finder = read_image(example_path("source.jpg")), tracker
    track = FaceTrack(finder)
    black = np.zeros_like(image)
    assert track.track(black) is None
    assert finder.find_all(black) == []
    assert track.track(image) is not None
    assert track.track(black) is None
    both = np.concatenate([image, np.ascontiguousarray(image[:, ::-1])], axis=1)
    faces = finder.find_all(both)
    assert len(faces) == 2
    left, right = sorted(faces, key=lambda face: float(face.landmarks[:, 0].mean()))
    for face in (right, left):
        track.follow(face, both)
        again = track.track(both)
        assert again is not None
        assert np.abs(again.landmarks - face.landmarks).mean() < 3


def test_fan_motion_files_round_trip(tracker: FanTracker, tmp_path: Path) -> None:
    image = read_image(example_path("source.jpg"))
    face = tracker.find(image)
    assert face is not None
    motion = tracker.make_motion([face], Fraction(25), (image.shape[1], image.shape[0]))
    motion.save(tmp_path / "a.motion.npz")
    again = Motion.load(tmp_path / "a.motion.npz", landmark_counts=(478, 68))
    np.testing.assert_array_equal(again.landmarks, motion.landmarks)


def test_real_network_with_random_weights(
    detector: FaceDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("face_alignment") is None:
        pytest.skip("the extra fan is not installed")
    package = fan.import_face_alignment()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("face_alignment.utils.download_url_to_file", offline)
    with pytest.raises(WeightsError, match=rf"{WEIGHTS} and cannot be fetched .*no network"):
        FanTracker(BASIS, detector)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=rf"{WEIGHTS} does not load .*\): delete it"):
        FanTracker(BASIS, detector)
    shapes = {name: entry.shape for name, entry in package.models.FAN(4).state_dict().items()}
    noise = torch.rand(max(shape.numel() for shape in shapes.values()), generator=torch.Generator().manual_seed(0))
    torch.save({name: noise[: shape.numel()].view(shape) for name, shape in shapes.items()}, folder / WEIGHTS)
    finder = FanTracker(BASIS, detector)
    image = read_image(example_path("source.jpg"))
    points = finder.predict_points(image, (100.0, 50.0, 300.0))
    assert points.shape == (68, 2)
    assert (points >= (100, 50)).all()
    assert (points <= (400, 350)).all()
    assert finder.find(image) is None  # random points are rejected as no face


MIRROR = [IBUG68.index(load_canonical_face().mirror[i]) for i in IBUG68]
POSES = [(0, 0, 0), (30, 0, 0), (-40, 10, 5), (10, -20, -15), (0, 15, 80)]  # yaw, pitch, roll in degrees


@pytest.fixture(scope="module")
def basis() -> FaceBasis:
    arrays = load_arrays(resolve_weights("fan_basis"))
    return FaceBasis(*(arrays[name].astype(np.float64) for name in ("mean", "identity", "expression")))


@pytest.fixture(scope="module")
def person(basis: FaceBasis) -> np.ndarray:
    """Return the neutral face of a person, (68, 3)."""
    size = np.random.default_rng(3).normal(size=len(basis.identity))
    return basis.mean + np.tensordot(0.8 * size, basis.identity, 1)


def project_face(basis: FaceBasis, neutral: np.ndarray, poses: list[tuple[float, ...]], **expression: float) -> FaceFit:
    """Return the face in each pose, with the given coefficients."""
    coefficients = np.zeros((len(poses), len(ARKIT_NAMES)))
    for name, value in expression.items():
        coefficients[:, [i for i, arkit_name in enumerate(ARKIT_NAMES) if arkit_name.startswith(name)]] = value
    rotation = np.stack([rotation_from_angles(*pose) for pose in poses])
    centre = np.array([0.02, -0.03, 2.6]) + 0.01 * np.arange(len(poses))[:, None]
    return FaceFit(rotation, centre, coefficients, basis.deform(neutral, coefficients))


def rotation_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the angles between rotations in degrees."""
    return np.degrees(np.arccos(((np.trace(np.swapaxes(a, 1, 2) @ b, axis1=1, axis2=2) - 1) / 2).clip(-1, 1)))


@pytest.mark.parametrize(
    "expression",
    [{}, {"jawOpen": 0.6}, {"eyeBlink": 0.9}, {"mouthSmile": 0.8, "browOuterUp": 0.8}, {"mouthPucker": 0.8}],
)
def test_fit_frames_recovers_pose_and_coefficients(
    basis: FaceBasis, person: np.ndarray, expression: dict[str, float]
) -> None:
    truth = project_face(basis, person, POSES, **expression)
    fitted = fit_frames(truth.project(), basis, person)
    assert rotation_distance(truth.rotation, fitted.rotation).max() < 1.5
    np.testing.assert_allclose(fitted.centre, truth.centre, atol=0.03)
    assert np.abs(fitted.coefficients - truth.coefficients).max() < 0.3
    assert np.abs(fitted.coefficients - truth.coefficients).mean() < 0.02
    assert np.linalg.norm(fitted.project() - truth.project(), axis=-1).mean() < 0.5 / 256


def test_fit_frames_without_priors_is_exact(
    basis: FaceBasis, person: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SPARSITY_WEIGHT": 0,
        "COEFFICIENT_SD": 1e4,
        "GAUSS_NEWTON_STEPS": 12,
        "DESCENT_SWEEPS": 150,
    }.items():
        monkeypatch.setattr(fan, name, value)
    truth = project_face(basis, person, POSES[:4], jawOpen=0.5, eyeBlink=0.6, mouthSmile=0.4)
    fitted = fit_frames(truth.project(), basis, person)
    np.testing.assert_allclose(fitted.project(), truth.project(), atol=1e-4)
    assert rotation_distance(truth.rotation, fitted.rotation).max() < 0.1
    assert np.abs(fitted.coefficients - truth.coefficients).max() < 0.05


def test_fit_neutral_recovers_the_person_from_a_moving_face(basis: FaceBasis, person: np.ndarray) -> None:
    poses = [(yaw, 5.0 * np.sin(yaw), 0.0) for yaw in range(-30, 31, 5)]
    parts = [project_face(basis, person, poses[i::3], jawOpen=0.3 * i, eyeBlink=0.5 * (2 - i)) for i in range(3)]
    fitted = fit_neutral(np.concatenate([part.project() for part in parts]), basis)
    before = np.linalg.norm(basis.mean - person, axis=1).mean()
    assert np.linalg.norm(fitted - person, axis=1).mean() < 0.5 * before


def test_fit_frames_keeps_coefficients_in_bounds_with_noise(basis: FaceBasis) -> None:
    rng = np.random.default_rng(0)
    points = project_face(basis, basis.mean, POSES).project() + rng.normal(0, 0.03, (len(POSES), 68, 2))
    fitted = fit_frames(points, basis, basis.mean)
    assert fitted.coefficients.min() >= 0
    assert fitted.coefficients.max() <= 1
    assert (fitted.coefficients[:, ~OBSERVABLE] == 0).all()
    assert np.isfinite(fitted.centre).all()


def test_fit_frames_of_a_mirrored_face_mirrors_coefficients(basis: FaceBasis) -> None:
    truth = project_face(basis, basis.mean, [(20, 5, 3)], mouthSmileLeft=0.8, eyeBlinkRight=0.7)
    points = truth.project()
    mirrored = points[:, MIRROR] * [-1, 1] + [1, 0]
    one, two = (fit_frames(p, basis, basis.mean).coefficients[0] for p in (points, mirrored))
    swap = {"Left": "Right", "Right": "Left"}
    for i, name in enumerate(ARKIT_NAMES):
        side = next((side for side in swap if name.endswith(side)), None)
        j = i if side is None else ARKIT_NAMES.index(name.removesuffix(side) + swap[side])
        assert two[j] == pytest.approx(one[i], abs=0.05), name


def test_shipped_basis_matches_the_canonical_face_and_is_symmetric(basis: FaceBasis) -> None:
    canonical = load_canonical_face().points[list(IBUG68)]
    assert np.linalg.norm(basis.mean - canonical, axis=1).mean() < 0.02  # 1 cm
    np.testing.assert_allclose(basis.mean[MIRROR], basis.mean * [-1, 1, 1], atol=2e-3)
    jaw = basis.expression[ARKIT_NAMES.index("jawOpen")]
    assert jaw[8, 1] > 0.03  # the chin goes down
    assert np.abs(jaw[36:48]).max() < 1e-3  # the eyes stay
