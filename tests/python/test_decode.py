"""Decoding gives Pillow's convert("RGB"), and never a part of an image."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ntkcl import _C

HEIGHT, WIDTH = 37, 53


def scene(mode: str = "RGB") -> Image.Image:
    """Smooth colours with noise, and varying transparency."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    bands = np.stack([4 * x, 6 * y, 3 * (x + y), 255 - 5 * y], -1) + rng.integers(0, 30, 4)
    image = Image.fromarray(np.clip(bands, 0, 255).astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pillow(encoded: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def png(colour_type: int, bits: int, rows: NDArray[Any], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of the kinds that Pillow does not write; `rows` holds each row's bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    pixels_per_row = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type] * bits
    header = struct.pack(
        ">IIBBBBB", rows.shape[1] * 8 // pixels_per_row, len(rows), bits, colour_type, 0, 0, 0
    )
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def noise_rows(row_bytes: int) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (HEIGHT, row_bytes), dtype=np.uint8)


FORMATS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(scene(), "JPEG", quality=90),
    "jpeg 4:2:0": lambda: encode(scene(), "JPEG", subsampling=2),
    "jpeg 4:2:2": lambda: encode(scene(), "JPEG", subsampling=1),
    "jpeg 4:4:4": lambda: encode(scene(), "JPEG", subsampling=0),
    "jpeg progressive": lambda: encode(scene(), "JPEG", progressive=True),
    "jpeg with restarts": lambda: encode(scene(), "JPEG", restart_marker_blocks=1),
    "jpeg RGB": lambda: encode(scene(), "JPEG", keep_rgb=True),
    "jpeg grey": lambda: encode(scene("L"), "JPEG"),
    "jpeg with trailing bytes": lambda: encode(scene(), "JPEG") + b"trailing",
    "png": lambda: encode(scene(), "PNG"),
    "png RGBA": lambda: encode(scene("RGBA"), "PNG"),
    "png grey": lambda: encode(scene("L"), "PNG"),
    "png grey and alpha": lambda: encode(scene("LA"), "PNG"),
    "png palette": lambda: encode(scene("P"), "PNG"),
    "png palette, 4 bits": lambda: encode(scene().quantize(11), "PNG"),
    "png palette, transparent": lambda: encode(scene("P"), "PNG", transparency=3),
    "png palette, alpha per colour": lambda: encode(
        scene("P"), "PNG", transparency=bytes(range(256))
    ),
    "png RGB, transparent colour": lambda: encode(scene(), "PNG", transparency=(1, 2, 3)),
    "png grey, transparent": lambda: encode(scene("L"), "PNG", transparency=40),
    "png 1 bit": lambda: encode(scene("1"), "PNG"),
    "png grey, 2 bits": lambda: png(0, 2, noise_rows(13)),
    "png grey, 4 bits": lambda: png(0, 4, noise_rows(27)),
    "png grey, 16 bits": lambda: png(0, 16, noise_rows(2 * WIDTH)),
    "png grey, 16 bits, dark": lambda: encode(
        Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) // 5),
        "PNG",
    ),
    "png grey and alpha, 16 bits": lambda: png(4, 16, noise_rows(4 * WIDTH)),
    "png RGB, 16 bits": lambda: png(2, 16, noise_rows(6 * WIDTH)),
    "png RGBA, 16 bits": lambda: png(6, 16, noise_rows(8 * WIDTH)),
    "png with gamma": lambda: png(
        2, 8, noise_rows(3 * WIDTH), (b"gAMA", struct.pack(">I", 100000))
    ),
    "bmp": lambda: encode(scene(), "BMP"),
    "bmp grey": lambda: encode(scene("L"), "BMP"),
    "bmp palette": lambda: encode(scene("P"), "BMP"),
    "bmp 1 bit": lambda: encode(scene("1"), "BMP"),
    "webp": lambda: encode(scene(), "WEBP", quality=80),
    "webp lossless": lambda: encode(scene(), "WEBP", lossless=True),
    "webp alpha": lambda: encode(scene("RGBA"), "WEBP", lossless=True, exact=True),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", FORMATS)
def test_equals_pillow(kind: str) -> None:
    encoded = FORMATS[kind]()
    assert np.array_equal(_C.decode_image(encoded, kind), pillow(encoded))


def test_cmyk_jpeg_is_within_rounding_of_pillow() -> None:
    encoded = encode(scene("CMYK"), "JPEG")
    difference = _C.decode_image(encoded, "cmyk").astype(int) - pillow(encoded)
    assert np.abs(difference).max() <= 1


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    encoded = encode(scene(), "JPEG", exif=exif)
    assert _C.decode_image(encoded, "x").shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(_C.decode_image(encoded, "x"), pillow(encoded))


def test_thumbnail_inside_a_truncated_jpeg_does_not_hide_the_cut() -> None:
    """The thumbnail carries an end marker of its own."""
    exif = Image.Exif()
    exif[0x010E] = encode(scene().resize((9, 7)), "JPEG").decode("latin-1")
    encoded = encode(scene(), "JPEG", exif=exif)
    assert encoded.count(b"\xff\xd9") >= 1
    with pytest.raises(ValueError, match="truncated"):
        _C.decode_image(encoded[:-20], "x")


@pytest.mark.parametrize(
    "kind", ["jpeg", "jpeg progressive", "jpeg with restarts", "png", "png palette", "bmp", "webp"]
)
def test_every_truncation_is_an_error(kind: str) -> None:
    encoded = FORMATS[kind]()
    lengths = sorted({*range(0, len(encoded), max(1, len(encoded) // 150)), len(encoded) - 1})
    for length in lengths:
        with pytest.raises(ValueError, match=r"\[decode_image\] cats/tom: "):
            _C.decode_image(encoded[:length], "cats/tom")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_never_crash(kind: str) -> None:
    """Random bytes in the middle: an image of the same kind of shape, or a ValueError."""
    rng = np.random.default_rng(11)
    encoded = FORMATS[kind]()
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(encoded)
        for position in rng.integers(8, len(encoded), 4):
            damaged[position] = rng.integers(0, 256)
        try:
            outcomes.add(_C.decode_image(bytes(damaged), "x").ndim)
        except ValueError as error:
            assert "[decode_image] x: " in str(error)
            outcomes.add(0)
    assert outcomes <= {0, 3}


def test_damaged_png_pixels_are_an_error() -> None:
    encoded = bytearray(encode(scene(), "PNG"))
    encoded[len(encoded) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="corrupt"):
        _C.decode_image(bytes(encoded), "x")


@pytest.mark.parametrize("encoded", [b"", b"hello", b"GIF89a" + bytes(50), b"\xff\xd8\xff"])
def test_other_content_is_an_error(encoded: bytes) -> None:
    with pytest.raises(ValueError, match=r"\[decode_image\] dir/a\.jpg: expected"):
        _C.decode_image(encoded, "dir/a.jpg")


def test_decompression_bomb_is_refused_before_decoding() -> None:
    rows = np.zeros((1, 1), np.uint8)
    encoded = bytearray(png(0, 8, rows))
    encoded[16:24] = struct.pack(">II", 100_000, 100_000)
    with pytest.raises(ValueError, match="pixels"):
        _C.decode_image(bytes(encoded), "bomb.png")
