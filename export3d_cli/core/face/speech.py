"""Motion of a face that speaks a sound: lips from phones; blinks, brows and small head movements from its loudness.

PocketSphinx (the extra `speech`) recognises phones with an English acoustic model: those of a text that is spoken, by
forced alignment, else the most likely ones. Each phone has a mouth shape in ARKit's coefficients. Shapes overlap as in
the dominance model of Cohen and Massaro (1993), but lips that must meet (p, b, m; f, v) do. Sounds that are
silent leave the lips shut. The same sound always gives the same motion.
"""

import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export3d_cli.core.face.arkit import head_rotations, make_motion
from export3d_cli.core.face.expression_coefficients import ARKIT_NAMES
from export3d_cli.core.face.motion import Motion
from export3d_cli.core.media.probe import audio_tracks
from export3d_cli.core.media.soundtrack import SOUND_RATE, loudness, mean_square, measure_silence, read_sound
from export3d_cli.core.runtime.camera import head_pose, with_head_pose
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import check_file

DEFAULT_FPS = Fraction(25)
SEGMENT_S = 15.0  # longest sound that is decoded at once without a text
INSET_S = 0.03  # at most, or a quarter of a phone: where its shape begins to fade before the phone's ends
SPREAD_S = 0.06  # over which it fades
CONTACT_S = 0.04  # in which lips come together before a closure, and part after it
MAX_CUE_S = 180.0  # the time of an alignment grows with the square of its length: 20 s for 88 s of sound
MAX_WORDS_PER_S = 20  # of a text, whose alignment takes time; people speak up to 7
BLINK_INTERVAL_S = (2.5, 5.5)
MAX_TEXT_BYTES = 2**22
# Of the time in which an alignment or the free recognition hears a phone, the part in which both hear the same one:
# .46 to .74 for English words that are spoken, .16 to .31 for other languages' words, .02 to .27 for other words.
REFUSED_AGREEMENT, DOUBTFUL_AGREEMENT = 0.12, 0.3
_PHONE_RATE = 100  # of PocketSphinx's frames
_MIN_SAMPLES = SOUND_RATE // 20  # fewer make no frame that can be decoded
_CUE_MARGIN_S = 0.25  # subtitles are not exact
_CONTROLS = (
    *(("jawOpen",), ("mouthLowerDownLeft", "mouthLowerDownRight"), ("mouthUpperUpLeft", "mouthUpperUpRight")),
    *(("mouthStretchLeft", "mouthStretchRight"), ("mouthFunnel",), ("mouthPucker",)),
    *(("mouthPressLeft", "mouthPressRight"), ("mouthShrugLower",), ("mouthRollLower",), ("mouthRollUpper",)),
)
# values of `_CONTROLS` for each phone, as the tracker measures them on people who speak
_VISEMES = Path(__file__).with_name("visemes.csv").read_text(encoding="utf-8").splitlines()[1:]
_ROWS = (row.split(",") for row in _VISEMES)
SHAPES = {phone: np.array(shape, np.float64) for phones, *shape in _ROWS for phone in phones.split()}
_DIPHTHONGS = {"AY": ("AA", "IH"), "AW": ("AA", "UW"), "EY": ("EH", "IY"), "OW": ("AO", "UW"), "OY": ("AO", "IH")}
_CONTACTS = frozenset({"P", "B", "M", "F", "V"})
_VOWELS = frozenset({"AA", "AE", "AH", "EH", "IH", "IY", "AO", "UH", "UW", "W"})  # which dominate the rest
_PHONES = (SHAPES.keys() - {"SIL"}) | _DIPHTHONGS.keys()
# How letters sound in words that the dictionary lacks.
_SOUNDS = """sch=SH ch=CH sh=SH th=TH ph=F ng=NG ee=IY oo=UW ou=UW ck=K a=AA b=B c=K d=D e=EH f=F g=G h=HH i=IH j=JH k=K
             l=L m=M n=N o=AO p=P q=K r=R s=S t=T u=UW v=V w=W x=K y=IY z=Z"""
