import re
import subprocess
from fractions import Fraction

import numpy as np
import pytest

from export3d_cli.core.media.probe import audio_tracks, ffmpeg_path, probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import InputError, MediaError


def frames(count, size=(64, 48)):
    """Return smooth frames of increasing brightness."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 2, y * 2, (x + y)], axis=-1)
    return [(base + 3 * i).clip(0, 255).astype(np.uint8) for i in range(count)]


def header(path):
    return subprocess.run([ffmpeg_path(), "-i", str(path)], capture_output=True, check=False).stderr.decode()


def seconds(path):
    h, m, s = re.search(r"Duration: (\d+):(\d+):([\d.]+)", header(path)).groups()
    return int(h) * 3600 + int(m) * 60 + float(s)


def test_reader_start_duration_rate_and_size(picture):
    path = picture("a.mp4", "25", 50)
    every = list(VideoReader(path))
    part = VideoReader(path, start=0.4, duration=0.8)
    part_frames = list(part)
    assert part.info.frame_count == len(part_frames) == 20
    assert np.array_equal(part_frames[0], every[10])
    assert len(list(VideoReader(path, fps=Fraction(10)))) == 20
    assert next(iter(VideoReader(path, size=(20, 10)))).shape == (10, 20, 3)


def test_reader_left_early_ends_process(picture):
    with VideoReader(picture("a.mp4", "25", 200, size="320x240")) as reader:
        next(iter(reader))
        process = reader._process or None
    assert process is None or process._popen.poll() is not None
    iterator = iter(reader)
    next(iterator)
    running = reader._process._popen
    reader.close()
    assert running.poll() is not None


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no file"), (b"", "empty"), (b"just text " * 50, "not a video")]
)
def test_probe_of_other_files_raises(tmp_path, content, message):
    path = tmp_path / "x.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        probe(path)
    assert str(path) in str(caught.value)


def test_probe_of_audio_file_raises(sound):
    with pytest.raises(InputError, match="no video"):
        probe(sound("a.wav"))


def test_reader_start_past_end_raises(picture):
    with pytest.raises(InputError, match="past the end"):
        VideoReader(picture("a.mp4"), start=9.0)


def test_reader_of_damaged_video_raises(picture):
    path = picture("a.mkv", "25", 50, size="320x240")
    data = path.read_bytes()
    path.write_bytes(data[:400] + bytes(len(data) - 400))
    with pytest.raises((InputError, MediaError)):
        list(VideoReader(path))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_video_round_trip(tmp_path, suffix):
    path = tmp_path / f"new/folder/a{suffix}"
    given = frames(20)
    with VideoWriter(path, size=(64, 48), fps=Fraction(30000, 1001), crf=8) as writer:
        for frame in given:
            writer.write(frame)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    info = probe(path)
    assert (info.fps, info.frame_count, info.has_audio) == (Fraction(30000, 1001), 20, False)
    for sent, decoded in zip(given, VideoReader(path), strict=True):
        assert np.abs(sent.astype(int) - decoded).mean() < 3
    text = header(path)
    assert "bt709" in text
    assert "yuv420p" in text
    assert "synthetic" in text


def test_gif_contains_synthetic_comment(tmp_path):
    path = tmp_path / "a.gif"
    with VideoWriter(path, size=(64, 48), fps=Fraction(10)) as writer:
        for frame in frames(6):
            writer.write(frame)
    assert "comment         : synthetic" in header(path)
    assert probe(path).frame_count == len(list(VideoReader(path))) == 6


def test_gif_rate_is_limited_to_50(tmp_path):
    path = tmp_path / "a.gif"
    with VideoWriter(path, size=(64, 48), fps=Fraction(60)) as writer:
        for frame in frames(60):
            writer.write(frame)
    assert (probe(path).fps, probe(path).frame_count) == (50, 50)


def test_writer_crops_odd_sizes(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", size=(65, 49), fps=Fraction(25)) as writer:
        writer.write(frames(1, (65, 49))[0])
    assert (probe(tmp_path / "a.mp4").width, probe(tmp_path / "a.mp4").height) == (64, 48)


def test_writer_output_is_reproducible(tmp_path):
    for name in ("a.mkv", "b.mkv"):
        with VideoWriter(tmp_path / name, size=(64, 48), fps=Fraction(25)) as writer:
            for frame in frames(5):
                writer.write(frame)
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


@pytest.mark.parametrize(("suffix", "source", "codec"), [(".mp4", "a.m4a", "aac"), (".mkv", "a.wav", "pcm_s16le")])
def test_writer_adds_audio_cut_to_video(tmp_path, sound, suffix, source, codec):
    audio = sound(source, 3, *(["-c:a", "libvorbis"] if codec == "vorbis" else []))
    path = tmp_path / f"out{suffix}"
    with VideoWriter(path, size=(64, 48), fps=Fraction(25), audio=audio, audio_start=0.5) as writer:
        for frame in frames(25):
            writer.write(frame)
    assert audio_tracks(path)[0].codec == codec
    assert len(list(VideoReader(path))) == 25
    assert abs(seconds(path) - 1.0) < 0.05
    assert not [p for p in tmp_path.iterdir() if ".part" in p.name]


def test_writer_with_short_audio_keeps_all_frames(tmp_path, sound):
    path = tmp_path / "out.mp4"
    with VideoWriter(path, size=(64, 48), fps=Fraction(25), audio=sound("a.wav", 0.4)) as writer:
        for frame in frames(25):
            writer.write(frame)
    assert len(list(VideoReader(path))) == 25
    assert probe(path).has_audio


def test_writer_with_audio_source_without_audio(tmp_path, picture):
    with VideoWriter(tmp_path / "o.mp4", size=(64, 48), fps=Fraction(25), audio=picture("a.mp4")) as writer:
        writer.write(frames(1)[0])
    assert not probe(tmp_path / "o.mp4").has_audio


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_writer_after_exception_leaves_no_file_or_process(tmp_path, sound, error):
    audio = sound("a.wav")
    (tmp_path / "a.mp4").write_bytes(b"old content")
    writer = VideoWriter(tmp_path / "a.mp4", size=(64, 48), fps=Fraction(25), audio=audio)
    processes = []
    with pytest.raises(error), writer:  # noqa: PT012
        writer.write(frames(1)[0])
        processes.append(writer._process._popen)
        raise error
    assert processes[0].poll() is not None
    assert (tmp_path / "a.mp4").read_bytes() == b"old content"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.wav"]


def test_writer_reports_message_of_failed_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(VideoWriter, "_metadata_arguments", lambda self: ["-c:v", "nonsense"])
    writer = VideoWriter(tmp_path / "a.mp4", size=(640, 480), fps=Fraction(25))
    with pytest.raises(MediaError, match="nonsense"), writer:  # noqa: PT012
        for frame in frames(50, (640, 480)):
            writer.write(frame)
    assert not list(tmp_path.iterdir())


def test_writer_without_frames_raises(tmp_path):
    with pytest.raises(MediaError, match="no frame"), VideoWriter(tmp_path / "a.mp4", size=(64, 48), fps=Fraction(25)):
        pass
    assert not list(tmp_path.iterdir())


def test_writer_with_wrong_arguments_raises(tmp_path):
    with pytest.raises(InputError, match=r"\.xyz"):
        VideoWriter(tmp_path / "a.xyz", size=(64, 48), fps=Fraction(25))
    with pytest.raises(InputError, match="positive rate"):
        VideoWriter(tmp_path / "a.mp4", size=(64, 48), fps=Fraction(0))
    with (
        pytest.raises(InputError, match="frames"),
        VideoWriter(tmp_path / "a.mp4", size=(64, 48), fps=Fraction(25)) as writer,
    ):
        writer.write(frames(1, (32, 32))[0])


def test_probe_of_huge_video_raises(picture, monkeypatch):
    monkeypatch.setattr("export3d_cli.core.media.image.MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="megapixels"):
        probe(picture("big.mp4"))
