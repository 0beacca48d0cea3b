"""Motion from sound: mouth shapes of phones, closures, silence, texts and subtitles, and phones that are recognised."""

from __future__ import annotations

import math
import sys
import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export3d_cli.core.animation.driver_stream import DriverStream
from export3d_cli.core.animation.options import ReenactOptions
from export3d_cli.core.dataset.preprocess import preprocess
from export3d_cli.core.face import speech
from export3d_cli.core.face.arkit import read_csv
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.face.speech import Cue, Phone, read_cues, read_speech
from export3d_cli.core.face.tracker import open_landmarker_tracker
from export3d_cli.core.media.soundtrack import SOUND_RATE
from export3d_cli.core.runtime.camera import orbit_camera, yaw_pitch_roll
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.weights import example_path

CAMERA = orbit_camera(10, -5)
FPS = Fraction(25)
FORMANTS = {"M": (250, 1200), "AA": (750, 1150), "IY": (290, 2300), "UW": (310, 850)}  # Hz
WriteSound = Callable[..., Path]


def synthesize(phones: Sequence[Phone], rate: int = SOUND_RATE) -> np.ndarray:
    """Return a buzz of 110 Hz through two resonances per phone, in [-1, 1]; silent where no phone is."""
    time = np.arange(round((phones[-1].end + 0.4) * rate)) / rate
    sound = np.zeros_like(time)
    for name, start, end in phones:
        if name == "SIL":
            continue
        gain = np.interp(time, [start - 0.01, start + 0.01, end - 0.01, end + 0.01], [0, 1, 1, 0])
        for harmonic in range(1, min(36, int(rate / 220))):
            pitch = 110.0 * harmonic
            resonance = sum(1 / (1 + ((pitch - f) / 90) ** 2) for f in FORMANTS[name])
            sound += gain * (0.3 if name == "M" else 1) * (resonance + 0.01) * np.sin(2 * np.pi * pitch * time)
    return sound / np.abs(sound).max()


MAMA = [
    Phone(name, 0.5 + start, 0.5 + end)
    for name, start, end in (("M", 0, 0.12), ("AA", 0.12, 0.4), ("M", 0.4, 0.52), ("AA", 0.52, 0.85))
]


@pytest.fixture
def write_sound(tmp_path: Path) -> WriteSound:
    """Return a function that writes samples in [-1, 1] as a WAV file."""

    def write(samples: np.ndarray, rate: int = SOUND_RATE, channels: int = 1) -> Path:
        path = tmp_path / "sound.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(np.repeat(np.rint(samples * 30000).astype("<i2"), channels).tobytes())
        return path

    return write


