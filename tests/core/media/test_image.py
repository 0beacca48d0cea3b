import io
import os
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from export3d_cli.core.media.image import MAX_PIXELS, has_image_suffix, read_image, to_tensor, to_uint8, write_image
from export3d_cli.core.runtime.errors import Export3DWarning, InputError
from export3d_cli.core.runtime.weights import example_path

HALVES = Path(__file__).parents[2] / "data" / "halves.heic"


def gradient(height=20, width=30):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 8, y * 12, 255 - x * 8], axis=-1).astype(np.uint8)


def test_png_round_trip_is_exact(tmp_path):
    write_image(tmp_path / "a.png", gradient())
    assert np.array_equal(read_image(tmp_path / "a.png"), gradient())
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tiff"])
def test_write_image_prints_nothing(tmp_path, suffix, capfd):
    write_image(tmp_path / f"a{suffix}", gradient())
    assert read_image(tmp_path / f"a{suffix}").shape == (20, 30, 3)
    assert capfd.readouterr() == ("", "")


def test_jpeg_round_trip_keeps_channel_order(tmp_path):
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 250
    write_image(tmp_path / "a.jpg", red)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - red).max() < 8


EXIF = [
    (1, 0, False),
    (2, 0, True),
    (3, 2, False),
    (4, 2, True),
    (5, 1, True),
    (6, -1, False),
    (7, -1, True),
    (8, 1, False),
]


def exif_of(orientation, order=">"):
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    head = b"MM\0*" if order == ">" else b"II*\0"
    return head + struct.pack(order + "IH", 8, 1) + entry + b"\0\0\0\0"


@pytest.mark.parametrize(("orientation", "turn", "mirror"), EXIF)
def test_read_image_applies_exif_orientation(tmp_path, orientation, turn, mirror):
    image = gradient()
    data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    exif = b"Exif\0\0" + exif_of(orientation)
    path = tmp_path / "a.jpg"
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])
    turned = np.rot90(image[:, ::-1] if mirror else image, turn)
    assert read_image(path).shape == turned.shape
    assert np.abs(read_image(path).astype(int) - turned).mean() < 6


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("orientation", "turn", "mirror"), EXIF)
def test_read_image_of_png_with_alpha_applies_exif_orientation(tmp_path, orientation, turn, mirror, order):
    image = gradient()
    opaque = np.dstack([image[..., ::-1], np.full((20, 30), 255, np.uint8)])
    data = cv2.imencode(".png", opaque)[1].tobytes()
    chunk = b"eXIf" + exif_of(orientation, order)
    path = tmp_path / "a.png"
    path.write_bytes(
        data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    )
    assert np.array_equal(read_image(path), np.rot90(image[:, ::-1] if mirror else image, turn))


def test_read_image_composites_alpha_on_white(tmp_path):
    bgra = np.zeros((4, 4, 4), np.uint8)
    bgra[..., 3] = [0, 51, 204, 255]
    cv2.imwrite(str(tmp_path / "a.png"), bgra)
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [255, 204, 51, 0]


def test_read_image_of_grey_and_16_bit_returns_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((5, 6), 77, np.uint8))
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((5, 6, 3), 128 * 257, np.uint16))
    assert (read_image(tmp_path / "grey.png") == 77).all()
    assert (read_image(tmp_path / "deep.png") == 128).all()


