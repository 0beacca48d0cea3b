"""Driver streams: batch sizes, frames without a face, motion files at other frame rates."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from export3d_cli.core.animation.driver_stream import DriverStream
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.animation.retargeting import reference_rows
from export3d_cli.core.face.crop import crop_image
from export3d_cli.core.face.face_track import FaceTrack, TrackCache
from export3d_cli.core.face.matting import PersonMatting
from export3d_cli.core.face.motion import Motion, resample_rows
from export3d_cli.core.face.tracker import LandmarkerTracker, open_landmarker_tracker
from export3d_cli.core.media.image import write_image
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.camera import orbit_camera
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.weights import example_path, resolve_weights

MakeClip = Callable[..., Path]
SOURCE_MOTION = Motion(
    np.zeros((1, 64), np.float32), orbit_camera(0)[None], np.zeros((1, 478, 3), np.float32),
    np.ones(1, bool), Fraction(25), (0.0, 0.0, 1.0), (1, 1),
)  # fmt: skip
BLACK = "drawbox=enable='{}':t=fill:color=black:w=iw:h=ih"  # over the frames n that meet a condition


@pytest.fixture(scope="module")
def tracker() -> LandmarkerTracker:
    return open_landmarker_tracker()


def stream(
    driver: Path, tracker: LandmarkerTracker, *, reference: Any = None, batch: int = 4, crop_size: int | None = None,
    source: Motion | None = None, track_cache: TrackCache | None = None, **options: Any,
) -> DriverStream:  # fmt: skip
    pose = {None: "absolute", "auto": "auto"}.get(reference, "relative")
    number = reference if pose == "relative" else None
    job = ReenactOptions(**{"smooth": "off", "pose": pose, "reference_frame": number, **options})
    return DriverStream(
        driver, tracker, job, batch=batch, crop_scale=2.1, crop_size=crop_size, source=source, track_cache=track_cache
    )


def read(driver: DriverStream) -> tuple[np.ndarray, np.ndarray, list[np.ndarray | None]]:
    """Return beta, landmarks and crops of all frames."""
    with driver:
        parts = list(driver)
    assert all(len(motion) == len(crops) <= driver.batch for motion, crops, _ in parts)
    beta, landmarks = (np.concatenate([getattr(m, k) for m, _, _ in parts]) for k in ("beta", "landmarks"))
    return beta, landmarks, [crop for _, crops, _ in parts for crop in crops]


def test_motion_does_not_depend_on_the_batch_size(make_clip: MakeClip, tracker: LandmarkerTracker) -> None:
    clip = make_clip("clip.mp4")
    results = [read(stream(clip, tracker, batch=batch)) for batch in (1, 4, 100)]
    for beta, landmarks, crops in results:
        assert len(beta) == 6
        assert crops == [None] * 6
        np.testing.assert_array_equal(beta, results[0][0])
        np.testing.assert_array_equal(landmarks, results[0][1])


def test_short_lookahead_gives_the_same_motion_for_a_short_clip(
    make_clip: MakeClip, tracker: LandmarkerTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are yielded before the clip ends, as for a long clip, and crops match the motion."""
    clip = make_clip("dark.mp4", filters=BLACK.format("between(n,3,4)"), frames=8)
    waited = read(stream(clip, tracker, batch=2, crop_size=32))
    monkeypatch.setattr("export3d_cli.core.animation.driver_stream.LOOKAHEAD_S", 0)
    early = read(stream(clip, tracker, batch=2, crop_size=32))
    np.testing.assert_allclose(early[0], waited[0], atol=1e-3)
    assert [int(crop.mean()) < 5 for crop in early[2]] == [False] * 3 + [True] * 2 + [False] * 3


