"""The sound of an output video: which track of a file it is, and how it is converted. Each way is tried beforehand."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from export3d_cli.core.media.ffmpeg_process import FfmpegProcess, run_ffmpeg
from export3d_cli.core.media.probe import AudioTrack, audio_tracks, read_command
from export3d_cli.core.runtime.errors import Export3DWarning, InputError

_COPYABLE_CODECS = {  # that a container takes without re-encoding
    ".mp4": {"aac", "mp3", "ac3", "eac3", "alac", "opus"},
    ".mov": {"aac", "mp3", "ac3", "alac", "pcm_s16le", "pcm_s24le"},
    ".mkv": {"aac", "mp3", "ac3", "eac3", "opus", "vorbis", "flac", "pcm_s16le", "pcm_s24le"},
    ".webm": {"opus", "vorbis"},
}
_PLAYABLE_LAYOUTS = "aformat=channel_layouts=mono|stereo|5.1"  # what both encoders and all players know
_FIRST_CHANNELS = ("pan=stereo|c0=c0|c1=c1", "pan=mono|c0=c0")  # of layouts without a rule for mixing
_MP4_OPTIONS = ("-movflags", "+frag_keyframe+delay_moov", "-f")
_STREAMED_CONTAINERS = {  # formats as they can be written to a pipe
    ".mp4": (*_MP4_OPTIONS, "mp4"), ".mov": (*_MP4_OPTIONS, "mov"), ".mkv": ("-f", "matroska"), ".webm": ("-f", "webm"),
}  # fmt: skip
SILENCE_DB = 25.0  # below the sound's 95th percentile
SPEECH_MARGIN_S = 0.12  # seconds around sounds that are not silent; lips then shut, or part, within twice as long
_NOISE_DB = 36.0  # over one step of 16 bits, -54 dB of full scale: sounds below are silence anyway
SOUND_RATE = 16_000  # samples a second of `read_sound`
_TRIAL = ("-frames:a", "20")


@dataclass(frozen=True)
class Soundtrack:
    """A track of a file and ffmpeg's arguments that put it into a video."""

    path: Path
    index: int  # among the audio tracks, from 0
    encoder: tuple[str, ...]  # ("copy",): without re-encoding


def choose_soundtrack(path: Path, suffix: str) -> Soundtrack | None:
    """Return the first track that a video with this suffix takes, or None; warn of tracks that do not decode."""
    tracks = audio_tracks(path)
    for index, track in enumerate(tracks):
        for candidate in _candidates(Path(path), index, track, suffix):
            if _works(candidate, suffix):
                if index:
                    skipped = ", ".join(skipped.codec for skipped in tracks[:index])
                    text = f"{path}: audio track {index + 1} is used, because those before it cannot be decoded"
                    warnings.warn(f"{text} ({skipped})", Export3DWarning, stacklevel=2)
                return candidate
    if tracks:
        codecs = ", ".join(track.codec for track in tracks)
        text = f"{path}: its sound cannot be decoded ({codecs}), so the result is silent: convert it to .wav, and give"
        warnings.warn(f"{text} that with --audio", Export3DWarning, stacklevel=2)
    return None


def check_has_sound(path: Path) -> None:
    """Raise `InputError` unless `path` has an audio track that can be decoded."""
    tracks = audio_tracks(path)
    if not tracks:
        raise InputError(f"{path} has no sound: give an audio file or a video with sound")
    trials = (["-map", f"0:a:{index}", *_TRIAL, "-f", "null", "-"] for index in range(len(tracks)))
    if not any(_runs(Path(path), trial) for trial in trials):
        raise InputError(f"the sound of {path} cannot be decoded ({tracks[0].codec}): convert it to .wav")


def find_silence(path: Path | None, fps: Fraction, start: float = 0.0) -> np.ndarray:
    """Return the weight of silence, float64 (N,) in [0, 1], in each frame at a rate `fps` of the sound of a file.

    It begins `start` seconds into the file. A frame is silent if it is `SILENCE_DB` below the loud ones, and no louder
    one is within `SPEECH_MARGIN_S`. Raises `InputError` if there is no sound.
    """
    if path is None:
        raise InputError("--lips-shut-when-silent needs sound: give --audio FILE")
    check_has_sound(path)
    return measure_silence(np.array([mean_square(samples) for samples in read_sound(path, fps, start)]), fps)