@pytest.fixture
def recognize(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces the recogniser by one that hears these phones, and only these words."""

    def replace(phones: Sequence[Phone], words: Sequence[str] = ()) -> None:
        class Recognizer:
            def decode(self, samples: np.ndarray) -> list[Phone]:
                return list(phones)

            def align(self, samples: np.ndarray, said: Sequence[str]) -> list[Phone]:
                return list(phones) if list(said) == list(words) else []

        monkeypatch.setattr(speech, "_Recognizer", Recognizer)

    return replace


def column(motion: Motion, name: str) -> np.ndarray:
    values: np.ndarray = motion.beta[:, ARKIT_NAMES.index(name)]
    return values


def frames(motion: Motion, phone: Phone) -> np.ndarray:
    times = (np.arange(len(motion)) + 0.5) / float(motion.fps)
    return np.flatnonzero((times > phone.start) & (times < phone.end))


@pytest.mark.parametrize("fps", [Fraction(24), Fraction(30000, 1001), Fraction(60)])
def test_lips_meet_at_every_closure_and_open_at_vowels(
    write_sound: WriteSound, recognize: Callable[..., None], fps: Fraction
) -> None:
    recognize(MAMA)
    motion, notes = read_speech(write_sound(synthesize(MAMA)), CAMERA, fps=fps)
    assert not notes and motion.fps == fps and len(motion) == math.ceil(1.75 * fps)
    for phone in MAMA:
        jaw = column(motion, "jawOpen")[frames(motion, phone)]
        assert jaw.min() < 0.01 if phone.name == "M" else jaw.max() > 0.45
    pressed = column(motion, "mouthPressLeft")
    assert all(pressed[frames(motion, phone)].max() > 0.24 for phone in MAMA if phone.name == "M")


def test_vowels_have_their_order_of_opening_and_u_is_round(
    write_sound: WriteSound, recognize: Callable[..., None]
) -> None:
    vowels = [Phone(name, 0.5 + 0.5 * k, 0.9 + 0.5 * k) for k, name in enumerate(("AA", "EH", "IY", "UW"))]
    sound = write_sound(synthesize([Phone("AA", p.start, p.end) for p in vowels]))
    recognize(vowels)
    motion, _ = read_speech(sound, CAMERA)
    middles = [frames(motion, phone)[4] for phone in vowels]
    a, e, i, u = column(motion, "jawOpen")[middles]
    assert a > e + 0.1 > i + 0.2 > 0.2 and u < e
    assert column(motion, "mouthPucker")[middles[3]] > 0.8
    assert (column(motion, "mouthPucker")[middles[:3]] < 0.05).all()


def test_silence_shuts_the_lips_whatever_is_recognised(write_sound: WriteSound, recognize: Callable[..., None]) -> None:
    recognize([Phone("AA", 0.0, 6.0)])
    sound = np.concatenate([synthesize([Phone("AA", 0.1, 2.0)]), np.zeros(4 * SOUND_RATE)])
    motion, _ = read_speech(write_sound(sound), CAMERA)
    mouth = [name for name in ARKIT_NAMES if name.startswith(("jaw", "mouth"))]
    assert max(np.ptp(column(motion, name)[62:]) for name in mouth) == 0
    assert not column(motion, "jawOpen")[62:].any() and (column(motion, "mouthPressLeft")[62:] > 0.1).all()
    assert column(motion, "jawOpen")[20:40].min() > 0.4


def test_a_louder_syllable_opens_wider(write_sound: WriteSound, recognize: Callable[..., None]) -> None:
    quiet, loud = Phone("AA", 0.5, 1.0), Phone("AA", 1.0, 1.5)
    recognize([quiet, loud])
    sound = synthesize([quiet, loud])
    sound[:SOUND_RATE] *= 0.15
    jaw = column(read_speech(write_sound(sound), CAMERA)[0], "jawOpen")
    assert jaw[31] > jaw[18] + 0.1 > 0.2


def test_head_and_lids_move_a_little_and_always_the_same(
    write_sound: WriteSound, recognize: Callable[..., None]
) -> None:
    recognize([Phone("AA", 0.0, 60.0)])
    sound = write_sound(np.sin(np.arange(60 * SOUND_RATE) * 0.05) * np.abs(np.sin(np.arange(60 * SOUND_RATE) * 1e-4)))
    motion, again = (read_speech(sound, CAMERA)[0] for _ in range(2))
    np.testing.assert_array_equal(motion.beta, again.beta)
    np.testing.assert_array_equal(motion.camera, again.camera)
    shut = column(motion, "eyeBlinkLeft") > 0.6
    assert 10 <= (np.diff(shut.astype(int)) == 1).sum() <= 25  # in a minute
    angles = yaw_pitch_roll(motion.camera) - yaw_pitch_roll(CAMERA[None])
    assert (np.ptp(angles, axis=0) > 0.5).all() and np.abs(angles).max() < 6  # degrees
    assert np.abs(np.diff(angles, axis=0)).max() < 1


def test_start_and_duration_choose_the_part_that_is_spoken(
    write_sound: WriteSound, recognize: Callable[..., None]
) -> None:
    recognize([])
    sound = write_sound(np.concatenate([np.zeros(SOUND_RATE), synthesize(MAMA)]))
    motion, notes = read_speech(sound, CAMERA, start=1.0, duration=1.2)
    assert len(motion) == 30
    assert not column(motion, "jawOpen").any() and "no speech was found" in notes[0]


def test_sound_is_decoded_in_segments_that_end_at_pauses(
    write_sound: WriteSound, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    class Recognizer:
        def decode(self, samples: np.ndarray) -> list[Phone]:
            lengths.append(len(samples) / SOUND_RATE)
            return [Phone("AA", 0.0, 0.1)]

    monkeypatch.setattr(speech, "_Recognizer", Recognizer)
    sound = np.random.default_rng(0).uniform(-1, 1, 40 * SOUND_RATE)
    for pause in (11, 20):
        sound[pause * SOUND_RATE : round((pause + 0.3) * SOUND_RATE)] = 0
    motion, _ = read_speech(write_sound(sound), CAMERA)
    assert sum(lengths) == pytest.approx(40, abs=0.1) and max(lengths) <= speech.SEGMENT_S + 0.1
    np.testing.assert_allclose(np.cumsum(lengths)[:2], [11.15, 20.15], atol=0.15)
    assert column(motion, "jawOpen")[round(lengths[0] * 25) + 1] > 0.1  # phones have the times of the whole sound


def test_cues_are_decoded_at_their_times_and_a_wrong_one_is_named(
    write_sound: WriteSound, recognize: Callable[..., None], tmp_path: Path
) -> None:
    text = tmp_path / "text.srt"
    cue = "{}\n00:00:0{},000 --> 00:00:0{},500\n<i>{}</i>\n\n"
    text.write_text(cue.format(1, 1, 1, "Mama!") + cue.format(2, 3, 3, "papa"), encoding="utf-8")
    assert read_cues(text) == [Cue(1.0, 1.5, ["mama"]), Cue(3.0, 3.5, ["papa"])]
    assert read_cues(text, 2.0) == [Cue(1.0, 1.5, ["papa"])]
    recognize([Phone("UW", 0.25, 0.75)], ["mama"])
    sound = write_sound(np.sin(np.arange(5 * SOUND_RATE) * 0.05))
    motion, notes = read_speech(sound, CAMERA, text=text)
    assert "may differ" in notes[0] and "(at 3.0 s)" in notes[0]
    pucker = column(motion, "mouthPucker")
    assert pucker[31] > 0.8 and pucker[81] > 0.8 and pucker[50:68].max() < 0.05


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"mama papa", "is not what"),
        (b"", "no words in Latin letters"),
        ("Привет".encode(), "no words in Latin letters"),
        (b"\xff\xfe\x00", "save it as UTF-8"),
        (b"1\n0:0 --> 0:1\nmama\n", "times that cannot be read"),
        (b"something else " * 1000, "is not what"),
        (b"1\n00:00:00,500 --> 00:00:01,500\nelse\n\n" * 3, "more than two subtitles at a time"),
    ],
)
def test_useless_text_is_refused_in_one_line(
    write_sound: WriteSound, recognize: Callable[..., None], tmp_path: Path, content: bytes, message: str
) -> None:
    recognize(MAMA, ["something", "else"] * 1000)
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_speech(write_sound(synthesize(MAMA)), CAMERA, text=text)


def test_words_lose_accents_and_digits_are_spoken() -> None:
    assert speech.split_words("Élan vital, don’t — 42!") == ["elan", "vital", "don't", "four", "two"]


@pytest.mark.parametrize("samples", [0, 100])
def test_empty_or_very_short_sound_does_not_crash(
    write_sound: WriteSound, recognize: Callable[..., None], samples: int
) -> None:
    recognize([])
    path = write_sound(np.full(samples, 0.5))
    if samples:
        assert len(read_speech(path, CAMERA)[0]) == 1
    else:
        with pytest.raises(InputError, match="sound"):
            read_speech(path, CAMERA)


def test_without_the_extra_one_line_says_what_to_install(
    write_sound: WriteSound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(InputError, match=r"pip install 'export3d-cli\[speech\]'"):
        read_speech(write_sound(synthesize(MAMA)), CAMERA)


@pytest.fixture
def installed() -> None:
    pytest.importorskip("pocketsphinx", reason="the extra `speech` is not installed")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (SOUND_RATE, 1), (48000, 2)])
def test_words_of_a_text_are_found_in_the_sound(
    write_sound: WriteSound, tmp_path: Path, rate: int, channels: int
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Mama", encoding="utf-8")
    motion, notes = read_speech(write_sound(synthesize(MAMA, rate), rate, channels), CAMERA, text=text)
    assert not notes
    times = (np.arange(len(motion)) + 0.5) / float(FPS)
    pressed = times[column(motion, "mouthPressLeft") > 0.2]
    for phone in (MAMA[0], MAMA[2]):
        assert np.abs(pressed - (phone.start + phone.end) / 2).min() < 0.06  # seconds
    for phone in (MAMA[1], MAMA[3]):
        assert column(motion, "jawOpen")[frames(motion, phone)].max() > 0.3


@pytest.mark.usefixtures("installed")
def test_any_sound_can_be_decoded(write_sound: WriteSound) -> None:
    rng, time = np.random.default_rng(0), np.arange(2 * SOUND_RATE) / SOUND_RATE
    for sound in (np.zeros_like(time), 0.9 * np.sin(2 * np.pi * 440 * time), rng.uniform(-1, 1, len(time))):
        motion, _ = read_speech(write_sound(sound), CAMERA)
        assert len(motion) == 50 and np.isfinite(motion.beta).all() and np.abs(motion.beta[:, :52]).max() <= 1
        if not sound.any():
            assert not column(motion, "jawOpen").any()


@pytest.mark.usefixtures("installed")
def test_unknown_words_are_spelled_by_sound() -> None:
    recognizer = speech._Recognizer()
    assert recognizer._pronunciations("mama") == [["M", "AA", "M", "AH"]]
    assert recognizer._pronunciations("schnupfa") == [["SH", "N", "UW", "P", "F", "AA"]]


def test_a_sound_drives_a_stream_and_a_text_needs_one(
    write_sound: WriteSound, recognize: Callable[..., None], tmp_path: Path
) -> None:
    recognize(MAMA)
    sound, text = write_sound(synthesize(MAMA)), tmp_path / "text.txt"
    text.write_text("mama", encoding="utf-8")

    def stream(driver: Path, crop_size: int | None = None, **options: Any) -> DriverStream:
        job = ReenactOptions(smooth="off", pose="absolute", **options)
        return DriverStream(driver, open_landmarker_tracker(), job, batch=8, crop_scale=2.1, crop_size=crop_size)

    with stream(sound, max_frames=30) as driver:
        motion = Motion.concatenate([batch.motion for batch in driver])
    assert (len(motion), driver.total, driver.fps, driver.missing) == (30, 30, 25, 0)
    assert column(motion, "jawOpen").max() > 0.4
    with pytest.raises(InputError, match="add --drive-by sound"):
        stream(example_path("drive.mp4"), text=text)
    with pytest.raises(InputError, match="leave out --compare"):
        stream(sound, crop_size=16)
    with pytest.raises(InputError, match="has no sound"):
        stream(example_path("source.jpg"), drive_by="sound")
    take = tmp_path / "take.csv"
    preprocess([sound], take)
    assert read_csv(take, CAMERA)[0].beta[:, ARKIT_NAMES.index("jawOpen")].max() > 0.4


def test_a_text_of_a_long_sound_needs_times(
    write_sound: WriteSound, recognize: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognize(MAMA, ["mama"])
    monkeypatch.setattr(speech, "MAX_CUE_S", 1.0)
    text = tmp_path / "text.txt"
    text.write_text("mama", encoding="utf-8")
    sound = write_sound(synthesize(MAMA))
    with pytest.raises(InputError, match=r"at most 1 s .* subtitles"):
        read_speech(sound, CAMERA, text=text)
    assert len(read_speech(sound, CAMERA, text=text, duration=0.8)[0]) == 20
