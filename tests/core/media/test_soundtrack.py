"""Sound of every kind in output videos: channel layouts, several tracks, tracks that cannot be decoded."""

import subprocess
import warnings
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from export3d_cli.core.media.probe import audio_tracks, ffmpeg_path, probe
from export3d_cli.core.media.reader import VideoReader
from export3d_cli.core.media.soundtrack import SOUND_RATE, check_has_sound, choose_soundtrack, find_silence, read_sound
from export3d_cli.core.media.writer import VideoWriter
from export3d_cli.core.runtime.errors import Export3DWarning, InputError

LAYOUTS = ["mono", "stereo", "2.1", "quad", "5.0", "5.1", "5.1(side)", "7.1", "7.1(wide)", "hexadecagonal", "22.2"]


def write_second(path, audio, **options):
    """Write one second of grey frames with this audio."""
    with VideoWriter(path, size=(32, 32), fps=Fraction(25), audio=audio, **options) as writer:
        for _ in range(25):
            writer.write(np.full((32, 32, 3), 90, np.uint8))


def waveform(path):
    """Return the sound of a file as mono samples in [-1, 1] at 48 kHz."""
    command = [
        ffmpeg_path(),
        "-v",
        "error",
        "-i",
        str(path),
        "-map",
        "0:a:0",
        "-ac",
        "1",
        "-ar",
        "48000",
        "-f",
        "f32le",
    ]
    return np.frombuffer(subprocess.run([*command, "-"], capture_output=True, check=True).stdout, np.float32)


def tone_of(path):
    """Return the loudest frequency of a file's sound in Hz."""
    wave = waveform(path)
    spectrum = np.abs(np.fft.rfft(wave))
    return float(np.argmax(spectrum) * 48000 / len(wave))


def tones(make, name, *frequencies, codec=("-c:a", "aac")):
    """Encode a silent picture and one audio track for each frequency."""
    sources = [part for f in frequencies for part in ("-f", "lavfi", "-i", f"sine=frequency={f}:d=2")]
    maps = [part for i in range(len(frequencies) + 1) for part in ("-map", str(i))]
    picture = ["-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=2"]
    return make(name, *picture, *sources, *maps, "-c:v", "libx264", "-pix_fmt", "yuv420p", *codec)


