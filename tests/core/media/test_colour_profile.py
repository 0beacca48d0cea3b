"""Photos with colour profiles: their colours are those of the sRGB original, in every format."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from export3d_cli.core.media.colour_profile import ADOBE_RGB, DISPLAY_P3, make_profile
from export3d_cli.core.media.image import read_image
from export3d_cli.core.runtime.errors import Export3DWarning
from export3d_cli.core.runtime.weights import example_path

ASTRONAUT = Path(__file__).parents[3] / "examples" / "astronaut.jpg"
DATA = Path(__file__).parents[2] / "data"
PRO_PHOTO = ((0.7976749, 0.2880402, 0, 0.1351917, 0.7118741, 0, 0.0313534, 0.0000857, 0.82521), 1.8)
PROFILES = {"p3": DISPLAY_P3, "adobe": ADOBE_RGB, "prophoto": PRO_PHOTO}
CHROMATICITIES = {  # x, y of red, green, blue and white
    "srgb": (0.64, 0.33, 0.3, 0.6, 0.15, 0.06, 0.3127, 0.329),
    "p3": (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.329),
    "adobe": (0.64, 0.33, 0.21, 0.71, 0.15, 0.06, 0.3127, 0.329),
    "prophoto": (0.734699, 0.265301, 0.159597, 0.840403, 0.036598, 0.000105, 0.34567, 0.3585),
}


def to_xyz(space):
    """Return the matrix from linear RGB to XYZ, adapted to D50 (Bradford)."""
    *primaries, white = np.reshape(CHROMATICITIES[space], (4, 2))
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    white_xyz = np.array([white[0] / white[1], 1, (1 - white.sum()) / white[1]])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    scale = (bradford @ [0.9642, 1, 0.8249]) / (bradford @ white_xyz)
    adaptation = np.linalg.inv(bradford) @ np.diag(scale) @ bradford
    return adaptation @ columns * np.linalg.solve(columns, white_xyz)


def encode(image, space):
    """Return uint8 sRGB colours in another space, as floats in [0, 1]."""
    rgb = image / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    other = (linear @ (np.linalg.inv(to_xyz(space)) @ to_xyz("srgb")).T).clip(0, 1)
    if space == "p3":
        return np.where(other <= 0.0031308, other * 12.92, 1.055 * other ** (1 / 2.4) - 0.055)
    return other ** (1 / PROFILES[space][1])


def difference(image, expected):
    """Return the CIE76 colour difference of each pixel."""
    a, b = (cv2.cvtColor((x / 255).astype(np.float32), cv2.COLOR_RGB2LAB) for x in (image, expected))
    return np.linalg.norm(a - b, axis=-1)


@pytest.fixture(scope="module")
def portrait():
    return read_image(example_path("source.jpg"))[100:300, 150:350]


FORMATS = {
    "JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("space", PROFILES)
def test_read_image_converts_profile_to_srgb(tmp_path, portrait, space, form):
    stored = Image.fromarray(np.rint(encode(portrait, space) * 255).astype(np.uint8))
    stored.save(tmp_path / "a", form, icc_profile=make_profile(*PROFILES[space]), **FORMATS[form])
    result = read_image(tmp_path / "a")
    with Image.open(tmp_path / "a") as image:
        decoded = np.asarray(image)
    assert np.quantile(np.abs(encode(result, space) * 255 - decoded), 0.99) < 1.5  # JPEG and AVIF are not exact
    assert difference(result, portrait).mean() < (1.7 if form in ("JPEG", "AVIF") else 1)
    assert difference(decoded, portrait).mean() > 2.8


def test_read_image_of_phone_photo_has_colours_of_original():
    skin = np.s_[60:160, 180:260]
    photo, original = read_image(DATA / "display_p3.jpg"), read_image(ASTRONAUT)
    assert difference(photo, original)[skin].mean() < 1.1
    means = [image[skin].mean((0, 1))[None, None] for image in (photo, original)]
    assert difference(*means).item() < 0.3


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_read_image_converts_profile_of_transparent_and_turned_image(tmp_path, portrait, form):
    stored = Image.fromarray(np.rint(encode(portrait, "p3") * 255).astype(np.uint8))
    alpha = np.full(portrait.shape[:2], 255, np.uint8)
    alpha[:50] = 0
    stored.putalpha(Image.fromarray(alpha))
    exif = Image.Exif()
    exif[0x112] = 6
    stored.save(tmp_path / "a", form, exif=exif, icc_profile=make_profile(*DISPLAY_P3), **FORMATS[form])
    expected = portrait.copy()
    expected[:50] = 255
    assert difference(read_image(tmp_path / "a"), np.rot90(expected, -1)).mean() < 1


def test_read_image_of_16_bit_profile_converts_to_srgb(tmp_path, portrait):
    deep = np.rint(encode(portrait, "prophoto") * 65535).astype(np.uint16)
    data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG", icc_profile=make_profile(*PRO_PHOTO))
    start = buffer.getvalue().index(b"iCCP") - 4
    length = struct.unpack(">I", buffer.getvalue()[start : start + 4])[0] + 12
    (tmp_path / "a.png").write_bytes(data[:33] + buffer.getvalue()[start : start + length] + data[33:])
    assert difference(read_image(tmp_path / "a.png"), portrait).mean() < 1


def test_read_image_of_srgb_profile_changes_nothing(tmp_path, portrait):
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), None):
        Image.fromarray(portrait).save(tmp_path / "a.png", icc_profile=profile)
        assert np.array_equal(read_image(tmp_path / "a.png"), portrait)


def grey_profile(gamma):
    """Return the profile of a grey scale with an exponent."""
    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 16)
    head = struct.pack(">III", 192, 0, 0x02400000) + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28) + white[8:]
    return head.ljust(128, b"\0") + table + white + curve


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_read_image_converts_grey_profile(tmp_path, mode):
    linear = np.tile(np.linspace(0.1, 1, 200), (4, 1))
    stored = np.rint(linear * 255).astype(np.uint8)
    image = Image.fromarray(stored.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(stored).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    expected = 255 * (1.055 * (stored / 255) ** (1 / 2.4) - 0.055)
    result = read_image(tmp_path / "a.png")
    assert (result == result[..., :1]).all()
    assert np.abs(result[..., 0] - expected).max() <= 2


def test_read_image_of_grey_with_rgb_profile_stays_grey(tmp_path):
    stored = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    Image.fromarray(stored).save(tmp_path / "a.png", icc_profile=make_profile(*DISPLAY_P3))
    assert np.abs(read_image(tmp_path / "a.png").astype(int) - stored[..., None]).max() <= 1


def test_read_image_of_lab_returns_its_colours(tmp_path, portrait):
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(Image.fromarray(portrait), to_lab).save(tmp_path / "a.tif")
    assert difference(read_image(tmp_path / "a.tif"), portrait).mean() < 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    "profile", [b"broken", b"", make_profile(*DISPLAY_P3)[:300], grey_profile(2.2), bytes(3000)],
    ids=["text", "empty", "cut", "of grey images", "zeros"],
)  # fmt: skip
def test_read_image_ignores_unusable_profile(tmp_path, portrait, profile, form):
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    Image.fromarray(portrait).save(plain, form, **FORMATS[form])
    Image.fromarray(portrait).save(marked, form, icc_profile=profile, **FORMATS[form])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.array_equal(read_image(marked), read_image(plain))
    notes = [str(warning.message) for warning in caught if warning.category is Export3DWarning]
    assert len(notes) == (1 if profile else 0)
    assert all("marked: its colour profile cannot be used" in note and "\n" not in note for note in notes)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_read_image_ignores_rgb_profile_of_cmyk_image(tmp_path, portrait, form):
    image = Image.fromarray(portrait).convert("CMYK")
    image.save(tmp_path / "a", form, icc_profile=make_profile(*DISPLAY_P3))
    with pytest.warns(Export3DWarning, match="it is for RGB, the image is CMYK"):
        assert np.abs(read_image(tmp_path / "a").astype(int) - portrait).mean() < 6


def cmyk_profile():
    """Return a profile of an ideal printer: each ink takes its colour away, as in `convert`."""
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    rgb = (1 - grid[:, :3]) * (1 - grid[:, 3:])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    t = np.cbrt(linear @ to_xyz("srgb").T / [0.9642, 1, 0.8249])
    lab = np.stack([116 * t[:, 1] - 16, 500 * (t[:, 0] - t[:, 1]), 200 * (t[:, 1] - t[:, 2])], axis=1)
    values = np.rint(np.stack([lab[:, 0] * 652.8, (lab[:, 1] + 128) * 256, (lab[:, 2] + 128) * 256], axis=1))
    ramp = struct.pack(">2H", 0, 65535)
    lut = b"mft2" + bytes(4) + bytes([4, 3, 9, 0]) + struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    lut += struct.pack(">2H", 2, 2) + ramp * 4 + values.clip(0, 65535).astype(">u2").tobytes() + ramp * 3
    size = 128 + 4 + 12 + len(lut)
    head = struct.pack(">III", size, 0, 0x02400000) + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_read_image_converts_cmyk_profile(tmp_path, form):
    colours = np.array([[200, 40, 40], [40, 160, 60], [180, 140, 120], [128, 128, 128]], np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(colours[None], 16, 0), 16, 1)).convert("CMYK")
    image.save(tmp_path / "a", form, icc_profile=cmyk_profile(), **FORMATS[form])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = read_image(tmp_path / "a")[8, 8::16]
    assert np.abs(result.astype(int) - colours).max() < 14


def heic(box, before=b""):
    """Return a HEIC file with another colour box, and with boxes `before` its metadata."""
    data = (DATA / "halves.heic").read_bytes()
    start = data.index(b"colrnclx") - 4
    old, box = data[start : start + 19], struct.pack(">I", len(box) + 8) + b"colr" + box
    grown = len(box) - len(old)
    for name in (b"meta", b"iprp", b"ipco"):
        at = data.index(name) - 4
        data = data[:at] + struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + grown) + data[at + 4 :]
    for offset in (0x1E2, 0x268):  # of the items
        data = data.replace(struct.pack(">I", offset), struct.pack(">I", offset + grown + len(before)), 1)
    data = data.replace(old, box, 1)
    end = int.from_bytes(data[:4], "big")  # of the first box
    return data[:end] + before + data[end:]


@pytest.mark.parametrize(
    "box", [b"prof" + make_profile(*DISPLAY_P3), b"nclx" + struct.pack(">HHHB", 12, 13, 6, 0x80)], ids=["icc", "nclx"]
)
def test_read_image_of_heic_converts_display_p3(tmp_path, box):
    (tmp_path / "a.heic").write_bytes(heic(box))
    stored = np.array([[200, 40, 40]], np.uint8)
    result = read_image(tmp_path / "a.heic")[16, 8]
    assert encode(result[None].astype(float), "p3") * 255 == pytest.approx(stored, abs=8)
    assert result[0] > 210  # the red of Display P3 is stronger


@pytest.mark.parametrize(("code", "before"), [(12, bytes(70_000)), (1, b"colrnclx\0\x0c")], ids=["late", "of another"])
def test_read_image_of_heic_uses_the_code_of_its_picture(tmp_path, code, before):
    box = struct.pack(">I", len(before) + 8) + b"free" + before
    (tmp_path / "a.heic").write_bytes(heic(b"nclx" + struct.pack(">HHHB", code, 13, 6, 0x80), box))
    red = read_image(tmp_path / "a.heic")[16, 8, 0]
    assert (red > 210) == (code == 12)


def add_cicp(data, primaries):
    chunk = b"cICP" + bytes([primaries, 13, 0, 1])
    return data[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


@pytest.mark.parametrize(("primaries", "colorants"), [(1, DISPLAY_P3), (12, ADOBE_RGB)], ids=["srgb", "p3"])
def test_code_of_png_overrides_its_profile(tmp_path, portrait, primaries, colorants):
    stored = portrait if primaries == 1 else np.rint(encode(portrait, "p3") * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "PNG", icc_profile=make_profile(*colorants))
    (tmp_path / "a.png").write_bytes(add_cicp(buffer.getvalue(), primaries))
    assert difference(read_image(tmp_path / "a.png"), portrait).mean() < 1


@pytest.mark.parametrize("form", ["AVIF", "PNG"])
def test_read_image_converts_display_p3_named_by_code(tmp_path, portrait, form):
    buffer = io.BytesIO()
    Image.fromarray(np.rint(encode(portrait, "p3") * 255).astype(np.uint8)).save(buffer, form, **FORMATS[form])
    data = buffer.getvalue()
    if form == "AVIF":
        assert data.count(b"colrnclx\0\1") == 1  # sRGB
        data = data.replace(b"colrnclx\0\1", b"colrnclx\0\x0c")
    else:
        data = add_cicp(data, 12)
    (tmp_path / "a").write_bytes(data)
    assert difference(read_image(tmp_path / "a"), portrait).mean() < (1.7 if form == "AVIF" else 1)


def test_read_image_of_camera_jpeg_marked_adobe_rgb(tmp_path, portrait):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    stored = Image.fromarray(np.rint(encode(portrait, "adobe") * 255).astype(np.uint8))
    stored.save(tmp_path / "_A.jpg", exif=exif, **FORMATS["JPEG"])
    result = read_image(tmp_path / "_A.jpg")
    assert difference(result, portrait).mean() < 1.2
    means = [image.mean((0, 1))[None, None] for image in (result, portrait)]
    assert difference(*means).item() < 0.3