@pytest.mark.parametrize(("side", "limit"), [(int(MAX_PIXELS**0.5) + 1000, 64), (15_000, 64), (100_000, 256)])
def test_read_image_of_decompression_bomb_raises_before_decoding(tmp_path, monkeypatch, side, limit):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = b""
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(100))):
        chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match=f"more than {limit} megapixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.png", None, "no file"),
        ("text.png", b"hello", "not an image"),
        ("empty.png", b"", "empty"),
        ("phone.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not an image"),
        ("web.png", b"\0\0\0\x1cftypavif\0\0\0\0mif1avif", "not an image"),
        ("vector.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_read_image_of_other_files_raises(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_image(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_image_of_folder_raises(tmp_path):
    with pytest.raises(InputError, match="folder"):
        read_image(tmp_path)


def test_write_image_of_wrong_array_or_suffix_raises(tmp_path):
    with pytest.raises(InputError, match="uint8"):
        write_image(tmp_path / "a.png", gradient().astype(float))
    with pytest.raises(InputError, match=r"\.xyz"):
        write_image(tmp_path / "a.xyz", gradient())


def test_tensor_round_trip_is_exact():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = to_tensor(ramp)
    assert tuple(tensor.shape) == (3, 16, 16)
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    assert np.array_equal(to_uint8(tensor), ramp)
    batch = to_tensor(np.stack([ramp, ramp]))
    assert tuple(batch.shape) == (2, 3, 16, 16)
    assert np.array_equal(to_uint8(batch * 3)[0], to_uint8((batch * 3).clamp(-1, 1))[0])


def to_bytes(image, suffix, **settings):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **settings)
    return buffer.getvalue()


def test_read_image_of_heic_returns_rgb(tmp_path):
    data = HALVES.read_bytes()
    (tmp_path / "IMG_0001.HEIC").write_bytes(data)
    image = read_image(tmp_path / "IMG_0001.HEIC")
    assert image.shape == (32, 64, 3)
    assert np.abs(image[16, 8].astype(int) - (200, 40, 40)).max() < 8
    assert np.abs(image[16, 56].astype(int) - (40, 40, 200)).max() < 8
    assert has_image_suffix(tmp_path / "IMG_0001.HEIC")
    for end in range(24, len(data) - 40, 40):
        (tmp_path / "cut.heic").write_bytes(data[:end])
        with pytest.raises(InputError, match=r"not an image|damaged|truncated"):
            read_image(tmp_path / "cut.heic")


def test_write_image_as_heic_raises(tmp_path):
    with pytest.raises(InputError, match=r"cannot write images of type '\.heic'"):
        write_image(tmp_path / "a.heic", gradient())


def test_read_image_of_avif_returns_rgb(tmp_path):
    (tmp_path / "a.avif").write_bytes(to_bytes(Image.fromarray(gradient()), "AVIF", quality=90))
    assert np.abs(read_image(tmp_path / "a.avif").astype(int) - gradient()).mean() < 6


@pytest.mark.parametrize("suffix", ["PNG", "WEBP", "GIF", "AVIF"])
def test_read_image_of_animation_returns_first_picture_and_warns(tmp_path, suffix):
    first, second = (Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (60, 200))
    (tmp_path / "a").write_bytes(to_bytes(first, suffix, save_all=True, append_images=[second], duration=40))
    with pytest.warns(Export3DWarning, match="is an animation, and only its first picture is used"):
        image = read_image(tmp_path / "a")
    assert np.abs(image.astype(int) - 60).max() <= 2


@pytest.mark.parametrize("suffix", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("alpha", [False, True])
def test_read_image_of_any_format_applies_exif_orientation(tmp_path, suffix, alpha):
    exif = Image.Exif()
    exif[0x112] = 6
    image = Image.fromarray(gradient())
    if alpha:
        image.putalpha(255)
    settings = {"lossless": True} if suffix == "WEBP" else {}
    (tmp_path / "a").write_bytes(to_bytes(image, suffix, exif=exif, **settings))
    assert np.array_equal(read_image(tmp_path / "a"), np.rot90(gradient(), -1))


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("CMYK", "JPEG", 20),
        ("CMYK", "TIFF", 0),
        ("P", "PNG", 30),
        ("P", "BMP", 30),
        ("P", "GIF", 30),
        ("L", "JPEG", 4),
        ("1", "TIFF", 0),
    ],
)
def test_read_image_converts_every_colour_mode(tmp_path, mode, suffix, tolerance):
    image = Image.fromarray(gradient()).convert(mode)
    (tmp_path / "a").write_bytes(to_bytes(image, suffix))
    expected = np.asarray(image.convert("RGB")).astype(int)
    difference = np.abs(read_image(tmp_path / "a") - expected)
    assert difference.mean() <= tolerance / 4
    assert difference.max() <= tolerance or mode == "P"