def break_first_track(path, kind=b"zzzz"):
    """Give the first audio track of an .mp4 the type of a codec that ffmpeg does not know."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"mp4a", kind, 1).replace(b"esds", b"free", 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writer_adds_sound_of_any_channel_layout(make, tmp_path, layout):
    suffix = (".mp4", ".webm", ".mkv", ".mov")[LAYOUTS.index(layout) % 4]
    codec = "pcm_s16le" if layout in ("hexadecagonal", "22.2") else "flac"  # FLAC has 8 channels at most
    filters = f"sine=frequency=440:d=2:r=48000,aformat=channel_layouts={layout}"
    source = make("a.mkv", "-f", "lavfi", "-i", filters, "-c:a", codec)
    write_second(tmp_path / f"out{suffix}", source)
    wave = waveform(tmp_path / f"out{suffix}")
    assert abs(len(wave) / 48000 - 1) < 0.05
    assert abs(tone_of(tmp_path / f"out{suffix}") - 440) < 2


@pytest.mark.parametrize(("suffix", "codec"), [(".webm", "opus"), (".mp4", "ac3"), (".mkv", "ac3")])
def test_writer_adds_surround_sound_of_film(make, tmp_path, suffix, codec):
    filters = "sine=frequency=440:d=2:r=48000,aformat=channel_layouts=5.1(side)"
    source = make("a.mkv", "-f", "lavfi", "-i", filters, "-c:a", "ac3")
    write_second(tmp_path / f"out{suffix}", source)
    (track,) = audio_tracks(tmp_path / f"out{suffix}")
    assert (track.codec, track.layout.partition("(")[0]) == (codec, "5.1")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_writer_adds_first_two_of_unknown_channels(tmp_path, suffix):
    samples = np.zeros((96000, 64), "<i2")
    samples[:, 1] = (9000 * np.sin(2 * np.pi * 700 * np.arange(96000) / 48000)).astype(int)
    (tmp_path / "a.raw").write_bytes(samples.tobytes())
    raw = ["-f", "s16le", "-ar", "48000", "-ac", "64", "-i", str(tmp_path / "a.raw")]
    subprocess.run([ffmpeg_path(), "-v", "error", *raw, str(tmp_path / "a.wav")], check=True)
    write_second(tmp_path / f"out{suffix}", tmp_path / "a.wav")
    assert audio_tracks(tmp_path / f"out{suffix}")[0].layout == "stereo"
    assert abs(tone_of(tmp_path / f"out{suffix}") - 700) < 2


@pytest.mark.parametrize(("suffix", "kind"), [(".mp4", b"apac"), (".webm", b"zzzz")])  # iPhones write Apple's APAC
def test_writer_adds_first_decodable_track(make, tmp_path, suffix, kind):
    source = tones(make, "a.mp4", 300, 900, 1500)
    break_first_track(source, kind)
    first, *others = [track.codec for track in audio_tracks(source)]
    assert others == ["aac", "aac"]
    with pytest.warns(Export3DWarning, match=rf"track 2 is used.*\({first}\)"):
        write_second(tmp_path / f"out{suffix}", source)
    assert abs(tone_of(tmp_path / f"out{suffix}") - 900) < 2


def test_writer_skips_track_of_damaged_packets(make, tmp_path):
    source = tones(make, "a.mkv", 300, 900)
    good = choose_soundtrack(source, ".mp4")
    assert good is not None
    assert (good.index, good.encoder) == (0, ("copy",))
    broken = make("b.mkv", "-i", str(source), "-map", "0", "-c", "copy", "-bsf:a:0", "noise=amount=1")
    with pytest.warns(Export3DWarning, match="track 2 is used"):
        write_second(tmp_path / "out.mp4", broken)
    assert abs(tone_of(tmp_path / "out.mp4") - 900) < 2


def test_writer_without_decodable_sound_writes_silent_video(make, tmp_path):
    source = tones(make, "a.mp4", 300)
    break_first_track(source)
    with pytest.warns(Export3DWarning, match=r"cannot be decoded \(none\), so the result is silent"):
        write_second(tmp_path / "out.mp4", source)
    assert not probe(tmp_path / "out.mp4").has_audio
    assert len(list(VideoReader(tmp_path / "out.mp4"))) == 25
    with pytest.raises(InputError, match=r"cannot be decoded \(none\): convert it"):
        check_has_sound(source)


def test_writer_keeps_picture_if_sound_cannot_be_added(make, tmp_path):
    source, out = tones(make, "a.mp4", 300), tmp_path / "out.mp4"
    writer = VideoWriter(out, size=(32, 32), fps=Fraction(25), audio=source)
    writer.__enter__()
    for _ in range(25):
        writer.write(np.full((32, 32, 3), 90, np.uint8))
    source.unlink()
    with pytest.warns(Export3DWarning, match=r"out\.mp4 is silent, because adding the sound of .*a\.mp4 failed"):
        writer.__exit__(None, None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4"]
    assert not probe(out).has_audio
    assert [int(frame[9, 9, 0]) for frame in VideoReader(out)] == pytest.approx([90] * 25, abs=2)


@pytest.mark.parametrize(
    ("codec", "start", "suffix"),
    [("pcm_s16le", 0.5, ".mkv"), ("wmav2", 0.04, ".mp4"), ("libmp3lame", 0.5, ".mp4"), ("adpcm_ms", 0.0, ".mp4")],
)
def test_writer_adds_sound_of_avi_of_copied_stream(make, tmp_path, codec, start, suffix):
    original = tones(make, "a.mp4", 440)
    source = make("a.avi", "-i", str(original), "-c:v", "copy", "-c:a", codec)
    out = tmp_path / f"out{suffix}"
    write_second(out, source, audio_start=start)
    assert abs(len(waveform(out)) / 48000 - 1) < 0.08
    assert abs(tone_of(out) - 440) < 2
    assert len(list(VideoReader(out))) == 25


def test_choose_soundtrack_of_usual_sound_does_not_warn(sound):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_soundtrack(sound("a.wav"), ".mp4") is not None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("text.mp3", b"hello\n", "has no sound: give"), ("gone.mp3", None, "no file"), ("empty.mp3", b"", "is empty")],
)
def test_check_has_sound_of_other_file_raises(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_has_sound(tmp_path / name)


def test_check_has_sound_of_silent_video_raises(picture, sound):
    with pytest.raises(InputError, match="has no sound"):
        check_has_sound(picture("a.mp4"))
    check_has_sound(sound("a.wav"))
    check_has_sound(Path(sound("b.mp3")))


def test_find_silence_weighs_frames_between_tones(tmp_path):
    path, rate = tmp_path / "sound.wav", Fraction(30000, 1001)
    source = "sine=300:d=3,volume=volume='if(between(t,1,2),0.002,0.5)':eval=frame"
    subprocess.run([ffmpeg_path(), "-v", "error", "-f", "lavfi", "-i", source, str(path)], check=True)
    silent = find_silence(path, rate)
    assert len(silent) == 90
    at = [round(float(t * rate)) for t in (0.5, 1.0, 1.5, 2.0, 2.5)]
    np.testing.assert_allclose(silent[at], [0, 0, 1, 0, 0])
    assert (np.abs(np.diff(silent)) <= 0.2).all()  # lips take time
    np.testing.assert_allclose(find_silence(path, rate, 1.5)[:3], 1)
    with pytest.raises(InputError, match="needs sound"):
        find_silence(None, rate)


def test_read_sound_ends_with_the_duration_of_a_packet_that_lasts_hours(tmp_path):
    with wave.open(str(tmp_path / "slow.wav"), "wb") as file:
        file.setparams((1, 2, 1, 0, "NONE", ""))  # 1 Hz
        file.writeframes(bytes(8000))
    sound = list(read_sound(tmp_path / "slow.wav", Fraction(25), duration=0.32))
    assert [len(samples) for samples in sound] == [SOUND_RATE // 25] * 8