def read_sound(path: Path, fps: Fraction, start: float = 0.0, duration: float | None = None) -> Iterator[np.ndarray]:
    """Yield each frame's samples, int16 (N,) mono at `SOUND_RATE`, zero-padded; raise `InputError` if none decodes."""
    limit = [] if duration is None else ["-t", repr(duration)]  # of the output, too: packets of 1 Hz exceed it
    command = read_command(path, "-loglevel", "error", "-ss", repr(start), *limit)
    command += [*limit, "-map", "0:a:0", "-ac", "1", "-ar", str(SOUND_RATE), "-f", "s16le", "pipe:1"]
    process = FfmpegProcess(command, stdout=True)
    try:
        for number in itertools.count():
            first, end = (round(k * SOUND_RATE / fps) for k in (number, number + 1))
            samples = np.zeros(max(1, end - first), np.int16)
            if not process.read_into(samples.view(np.uint8).data):
                break
            yield samples
        if process.wait():
            raise InputError(f"the sound of {path} cannot be decoded: {process.error_summary()}")
    finally:
        process.kill()


def mean_square(samples: np.ndarray) -> float:
    """Return the mean square of int16 samples."""
    return float(np.square(samples.astype(np.float64)).mean())


def loudness(power: np.ndarray) -> np.ndarray:
    """Return the loudness of mean squares of int16 samples in dB over one step."""
    return 10 * np.log10(power + 1)


def measure_silence(power: np.ndarray, fps: Fraction) -> np.ndarray:
    """Return the weight of silence (N,) in [0, 1] of frames with these mean squares (N,), see `find_silence`."""
    if not len(power):
        return np.ones(0)
    level = loudness(power)
    loud = level > max(np.percentile(level, 95) - SILENCE_DB, _NOISE_DB)
    near = max(1, round(SPEECH_MARGIN_S * fps))
    window = np.lib.stride_tricks.sliding_window_view(np.pad(loud, near), 2 * near + 1)
    speech = np.pad(window.any(1).astype(np.float64), near, mode="edge")
    return 1 - np.lib.stride_tricks.sliding_window_view(speech, 2 * near + 1).mean(1)


def _candidates(path: Path, index: int, track: AudioTrack, suffix: str) -> Iterator[Soundtrack]:
    """Yield the ways to use a track, the best first: copying, converting, converting its first channels."""
    is_pcm = track.codec.startswith("pcm_")  # it has long packets: decoding cuts it to the sample
    has_rule = not track.layout.endswith(" channels")  # for mixing, which players need
    if track.codec in _COPYABLE_CODECS[suffix] and has_rule:
        yield Soundtrack(path, index, (track.codec,) if is_pcm else ("copy",))
    encoder = ("libopus", "-b:a", "128k") if suffix == ".webm" else ("aac", "-b:a", "192k")
    is_ambisonic = track.layout.startswith("ambisonic")  # its first channel is the sound from all directions
    for filters in _FIRST_CHANNELS[1:] if is_ambisonic else (_PLAYABLE_LAYOUTS, *_FIRST_CHANNELS):
        yield Soundtrack(path, index, (*encoder, "-af", filters))


def _works(soundtrack: Soundtrack, suffix: str) -> bool:
    """Return whether ffmpeg puts the first packets of the track into a file, and decodes them."""
    track = ["-map", f"0:a:{soundtrack.index}", *_TRIAL]
    output = [*track, "-c:a", *soundtrack.encoder, *_STREAMED_CONTAINERS[suffix], "pipe:1"]
    return _runs(soundtrack.path, [*output, *track, "-f", "null", "-"])


def _runs(path: Path, outputs: list[str]) -> bool:
    command = read_command(path, "-loglevel", "error", "-abort_on", "empty_output_stream")
    return run_ffmpeg([*command, *outputs]).returncode == 0
