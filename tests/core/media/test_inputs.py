"""Videos from phones, cameras, screen recorders and editors."""

import struct
from dataclasses import replace
from fractions import Fraction

import cv2
import numpy as np
import pytest

from export3d_cli.core.media.image import write_image
from export3d_cli.core.media.probe import audio_tracks, probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import InputError

RED = "color=0xC03040:s=32x32:r=5:d=1"


def middle(path):
    """Return the colour at the centre of the third frame."""
    frame = list(VideoReader(path))[2]
    return frame[frame.shape[0] // 2, frame.shape[1] // 2].astype(int)


@pytest.mark.parametrize(("degrees", "turn"), [(90, 1), (270, 3)])
def test_reader_applies_rotation(picture, make, degrees, turn):
    plain = picture("a.mp4", "25", 2)
    turned = make("b.mp4", "-display_rotation", str(degrees), "-i", str(plain), "-c", "copy")
    expected = np.rot90(next(iter(VideoReader(plain))), turn)
    assert np.abs(next(iter(VideoReader(turned))).astype(int) - expected).mean() < 8


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("a.mp4", ["-c:v", "libx264", "-pix_fmt", "yuv420p10le"]),
        ("a.mov", ["-c:v", "prores_ks", "-pix_fmt", "yuv422p10le"]),
        ("a.mkv", ["-c:v", "ffv1", "-pix_fmt", "gbrp12le"]),
        ("a.webm", ["-c:v", "libvpx-vp9"]),
        ("a.gif", ["-filter_complex", "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"]),
        ("a.avi", ["-c:v", "mjpeg", "-q:v", "2"]),
    ],
)
def test_reader_keeps_colours_of_every_format(make, name, args):
    assert np.abs(middle(make(name, "-f", "lavfi", "-i", RED, *args)) - [0xC0, 0x30, 0x40]).max() < 10