def test_driver_crops_match_the_motion(make_clip: MakeClip, tracker: LandmarkerTracker) -> None:
    clip = make_clip("clip.mp4")
    with stream(clip, tracker, crop_size=48, max_frames=3) as driver:
        motion, crops, _ = next(iter(driver))
    frames = list(VideoReader(clip))
    for frame, crop in zip(frames, crops, strict=False):
        np.testing.assert_array_equal(crop, crop_image(frame, motion.crop, 48))
    assert len(crops) == 3
    extent = np.ptp(motion.landmarks[..., :2], axis=1).max(-1)
    assert 1 / np.median(extent) == pytest.approx(2.1, rel=1e-3)  # side of the crop in face boxes


def test_driver_crop_outside_the_frame_shows_no_streaks(make_clip: MakeClip, tracker: LandmarkerTracker) -> None:
    clip = make_clip("tight.mp4", filters="crop=260:260:126:100,noise=alls=40")
    with VideoReader(clip) as reader:
        frame = next(iter(reader)).astype(int)
    _, _, crops = read(stream(clip, tracker, crop_size=256))
    assert crops[0] is not None
    detail = np.abs(np.diff(crops[0].astype(int), axis=1)).mean((1, 2))  # of each row
    assert np.abs(np.diff(frame, axis=1)).mean() > 12
    assert detail[128] > 8  # inside
    assert max(detail[0], detail[-1]) < 3


def test_on_missing_holds_skips_or_fails(make_clip: MakeClip, tracker: LandmarkerTracker) -> None:
    clip = make_clip("gap.mp4", filters=BLACK.format("eq(n,0)+between(n,3,4)"))
    held = stream(clip, tracker)
    beta, landmarks, _ = read(held)
    assert (len(beta), held.missing, held.total) == (6, 3, 6)
    for frame, source in ((0, 1), (3, 2), (4, 2)):  # before the first face, it is the first face
        np.testing.assert_array_equal(beta[frame], beta[source])
        np.testing.assert_array_equal(landmarks[frame], landmarks[source])
    assert (beta[5] != beta[2]).any()
    left_out = stream(clip, tracker, on_missing="skip")
    np.testing.assert_array_equal(read(left_out)[0], beta[[1, 2, 5]])
    assert left_out.missing == 3
    with pytest.raises(NoFaceError, match=r"frame 0 of .*gap"):
        read(stream(clip, tracker, on_missing="fail"))


def test_track_cache_serves_only_the_recorded_pass(make_clip: MakeClip, tracker: LandmarkerTracker) -> None:
    """The same pass is read from the cache; another face, number of frames or driver is tracked."""
    two = make_clip("mirrored.mp4", filters="split[a][b];[b]hflip[c];[a][c]hstack")
    with TrackCache() as cache:
        for options in ({"driver_face": "left"}, {"driver_face": "right"}, {"driver_face": "right", "max_frames": 3}):
            expected = read(stream(two, tracker, **options))
            for _ in range(2):
                beta, landmarks, _ = read(stream(two, tracker, track_cache=cache, **options))
                np.testing.assert_array_equal(landmarks, expected[1])
                np.testing.assert_array_equal(beta, expected[0])