_LETTERS = dict(sound.split("=") for sound in _SOUNDS.split())
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CLOCK = r"(\d{1,4}):(\d\d):(\d\d)[,.](\d{3})"
_CUE = re.compile(rf"{_CLOCK}\s*-->\s*{_CLOCK}[^\n]*\n(.*?)(?:\n\s*\n|\Z)", re.DOTALL)


class Phone(NamedTuple):
    """A phone of CMUdict, without stress, or SIL; times in seconds."""

    name: str
    start: float
    end: float


class Cue(NamedTuple):
    """Words that are spoken between two times in seconds."""

    start: float
    end: float
    words: list[str]


def read_speech(sound: Path, camera: np.ndarray, *, fps: Fraction = DEFAULT_FPS, start: float = 0.0,
                duration: float | None = None, text: Path | None = None) -> tuple[Motion, list[str]]:  # fmt: skip
    """Return the motion at a rate `fps` of a head that speaks the sound of a file, without landmarks; also notes.

    The sound is used from `start` for `duration` seconds (None: to its end). `text` is a text file with the words that
    are spoken in this part, or a subtitle file (SRT) of the whole sound. `camera` (25,) gives the head's place and mean
    pose. Raises `InputError` if there is no sound, if the text is not what is spoken, or without the extra `speech`.
    """
    if not audio_tracks(sound):
        raise InputError(f"{sound} has no sound: give an audio file or a video with sound")
    power, notes = array("d"), list[str]()

    def measured() -> Iterator[np.ndarray]:
        for samples in read_sound(sound, fps, start, duration):
            power.append(mean_square(samples))
            yield samples

    cues = None if text is None else read_cues(text, start)
    phones, agreements = recognize_phones(measured(), cues)
    if not power:
        raise InputError(f"{sound} has no sound that can be decoded after {start:g} s: give another file or --start")
    if agreements and max(agreements) < REFUSED_AGREEMENT:
        raise InputError(f"{text} is not what {sound} says: give the words that are spoken, or leave out --text")
    doubtful = [cue for cue, value in zip(cues or (), agreements, strict=True) if value < DOUBTFUL_AGREEMENT]
    if doubtful:
        at = ", ".join(f"{cue.start + start:.1f}" for cue in doubtful[:5])
        notes.append(f"{text} may differ from what {sound} says (at {at} s), or is not English: check the lips")
    if all(phone.name == "SIL" for phone in phones):
        notes.append(f"no speech was found in {sound}: the lips stay shut")
    return speak(phones, np.array(power), fps, camera), notes


def read_cues(text: Path, start: float = 0.0) -> list[Cue]:
    """Read what is spoken: a text as one cue, or the cues of an SRT file as seconds after `start` of the sound."""
    check_file(text, MAX_TEXT_BYTES)
    try:
        content = text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text} cannot be read as text ({error}): save it as UTF-8") from error
    matches = _CUE.findall(content)
    if not matches and "-->" in content:
        raise InputError(f"{text} has times that cannot be read: they must be 00:00:01,500 --> 00:00:03,000")
    cues = [Cue(0.0, np.inf, split_words(content))] if not matches else []
    for *clock, line in matches:
        h, m, s, ms, h2, m2, s2, ms2 = map(int, clock)
        begin, end = h * 3600 + m * 60 + s + ms / 1000 - start, h2 * 3600 + m2 * 60 + s2 + ms2 / 1000 - start
        cues.append(Cue(max(begin, 0.0), end, split_words(re.sub(r"<[^>]*>|\{[^}]*\}", "", line))))
    cues = sorted(cue for cue in cues if cue.words and cue.end > cue.start)
    if not cues:
        raise InputError(f"{text} has no words in Latin letters: give the spoken text, or leave out --text")
    if any(third.start < first.end for first, third in zip(cues, cues[2:], strict=False)):  # each is decoded
        raise InputError(f"{text} has more than two subtitles at a time: give each its own time")
    return cues


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without accents; digits are words of their own."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.replace("’", "'")) if not unicodedata.combining(c))
    words = re.findall(r"[a-z]+(?:'[a-z]+)*|[0-9]", plain.lower())
    return [_DIGITS[int(word)] if word.isdigit() else word for word in words]


