"""Output formats of videos and ffmpeg's encoder settings for each container."""

from __future__ import annotations

from pathlib import Path

from export3d_cli.core.runtime.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".gif")  # formats that can be written
ALPHA_SUFFIXES = (".webm", ".mov")  # formats with an alpha channel
DEFAULT_CRF = 18  # visually transparent
_BT709_FILTERS = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
_BT709_TAGS = "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709"


def check_output_suffix(path: Path, *, alpha: bool = False) -> None:
    """Raise `InputError` if the suffix is no output format, or has no alpha channel where `alpha` needs one."""
    suffix = path.suffix.lower()
    if suffix not in (*VIDEO_SUFFIXES, ".png"):
        usual = ", ".join(VIDEO_SUFFIXES)
        raise InputError(f"cannot write videos of type {suffix!r}: use {usual} or FOLDER/%05d.png")
    if alpha and suffix not in (*ALPHA_SUFFIXES, ".png"):
        raise InputError(f"{path} cannot be transparent: use .webm, .mov or FOLDER/%05d.png")


def check_crf(path: Path, crf: int | None, *, alpha: bool = False) -> None:
    """Raise `InputError` if a constant rate factor is given for an output without one (GIF, ProRes, images)."""
    suffix = path.suffix.lower()
    if crf is not None and (suffix not in VIDEO_SUFFIXES or suffix == ".gif" or (alpha and suffix == ".mov")):
        kind = "transparent .mov" if suffix == ".mov" else suffix or "this output"
        raise InputError(f"crf does not apply to {kind} ({path}): omit it, or write .mp4, .mkv or .webm")


def encoder_arguments(suffix: str, crf: int, size: tuple[int, int], *, alpha: bool) -> list[str]:
    """Return ffmpeg's arguments: VP9 for .webm, ProRes 4444 for .mov with alpha, H.264 otherwise.

    Chroma is subsampled (4:2:0) except in ProRes, so `size` (width, height) is cropped to even sides.
    """
    width, height = size
    layout = "yuva420p" if alpha else "yuv420p"
    if suffix == ".webm":  # VP9's CRF scale ends at 63, x264's at 51
        codec = ["libvpx-vp9", "-crf", str(round(crf * 63 / 51)), "-b:v", "0", "-row-mt", "1"]
        codec += ["-deadline", "good", "-cpu-used", "4", *(["-auto-alt-ref", "0"] if alpha else [])]
    elif alpha:
        layout, codec = "yuva444p10le", ["prores_ks", "-profile:v", "4444", "-alpha_bits", "16", "-vendor", "apl0"]
    else:
        codec = ["libx264", "-preset", "medium", "-crf", str(crf)]
    filters = f"crop={width // 2 * 2}:{height // 2 * 2}:0:0,{_BT709_FILTERS},format={layout},{_BT709_TAGS}"
    return ["-vf", filters, "-c:v", *codec]