def test_a_stream_with_a_cache_is_read_again_without_tracking(
    make_clip: MakeClip, tracker: LandmarkerTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrackCache() as cache:
        driver = stream(make_clip("pause.mp4", filters=BLACK.format("between(n,3,4)")), tracker, track_cache=cache)
        first = read(driver)
        monkeypatch.setattr(FaceTrack, "track", lambda *_: pytest.fail("tracked again"))
        monkeypatch.setattr(LandmarkerTracker, "find", lambda *_: pytest.fail("tracked again"))
        for _ in range(2):
            for one, again in zip(first[:2], read(driver)[:2], strict=True):
                np.testing.assert_array_equal(again, one)
        assert driver.missing == 2


def test_hidden_face_is_not_replaced_by_another(make_clip: MakeClip, tracker: LandmarkerTracker) -> None:
    two = "scale=192:192,split[a][b];[b]hflip,crop=160:160,scale=192:192[c];[a][c]hstack"
    hidden = "drawbox=enable='between(n,3,4)':t=fill:color=gray:x={}:y=30:w=120:h=130"
    clip = make_clip("two.mp4", filters=two + "," + hidden.format(36), frames=7)
    middles = []
    for face, missing in (("left", 2), ("right", 0), ("largest", 0)):
        with stream(clip, tracker, driver_face=face, batch=10) as driver:
            ((motion, _, _),) = list(driver)
        assert driver.missing == missing
        middles.append(motion.crop[0] + motion.crop[2] / 2)
    assert middles[0] < 192 < middles[1] == middles[2]  # the right one is the larger


@pytest.mark.parametrize("on_missing", ["hold", "skip"])
def test_driver_without_any_face_raises(make_clip: MakeClip, tracker: LandmarkerTracker, on_missing: str) -> None:
    clip = make_clip("black.mp4", filters=BLACK.format("1"))
    with pytest.raises(NoFaceError, match=r"black\.mp4"):
        read(stream(clip, tracker, on_missing=on_missing))


def test_folder_of_images_gives_the_motion_of_the_video(
    make_clip: MakeClip, tracker: LandmarkerTracker, tmp_path: Path
) -> None:
    clip = make_clip("clip.mp4")
    for i, frame in enumerate(VideoReader(clip)):
        write_image(tmp_path / f"{i + 7}.png", frame)
    folder = stream(tmp_path, tracker, crop_size=32)
    assert (folder.fps, folder.total) == (25, 6)
    beta, landmarks, crops = read(folder)
    expected = read(stream(clip, tracker))
    np.testing.assert_array_equal(beta, expected[0])
    np.testing.assert_array_equal(landmarks, expected[1])
    assert all(crop is not None for crop in crops)


def test_image_driver_is_one_frame(tracker: LandmarkerTracker) -> None:
    driver = stream(example_path("source.jpg"), tracker, crop_size=16)
    beta, _, crops = read(driver)
    assert (len(beta), driver.total, driver.fps) == (1, 1, 25)
    assert crops[0].shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("fps", "start", "duration", "expected"),
    [
        ("25", 0.0, None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("25", 0.12, 0.08, [3, 4]),
        ("25", 0.32, 9.0, [8, 9]),
        ("25", 0.4, None, []),
        ("50", 0.2, 0.08, [5, 5, 6, 6]),  # the same seconds in twice as many frames
        ("25/2", 0.0, None, [0, 2, 4, 6, 8]),
        ("1", 0.0, None, [0]),
    ],
)
def test_resampled_rows_keep_the_motion_s_timing(
    fps: str, start: float, duration: float | None, expected: list[int]
) -> None:
    assert resample_rows(10, Fraction(25), Fraction(fps), start, duration).tolist() == expected


def test_motion_file_streams_its_rows(make_clip: MakeClip, tracker: LandmarkerTracker, tmp_path: Path) -> None:
    frames = list(VideoReader(make_clip("clip.mp4")))
    track = FaceTrack(tracker).track
    faces = [track(frame) for frame in frames]
    motion = tracker.make_motion(faces, Fraction(25), (frames[0].shape[1], frames[0].shape[0]))
    motion.found[2] = False
    path = tmp_path / "a.motion.npz"
    motion.save(path)
    driver = stream(path, tracker, start=0.04, max_frames=4)
    beta, _, crops = read(driver)
    np.testing.assert_array_equal(beta, motion.beta[1:5])
    assert (driver.total, driver.missing, driver.fps, crops) == (4, 1, 25, [None] * 4)
    with pytest.raises(InputError, match="is after the end"):
        stream(path, tracker, start=5.0)
    with pytest.raises(InputError, match="holds no images"):
        stream(path, tracker, crop_size=16)
    assert isinstance(Motion.load(path), Motion)


def write_frames(folder: Path, frames: list[np.ndarray]) -> Path:
    for i, frame in enumerate(frames):
        write_image(folder / f"{i:03d}.png", frame)
    return folder


def wide_shot(frame: np.ndarray) -> np.ndarray:
    """Show the frame half as large, at the right of a picture of another colour."""
    picture = np.full_like(frame, (90, 40, 120))
    picture[40 : 40 + frame.shape[0] // 2, frame.shape[1] // 2 :] = frame[::2, ::2]
    return picture


@pytest.mark.parametrize("batch", [3, 100])
def test_shots_have_their_own_crop_and_reference(
    make_clip: MakeClip, tracker: LandmarkerTracker, tmp_path: Path, batch: int
) -> None:
    """After a cut to a wide shot the face has the same size in the crop; smoothing does not cross the cut."""
    frames = list(VideoReader(make_clip("clip.mp4", frames=8)))
    count = len(frames)
    driver = write_frames(tmp_path, frames + [wide_shot(frame) for frame in frames])
    with TrackCache() as cache:
        for _ in range(2):  # tracked, and from the cache
            batches = list(
                stream(
                    driver,
                    tracker,
                    batch=batch,
                    smooth="strong",
                    reference="auto",
                    source=SOURCE_MOTION,
                    crop_size=32,
                    track_cache=cache,
                )
            )
    motion = Motion.concatenate([batch.motion for batch in batches])
    shots = np.concatenate([[batch.motion.crop[2]] * len(batch.motion) for batch in batches])
    assert shots.tolist() == [shots[0]] * count + [shots[-1]] * count
    assert shots[-1] == pytest.approx(shots[0] / 2, rel=0.05)
    for first, second in zip(motion.landmarks[:count], motion.landmarks[count:], strict=True):
        np.testing.assert_allclose(first[:, :2], second[:, :2], atol=0.02)
    for part in (frames, [wide_shot(frame) for frame in frames]):
        folder = tmp_path / f"shot{len(part[0])}{int(part[0][0, 0, 0])}"
        folder.mkdir()
        alone = Motion.concatenate(
            [batch.motion for batch in stream(write_frames(folder, part), tracker, smooth="strong")]
        )
        rows = slice(0, count) if part is frames else slice(count, None)
        np.testing.assert_allclose(motion.beta[rows], alone.beta, atol=1e-4)
    references = list(dict.fromkeys(id(batch.reference) for batch in batches))
    assert len(references) == 2
    for shot, batch in (
        (motion.select(np.arange(count)), batches[0]),
        (motion.select(np.arange(count, 2 * count)), batches[-1]),
    ):
        best = reference_rows(shot, SOURCE_MOTION)[0]
        np.testing.assert_array_equal(batch.reference.camera[0], shot.camera[best])
    assert [crop.shape for batch in batches for crop in batch.driver_crops] == [(32, 32, 3)] * (2 * count)


def test_a_cut_within_the_same_framing_keeps_crop_and_reference(
    make_clip: MakeClip, tracker: LandmarkerTracker, tmp_path: Path
) -> None:
    """As jump cuts and flashes do."""
    frames = list(VideoReader(make_clip("clip.mp4", frames=8)))
    flash = frames[:4] + [np.full_like(frames[4], 255)] + frames[5:]
    batches = list(stream(write_frames(tmp_path, flash), tracker, batch=2, reference="auto", source=SOURCE_MOTION))
    assert len({batch.motion.crop for batch in batches}) == len({id(batch.reference) for batch in batches}) == 1


def test_a_fixed_reference_may_lie_in_a_later_shot(
    make_clip: MakeClip, tracker: LandmarkerTracker, tmp_path: Path
) -> None:
    frames = list(VideoReader(make_clip("clip.mp4", frames=6)))
    driver = write_frames(tmp_path, frames + [wide_shot(frame) for frame in frames])
    batches = list(stream(driver, tracker, batch=4, reference=10))
    motion = Motion.concatenate([batch.motion for batch in batches])
    assert len({id(batch.reference) for batch in batches}) == 1
    np.testing.assert_array_equal(batches[0].reference.camera, motion.camera[10:11])
    with pytest.raises(InputError, match="has 12 frames: frame 12 cannot be the reference"):
        list(stream(driver, tracker, reference=12))


@pytest.mark.parametrize(("degrees", "state"), [(90, "lies on its side"), (180, "is upside down")])
def test_a_driver_without_its_rotation_tag_is_turned_upright(
    make_clip: MakeClip, tmp_path: Path, degrees: int, state: str
) -> None:
    """The note says so; the motion and the crops are those of the upright video, also from the cache."""
    tracker = open_landmarker_tracker()
    frames = list(VideoReader(make_clip("clip.mp4")))
    frames[0] = np.zeros_like(frames[0])  # no face tells how this one is to be turned
    upright, turned = tmp_path / "upright", tmp_path / "turned"
    upright.mkdir(), turned.mkdir()
    write_frames(upright, frames)
    write_frames(turned, [np.rot90(frame, degrees // 90) for frame in frames])
    expected = read(stream(upright, tracker, crop_size=32))
    with TrackCache() as cache:
        for _ in range(2):
            driver = stream(turned, tracker, crop_size=32, track_cache=cache)
            beta, landmarks, crops = read(driver)
            np.testing.assert_allclose(beta, expected[0], atol=1e-3)
            np.testing.assert_allclose(landmarks, expected[1], atol=1e-3)
            np.testing.assert_array_equal(crops[1:], expected[2][1:])
            assert driver.notes == [
                f"the face in {turned} {state}: its frames are used rotated by {degrees} degrees clockwise"
            ]


@pytest.mark.parametrize("is_wide", [False, True])
def test_torso_starts_again_in_each_shot(tracker: LandmarkerTracker, tmp_path: Path, is_wide: bool) -> None:
    """A flash within the same framing does not end the shot; the frame after a cut may show no face."""
    with VideoReader(example_path("drive.mp4")) as reader:
        frame = next(iter(reader))
    turn = cv2.getRotationMatrix2D((256, 400), -4, 1)
    turned = cv2.warpAffine(frame, turn, frame.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
    last = wide_shot(turned) if is_wide else turned
    hidden = np.full_like(frame, 255)
    if is_wide:
        hidden = last.copy()
        hidden[90:226, 320:460] = 128
    frames = [frame, turned, hidden, last]
    options = ReenactOptions(smooth="off", pose="relative", torso="driver")
    matting = PersonMatting(resolve_weights("selfie_segmentation"))
    driver = DriverStream(write_frames(tmp_path, frames), tracker, options, batch=4, crop_scale=2.1, matting=matting)
    roll = np.concatenate([batch.motion.torso[:, 2] for batch in driver])
    np.testing.assert_allclose(np.degrees(roll), [0, 4, 4, 0 if is_wide else 4], atol=0.3)


def test_torso_is_read_only_on_demand(tracker: LandmarkerTracker, tmp_path: Path) -> None:
    matting, torsos = PersonMatting(resolve_weights("selfie_segmentation")), []
    for reads in (False, True):
        options = ReenactOptions(smooth="off", pose="relative", torso="driver" if reads else None, max_frames=3)
        with DriverStream(
            example_path("drive.mp4"), tracker, options, batch=4, crop_scale=2.1, matting=matting if reads else None
        ) as driver:
            motion = Motion.concatenate([batch.motion for batch in driver])
        torsos.append(motion.torso)
        assert not driver.notes
    assert np.isnan(torsos[0]).all()
    assert np.ptp(torsos[1], axis=0).max() < 0.01
    np.testing.assert_allclose(torsos[1][0], [0.5, 1.2, 0, 0], atol=0.15)
    motion.save(tmp_path / "a.motion.npz")
    track = DriverStream(tmp_path / "a.motion.npz", tracker, options, batch=4, crop_scale=2.1, matting=matting)
    assert track.notes[0].endswith("the torso follows the head there, as with --torso follow")