def test_read_image_composites_transparent_palette_on_white(tmp_path):
    image = Image.new("P", (4, 1))
    image.putpalette([10, 20, 30, 10, 20, 30])
    image.putdata([0, 1, 0, 1])
    (tmp_path / "a.png").write_bytes(to_bytes(image, "PNG", transparency=bytes([255, 0])))
    assert read_image(tmp_path / "a.png")[0].tolist() == [[10, 20, 30], [255, 255, 255]] * 2


def test_read_image_of_floating_point_raises(tmp_path):
    (tmp_path / "a.tif").write_bytes(to_bytes(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(InputError, match="32 bits per channel"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("settings", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_QUALITY, 30]])
def test_read_image_of_jpeg_equals_opencv(tmp_path, settings):
    photo = cv2.imread(str(example_path("source.jpg")))[:301, :403]
    data = cv2.imencode(".jpg", photo, settings)[1]
    (tmp_path / "a.jpg").write_bytes(data.tobytes())
    assert np.array_equal(read_image(tmp_path / "a.jpg"), cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


def test_read_image_in_threads_does_not_redirect_stderr(tmp_path, capfd):
    (tmp_path / "a.png").write_bytes(to_bytes(Image.fromarray(gradient()), "PNG"))
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            read_image(tmp_path / "a.png")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(2000):
        os.write(2, f"{number}\n".encode())
    stop.set()
    for reader in readers:
        reader.join()
    assert capfd.readouterr().err.split() == [str(number) for number in range(2000)]


def write_wide(path, width, height, suffix, **settings):
    """Write a large image of squares of three colours; return the colours at the centres of its quarters."""
    colours = np.array([[[200, 60, 40], [40, 180, 60]], [[60, 40, 190], [220, 220, 90]]], np.uint8)
    Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST).save(path, suffix, **settings)
    return colours


def test_read_image_of_large_phone_photo_reduces_it(tmp_path):
    width, height = 9248, 6936
    colours = write_wide(tmp_path / "a.jpeg", width, height, "JPEG")
    with pytest.warns(Export3DWarning, match=f"has {width}x{height} pixels and is read at half its size"):
        image = read_image(tmp_path / "a.jpeg")
    assert image.shape == (height // 2, width // 2, 3)
    quarters = image[height // 8 :: height // 4, width // 8 :: width // 4]
    assert np.abs(quarters.astype(int) - colours).max() < 8


@pytest.mark.parametrize("mode", ["P", "LA", "I;16", "RGBA", "CMYK", "1"])
def test_read_image_reduces_every_colour_mode(tmp_path, monkeypatch, mode):
    monkeypatch.setattr("export3d_cli.core.media.image.MAX_PIXELS", 1000)
    rows = np.repeat(np.arange(0, 240, 8, dtype=np.uint8)[:, None], 40, 1) // 16 * 16
    image = Image.fromarray(rows.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(rows).convert(mode)
    exif = Image.Exif()
    exif[0x112] = 3
    image.save(tmp_path / "a", "TIFF", exif=exif)
    with pytest.warns(Export3DWarning, match="half its size"):
        result = read_image(tmp_path / "a").astype(int)
    assert result.shape == (15, 20, 3)
    expected = np.asarray(image.convert("RGB") if mode != "I;16" else Image.fromarray(rows).convert("RGB")).astype(int)
    expected = expected[::-1, ::-1].reshape(15, 2, 20, 2, 3).mean((1, 3))
    assert np.abs(result - expected).max() <= 1