def recognize_phones(samples: Iterable[np.ndarray], cues: Sequence[Cue] | None) -> tuple[list[Phone], list[float]]:
    """Return the phones of a sound, int16 in parts at `SOUND_RATE`, and the agreement of each cue, [0, 1].

    Without `cues`, no more than `SEGMENT_S` of the sound is in memory; the words of cues that are refused are not used.
    """
    recognizer = _Recognizer()
    phones, agreements = list[Phone](), list[float]()
    for begin, part, cue in _cut_at_pauses(samples) if cues is None else _cut_at_cues(samples, cues):
        found = recognizer.decode(part)
        if cue is not None:
            fits = len(cue.words) <= MAX_WORDS_PER_S * (1 + len(part) / SOUND_RATE)
            aligned = recognizer.align(part, cue.words) if fits else []
            agreements.append(_agreement(aligned, found))
            found = found if agreements[-1] < REFUSED_AGREEMENT else aligned
        phones += [Phone(p.name, p.start + begin, p.end + begin) for p in found]
    return phones, agreements


def _agreement(one: Sequence[Phone], other: Sequence[Phone]) -> float:
    """Return in which part of the time that one of two recognitions of a sound hears a phone both hear the same."""
    if not one or not other:
        return 0.0
    names, others = (
        np.repeat([p.name for p in phones], [round((p.end - p.start) * _PHONE_RATE) for p in phones])
        for phones in (one, other)
    )
    count = min(len(names), len(others))
    names, others = names[:count], others[:count]
    heard = (names != "SIL") | (others != "SIL")
    return float((names == others)[heard].mean()) if heard.any() else 0.0


