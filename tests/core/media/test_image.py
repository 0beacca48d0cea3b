import struct
import zlib

import cv2
import numpy as np
import pytest

from export3d_cli.core.media.image import MAX_PIXELS, read_image, to_tensor, to_uint8, write_image
from export3d_cli.core.runtime.errors import InputError


def gradient(height=20, width=30):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 8, y * 12, 255 - x * 8], axis=-1).astype(np.uint8)


def test_png_round_trip_is_exact_and_leaves_no_other_file(tmp_path):
    write_image(tmp_path / "a.png", gradient())
    assert np.array_equal(read_image(tmp_path / "a.png"), gradient())
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tiff"])
def test_writing_is_silent_in_every_format(tmp_path, suffix, capfd):
    write_image(tmp_path / f"a{suffix}", gradient())
    assert read_image(tmp_path / f"a{suffix}").shape == (20, 30, 3)
    assert capfd.readouterr() == ("", "")


def test_jpeg_keeps_the_channel_order(tmp_path):
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
def test_exif_orientation_is_applied(tmp_path, orientation, turn, mirror):
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
def test_exif_orientation_of_a_png_with_alpha_is_applied(tmp_path, orientation, turn, mirror, order):
    image = gradient()
    opaque = np.dstack([image[..., ::-1], np.full((20, 30), 255, np.uint8)])
    data = cv2.imencode(".png", opaque)[1].tobytes()
    chunk = b"eXIf" + exif_of(orientation, order)
    path = tmp_path / "a.png"
    path.write_bytes(
        data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    )
    assert np.array_equal(read_image(path), np.rot90(image[:, ::-1] if mirror else image, turn))


def test_alpha_is_composited_on_white(tmp_path):
    bgra = np.zeros((4, 4, 4), np.uint8)
    bgra[..., 3] = [0, 51, 204, 255]
    cv2.imwrite(str(tmp_path / "a.png"), bgra)
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [255, 204, 51, 0]


def test_grey_and_16_bit_images_become_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((5, 6), 77, np.uint8))
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((5, 6, 3), 128 * 257, np.uint16))
    assert (read_image(tmp_path / "grey.png") == 77).all()
    assert (read_image(tmp_path / "deep.png") == 128).all()


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1000
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with pytest.raises(InputError, match="more than 64 megapixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.png", None, "no file"),
        ("text.png", b"hello", "not an image"),
        ("empty.png", b"", "empty"),
        ("phone.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC, which is not read: save it as JPEG"),
        ("web.png", b"\0\0\0\x1cftypavif\0\0\0\0mif1avif", "is AVIF, which"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_image(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(InputError, match="folder"):
        read_image(tmp_path)


def test_writing_refuses_other_arrays_and_suffixes(tmp_path):
    with pytest.raises(InputError, match="uint8"):
        write_image(tmp_path / "a.png", gradient().astype(float))
    with pytest.raises(InputError, match=r"\.xyz"):
        write_image(tmp_path / "a.xyz", gradient())


def test_tensors_span_minus_one_to_one_and_come_back_exactly():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = to_tensor(ramp)
    assert tuple(tensor.shape) == (3, 16, 16)
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    assert np.array_equal(to_uint8(tensor), ramp)
    batch = to_tensor(np.stack([ramp, ramp]))
    assert tuple(batch.shape) == (2, 3, 16, 16)
    assert np.array_equal(to_uint8(batch * 3)[0], to_uint8((batch * 3).clamp(-1, 1))[0])
