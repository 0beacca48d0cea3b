"""Colour profiles of photos: conversion to sRGB, the space in which everything here computes and videos are written.

Phones write Display P3, cameras Adobe RGB, raw converters ProPhoto. Samples have 8 bits: a result has no more, and the
error of converting 8-bit ProPhoto, the widest of these spaces, is below one step of lightness.
"""

import io
import re
import struct
import warnings
from pathlib import Path

from PIL import ExifTags, Image, ImageCms

from export3d_cli.core.runtime.errors import Export3DWarning

# XYZ of red, green and blue, adapted to D50; and the exponent of the tone curve, None: that of sRGB
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105, 0.29198, 0.69225, 0.04189, 0.1571, 0.06657, 0.78407), None)
ADOBE_RGB = ((0.60974, 0.31111, 0.01947, 0.20528, 0.62567, 0.06087, 0.14919, 0.06322, 0.74457), 563 / 256)
_CICP_DISPLAY_P3 = 12  # code of primaries; 1: sRGB
_PNG_CODE = re.compile(rb"\0\0\0\x04cICP([\x01\x0c])")
_AVIF_DISPLAY_P3 = b"colrnclx\0\x0c"
_ADOBE_RGB_MARK = "R03"  # interoperability index of cameras that embed no profile
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # Pillow's for the colour spaces of profiles


def convert_to_srgb(image: Image.Image, path: Path, header: bytes) -> Image.Image:
    """Convert an image of any Pillow mode with a profile to sRGB (mode RGB or RGBA); return others unchanged.

    `header` is the beginning of a PNG or AVIF file, which may name primaries instead, empty for others. A profile that
    is damaged or is for other colour channels is ignored, with an `Export3DWarning`.
    """
    data = _find_profile(image, header)
    if not data and image.mode != "LAB":
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data)) if data else ImageCms.createProfile("LAB")
        return _convert(image, profile)
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error).strip() or type(error).__name__
        text = f"{path}: its colour profile cannot be used ({reason}), so its colours are taken for sRGB"
        warnings.warn(text, Export3DWarning, stacklevel=2)
        return image


def make_profile(colorants: tuple[float, ...], gamma: float | None) -> bytes:
    """Return an ICC profile of three primaries, XYZ (9,) adapted to D50, and a tone curve; None: that of sRGB."""

    def pack(kind: bytes, *values: float) -> bytes:
        return kind + struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    d50 = (0.9642, 1, 0.8249)
    srgb_curve = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    curve = pack(b"para\0\0\0\0\0\3\0\0", *srgb_curve) if gamma is None else pack(b"para\0\0\0\0\0\0\0\0", gamma)
    xyz = {name: colorants[i : i + 3] for i, name in ((0, b"rXYZ"), (3, b"gXYZ"), (6, b"bXYZ"))} | {b"wtpt": d50}
    tags = {name: pack(b"XYZ \0\0\0\0", *values) for name, values in xyz.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    start = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">III", start + len(body), 0, 0x04200000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return pack(header, *d50).ljust(128, b"\0") + table + body


def _find_profile(image: Image.Image, header: bytes) -> bytes | None:
    """Return the profile of an image: the embedded one, or that of a code of primaries, or of Adobe RGB's EXIF mark."""
    if code := _PNG_CODE.search(header):  # it overrides an embedded profile
        return make_profile(*DISPLAY_P3) if code[1][0] == _CICP_DISPLAY_P3 else None
    if embedded := image.info.get("icc_profile"):
        return bytes(embedded)
    primaries = (image.info.get("nclx_profile") or {}).get("color_primaries")  # of HEIC files
    if primaries == _CICP_DISPLAY_P3 or _AVIF_DISPLAY_P3 in header:
        return make_profile(*DISPLAY_P3)
    try:
        index = image.getexif().get_ifd(ExifTags.IFD.Interop).get(1, "")
    except Exception:  # damaged EXIF data can raise anything
        return None
    return make_profile(*ADOBE_RGB) if index == _ADOBE_RGB_MARK else None


def _convert(image: Image.Image, profile: ImageCms.ImageCmsProfile | ImageCms.core.CmsProfile) -> Image.Image:
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    is_grey = image.mode in ("1", "L", "LA", "La")
    mode = image.mode if image.mode in ("CMYK", "LAB") else "L" if is_grey else "RGB"
    space = profile.profile.xcolor_space if isinstance(profile, ImageCms.ImageCmsProfile) else "Lab"
    expected = _MODES[space.strip()]
    if mode == "L" and expected == "RGB":  # grey photos often have the profile of the screen
        mode = "RGB"
    if mode != expected:
        raise ValueError(f"it is for {expected}, the image is {mode}")
    if space.strip() == "RGB" and "sRGB" in ImageCms.getProfileDescription(profile):  # rounding would change it
        return image
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB",
                                        ImageCms.Intent.RELATIVE_COLORIMETRIC,
                                        ImageCms.Flags.BLACKPOINTCOMPENSATION)  # fmt: skip
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
