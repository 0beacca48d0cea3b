import json
import multiprocessing
import shutil
import subprocess
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.animation.driver_stream import DriverStream
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.dataset import preprocess as module
from export3d_cli.core.dataset.preprocess import preprocess
from export3d_cli.core.dataset.segmentation import ClipFilter
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.image import read_image, write_image
from export3d_cli.core.media.probe import ffmpeg_path, probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.runtime.errors import InputError, NoFaceError
from export3d_cli.core.runtime.weights import example_path
from export3d_cli.core.train.training_data import load_dataset

process_input = module._process_input
SHORT = ClipFilter(min_seconds=0.3)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A video: 12 frames, a cut, 12 mirrored frames in other colours, 9 black frames, 4 more."""
    path = tmp_path_factory.mktemp("talk") / "in" / "deep er" / "Ünï_1.mp4"
    path.parent.mkdir(parents=True)
    base = "[0:v]scale=256:256,split=3[a][b][c];[a]trim=end_frame=12[x];"
    base += "[b]trim=start_frame=20:end_frame=32,setpts=PTS-STARTPTS,hflip,negate,lutrgb=r=val*0.8:g=val*0.9[y];"
    base += "[c]trim=start_frame=40:end_frame=44,setpts=PTS-STARTPTS[z];color=black:s=256x256:r=25:d=0.36[k];"
    base = base.replace("negate,lutrgb=r=val*0.8:g=val*0.9", "lutrgb=r=val*0.4:g=val*0.7+30")
    command = [ffmpeg_path(), "-loglevel", "error", "-i", str(example_path("drive.mp4")), "-filter_complex"]
    command += [base + "[x][y][k][z]concat=n=4[v]", "-map", "[v]", "-r", "25", "-crf", "12", str(path)]
    subprocess.run(command, check=True)
    return path.parent.parent


@pytest.fixture(scope="module")
def data(talk, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    return out, preprocess([talk], out, size=64, clip_filter=SHORT, report=True)


def test_preprocess_video_gives_a_clip_per_scene(data):
    out, summary = data
    rows = lines(out / "manifest.jsonl")
    assert [(row["id"], row["frames"], row["person"]) for row in rows] == [
        ("deep er-Ünï_1-c01", 12, "Ünï"), ("deep er-Ünï_1-c02", 12, "Ünï"),
    ]  # fmt: skip
    assert summary.clips == 2
    assert summary.frames == 24
    (rejected,) = lines(out / "rejected.jsonl")
    assert rejected["reason"].startswith("too short: 0.16 s")
    assert (rejected["id"], rejected["start"]) == ("deep er-Ünï_1-c03", 1.32)
    assert sorted(p.name for p in out.iterdir()) == [
        "clips", "inputs", "manifest.jsonl", "rejected.jsonl", "report.png",
    ]  # fmt: skip
    assert len(list((out / "clips").iterdir())) == 4


def test_preprocess_crops_match_their_motion(data):
    out, _ = data
    for line in lines(out / "manifest.jsonl"):
        motion = Motion.load(out / line["motion"])
        info = probe(out / line["file"])
        assert (info.width, info.height, info.fps, info.frame_count) == (64, 64, 25, len(motion))
        assert np.abs(np.median(motion.landmarks[:, 1, :2], axis=0) - 0.5).max() < 0.02
        tracker = module.open_landmarker_tracker()
        with VideoReader(out / line["file"], size=(256, 256)) as reader:
            face = tracker.find(next(iter(reader)))
        assert np.abs(face.landmarks[:, :2] / 256 - motion.landmarks[0, :, :2]).mean() < 0.02


def test_preprocess_output_is_read_by_the_trainer(data):
    training_set = load_dataset(data[0], 64)
    assert [clip.count for clip in training_set.clips] == [12, 12]
    shutil.rmtree(data[0] / "cache-64")


def test_preprocess_report_is_a_picture(data):
    assert read_image(data[0] / "report.png").shape == (160, 2 * 160, 3)
    assert "report.png" in data[1].notes[0]
    assert data[1].notes[1].startswith("yaw, degrees: 5 % below ")


@pytest.mark.parametrize("suffix", [".mp4", ".motion.npz"])
def test_report_names_the_remedy_for_a_damaged_clip(data, talk, tmp_path, suffix):
    out = tmp_path / "data"
    shutil.copytree(data[0], out)
    clip = next((out / "clips").glob(f"*-c01{suffix}"))
    clip.write_bytes(clip.read_bytes()[:300])
    remedy = f"; delete manifest.jsonl and inputs/deep er-Ünï_1.jsonl in {out} and run again: the clip is rewritten"
    with pytest.raises(InputError) as error:
        preprocess([talk], out, size=64, clip_filter=SHORT, report=True)
    assert clip.name in str(error.value) and str(error.value).endswith(remedy) and "\n" not in str(error.value)
    for path in (out / "manifest.jsonl", out / "inputs/deep er-Ünï_1.jsonl"):
        path.unlink()
    assert preprocess([talk], out, size=64, clip_filter=SHORT, report=True).clips == 2
    assert clip.stat().st_size > 300


def test_preprocess_skips_finished_inputs(talk, data, monkeypatch):
    monkeypatch.setattr(module, "_process_input", lambda job: pytest.fail("processed again"))
    again = preprocess([talk], data[0], size=64, clip_filter=SHORT)
    assert (again.clips, again.rejected) == (2, [])


def test_preprocess_keeps_manifest_rows_without_source(tmp_path, monkeypatch):
    old = {"id": "drive", "person": "p", "file": "clips/drive.mp4", "motion": "m", "frames": 3, "fps": "25/1"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(old) + "\n", encoding="utf-8")
    monkeypatch.setattr(module, "_process_input", lambda job: pytest.fail("processed again"))
    assert preprocess([example_path("drive.mp4")], tmp_path).frames == 3
    assert lines(tmp_path / "manifest.jsonl") == [old]


@pytest.fixture
def stills(tmp_path):
    """Five photos: one without a face, one unreadable."""
    folder = tmp_path / "in"
    for name in ("a_1", "a_2", "b_1"):
        folder.joinpath(name[0]).mkdir(parents=True, exist_ok=True)
        shutil.copy(example_path("source.jpg"), folder / name[0] / f"{name}.jpg")
    write_image(folder / "empty.png", np.full((64, 64, 3), 128, np.uint8))
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def test_preprocess_shards_fill_one_data_set(stills, tmp_path):
    out = tmp_path / "out"
    first = preprocess([stills], out, size=32, shard=(1, 2))
    assert 0 < first.clips < 3
    assert preprocess([stills], out, size=32, shard=(2, 2)).clips == 3
    assert [line["id"] for line in lines(out / "manifest.jsonl")] == ["a-a_1-still", "a-a_2-still", "b-b_1-still"]
    assert [line["id"] for line in lines(out / "rejected.jsonl")] == ["broken-still", "empty-still"]
    again = preprocess([stills], out, size=32)
    assert (again.clips, len(again.rejected)) == (3, 1)  # unreadable inputs are tried again


def test_preprocess_continues_a_killed_run(stills, tmp_path, monkeypatch):
    """The lists are rebuilt; a row that another shard is writing is not read."""
    out = tmp_path / "out"
    preprocess([stills], out, size=32)
    whole = (out / "manifest.jsonl").read_text(encoding="utf-8")
    (out / "manifest.jsonl").unlink()
    (out / "inputs/b-b_1-still.jsonl").unlink()
    (out / "inputs/.a.part.jsonl").write_text("{")  # another shard is writing it
    done = []
    monkeypatch.setattr(module, "_process_input", lambda job: done.append(job.source_id) or process_input(job))
    assert preprocess([stills], out, size=32).clips == 3
    assert sorted(done) == ["b-b_1-still", "broken-still"]
    assert (out / "manifest.jsonl").read_text(encoding="utf-8") == whole


def test_find_inputs_name_like_a_clip_gets_its_own_id(tmp_path):
    for name in ("a.mp4", "a-c01.mp4", "a.mkv", "a-c01-video.mp4"):
        (tmp_path / name).touch()
    names = [name for _, name in module._find_inputs([tmp_path], tmp_path / "out")]
    assert names == ["a-c01-video", "a-c01-video-2", "a", "a-2"]
    (tmp_path / "out" / "clips").mkdir(parents=True)
    (tmp_path / "out" / "clips" / "a.mp4").touch()
    with pytest.raises(InputError, match="lies in the output folder"):
        module._find_inputs([tmp_path / "out" / "clips" / "a.mp4"], tmp_path / "out")


def test_preprocess_workers_give_the_same_result(stills, tmp_path):
    one = preprocess([stills], tmp_path / "one", size=32)
    two = preprocess([stills], tmp_path / "two", size=32, workers=2, person="folder")
    assert (one.clips, sorted(one.rejected)) == (two.clips, sorted(two.rejected))
    assert [line["person"] for line in lines(tmp_path / "two/manifest.jsonl")] == ["a", "a", "b"]


def test_preprocess_filters_photos_and_refuses_an_empty_result(stills, tmp_path):
    with pytest.raises(NoFaceError, match="none of the 5 inputs"):
        preprocess([stills], tmp_path / "out", clip_filter=ClipFilter(min_face_px=2000))
    assert "too small" in lines(tmp_path / "out/rejected.jsonl")[0]["reason"]


def test_preprocess_ignores_its_own_output(stills):
    assert preprocess([stills], stills / "out", size=32).clips == 3
    assert preprocess([stills], stills / "out", size=32).clips == 3


def test_preprocess_overlay_differs_from_the_video(make_clip, tmp_path):
    clip = make_clip("overlay.mp4", frames=3)
    preprocess([clip], tmp_path / "x.motion.npz", overlay=tmp_path / "o.mp4")
    with VideoReader(tmp_path / "o.mp4") as marked, VideoReader(clip) as plain:
        assert marked.info.fps == plain.info.fps
        pairs = list(zip(marked, plain, strict=True))
    assert len(pairs) == 3
    assert all(np.abs(a.astype(int) - b).mean() > 1 for a, b in pairs)
    with pytest.raises(InputError, match="overlay"):
        preprocess([clip], tmp_path / "set", overlay=tmp_path / "o.mp4")


def test_preprocess_arkit_csv_gives_one_motion(tmp_path):
    path = tmp_path / "take.csv"
    rows = [f"00:00:01:{k:02}.000," + ",".join([f"{k / 100:.2f}"] * 52) for k in range(30)]
    path.write_text("\n".join(["Timecode," + ",".join(ARKIT_NAMES), *rows]) + "\n", encoding="utf-8")
    for fps, count in ((None, 30), (Fraction(30), 15)):
        assert preprocess([path], tmp_path / "x.motion.npz", fps=fps).frames == count
        options = ReenactOptions(smooth="off", pose="absolute")
        with DriverStream(tmp_path / "x.motion.npz", None, options, batch=100, crop_scale=2.0) as driver:
            ((motion, _, _),) = list(driver)
        assert (driver.fps, len(motion)) == (fps or 60, count)
        np.testing.assert_allclose(motion.beta[-1, 0], (29 if fps is None else 28) / 100, atol=1e-6)
    for option, value in (("overlay", tmp_path / "o.mp4"), ("face", "left"), ("tracker", "fan")):
        with pytest.raises(InputError, match=f"no pictures, and --{option} applies"):
            preprocess([path], tmp_path / "x.motion.npz", **{option: value})


def test_preprocess_photo_takes_the_given_frame_rate(tmp_path):
    preprocess([example_path("source.jpg")], tmp_path / "x.motion.npz", fps=Fraction(12))
    assert Motion.load(tmp_path / "x.motion.npz").fps == 12


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("x.motion.npz", "size", 256), ("x.motion.npz", "workers", 1), ("x.motion.npz", "clip_filter", ClipFilter()),
        ("x.motion.npz", "person", "name"), ("x.motion.npz", "shard", (1, 1)), ("x.motion.npz", "report", True),
        ("set", "fps", Fraction(25)), ("set", "face", "largest"), ("set", "tracker", "landmarker"),
        ("set", "overlay", Path("o.mp4")),
    ],
)  # fmt: skip
def test_preprocess_option_of_the_other_output_is_refused(tmp_path, name, option, value):
    with pytest.raises(InputError, match="applies to a"):
        preprocess([example_path("source.jpg")], tmp_path / name, **{option: value})
    assert not list(tmp_path.iterdir())


def test_preprocess_notes_shorter_clips_and_kept_inputs(stills, tmp_path):
    assert preprocess([stills], tmp_path / "out", size=32).notes == []
    notes = preprocess([stills], tmp_path / "out", size=32, max_frames=10).notes
    assert notes == ["clips from 0.4 s are kept, because inputs are cut at 10 frames",
                     "4 inputs of an earlier run are kept as they are"]  # fmt: skip


def sleep(seconds):
    time.sleep(seconds)


def test_preprocess_stopped_early_ends_only_its_own_workers(stills, tmp_path):
    """A child process of the host program survives; the pool's own workers end."""
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=sleep, args=(60,))
    child.start()
    before = set(multiprocessing.active_children())

    def stop(stage, done, total):
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            preprocess([stills], tmp_path / "out", size=32, workers=2, progress=stop)
        assert child.is_alive() and set(multiprocessing.active_children()) == before
    finally:
        child.kill()
        child.join()


def test_preprocess_image_folder_gives_one_motion(make_clip, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    with VideoReader(make_clip("overlay.mp4", frames=3)) as reader:
        for i, frame in enumerate(reader):
            write_image(folder / f"{i + 8}.png", frame)
    for fps in (None, Fraction(12)):
        preprocess([folder], tmp_path / "x.motion.npz", fps=fps)
        motion = Motion.load(tmp_path / "x.motion.npz")
        assert (len(motion), motion.fps) == (3, fps or 25)