class _Recognizer:
    """PocketSphinx with two searches: any phones, and the phones of given words."""

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder, get_model_path
        except ImportError as error:
            raise InputError("a sound as driver needs pocketsphinx: pip install 'export3d-cli[speech]'") from error
        model = get_model_path("en-us")
        self._decoder: Any = Decoder(hmm=f"{model}/en-us", dict=f"{model}/cmudict-en-us.dict", lm=None, lw=0.5,
                                     loglevel="FATAL", beam=1e-80, pbeam=1e-80, wbeam=1e-60)  # fmt: skip
        self._decoder.add_allphone_file("phones", f"{model}/en-us-phone.lm.bin")
        for phone in sorted(_PHONES):  # as words: a text is a sequence of them
            self._decoder.add_word(f"_{phone}", phone, False)
        self._decoder.add_word("_SIL", "SIL", True)

    def decode(self, samples: np.ndarray) -> list[Phone]:
        """Return the most likely phones, with times from the first sample."""
        self._decoder.activate_search("phones")
        return self._search(samples)

    def align(self, samples: np.ndarray, words: Sequence[str]) -> list[Phone]:
        """Return the phones of words with their times; none if they cannot be what is spoken."""
        transitions, state, count = [], 0, 1
        for word in words:
            end, count = count, count + 1
            for phones in self._pronunciations(word):
                path = [state, *range(count, count + len(phones) - 1), end]
                count += len(phones) - 1
                transitions += [(a, b, 1.0, f"_{p}") for a, b, p in zip(path, path[1:], phones, strict=False)]
            state = end
        self._decoder.add_fsg("text", self._decoder.create_fsg("text", 0, state, transitions))
        self._decoder.activate_search("text")
        return self._search(samples)

    def _pronunciations(self, word: str) -> list[list[str]]:
        entries = [self._decoder.lookup_word(word + number) for number in ("", "(2)", "(3)", "(4)")]
        known = [entry.split() for entry in entries if entry]
        spelled = " ".join(_LETTERS[part] for part in re.findall("|".join(_LETTERS), word))
        return known or [spelled.split()]

    def _search(self, samples: np.ndarray) -> list[Phone]:
        if len(samples) < _MIN_SAMPLES:
            return []
        noise = np.random.default_rng(0).integers(-4, 5, len(samples))  # digital silence has no logarithm
        self._decoder.start_utt()
        self._decoder.process_raw((samples + noise).clip(-32768, 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        if self._decoder.hyp() is None:
            return []
        segments = [(re.sub(r"^_|\(.*", "", s.word), s.start_frame, s.end_frame + 1) for s in self._decoder.seg()]
        return [Phone(name if name in _PHONES else "SIL", a / _PHONE_RATE, b / _PHONE_RATE) for name, a, b in segments]


def _cut_at_pauses(samples: Iterable[np.ndarray]) -> Iterator[tuple[float, np.ndarray, None]]:
    """Yield the sound in segments of at most `SEGMENT_S`, which end at their second half's quietest place."""
    waiting, begin, hop = list[np.ndarray](), 0, SOUND_RATE // 10
    for block in samples:
        waiting.append(block)
        if sum(map(len, waiting)) >= SEGMENT_S * SOUND_RATE:
            segment = np.concatenate(waiting)
            hops = np.abs(segment[: len(segment) // hop * hop].astype(np.float64)).reshape(-1, hop).mean(1)
            half = len(hops) // 2
            cut = (half + int(hops[half:].argmin())) * hop + hop // 2
            yield begin / SOUND_RATE, segment[:cut], None
            waiting, begin = [segment[cut:]], begin + cut
    if waiting:
        yield begin / SOUND_RATE, np.concatenate(waiting), None


def _cut_at_cues(samples: Iterable[np.ndarray], cues: Sequence[Cue]) -> Iterator[tuple[float, np.ndarray, Cue]]:
    """Yield the sound of each cue, with a margin that reaches at most to the middle between two cues."""
    blocks, waiting, first = iter(samples), np.zeros(0, np.int16), 0
    for before, cue, after in zip([None, *cues], cues, [*cues[1:], None], strict=False):
        start, end = cue.start - _CUE_MARGIN_S, cue.end + _CUE_MARGIN_S
        start = max(start, 0.0 if before is None else min((before.end + cue.start) / 2, cue.start))
        end = end if after is None else min(end, max((cue.end + after.start) / 2, start))
        parts, count = [waiting], len(waiting)
        while first + count < end * SOUND_RATE and (block := next(blocks, None)) is not None:
            parts.append(block)
            count += len(block)
            if count > MAX_CUE_S * SOUND_RATE + len(waiting):
                raise InputError(f"a text is aligned to at most {MAX_CUE_S:.0f} s of sound: give subtitles (SRT) "
                                 "with times, or use --duration")  # fmt: skip
        waiting = np.concatenate(parts)
        a = min(round(start * SOUND_RATE) - first, count)
        yield start, waiting[max(a, 0) : round(min(end * SOUND_RATE - first, count))], cue
        waiting, first = waiting[max(a, 0) :], first + max(a, 0)
    for _ in blocks:  # which are read to their end
        pass


def speak(phones: Sequence[Phone], power: np.ndarray, fps: Fraction, camera: np.ndarray) -> Motion:
    """Return the motion of phones, and of the mean square (T,) of the samples in each frame, see `read_sound`."""
    count = len(power)
    level = loudness(power)
    loud = (level - np.percentile(level, 95)).clip(-40, 0) / 40  # [-1, 0]
    speaking = 1 - measure_silence(power, fps)
    strength = _smooth((1 + loud).clip(0.4), 0.06, fps)
    shapes = SHAPES["SIL"] + speaking[:, None] * (articulate(phones, strength, fps) - SHAPES["SIL"])
    coefficients = np.zeros((count, len(ARKIT_NAMES)))
    for names, column in zip(_CONTROLS, shapes.T, strict=True):
        for name in names:
            coefficients[:, ARKIT_NAMES.index(name)] = column
    # Syllables louder than their neighbours raise the brows and lower the head a little.
    emphasis = ((_smooth(loud, 0.12, fps) - _smooth(loud, 0.8, fps)) * speaking * 5).clip(0, 1)
    emphasis = _smooth(emphasis, 0.1, fps)
    rng = np.random.default_rng(zlib.crc32(power.tobytes()))
    for name, factor in (("browInnerUp", 0.35), ("browOuterUpLeft", 0.25), ("browOuterUpRight", 0.25)):
        coefficients[:, ARKIT_NAMES.index(name)] = factor * emphasis
    shut = blinks(count, fps, rng)
    for side in ("eyeBlinkLeft", "eyeBlinkRight"):
        coefficients[:, ARKIT_NAMES.index(side)] = shut
    seconds = np.arange(count)[:, None, None] / float(fps)
    frequencies, phases = rng.uniform((0.1, 0.25), (0.2, 0.45), (3, 2)), rng.uniform(0, 2 * np.pi, (3, 2))
    waves = np.sin(2 * np.pi * frequencies * seconds + phases).mean(-1)  # (T, 3)
    angles = waves * np.array([3.0, 1.5, 1.5]) * (0.4 + 0.6 * _smooth(speaking, 0.5, fps))[:, None]
    angles[:, 1] += 2.0 * emphasis
    cameras = np.repeat(np.asarray(camera, dtype=np.float32)[None], count, axis=0)
    rotation, centre = head_pose(cameras)
    cameras = with_head_pose(cameras, head_rotations(np.radians(angles)) @ rotation, centre)
    return make_motion(coefficients, cameras, fps)


def articulate(phones: Sequence[Phone], strength: np.ndarray, fps: Fraction) -> np.ndarray:
    """Return the mouth's shape in each frame, (T, 10) of `_CONTROLS`; `strength` (T,) scales all but closures."""
    times = (np.arange(len(strength)) + 0.5) / float(fps)
    weights = np.full((len(times), 1), 0.02)  # of lips at rest
    total = weights * SHAPES["SIL"]
    parts = list[Phone]()
    for name, start, end in phones:
        first, second = _DIPHTHONGS.get(name, (name, name))
        middle = start + 0.6 * (end - start)
        parts += [Phone(first, start, middle), Phone(second, middle, end)] if first != second else [(name, start, end)]  # type: ignore[list-item]

    def distance(start: float, end: float, reach: float) -> tuple[slice, np.ndarray]:
        """Return the frames within `reach` of an interval, and their distances to it."""
        near = slice(*np.searchsorted(times, (start - reach, end + reach)))
        return near, np.maximum(np.abs(times[near] - (start + end) / 2) - (end - start) / 2, 0)[:, None]

    for name, start, end in parts:
        inset = min((end - start) / 4, INSET_S)
        near, away = distance(start + inset, end - inset, 4 * SPREAD_S)
        dominance = (1.0 if name in _VOWELS or name == "SIL" else 0.6) * np.exp(-((away / SPREAD_S) ** 2))
        total[near] += dominance * SHAPES[name]
        weights[near] += dominance
    shapes = SHAPES["SIL"] + (total / weights - SHAPES["SIL"]) * strength[:, None]
    half = 0.5 / float(fps)  # so that every contact is seen in a frame
    for name, start, end in parts:
        if name in _CONTACTS:
            near, away = distance(start - half, end + half, CONTACT_S)
            contact = 0.5 + 0.5 * np.cos(np.pi * (away / CONTACT_S).clip(0, 1))
            shapes[near] += contact * (SHAPES[name] - shapes[near])
    return shapes


def blinks(count: int, fps: Fraction, rng: np.random.Generator) -> np.ndarray:
    """Return how far the lids are shut, [0, 1], in each of `count` frames: 0.08 s to shut, 0.16 s to open again."""
    times, shut = np.arange(count) / float(fps), np.zeros(count)
    moment = rng.uniform(*BLINK_INTERVAL_S)
    while moment < count / fps:
        shut = np.maximum(shut, np.interp(times - moment, (-0.1, -0.02, 0.02, 0.18), (0.0, 0.9, 0.9, 0.0)))
        moment += rng.uniform(*BLINK_INTERVAL_S)
    return shut


def _smooth(values: np.ndarray, sigma_s: float, fps: Fraction) -> np.ndarray:
    """Return the convolution of (T,) values with a Gaussian."""
    sigma = sigma_s * float(fps)
    reach = max(1, round(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), kernel / kernel.sum(), mode="valid")
