import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from invdiff.data.images import UnreadableImage, read_image

RED = (255, 0, 0)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(**options):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, *RED])
    return encoded(image, **options)


def photograph_on_its_side():
    image = Image.new("RGB", (16, 8))
    image.paste(RED, (0, 0, 8, 8))  # left half, which EXIF 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


def described(**options):
    info = PngImagePlugin.PngInfo()
    for number in range(3):
        info.add_text(f"workflow {number}", "x" * 2_000_000, zip=True)
    return encoded(Image.new("RGB", (4, 4), RED), pnginfo=info, **options)


SIXTEEN_BITS = Image.fromarray(np.array([[32896, 0, 257, 65535]], dtype=np.uint16))


@pytest.mark.parametrize(
    ("data", "first", "last"),
    [
        (encoded(Image.new("L", (2, 2), 77)), (77, 77, 77), None),
        (encoded(Image.new("1", (2, 2), 1)), (255, 255, 255), None),
        (encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))), (255, 255, 255), None),
        (encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 127))), (128, 128, 128), None),
        (encoded(Image.new("LA", (2, 2), (0, 0))), (255, 255, 255), None),
        (encoded(Image.new("RGB", (2, 2), RED), transparency=RED), (255, 255, 255), None),
        (palette(), RED, None),
        (palette(transparency=1), (255, 255, 255), None),
        (palette(transparency=bytes([255, 127])), (255, 128, 128), None),
        (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), RED, None),
        (encoded(SIXTEEN_BITS), (128, 128, 128), (255, 255, 255)),  # scaled, not clipped
        (encoded(SIXTEEN_BITS, "TIFF"), (128, 128, 128), (255, 255, 255)),
        (photograph_on_its_side(), RED, (0, 0, 0)),
        # What is said about the pixels, however long or damaged, makes no image unreadable.
        (described(), RED, None),
        (described(icc_profile=b"\0" * 3_000_000), RED, None),
        (encoded(Image.new("RGB", (4, 4), RED), exif=b"Exif\0\0garbage"), RED, None),
    ],
    ids=str,
)
def test_every_mode_becomes_upright_rgb_on_white_whatever_is_said_about_it(data, first, last, tmp_path):
    (tmp_path / "image").write_bytes(data)
    image = read_image(tmp_path / "image")
    assert image.mode == "RGB"
    assert np.abs(np.subtract(image.getpixel((0, 0)), first)).max() < 5
    assert image.getpixel((image.width - 1, image.height - 1)) == (last or image.getpixel((0, 0)))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_damaged_files_are_unreadable(tmp_path):
    for data, reason in (
        (encoded(NOISE)[:6000], "truncated"),
        (encoded(NOISE, "JPEG")[:2000], "truncated"),
        (b"", "the file is empty"),
        (b"hello", "not an image in a known format"),
        (encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "no known range"),
        (encoded(Image.fromarray(np.full((2, 2), 200, dtype=np.int32)), "TIFF"), "no known range"),
    ):
        (tmp_path / "cut.img").write_bytes(data)
        with pytest.raises(UnreadableImage, match=rf"cut\.img: .*{reason}"):
            read_image(tmp_path / "cut.img")