@pytest.mark.parametrize(
    ("name", "args", "alpha"),
    [
        ("a.mov", ["-c:v", "qtrle", "-pix_fmt", "argb"], "plain"),
        ("a.mkv", ["-c:v", "ffv1", "-pix_fmt", "yuva444p"], "plain"),
        ("a.webm", ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"], "vp9"),
        ("b.webm", ["-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0"], "vp8"),
    ],
)
def test_reader_composites_transparency_on_white(make, name, args, alpha):
    path = make(name, "-f", "lavfi", "-i", RED.replace("40", "40@0.5") + ",format=rgba", *args)
    assert probe(path).alpha_source == alpha
    assert np.abs(middle(path) - (np.array([0xC0, 0x30, 0x40]) + 255) / 2).max() < 10


HDR = ["-vf", "format=gray10le,geq=lum='X*1023/31',format=yuv420p10le", "-c:v", "libx265", "-x265-params"]


@pytest.mark.parametrize(("hdr", "white"), [("smpte2084", 0.58), ("arib-std-b67", 0.75)])
def test_reader_tone_maps_high_dynamic_range(make, hdr, white):
    tags = f"log-level=none:colorprim=bt2020:transfer={hdr}:colormatrix=bt2020nc"
    path = make("a.mp4", "-f", "lavfi", "-i", "color=gray:s=32x32:r=5:d=1", *HDR, tags)
    assert probe(path).hdr_transfer == hdr
    mapped = VideoReader(path)
    assert mapped.notes == [f"{path}: high dynamic range, tone-mapped"]
    row = next(iter(mapped))[16].astype(int).mean(-1)
    assert row[0] < 25
    assert row[-1] > 200
    assert (np.diff(row) >= -2).all()
    assert row[round(31 * white)] > 140  # diffuse white: bright, but below the maximum


def test_reader_deinterlaces(make):
    source = ["-f", "lavfi", "-i", "testsrc2=s=64x64:r=50:d=0.4,scroll=h=0.06,tinterlace=interleave_top"]
    path = make("a.mpg", *source, "-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-q:v", "2")
    assert probe(path).interlaced
    whole, combed = VideoReader(path), VideoReader(path)
    combed.info = replace(combed.info, interlaced=False)

    def teeth(reader):
        frames = np.stack(list(reader)).astype(int)
        assert abs(len(frames) - 10) <= 1
        return np.abs(2 * frames[:, 1:-1] - frames[:, :-2] - frames[:, 2:]).mean()

    assert teeth(whole) < 0.6 * teeth(combed)
    assert not probe(make("b.mp4", *source, "-vf", "setfield=prog", "-pix_fmt", "yuv420p")).interlaced


def test_reader_takes_first_of_several_video_streams(picture, make):
    one, two = picture("one.mp4", "25", 5), picture("two.mp4", "30", 9, size="96x80")
    path = make("both.mkv", "-i", str(two), "-i", str(one), "-map", "0:v", "-map", "1:v", "-c", "copy")
    info = probe(path)
    assert (info.width, info.height, info.fps) == (96, 80, 30)
    assert len(list(VideoReader(path))) == 9


def test_probe_of_cover_art_raises(sound, make, tmp_path):
    write_image(tmp_path / "cover.png", np.full((20, 30, 3), 90, np.uint8))
    cover = ["-i", str(tmp_path / "cover.png"), "-map", "0:a", "-map", "1:v", "-c", "copy"]
    path = make("a.m4a", "-i", str(sound("s.m4a", 1)), *cover, "-disposition:v:0", "attached_pic")
    with pytest.raises(InputError, match="no video"):
        probe(path)


@pytest.fixture
def folder(tmp_path):
    """A folder of twelve images, of brightness 10 times their number, and other files."""
    path = tmp_path / "shots of, me"
    path.mkdir()
    for i in range(12):
        write_image(path / f"shot{i}.png", np.full((6, 8, 3), 10 * i, np.uint8))
    (path / "notes.txt").write_text("no picture")
    (path / ".hidden.png").write_bytes(b"")
    return path


def test_reader_of_image_folder(folder):
    reader = VideoReader(folder)
    assert (reader.info.fps, reader.info.frame_count, reader.info.duration) == (25, 12, 0.48)
    assert [frame[0, 0, 0] for frame in reader] == [10 * i for i in range(12)]
    slow = VideoReader(folder, fps=Fraction(10), start=0.2, duration=0.5, size=(4, 3))
    assert (slow.info.fps, slow.info.frame_count) == (10, 5)
    assert [frame[0, 0, 0] for frame in slow] == [20, 30, 40, 50, 60]
    assert next(iter(slow)).shape == (3, 4, 3)
    assert audio_tracks(folder) == []


def test_reader_of_image_folder_applies_exif_orientation(tmp_path):
    data = cv2.imencode(".jpg", np.zeros((6, 8, 3), np.uint8))[1].tobytes()
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + b"\0\0\0\0"
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    assert (probe(tmp_path).width, probe(tmp_path).height) == (6, 8)
    assert [frame.shape for frame in VideoReader(tmp_path)] == [(8, 6, 3)] * 3


def test_reader_of_images_of_two_sizes_raises(folder, tmp_path):
    write_image(folder / "shot5.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"shot5\.png is 8x8, the first image 8x6"):
        list(VideoReader(folder))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="without images"):
        probe(tmp_path / "none")


def test_image_sequence_round_trip(tmp_path):
    pattern = tmp_path / "new" / "shot-%04d.png"
    given = [np.full((6, 8, 3), i, np.uint8) for i in range(3)]
    with VideoWriter(pattern, size=(8, 6), fps=Fraction(25)) as writer:
        for frame in given:
            writer.write(frame)
    assert sorted(p.name for p in pattern.parent.iterdir()) == [f"shot-000{i}.png" for i in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(VideoReader(pattern.parent), given, strict=True))
    assert b"synthetic" in (pattern.parent / "shot-0000.png").read_bytes()
    with pytest.raises(InputError, match="already"):
        VideoWriter(pattern, size=(8, 6), fps=Fraction(25))
    with pytest.raises(InputError, match=r"%05d\.png"):
        VideoWriter(tmp_path / "one.png", size=(8, 6), fps=Fraction(25))


@pytest.mark.parametrize("rate", ["25", "30000/1001"])
def test_avi_of_copied_stream_has_frames_of_original(picture, make, rate):
    original = picture("a.mp4", rate, 40)  # with B-frames, which AVI stamps with decoding times only
    path = make("a.avi", "-i", str(original), "-c", "copy")
    info = probe(path)
    assert (info.fps, info.frame_count, info.vfr) == (Fraction(rate), 40, False)
    frames = list(VideoReader(original))
    assert np.array_equal(list(VideoReader(path)), frames)
    for start in (1, 10):
        part = VideoReader(path, start=start / float(info.fps), duration=20 / float(info.fps))
        assert np.array_equal(list(part), frames[start : start + 20])


def test_avi_of_copied_stream_with_missing_frames_has_rate_of_original(picture, make):
    holes = "select='not(between(n,20,50)*mod(n,3))'"
    original = picture("a.mp4", "30", 80, "-vf", holes, "-fps_mode", "vfr")
    path = make("a.avi", "-i", str(original), "-c", "copy")
    assert (probe(path).fps, probe(path).vfr) == (30, True)
    assert abs(len(list(VideoReader(path))) - len(list(VideoReader(original)))) <= 1


def test_edit_list_hides_the_frames_before_it(picture, make):
    """A clip that a phone trimmed still holds the frames before its start, from the key frame on."""
    original = picture("a.mp4", "25", 40)
    path = make("trimmed.mp4", "-ss", "0.52", "-i", str(original), "-c", "copy")
    info, frames = probe(path), list(VideoReader(path))
    assert (info.fps, info.frame_count, info.vfr, len(frames)) == (25, 27, False, 27)
    assert info.duration == pytest.approx(27 / 25)
    assert np.array_equal(frames, list(VideoReader(original))[13:])


def test_avi_of_mpeg4_with_b_frames_has_all_frames(make):
    path = make("a.avi", "-f", "lavfi", "-i", "testsrc=r=25:d=1", "-c:v", "mpeg4", "-bf", "2", "-q:v", "2")
    assert (probe(path).fps, probe(path).frame_count, len(list(VideoReader(path)))) == (25, 25, 25)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("a.h264", []),
        ("a.mjpeg", ["-c:v", "mjpeg", "-q:v", "2"]),
        ("a.y4m", ["-c:v", "rawvideo"]),
        ("a.mkv", ["-f", "matroska", "-live", "1"]),
    ],
)
def test_probe_of_stream_without_duration_counts_its_frames(make, name, args):
    path = make(name, "-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=35", "-pix_fmt", "yuvj420p", *args)
    info = probe(path)
    assert info.frame_count == len(list(VideoReader(path))) == 35 * 25
    assert info.duration == 35
